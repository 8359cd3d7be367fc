"""Pairs one after the other, without reading all records first: for data too large for that, and for loops of one's own.

The trainer does not use it: it needs every pair's size ahead, for batches of equal sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from focusdpo.data.checks import check_pair
from focusdpo.data.dataset import PairDataset, PairSample
from focusdpo.data.lines import DatasetError, Problem, split_problems
from focusdpo.data.records import PairRecord
from focusdpo.data.sources import find_sources, items_of


class PairStream(IterableDataset[PairSample]):
    """The pairs of one epoch, or what is left of it, shared among processes and a loader's workers.

    Which pair comes at a position depends on seed, epoch and the number of processes alone: with `DataLoader(stream,
    batch_size=None)` and any number of workers, a process that has had n pairs goes on with `start=n` at the very next one.
    Shuffled, files come in random order, and so do the pairs within each: the file at hand is the one whose records are in
    memory. All processes have the same number of pairs; the first are repeated where the last round is not full.

    Args:
        path: what `find_sources` takes.
        dataset: brings records to size, such as `partial(PairDataset, resolution=512, ...)`.
        shuffle: a new order each epoch.
        seed: of that order.
        epoch: number of the epoch.
        start: pairs of this epoch that this process has had.
        rank: number of this process.
        processes: how many there are.

    Iterating raises DatasetError at a file or pair that is unfit. `index` of a sample is its position in the epoch.
    """

    def __init__(
        self,
        path: str | Path,
        dataset: Callable[[Sequence[PairRecord]], PairDataset],
        *,
        shuffle: bool,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        if not 0 <= rank < processes:
            raise ValueError(f"rank: got {rank}; expected 0 to {processes - 1}, one less than processes")
        if start < 0:
            raise ValueError(f"start: got {start}; expected 0 or more")
        self._sources = find_sources(path)
        self._dataset = dataset
        self._shuffle = shuffle
        self._seed = seed
        self._epoch = epoch
        self._start = start
        self._rank = rank
        self._processes = processes

    def __iter__(self) -> Iterator[PairSample]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        wanted, step = (self._start + worker) * self._processes + self._rank, workers * self._processes
        total = 0
        for records in self._files():
            while wanted < total + len(records):
                yield self._sample(records[wanted - total], wanted)
                wanted += step
            total += len(records)
        if total <= wanted < -(-total // self._processes) * self._processes:
            yield self._sample(self._find(wanted % total), wanted)

    def _files(self) -> Iterator[list[PairRecord]]:
        """The records of each file, in the epoch's order."""
        for number in self._order(len(self._sources)):
            records, problems = split_problems(items_of(self._sources[number]))
            errors = [problem for problem in problems if problem.severity == "error"]
            if errors:
                raise DatasetError(errors)
            yield [records[i] for i in self._order(len(records), number)]

    def _find(self, position: int) -> PairRecord:
        for records in self._files():
            if position < len(records):
                return records[position]
            position -= len(records)
        raise IndexError(position)

    def _order(self, count: int, *file: int) -> list[int]:
        if not self._shuffle:
            return list(range(count))
        return np.random.default_rng([self._seed, self._epoch, *file]).permutation(count).tolist()

    def _sample(self, record: PairRecord, position: int) -> PairSample:
        try:
            return replace(self._dataset([record])[0], index=position)
        except Exception as error:  # Pillow's decoders raise anything on damaged files
            problems = [p for p in check_pair(record, "full").problems if p.severity == "error"]
            unknown = Problem(record.file, record.line, "line", f"cannot be read ({error})", "look at its images")
            raise DatasetError(problems or [unknown]) from error
