"""Means and intervals of rows, over all, per subject and per prompt; and what an evaluation writes and prints of them."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from focusdpo.foundation.files import write_whole, writing
from focusdpo.foundation.text import aligned, cell, printable
from focusdpo.metrics.bootstrap import Interval

RESULTS, PROMPTS, SUBJECTS, PICTURE = "results.json", "prompts.csv", "subjects.csv", "subjects.png"
FILES = (RESULTS, PROMPTS, SUBJECTS, PICTURE)
SHOWN = 40  # subjects in the picture
SHARES = ("_leaks", "missing")  # ends of the names of rates

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """A metric's mean with its interval, and how many images or regions, and prompts, it is over."""

    mean: float
    low: float
    high: float
    count: int
    prompts: int


Intervals = Callable[..., Interval]  # `mean_interval` with a run's settings


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
            mean, low, high = interval(
                [row[name] for row in having], None if within_prompt else lines, is_share=name.endswith(SHARES)
            )
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


def write_table(file: Path, first: Sequence[str], rows: Iterable[tuple[Sequence[Any], Mapping[str, Line]]]) -> None:
    """A CSV with a row per subject or prompt: what it is, then mean, low and high of each metric; empty where there is none.

    What it is comes from data, and is never a formula (`focusdpo.foundation.text.cell`).
    """
    listed = list(rows)
    names = list(dict.fromkeys(name for _, lines in listed for name in lines))
    stream = StringIO()
    table = csv.writer(stream, lineterminator="\n")
    table.writerow([*first, *(column for name in names for column in (name, f"{name}_low", f"{name}_high"))])
    for what, lines in listed:
        found = [lines.get(name) for name in names]
        numbers = [(math.nan,) * 3 if line is None else (line.mean, line.low, line.high) for line in found]
        shown = ("" if math.isnan(number) else f"{number:.6f}" for three in numbers for number in three)
        table.writerow([*map(cell, what), *shown])
    write_whole(file, stream.getvalue())


def table(lines: Mapping[str, Line], labels: Mapping[str, str], level: float, of: str) -> str:
    """Metrics with their intervals, for reading; `of` says what is counted, images or regions."""
    rows = [("", "mean", f"{level:.0%} interval", of, "prompts")]
    for name, label in labels.items():
        if name in lines:
            line, digits = lines[name], 2 if name == "fid" else 4
            interval = "-" if math.isnan(line.low) else f"{line.low:.{digits}f} to {line.high:.{digits}f}"
            rows.append((printable(label), f"{line.mean:.{digits}f}", interval, str(line.count), str(line.prompts)))
    return aligned(rows, words=1)


def draw_subjects(
    file: Path,
    subjects: Mapping[str, Mapping[str, Line]],
    overall: Mapping[str, Line],
    labels: Sequence[Mapping[str, str]],
    level: float,
) -> None:
    """Draws each subject's metrics with intervals to a PNG, the worst by the first metric above.

    Args:
        file: the PNG.
        subjects: metrics by subject.
        overall: the same metrics over all, drawn as a band.
        labels: of the metrics to draw, by name: a row of panels for each mapping, a panel for each metric that there is.
        level: of the intervals.
    """
    panels = [{name: label for name, label in row.items() if name in overall} for row in labels]
    panels = [row for row in panels if row]
    if not panels:
        return
    first, title = next(iter(panels[0].items()))
    worst = sorted(subjects, key=lambda subject: subjects[subject][first].mean)
    shown = worst[:SHOWN]
    columns = max(len(row) for row in panels)
    height = 1.0 + 0.27 * max(len(shown), 4)  # inches: title and axis beside the subjects
    size = (2.2 + 2.9 * columns, 0.5 + height * len(panels))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(panels), columns, sharey="row", squeeze=False)
    for row, names in zip(axes, panels, strict=True):
        for axis, (name, label) in zip(row, names.items(), strict=False):
            _draw_panel(axis, [subjects[subject].get(name) for subject in shown], overall[name], label)
        for axis in row[len(names) :]:
            axis.set_visible(False)
        row[0].set_yticks(range(len(shown)), [_short(subject) for subject in shown], parse_math=False)
        row[0].set_ylim(len(shown) - 0.5, -0.5)
    rest = f"; the {len(shown)} of {len(subjects)} subjects that are lowest in {title}" if len(shown) < len(subjects) else ""
    figure.suptitle(f"Per subject, {level:.0%} intervals over prompts; blue: all{rest}", fontsize=11)
    with writing(file) as partial:
        figure.savefig(partial, dpi=110, format="png")


def _draw_panel(axis: Any, lines: Sequence[Line | None], whole: Line, label: str) -> None:
    having = [(place, line) for place, line in enumerate(lines) if line is not None]
    means, lows, highs = (np.array([getattr(line, end) for _, line in having]) for end in ("mean", "low", "high"))
    axis.axvspan(whole.low, whole.high, color="tab:blue", alpha=0.15, linewidth=0)
    axis.axvline(whole.mean, color="tab:blue", linewidth=1.2)
    reach = np.nan_to_num(np.clip([means - lows, highs - means], 0, None))
    places = [place for place, _ in having]
    axis.errorbar(means, places, xerr=reach, fmt="o", color="black", ecolor="gray", markersize=4.5, capsize=2, linewidth=1.3)
    axis.set_title(f"{label}\nall: {whole.mean:.3f}", fontsize=11)
    axis.grid(alpha=0.25)
    axis.tick_params(labelsize=9)


def _short(name: str) -> str:
    name = printable(name)
    return name if len(name) <= 28 else f"…{name[-27:]}"
