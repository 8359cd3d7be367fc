"""The rows of a run of any length, read one after the other into curves of few points.

A run of 100,000 steps has more rows than a screen has pixels. The steps are divided into bins alike in width; of a bin, a curve
keeps the mean, the lowest and the highest value, and how many values were not finite, so that a spike of one step and a NaN are
still seen.

Nearly all the time goes into parsing JSON, so that a large file is read in parts, by as many processes as there are cores. What
they find adds up: a part may end within a bin.
"""

from __future__ import annotations

import logging
import logging.handlers
import math
import queue
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from focusdpo.drawing.training_curves import Floats, names_of, value_of
from focusdpo.foundation.journals import Part, Row, has_step, parse_row, parts_of, read_steps
from focusdpo.foundation.workers import Pool, cores

logger = logging.getLogger(__name__)

TAIL = 2**20  # bytes in which the last whole row is looked for; a row has some thousand
BLOCK = 500  # rows in memory
PART = 2**26  # bytes of a part at least, which are read in a second: a process takes a third of one to start
PROCESSES = 8  # at most


@dataclass
class Curve:
    """One metric, binned: arrays of a value per bin, NaN where it has no finite one; `bad` counts those that are not finite."""

    mean: Floats
    low: Floats
    high: Floats
    bad: Floats


@dataclass
class BinnedRun:
    """What metrics.jsonl says.

    Args:
        first, last: steps of its first and last row; 0 where it has none.
        width: steps of a bin.
        curves: by line of a panel (`focusdpo.drawing.training_curves`); those alone that the run has.
        pairs: that were trained on, with repetition.
        seconds: that the steps took.
    """

    first: int = 0
    last: int = 0
    width: int = 1
    curves: dict[str, Curve] = field(default_factory=dict)
    pairs: float = 0.0
    seconds: float = 0.0

    @property
    def steps(self) -> Floats:
        """The middle of each bin."""
        edges = np.arange(self.first, self.last + 1, self.width, dtype=float)
        return (edges + np.minimum(edges + self.width - 1, self.last)) / 2


@dataclass(frozen=True)
class _Task:
    """What is read of a file: lines of panels, in bins over the steps from first to last."""

    path: Path
    lines: Sequence[str]
    first: int
    last: int
    width: int

    @property
    def bins(self) -> int:
        return -(-(self.last - self.first + 1) // self.width)


class _Sums:
    """What the rows of a part add up to: arrays [lines, bins]."""

    def __init__(self, lines: int, bins: int) -> None:
        self.total, self.count, self.bad = (np.zeros((lines, bins)) for _ in range(3))
        self.low, self.high = np.full((lines, bins), math.inf), np.full((lines, bins), -math.inf)
        self.pairs = self.seconds = 0.0

    def add(self, index: int, lines: list[int], values: Floats) -> None:
        """Takes values [lines, rows] of one bin."""
        finite = np.isfinite(values)
        count = finite.sum(1)
        with np.errstate(over="ignore"):
            self.total[lines, index] += np.where(finite, values, 0.0).sum(1)
        self.count[lines, index] += count
        self.bad[lines, index] += values.shape[1] - count
        self.low[lines, index] = np.minimum(self.low[lines, index], np.where(finite, values, math.inf).min(1))
        self.high[lines, index] = np.maximum(self.high[lines, index], np.where(finite, values, -math.inf).max(1))

    def __iadd__(self, other: _Sums) -> _Sums:
        for name in ("total", "count", "bad", "pairs", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.low, self.high = np.minimum(self.low, other.low), np.maximum(self.high, other.high)
        return self

    def curve(self, line: int) -> Curve | None:
        """None where no row has the line."""
        there = self.count[line] > 0
        if not there.any() and not self.bad[line].any():
            return None
        mean = np.divide(self.total[line], self.count[line], out=np.full(len(there), math.nan), where=there)
        low, high = (np.where(there, found[line], math.nan) for found in (self.low, self.high))
        return Curve(mean, low, high, self.bad[line])


def read_run(path: Path, lines: Iterable[str], points: int, progress: bool = True) -> BinnedRun:
    """Reads a metrics.jsonl of any length, of which a few hundred rows at a time are in memory.

    Args:
        path: the file; a run that has not begun has none.
        lines: of panels, which are read.
        points: bins at most.
        progress: show a progress bar.
    """
    first, last = _ends(path)
    if last == 0:
        return BinnedRun()
    width = -(-(last - first + 1) // points)
    task = _Task(path, list(dict.fromkeys(lines)), first, last, width)
    own, *others = parts_of(path, max(min(path.stat().st_size // PART, cores(), PROCESSES), 1))
    with ExitStack() as pools:  # of one worker each: one that fails leaves the others alone
        coming = [pools.enter_context(Pool(1, partial(_read_apart, task))).run([part]) for part in others]
        sums = _read_part(task, own, progress)
        for part, results in zip(others, coming, strict=True):
            try:
                ((_, (more, said)),) = results
            except Exception as error:  # for want of memory perhaps: it costs time alone, and another cause comes here again
                logger.info("%s: a part is read once more, as a worker failed (%s)", path, error)
                more, said = _read_part(task, part), []
            for record in said:
                logging.getLogger(record.name).handle(record)
            sums += more
    curves = {line: curve for i, line in enumerate(task.lines) if (curve := sums.curve(i)) is not None}
    return BinnedRun(first, last, width, curves, sums.pairs, sums.seconds)


def _read_apart(task: _Task, part: Part) -> tuple[_Sums, list[logging.LogRecord]]:
    """In a worker: what it found, and what it said."""
    said: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    logging.getLogger().addHandler(logging.handlers.QueueHandler(said))
    return _read_part(task, part), [said.get() for _ in range(said.qsize())]


def _read_part(task: _Task, part: Part, progress: bool = False) -> _Sums:
    sums = _Sums(len(task.lines), task.bins)
    block: list[Row] = []
    place = 0
    for row in read_steps(task.path, progress, part):
        if not task.first <= row["step"] <= task.last:  # written after the last one, by a run that goes on: for the next page
            continue
        index = int(row["step"] - task.first) // task.width
        if block and (index != place or len(block) == BLOCK):
            _take(sums, task.lines, place, block)
            block = []
        place = index
        block.append(row)
    if block:
        _take(sums, task.lines, place, block)
    return sums


def _take(sums: _Sums, lines: Sequence[str], index: int, rows: list[Row]) -> None:
    """Adds rows of one bin; those that have the same metrics are a table."""
    tables: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        tables[tuple(row)].append(row)
    wanted = {"pairs", "pairs_per_second"}.union(*map(names_of, lines))
    for names, alike in tables.items():
        columns = zip(names, zip(*(row.values() for row in alike), strict=True), strict=True)
        table = {name: _numbers(values) for name, values in columns if name in wanted}
        with np.errstate(invalid="ignore", over="ignore"):
            found = {i: values for i, line in enumerate(lines) if (values := value_of(table, line)) is not None}
        if found:
            sums.add(index, list(found), np.stack(list(found.values())))
        if "pairs" in table and "pairs_per_second" in table:
            pairs, speed = table["pairs"], table["pairs_per_second"]
            sound = np.isfinite(pairs) & np.isfinite(speed) & (speed > 0)
            sums.pairs += float(pairs[sound].sum())
            sums.seconds += float((pairs[sound] / speed[sound]).sum())


def _numbers(values: Sequence[Any]) -> Floats:
    """What is no number is not finite either."""
    try:
        return np.fromiter(values, float, len(values))
    except (TypeError, ValueError, OverflowError):
        return np.fromiter(map(_number, values), float, len(values))


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _ends(path: Path) -> tuple[int, int]:
    """Steps of the first and the last whole row; zeros where there is none."""
    first = next(read_steps(path), None)
    if first is None:
        return 0, 0
    with path.open("rb") as stream:
        stream.seek(max(path.stat().st_size - TAIL, 0))
        last = next((row for line in reversed(stream.readlines()) if (row := parse_row(line)) and has_step(row)), first)
    return int(first["step"]), max(int(last["step"]), int(first["step"]))
