"""The rows of a run of any length, read one after the other into curves of few points.

A run of 100,000 steps has more rows than a screen has pixels. The steps are divided into bins alike in width; of a bin, a curve
keeps the mean, the lowest and the highest value, and how many values were not finite, so that a spike of one step and a NaN are
still seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np

from focusdpo.evaluation.panels import Floats, value_of
from focusdpo.journals import has_step, parse_row, read_steps

TAIL = 2**20  # bytes in which the last whole row is looked for; a row has some thousand


@dataclass
class Curve:
    """One metric, binned: arrays of a value per bin, NaN where it has no finite one; `bad` counts those that are not finite."""

    mean: Floats
    low: Floats
    high: Floats
    bad: Floats

    @classmethod
    def empty(cls, bins: int) -> Curve:
        return cls(np.full(bins, math.nan), np.full(bins, math.nan), np.full(bins, math.nan), np.zeros(bins))

    def fill(self, index: int, values: list[float]) -> None:
        """Takes the values of a bin."""
        finite = [value for value in values if math.isfinite(value)]
        self.bad[index] = len(values) - len(finite)
        if finite:
            self.mean[index], self.low[index], self.high[index] = sum(finite) / len(finite), min(finite), max(finite)


@dataclass
class BinnedRun:
    """What metrics.jsonl says.

    Args:
        first, last: steps of its first and last row; 0 where it has none.
        width: steps of a bin.
        curves: by line of a panel (`focusdpo.evaluation.panels`); those alone that the run has.
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


def read_run(path: Path, lines: Iterable[str], points: int, progress: bool = True) -> BinnedRun:
    """Reads a metrics.jsonl of any length, of which a bin at a time is in memory.

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
    bins = -(-(last - first + 1) // width)
    run = BinnedRun(first, last, width)
    wanted = list(dict.fromkeys(lines))
    # Rows after the last one are written by a run that goes on; they are for the next page.
    rows = (row for row in read_steps(path, progress) if first <= row["step"] <= last)
    for index, group in groupby(rows, key=lambda row: int(row["step"] - first) // width):
        together = list(group)
        for line in wanted:
            values = [value for row in together if (value := value_of(row, line)) is not None]
            if values:
                run.curves.setdefault(line, Curve.empty(bins)).fill(index, values)
        for row in together:
            if row.get("pairs_per_second", 0) > 0 and math.isfinite(row["pairs_per_second"]):
                run.pairs += row["pairs"]
                run.seconds += row["pairs"] / row["pairs_per_second"]
    return run


def _ends(path: Path) -> tuple[int, int]:
    """Steps of the first and the last whole row; zeros where there is none."""
    first = next(read_steps(path), None)
    if first is None:
        return 0, 0
    with path.open("rb") as stream:
        stream.seek(max(path.stat().st_size - TAIL, 0))
        last = next((row for line in reversed(stream.readlines()) if (row := parse_row(line)) and has_step(row)), first)
    return int(first["step"]), max(int(last["step"]), int(first["step"]))
