"""Means and intervals of rows: over all, per subject, per prompt."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from focusdpo.metrics.bootstrap import Interval

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """A metric's mean with its interval, and how many images or regions, and prompts, it is over."""

    mean: float
    low: float
    high: float
    count: int
    prompts: int


Intervals = Callable[[Sequence[float], Sequence[Hashable] | None], Interval]  # `mean_interval` with a run's settings


def summarise(rows: Sequence[Row], names: Iterable[str], interval: Intervals, within_prompt: bool = False) -> dict[str, Line]:
    """The metrics over rows that have them.

    Args:
        rows: with "line", the prompt, and metrics by name.
        names: of the metrics.
        interval: mean and interval of values in groups.
        within_prompt: whether all rows are one prompt's: its images are resampled then, else the prompts.
    """
    found = {}
    for name in names:
        having = [row for row in rows if row.get(name) is not None]
        if having:
            lines = [row["line"] for row in having]
            mean, low, high = interval([row[name] for row in having], None if within_prompt else lines)
            found[name] = Line(mean, low, high, len(having), len(set(lines)))
    return found


def by(rows: Iterable[Row], name: str) -> dict[Any, list[Row]]:
    """Rows by what they have under a name, in order of appearance."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(row[name], []).append(row)
    return found


def subject_rows(image_rows: Iterable[Row], metrics: Iterable[str]) -> list[Row]:
    """A row for each subject of each image: the similarity to its own reference, and what the image as a whole has."""
    names = list(metrics)
    rows: list[Row] = []
    for row in image_rows:
        for index, subject in enumerate(row["subjects"]):
            own = {name: row[f"{name}_references"][index] for name in names if f"{name}_references" in row}
            whole = {name: row[name] for name in names if name == "clip_t"}
            rows.append({"line": row["line"], "subject": subject, **own, **whole})
    return rows
