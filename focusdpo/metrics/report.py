"""Means and intervals of rows, over all, per subject and per prompt; and what an evaluation writes and prints of them."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure

from focusdpo.foundation.files import write_whole, writing
from focusdpo.foundation.text import aligned, cell, counted, first_of, printable
from focusdpo.metrics.bootstrap import Interval, find_clusters

RESULTS, PROMPTS, SUBJECTS, PICTURE = "results.json", "prompts.csv", "subjects.csv", "subjects.png"
FILES = (RESULTS, PROMPTS, SUBJECTS, PICTURE)
SHOWN = 40  # subjects in the picture
SHARES = ("_leaks", "missing")  # ends of the names of rates
FEWEST = 6  # of what is drawn, for an interval: docs/evaluation.md says why

Row = Mapping[str, Any]
Over = Literal["subjects", "prompts", "images"]


@dataclass(frozen=True)
class Line:
    """A metric's mean with its interval, and what they are over.

    Attributes:
        count: images or regions.
        over: what the interval draws, each with all that belongs to it.
        note: of what alone the interval speaks, or why there is none; empty where neither.
    """

    mean: float
    low: float
    high: float
    count: int
    images: int
    prompts: int
    subjects: int
    over: Over
    note: str


Groups = Sequence[Hashable]
Intervals = Callable[..., Interval]  # `mean_interval` with a run's settings
Subjects = Mapping[int, frozenset[str]]  # by the prompt's line


def summarise(
    rows: Iterable[Row], names: Iterable[str], interval: Intervals, subjects: Subjects, over: Over = "subjects"
) -> dict[str, Line]:
    """The metrics over rows that have them.

    Args:
        rows: with "line", the prompt, "image", and metrics by name.
        names: of the metrics.
        interval: mean and interval of values in groups.
        subjects: of each prompt.
        over: what intervals draw.
    """
    found, listed = {}, list(rows)
    for name in names:
        having = [row for row in listed if row.get(name) is not None]
        if having:
            values = [row[name] for row in having]
            estimate = partial(interval, values, is_share=name.endswith(SHARES))
            found[name] = line_of(having, subjects, over, float(np.mean(values)), estimate)
    return found


def line_of(rows: Sequence[Row], subjects: Subjects, over: Over, mean: float, estimate: Callable[[Groups], Interval]) -> Line:
    """The line of rows whose mean is known, with the interval that `estimate` makes of their groups.

    Prompts are drawn with all that have their subjects; where all have the same, one by one: what is found is of these subjects
    alone. With fewer than `FEWEST` to draw there is no interval.
    """
    sets = [subjects[row["line"]] for row in rows]
    everyone = frozenset[str]().union(*sets)
    counts = {"images": len({row["image"] for row in rows}), "prompts": len({row["line"] for row in rows})}
    counts["subjects"] = len(everyone)
    notes = []
    if over == "subjects" and len(set(sets)) == 1:
        over = "prompts"
        notes.append(f"over prompts, of {first_of(sorted(everyone))} alone")
    groups: Groups = sets if over == "subjects" else [row["line" if over == "prompts" else "image"] for row in rows]
    low = high = math.nan
    independent = round(find_clusters(groups).independent, 6)
    if independent < FEWEST:
        as_many = f", which count as {independent:.1f}" if independent < counts[over] else ""
        notes.append(f"none for {counted(counts[over], over[:-1])}{as_many}, too few: {FEWEST} are needed")
    else:
        _, low, high = estimate(groups)
    return Line(mean, low, high, len(rows), **counts, over=over, note="; ".join(notes))


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
            rows.append({"line": row["line"], "image": row["image"], "subject": subject, **own, **whole})
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
    """Metrics with their intervals and the notes on these, for reading; `of` says what is counted, images or regions."""
    rows = [("", "mean", f"{level:.0%} interval", of, "prompts", "subjects")]
    for name, label in labels.items():
        if name in lines:
            line, digits = lines[name], 2 if name == "fid" else 4
            interval = "-" if math.isnan(line.low) else f"{line.low:.{digits}f} to {line.high:.{digits}f}"
            counts = (str(line.count), str(line.prompts), str(line.subjects))
            rows.append((printable(label), f"{line.mean:.{digits}f}", interval, *counts))
    notes = dict.fromkeys(lines[name].note for name in labels if name in lines)
    return "\n".join([aligned(rows, words=1), *(f"intervals: {printable(note)}" for note in notes if note)])


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
    figure.suptitle(f"Per subject, {level:.0%} intervals over prompts; blue: all, over subjects{rest}", fontsize=11)
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
