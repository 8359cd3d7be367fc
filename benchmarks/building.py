"""How fast the embedded stages build pairs on one core: python -m benchmarks.building [--scenes N] [--resolution PIXELS].

Once with given masks, once with boxes from which GrabCut makes the masks of scenes and references. Where other processes share
the core, its time says more than the clock's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import cv2
import torch

from benchmarks.machine import device_name
from focusdpo.building.candidate import Candidate
from focusdpo.building.config import BuildConfig
from focusdpo.building.engines import Worker, steps
from focusdpo.building.scenes import load_scenes
from tests.demo_scenes import write_scenes


def without_masks(scenes: Path) -> Path:
    """The same scenes, where only boxes are given for the subjects in the scene."""
    lines = [json.loads(line) for line in scenes.read_text().splitlines()]
    for line in lines:
        for subject in line["subjects"]:
            mask = cv2.imread(str(scenes.parent / subject.pop("mask")), cv2.IMREAD_GRAYSCALE)
            left, top, width, height = cv2.boundingRect((mask > 127).astype("uint8"))
            subject["box"] = [left, top, left + width, top + height]
            del subject["reference_mask"]
    file = scenes.with_name("boxes.jsonl")
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def measure(scenes: Path, out: Path, resolution: int) -> None:
    config = BuildConfig(str(scenes), str(out), resolution=resolution, reference_resolution=resolution)
    records = load_scenes(scenes, progress=False)
    worker = Worker(steps(config, records))
    started, spent = time.perf_counter(), time.process_time()
    candidates = [worker(Candidate(index, 0, 0, record)) for index, record in enumerate(records)]
    seconds, spent = time.perf_counter() - started, time.process_time() - spent
    pairs = sum(candidate.pair is not None for candidate in candidates)
    print(
        f"{scenes.stem}: {pairs} pairs of {len(candidates)} candidates in {seconds:.1f} s ({pairs / seconds:.2f} pairs/s), "
        f"{spent:.1f} s of one core's time ({pairs / spent:.2f} pairs/s)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=60)
    parser.add_argument("--resolution", type=int, default=512)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    print(device_name(torch.device("cpu")))
    with tempfile.TemporaryDirectory() as folder:
        scenes = write_scenes(Path(folder) / "scenes", options.scenes, options.resolution, seed=0)
        for file in (scenes, without_masks(scenes)):
            measure(file, Path(folder) / file.stem, options.resolution)


if __name__ == "__main__":
    main()
