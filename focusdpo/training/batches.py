"""What a run trains on: checked records, datasets, and each process's batches from any position of the run."""

from __future__ import annotations

import functools
import logging
import math
import pickle
import tempfile
from collections.abc import Generator, Hashable, Sequence
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from torch.utils.data import DataLoader

from focusdpo.data import (
    DatasetError,
    PairBatch,
    PairDataset,
    PairRecord,
    Problem,
    SizeBatches,
    collate,
    leave_out_misfits,
    load_pairs,
)
from focusdpo.data.images import PATCH_SIZE
from focusdpo.foundation.files import ReadableFile, checksum
from focusdpo.foundation.garbage_collection import collector_paused
from focusdpo.foundation.launch import Launch
from focusdpo.foundation.text import counted
from focusdpo.training.config import DataConfig, FocusConfig, TrainConfig
from focusdpo.training.image_sizes import size_rules
from focusdpo.training.seeding import fixed_round_robin_places, round_robin_places
from focusdpo.training.signals import leave_to_parent

logger = logging.getLogger(__name__)

MAX_EXAMPLES = 3  # of pairs that are not held out, likewise
MAX_COMPARED = 1000  # winners and losers whose contents are read for that, some seconds


def load_datasets(config: TrainConfig, launch: Launch) -> tuple[list[PairDataset], list[Problem]]:
    """Training and held-out pairs under the sizes of a run, read and checked by the first process of each machine.

    Returns:
        The two datasets, and why pairs were left out of them; other processes of a machine are not told why.

    Raises:
        FileNotFoundError, DatasetError: in the first process of a machine; ElsewhereError in all others.
    """
    loaded: list[PairDataset] = []
    left_out: list[Problem] = []
    with ExitStack() as kept:

        def load() -> str:
            """Where the others find what was read."""
            for records in load_records(config, launch):
                loaded.append(dataset_of(records, config.data, config.model.backbone))
                left_out.extend(leave_out_misfits(loaded[-1], config.data.max_crop, launch.is_main))
            if launch.size == 1:
                return ""
            file = kept.enter_context(tempfile.NamedTemporaryFile(prefix="focusdpo-pairs-"))  # for this user's eyes
            with collector_paused():
                pickle.dump(loaded, file, pickle.HIGHEST_PROTOCOL)
            file.flush()
            return file.name

        name = launch.once_a_machine("pairs are checked", load)
        if not loaded:
            with open(name, "rb") as stream, collector_paused():
                loaded = pickle.load(stream)
        launch.wait("pairs are read")
    return loaded, left_out


def load_records(config: TrainConfig, launch: Launch | None = None) -> tuple[list[PairRecord], list[PairRecord]]:
    """Checked training and held-out records; DatasetError lists the problems of both.

    Args:
        config: of the run.
        launch: whose first process alone shows progress and warns; None is this process alone.
    """
    is_main = launch is None or launch.is_main
    records: list[list[PairRecord]] = []
    problems: list[Problem] = []
    for path in (config.data.train, config.data.validation):
        try:
            records.append(load_pairs(path, config.data.check, is_main, is_main) if path is not None else [])
        except DatasetError as error:
            problems += error.problems
            records.append([])
    problems += [problem for part in records for problem in prior_problems(config, part)]
    if problems:
        raise DatasetError(problems)
    if is_main:
        _warn_of_shared_images(*records)
    return records[0], records[1]


def prior_problems(config: TrainConfig, records: Sequence[PairRecord]) -> list[Problem]:
    """Records with one prior for all their subjects, where the settings need one for each."""
    problems = []
    for setting, other in _needs_priors(config):
        message = f"is one mask, but {setting} needs a list with one per reference"
        flat = [record for record in records if not record.per_subject]
        problems += [Problem(r.file, r.line, "prior", message, f"split it, or set {other}") for r in flat]
    return problems


def _needs_priors(config: TrainConfig) -> list[tuple[str, str]]:
    """Settings that take a prior per subject, each with the one that does not."""
    needs = []
    if config.focus.mask == "focus" and config.focus.per_subject:
        needs.append(("focus.per_subject", "focus.per_subject=false"))
    if config.focus.mask == "focus" and config.focus.source == "truth":
        needs.append(("focus.source=truth", "focus.source=features"))
    if config.loss.granularity == "subject":
        needs.append(("loss.granularity=subject", "loss.granularity=image"))
    return needs


def _warn_of_shared_images(train: Sequence[PairRecord], held_out: Sequence[PairRecord]) -> None:
    """Warns where held-out pairs have images of training pairs: what is measured of them then says nothing of new pairs."""
    shared = shared_images(train, held_out)
    if not shared:
        return
    judged = sum(any(field in ("winner", "loser") for field in fields) for _, fields in shared)
    examples = [
        f"  {record.file}:{record.line}: {field} is {other} of {of.file}:{of.line}"
        for record, fields in shared[:MAX_EXAMPLES]
        for field, (of, other) in list(fields.items())[:1]
    ]
    rest = [f"  and {counted(len(shared) - MAX_EXAMPLES, 'pair')} more"] if len(shared) > MAX_EXAMPLES else []
    logger.warning(
        "data.validation: %d of %d held-out pairs have images of data.train, %d of them as winner or loser%s; the held-out "
        "numbers then say nothing about new pairs\n%s",
        len(shared),
        len(held_out),
        judged,
        ": it is the training set, or a part of it" if judged == len(held_out) else "",
        "\n".join(examples + rest),
    )


Use = tuple[PairRecord, str]  # a pair, and the field that an image stands in


def shared_images(train: Sequence[PairRecord], held_out: Sequence[PairRecord]) -> list[tuple[PairRecord, dict[str, Use]]]:
    """The held-out pairs that have images of training pairs: each with its fields, and where else the image of each stands.

    Images are the same where they are one file, by whatever path or link. Winners and losers, which the loss is of, are also
    compared by content, if few enough are of one size that this takes no time; references of one subject may well be alike.
    """
    if not held_out:
        return []
    trained: dict[Hashable, Use] = {}
    for record in train:
        for field, file in record.image_fields.items():
            trained.setdefault(_identity(file), (record, field))
    sizes = [{_size(file) for record in part for file in (record.winner, record.loser)} for part in (train, held_out)]
    alike = (sizes[0] & sizes[1]) - {None}
    parts = [[r for r in part if {_size(r.winner), _size(r.loser)} & alike] for part in (train, held_out)]
    contents: dict[Hashable, Use] = {}
    few = sum(map(len, parts)) <= MAX_COMPARED // 2
    for record in parts[0] if few else ():
        for field in ("winner", "loser"):
            contents.setdefault(checksum(getattr(record, field)), (record, field))
    compared = {id(record) for record in parts[1]} if few else set()

    found = []
    for record in held_out:
        fields = {field: trained.get(_identity(file)) for field, file in record.image_fields.items()}
        if id(record) in compared:
            for field in ("winner", "loser"):
                fields[field] = fields[field] or contents.get(checksum(getattr(record, field)))
        uses = {field: use for field, use in fields.items() if use is not None}
        if uses:
            found.append((record, uses))
    return found


def _identity(file: ReadableFile) -> Hashable:
    if isinstance(file, Path):
        try:
            stat = file.stat()
            return stat.st_dev, stat.st_ino
        except OSError:  # taken away since it was checked
            pass
    return str(file)


def _size(file: ReadableFile) -> int | None:
    """In bytes, where that is known without reading it."""
    try:
        return file.stat().st_size if isinstance(file, Path) else getattr(file, "size", None)
    except OSError:
        return None


def dataset_of(records: Sequence[PairRecord], data: DataConfig, backbone: str) -> PairDataset:
    """Records under the sizes of a configuration, and the rules of a backbone where it leaves them to that.

    Raises:
        DatasetError: with every reference that cannot be brought to size.
    """
    return PairDataset(records, **size_rules(data, backbone))


def check_match_count(focus: FocusConfig, datasets: Sequence[PairDataset]) -> None:
    """A fixed number of matches has to fit the smallest target: ValueError."""
    count = focus.match_count
    if focus.counts_matches and isinstance(count, int):
        sizes = [pair.target for dataset in datasets for pair in dataset.sizes]
        width, height = min(sizes, key=math.prod)
        tokens = width * height // PATCH_SIZE**2
        if count > tokens:
            message = f"expected at most {tokens}, the tokens of the smallest target ({width}x{height})"
            raise ValueError(f"focus.match_count: got {count}; {message}")


def in_order(dataset: PairDataset, batch_size: int) -> list[list[int]]:
    """All pairs once in batches of one layout, as indices; always the same ones."""
    return SizeBatches(dataset, batch_size, shuffle=False, seed=0).epoch(0)


def sizes_vary(datasets: Sequence[PairDataset], batch_size: int) -> bool:
    """Whether the model sees more than one number of pairs or tokens."""
    seen = {(len(batch), each.sizes[batch[0]].tokens) for each in datasets for batch in in_order(each, batch_size)}
    return len(seen) > 1


def load_batches(dataset: PairDataset, batches: list[list[int]], num_workers: int, accelerator: Accelerator) -> DataLoader[Any]:
    """Batches of given indices, on the CPU."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=leave_to_parent,
    )


T = TypeVar("T")


def in_rounds(batches: Sequence[T], processes: int) -> list[list[T]]:
    """Batches, or other work, in rounds of one per process; the first come again where the last round is not full.

    A model that is split over processes runs in all of them or in none, so that each has to have as many.
    """
    rounds = -(-len(batches) // processes)
    return [[batches[(i * processes + rank) % len(batches)] for rank in range(processes)] for i in range(rounds)]


class TrainingBatches:
    """The batches of a run, split over its processes.

    A position counts the batches that each process has had. Which pairs come at a position depends on the configuration and
    the number of processes alone.

    Args:
        dataset: the training pairs.
        config: the run.
        accelerator: knows this process among the others.
    """

    def __init__(self, dataset: PairDataset, config: TrainConfig, accelerator: Accelerator) -> None:
        self._dataset = dataset
        self._config = config
        self._accelerator = accelerator
        self.plan = SizeBatches(dataset, config.data.batch_size, shuffle=config.data.shuffle, seed=config.seed)
        # A step may reach into the next epoch: every step looks at one or two, and each takes time in the pairs.
        self._share = functools.lru_cache(maxsize=2)(self._make_share)
        self._pairs_before = functools.lru_cache(maxsize=2)(self._count_before)
        with collector_paused():
            self._rounds = len(self._share(0))  # of every epoch
        per_batch = len(dataset) / self.plan.batches
        if accelerator.is_main_process and per_batch < 0.5 * config.data.batch_size:
            logger.warning(
                "data.batch_size is %d, but a batch holds %.1f pairs on average: only pairs of equal image sizes share one, "
                "and the data has %d combinations of sizes; data.buckets and data.reference_buckets make them fewer",
                config.data.batch_size,
                per_batch,
                len(self.plan.layouts),
            )

    def epochs(self, steps: int) -> float:
        """Epochs that so many optimiser steps are."""
        return steps * self._config.gradient_accumulation / self._rounds

    def start(self, position: int) -> Generator[tuple[PairBatch, float]]:
        """Endless batches of this process from a position, each with the factor of its loss.

        accelerate averages over accumulated batches and processes. The factor makes that a mean over pairs, as batches of one
        step may differ in size.
        """
        data, rank = self._config.data, self._accelerator.process_index
        accumulated: list[int] = []
        while True:
            epoch, start = divmod(position, self._rounds)
            mine = [batches[rank] for batches in self._share(epoch)[start:]]
            for batch in load_batches(self._dataset, mine, data.num_workers, self._accelerator):
                if not accumulated:  # pairs in each batch, of all processes, of the optimiser step that begins here
                    places = (divmod(i, self._rounds) for i in range(position, position + self._config.gradient_accumulation))
                    accumulated = [len(batch) for epoch, place in places for batch in self._share(epoch)[place]]
                factor = len(batch.prompts) * len(accumulated) / sum(accumulated)
                yield batch.to(self._accelerator.device), factor
                position += 1
                if position % self._config.gradient_accumulation == 0:
                    accumulated = []

    def draw_of(self, position: int) -> int | None:
        """Number of the fixed draw of times and noise at a position, another one each epoch; None without `loss.draws`."""
        draws = self._config.loss.draws
        return None if draws is None else position // self._rounds % draws

    def round_robin_places(self, position: int, batch: PairBatch) -> list[int]:
        """Places of a batch's pairs, where listed times go in turn from pair to pair and from process to process."""
        draw = self.draw_of(position)
        if draw is not None:
            return fixed_round_robin_places(batch.indices, draw)
        epoch, place = divmod(position, self._rounds)
        earlier = sum(map(len, self._share(epoch)[place][: self._accelerator.process_index]))
        return round_robin_places(self._pairs_before(epoch)[place] + earlier, epoch, len(batch.prompts))

    def pairs_of_draws(self, start: int, end: int) -> dict[int, set[int]]:
        """Indices of the pairs, of all processes, by fixed draw, at the positions from start to end."""
        pairs: dict[int, set[int]] = {}
        for position in range(start, end):
            epoch, place = divmod(position, self._rounds)
            draw = self.draw_of(position) or 0
            pairs.setdefault(draw, set()).update(index for batch in self._share(epoch)[place] for index in batch)
        return pairs

    def _make_share(self, epoch: int) -> list[list[list[int]]]:
        """The epoch's batches in rounds of one per process; the first are repeated where the last round is not full."""
        return in_rounds(self.plan.epoch(epoch), self._accelerator.num_processes)

    def _count_before(self, epoch: int) -> list[int]:
        """The pairs before each of the epoch's rounds, whose batches may be smaller than data.batch_size."""
        return [0, *accumulate(sum(map(len, batches)) for batches in self._share(epoch))]
