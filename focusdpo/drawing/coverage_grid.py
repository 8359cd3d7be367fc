"""Coverage of a pair over times and groups of blocks, in one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from focusdpo.drawing.overlays import COLOURS, MaskAtTime


def draw_coverage(masks: Mapping[str, Sequence[MaskAtTime]], path: Path, title: str) -> None:
    """Draws A with the branch that it takes, a row per group of blocks and a column per time; tau is marked on the scale.

    Args:
        masks: of one pair, by group, at the same times.
        path: the PNG.
        title: above the picture.
    """
    times = [one.t for one in next(iter(masks.values()))]
    coverage = np.array([[float(one.focus.coverage[0]) for one in each] for each in masks.values()])
    first = next(iter(masks.values()))[0].focus
    size = (max(1.5 * len(times) + 3.5, 6.5), 0.62 * len(masks) + 1.9)
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    drawn = axis.imshow(coverage, cmap=COLOURS, vmin=0, vmax=1, aspect="auto")
    axis.set_xticks(range(len(times)), [f"{t:g}" for t in times])
    axis.set_yticks(range(len(masks)), list(masks))
    axis.set_xlabel("t (0 is clean, 1 is noise)")
    axis.set_title(f"{title}\nthe least A that so many matches can reach: {float(first.coverage_floor[0]):.2f}", fontsize=11)
    for y, each in enumerate(masks.values()):
        for x, one in enumerate(each):
            branch = "detail" if bool(one.focus.uses_detail[0]) else "structure"
            colour = "black" if coverage[y, x] > 0.6 else "white"
            axis.text(x, y, f"{coverage[y, x]:.2f}\n{branch}", ha="center", va="center", color=colour, fontsize=9)
    bar = figure.colorbar(drawn, ax=axis, label="A, share of the prior not matched")
    bar.ax.axhline(first.tau, color=(1.0, 0.18, 0.58), linewidth=2.5)
    bar.ax.text(-0.2, first.tau, f"tau {first.tau:g}", fontsize=9, ha="right", va="center")
    figure.savefig(path, dpi=110)
