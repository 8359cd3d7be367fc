"""How far ahead of a trainer the reading of pairs is.

    python -m benchmarks.data                    # pairs of 512 px, two workers, a trainer that takes 4 pairs a second
    python -m benchmarks.data --stored 1024      # the same from files of 1024 px

Pairs are composed of real photographs, and read as the trainer does it: decoded, brought to size, masks pooled to tokens. First
as fast as they come, then by a trainer that sleeps as long as a step takes, whose waiting is what counts.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from benchmarks.machine import machine_info
from focusdpo.data import LongestSide, PairBatch, PairDataset, SizeBatches, collate, load_pairs
from focusdpo.data.shards import write_shards
from focusdpo.demo.scenes import write_dataset
from focusdpo.features import pool_mask, reference_token_mask
from focusdpo.training.config import DataConfig


def batches(path: Path, workers: int, epoch: int) -> Iterator[PairBatch]:
    """One epoch of a dataset with references of 512 px, 320 px where there are several, and what a step makes of masks."""
    default = DataConfig(str(path))
    dataset = PairDataset(
        load_pairs(path, "headers", progress=False),
        resolution=default.resolution,
        reference_rule=LongestSide(512),
        reference_rule_multiple=LongestSide(320),
    )
    plan = SizeBatches(dataset, default.batch_size, shuffle=True, seed=0).epoch(epoch)
    for batch in DataLoader(dataset, batch_sampler=plan, collate_fn=collate, num_workers=workers):
        pool_mask(batch.prior)
        reference_token_mask(batch.reference_masks)
        yield batch


def unhindered(path: Path, workers: int) -> tuple[float, float]:
    """Pairs a second, from the first to the last, and milliseconds that a processor works on each in the workers."""
    worked = _processor_seconds()
    reading = batches(path, workers, 0)
    next(reading)  # workers have started
    started = time.perf_counter()
    count = sum(len(batch.prompts) for batch in tqdm(reading, desc=f"reading {path.name}", unit="pair", leave=False))
    rate = count / (time.perf_counter() - started)
    return rate, 1e3 * (_processor_seconds() - worked) / (count + 1)


def _processor_seconds() -> float:
    """Of all workers that have ended; other work on the machine does not change it much."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def waiting(path: Path, workers: int, pace: float) -> tuple[float, float]:
    """Mean and longest wait of a trainer that takes `pace` pairs a second, in milliseconds; the first pair is not counted."""
    reading, waits = batches(path, workers, 1), []
    next(reading)
    bar = tqdm(desc=f"training on {path.name}", unit="pair", leave=False)
    while True:
        time.sleep(1 / pace)
        started = time.perf_counter()
        if next(reading, None) is None:
            break
        waits.append(1e3 * (time.perf_counter() - started))
        bar.update()
    bar.close()
    return sum(waits) / len(waits), max(waits)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--stored", type=int, default=512, help="side of winner and loser on disk, in pixels")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pace", type=float, default=4.0, help="pairs a second that the trainer takes")
    args = parser.parse_args(argv)
    machine = machine_info()
    print(", ".join(f"{name} {machine[name]}" for name in ("device", "threads", "torch") if name in machine))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_dataset(folder / "files", args.pairs, args.stored, seed=0)
        (folder / "shards").mkdir()
        write_shards(load_pairs(folder / "files"), folder / "shards", 1000)
        print(f"{args.pairs} pairs of {args.stored} px to 512 px, {args.workers} workers, a trainer of {args.pace:g} pairs/s")
        print("format  pairs/s  times the trainer  processor/pair  mean wait  longest wait")
        for name in ("files", "shards"):
            rate, work = unhindered(folder / name, args.workers)
            mean, longest = waiting(folder / name, args.workers, args.pace)
            print(f"{name:6}  {rate:7.1f}  {rate / args.pace:17.1f}  {work:11.1f} ms  {mean:6.1f} ms  {longest:9.1f} ms")


if __name__ == "__main__":
    main()
