"""Curves of a training run."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from focusdpo.drawing.metric_panels import PANELS, Floats, smooth, value_of
from focusdpo.foundation.journals import Row

SHOWN = ("loss", "accuracy", "error_change", "focus", "gradient_norm", "learning_rate")


def draw_curves(rows: Iterable[Row], validation: Iterable[Row], path: Path) -> None:
    """Draws a run's curves to a PNG.

    Args:
        rows: metrics.jsonl, a row per optimiser step; of a long run only what is drawn of them is kept.
        validation: rows of the held-out evaluations, may be empty.
        path: the PNG.
    """
    training, held_out = _series(rows), _series(validation)
    figure = Figure(figsize=(14, 7), layout="constrained")
    for axis, panel in zip(figure.subplots(2, 3).flat, (PANELS[name] for name in SHOWN), strict=True):
        for line, label in panel.lines.items():
            if line not in training:
                continue
            steps, values = training[line]
            (drawn,) = axis.plot(steps, values, alpha=0.3, linewidth=1)
            shown = smooth(values) if panel.smoothed else values
            axis.plot(steps, shown, color=drawn.get_color(), label=f"{label} (training)", linewidth=2)
            if line in held_out:
                points, measured = held_out[line]
                colour = drawn.get_color()
                axis.plot(points, measured, "o--", color=colour, markeredgecolor="black", label=f"{label} (held out)")
        if panel.level is not None:
            axis.axhline(panel.level[0], color="gray", linestyle=":", label=panel.level[1])
        if panel.unit_range:
            axis.set_ylim(-0.02, 1.02)
        axis.set_title(panel.title)
        axis.set_xlabel("optimiser step")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:  # a run without the focus mask has no coverage
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=110, format="png")


def _series(rows: Iterable[Row]) -> dict[str, tuple[Floats, Floats]]:
    """Steps and values of each line that rows have, where they have it."""
    found: dict[str, tuple[array[float], array[float]]] = {}
    lines = [line for name in SHOWN for line in PANELS[name].lines]
    for row in rows:
        for line in lines:
            value = value_of(row, line)
            if value is not None:
                steps, values = found.setdefault(line, (array("d"), array("d")))
                steps.append(row["step"])
                values.append(value)
    return {line: (np.array(steps), np.array(values)) for line, (steps, values) in found.items()}
