"""Curves of a training run."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the choice of a backend that needs no screen

from focusdpo.evaluation.panels import PANELS, smooth, value_of

SHOWN = ("loss", "accuracy", "error_change", "focus", "gradient_norm", "learning_rate")


def draw_curves(rows: list[dict[str, float]], validation: list[dict[str, float]], path: Path) -> None:
    """Draws a run's curves to a PNG.

    Args:
        rows: metrics.jsonl, a row per optimiser step.
        validation: rows of the held-out evaluations, may be empty.
        path: the PNG.
    """
    steps = np.array([row["step"] for row in rows])
    figure, axes = plt.subplots(2, 3, figsize=(14, 7), constrained_layout=True)
    for axis, panel in zip(axes.flat, (PANELS[name] for name in SHOWN), strict=True):
        for line, label in panel.lines.items():
            values = _series(rows, line)
            if values is None:
                continue
            (drawn,) = axis.plot(steps, values, alpha=0.3, linewidth=1)
            shown = smooth(values) if panel.smoothed else values
            axis.plot(steps, shown, color=drawn.get_color(), label=f"{label} (training)", linewidth=2)
            held_out = _series(validation, line)
            if held_out is not None:
                points, colour = [row["step"] for row in validation], drawn.get_color()
                axis.plot(points, held_out, "o--", color=colour, markeredgecolor="black", label=f"{label} (held out)")
        if panel.level is not None:
            axis.axhline(panel.level[0], color="gray", linestyle=":", label=panel.level[1])
        if panel.unit_range:
            axis.set_ylim(-0.02, 1.02)
        axis.set_title(panel.title)
        axis.set_xlabel("optimiser step")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:  # a run without the focus mask has no coverage
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _series(rows: list[dict[str, float]], line: str) -> np.ndarray | None:
    values = [value_of(row, line) for row in rows]
    return np.array(values) if values and None not in values else None
