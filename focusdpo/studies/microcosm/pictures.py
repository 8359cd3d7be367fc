"""What the microcosm looks like: its scenes, what each variant draws, and the numbers as intervals."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from safetensors.torch import load_file
from torch import Tensor

from focusdpo.data import PairDataset
from focusdpo.drawing.figures import new_figure
from focusdpo.studies.ablation.equal_drift import DRIFT, EqualDrift, curves_of, mean_curve
from focusdpo.studies.ablation.jobs import Point, Result
from focusdpo.studies.ablation.page import VERDICTS
from focusdpo.studies.ablation.statistics import Table
from focusdpo.studies.config import At
from focusdpo.studies.microcosm.judge import IdentityJudge, classify
from focusdpo.studies.microcosm.judging import IMAGES_FILE
from focusdpo.studies.microcosm.verdicts import Comparison

LINES = ("-", "--", ":")  # of ten colours each
SHOWN = 0.4  # differences that the picture of the verdicts has room for, either way


def draw_intervals(table: Table, names: Mapping[str, str], measures: Sequence[str], path: Path) -> None:
    """Means and intervals by variant, a panel per measure; green and red where the difference to the baseline is told."""
    shown = [name for name in measures if name in table.measures]
    columns = min(len(shown), 3)
    rows = -(-len(shown) // columns)
    height = 0.9 + 0.34 * len(table.rows)
    figure, axes = new_figure(rows, columns, (4.6 * columns, height * rows))
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    for number, name in enumerate(shown):
        _panel(axes.flat[number], table, name, names, labelled=number % columns == 0)
    figure.suptitle(
        f"mean and 95 % interval, not corrected; dotted: {names[table.baseline]}\n"
        "green better than it, red worse, after Holm's correction; gray not told from it",
        fontsize=9,
    )
    figure.savefig(path, dpi=110)


def _panel(axis: Axes, table: Table, measure: str, names: Mapping[str, str], labelled: bool) -> None:
    places = range(len(table.rows))[::-1]
    for place, row in zip(places, table.rows, strict=True):
        cell = row.cell(measure)
        if cell is None:
            continue
        found = cell.estimate
        errors = np.nan_to_num([[found.mean - found.low], [found.high - found.mean]])
        axis.errorbar(found.mean, place, xerr=errors, fmt="o", color=VERDICTS[cell.is_better], capsize=3)
        if row.variant == table.baseline:
            axis.axvline(found.mean, color="gray", linestyle=":", linewidth=1)
    axis.set_yticks(list(places), [names[row.variant] for row in table.rows] if labelled else [])
    axis.set_ylim(-0.6, len(table.rows) - 0.4)
    kind = table.measures[measure]
    better = "" if kind.better == "neither" else f" ({kind.better} is better)"
    axis.set_title(textwrap.fill(kind.label + better, 48), fontsize=9)
    axis.grid(axis="x", alpha=0.3)
    axis.locator_params(axis="x", nbins=5)


def draw_curves(
    curves: Mapping[str, Sequence[Sequence[Point]]],
    start: Point,
    titles: Mapping[str, str],
    path: Path,
) -> None:
    """Yardsticks over the preference training: each seed's points, and the mean over seeds as a line.

    Args:
        curves: by what a variant is called, for each seed the points of its run.
        start: the model before training.
        titles: of the panels, by yardstick.
        path: the PNG.
    """
    figure, axes = new_figure(1, len(titles), (4.2 * len(titles), 3.6))
    for axis, (name, title) in zip(axes[0], titles.items(), strict=True):
        for number, (label, runs) in enumerate(curves.items()):
            steps = [0, *(point.step for point in runs[0])]
            values = np.array([[start.mean(name), *(point.mean(name) for point in run)] for run in runs])
            axis.plot(steps, values.mean(0), LINES[number // 10 % len(LINES)], color=f"C{number}", label=label)
            for one in values:
                axis.plot(steps[1:], one[1:], ".", color=f"C{number}", alpha=0.5)
        axis.set_title(textwrap.fill(title, 44), fontsize=9)
        axis.set_xlabel("optimiser step")
        axis.grid(alpha=0.3)
    axes[0, -1].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def draw_drift(results: Sequence[Result], equal: EqualDrift, names: Mapping[str, str], path: Path) -> None:
    """The measure that says at which drift variants are compared, over drift: each training's points, means as lines."""
    figure, axes = new_figure(1, 1, (6.4, 4))
    axis = axes[0, 0]
    for number, row in enumerate(equal.table.rows):
        curves = curves_of(results, row.variant, equal.measure, DRIFT)
        means = mean_curve(curves, equal.measure)
        if not means:
            continue
        drifts, values = [drift for _, drift, _ in means], [mean for *_, mean in means]
        axis.plot(drifts, values, LINES[number // 10 % len(LINES)], color=f"C{number}", label=names[row.variant])
        points = [(point.mean(DRIFT), point.mean(equal.measure)) for curve in curves for point in curve]
        axis.plot(*zip(*points, strict=True), ".", color=f"C{number}", alpha=0.5)
    axis.axvline(equal.drift, color="gray", linestyle=":", linewidth=1)
    axis.set_xscale("log")
    axis.set_xlabel(f"drift ||v - v_ref||²; dotted: compared at {equal.drift:.3g}")
    axis.set_title(textwrap.fill(equal.table.measures[equal.measure].label, 60), fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def draw_verdicts(comparisons: Sequence[Comparison], path: Path) -> None:
    """The comparisons that were fixed in advance: a column a base, above at equal drift, below at the end of training.

    Args:
        comparisons: of all bases.
        path: the PNG.
    """
    bases = list(dict.fromkeys(one.base for one in comparisons))
    labels = list(dict.fromkeys(one.label for one in comparisons))
    rows: tuple[At, ...] = ("equal drift", "end")
    figure, axes = new_figure(2, len(bases), (3 + 3.2 * len(bases), 2 * (1 + 0.28 * len(labels))), sharex=True)
    for (line, at), (column, base) in itertools.product(enumerate(rows), enumerate(bases)):
        axis = axes[line, column]
        axis.axvline(0, color="gray", linestyle=":", linewidth=1)
        here = [one for one in comparisons if (one.base, one.at) == (base, at)]
        shown = [(one, one.cell.difference) for one in here if one.cell is not None and one.cell.difference is not None]
        if not shown:
            axis.text(0, -(len(labels) - 1) / 2, "no such drift", ha="center", fontsize=9, color="gray")
        for one, gap in shown:
            place, color = -labels.index(one.label), VERDICTS[one.is_better]
            if abs(gap.mean) > SHOWN:  # a ratio of errors may be anything, and would leave no room for the shares
                text = f"{gap.mean:+.2f} [{gap.low:+.2f}, {gap.high:+.2f}]"
                axis.text(0, place, text, ha="center", va="center", fontsize=8, color=color, backgroundcolor="white")
                continue
            errors = np.nan_to_num([[gap.mean - gap.low], [gap.high - gap.mean]])
            axis.errorbar(gap.mean, place, xerr=errors, fmt="o", color=color, capsize=3)
        axis.set_xlim(-SHOWN, SHOWN)
        axis.set_yticks([-place for place in range(len(labels))], labels if column == 0 else [], fontsize=8)
        axis.set_ylim(0.6 - len(labels), 0.6)
        axis.set_title(f"{base} model, at {'the end' if at == 'end' else at}", fontsize=9)
        axis.grid(axis="x", alpha=0.3)
    title = "differences with their 95 % intervals, each by itself"
    figure.suptitle(title + "\ngreen better, red worse, after Holm's correction; gray not told apart", fontsize=9)
    figure.savefig(path, dpi=110)


def draw_samples(
    held_out: PairDataset,
    runs: Mapping[str, Path],
    judge: IdentityJudge,
    names: Sequence[str],
    count: int,
    samples: int,
    path: Path,
) -> None:
    """Held-out scenes, a row each: references, the real scene, and what each variant draws from the same noise.

    Under a drawing stands whom the judge sees in its halves, in green where it is the right subject.

    Args:
        held_out: the scenes.
        runs: folders of runs by what the columns are called.
        judge: tells who is seen.
        names: of the identities, and what nobody is called.
        count: rows.
        samples: images that were generated a scene.
        path: the PNG.
    """
    count = min(count, len(held_out))
    columns = ["references", "real scene", *runs]
    figure, axes = new_figure(count, len(columns), (1.75 * len(columns), 2.05 * count))
    for axis, name in zip(axes[0], columns, strict=True):
        axis.set_title(textwrap.fill(name, 22), fontsize=8)
    drawn = {name: load_file(folder / IMAGES_FILE)["images"][::samples][:count] for name, folder in runs.items()}
    seen = {name: classify(judge, images.float() / 255)[0].argmax(-1) for name, images in drawn.items()}
    for i in range(count):
        pair, who = held_out[i], held_out.records[i].meta["identities"]
        _show(axes[i, 0], torch.cat(list(pair.references), dim=1))
        _show(axes[i, 1], pair.winner)
        for column, name in enumerate(runs, start=2):
            axis = axes[i, column]
            below = {"fontsize": 5, "ha": "center", "va": "top", "transform": axis.transAxes}
            _show(axis, drawn[name][i].float() / 255)
            for half, number in enumerate(seen[name][i].tolist()):
                colour = VERDICTS[number == who[half]]
                axis.text(0.25 + half / 2, -0.04, names[number], color=colour, **below)
    figure.savefig(path, dpi=110)


def draw_world(scenes: Tensor, restored: Tensor, path: Path, columns: int = 8) -> None:
    """Held-out scenes, and under each what the autoencoder gives back.

    Args:
        scenes: uint8 [N, 3, H, W].
        restored: float [N, 3, H, W] in [0, 1].
        path: the PNG.
        columns: scenes in a row.
    """
    rows = -(-len(scenes) // columns)
    figure, axes = new_figure(2 * rows, columns, (1.4 * columns, 2.8 * rows))
    for axis in axes.flat:
        axis.axis("off")
    for number, (scene, back) in enumerate(zip(scenes, restored, strict=True)):
        row, column = divmod(number, columns)
        _show(axes[2 * row, column], scene.float() / 255)
        _show(axes[2 * row + 1, column], back)
    figure.suptitle("real scenes, and under each what the autoencoder gives back", fontsize=10)
    figure.savefig(path, dpi=100)


def draw_losses(losses: Mapping[str, Sequence[tuple[int, float]]], path: Path) -> None:
    """The curves of what is learnt before any preference."""
    figure, axes = new_figure(1, len(losses), (3.2 * len(losses), 2.8))
    for axis, (name, points) in zip(axes[0], losses.items(), strict=True):
        axis.plot(*zip(*points, strict=True))
        axis.set_title(f"{name}: training loss", fontsize=9)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def _show(axis: Axes, image: Tensor) -> None:
    axis.imshow(image.permute(1, 2, 0).cpu().numpy())
    axis.set_xticks([])
    axis.set_yticks([])
