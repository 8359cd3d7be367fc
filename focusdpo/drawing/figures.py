"""Figures of several panels, drawn without a screen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure


def new_figure(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Figure, Any]:
    """A figure of `size` inches and its axes [rows, columns], laid out by matplotlib; options as `Figure.subplots` has them."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def colour_bar(figure: Figure, drawn: ScalarMappable, axes: Axes | Sequence[Axes], label: str, **options: Any) -> Colorbar:
    """A colour bar with its label above it, in short lines: beside it, along a low figure, the label would be cut."""
    bar = figure.colorbar(drawn, ax=axes, **options)
    # A title, or a label of the axis, would get no room of its own from the layout.
    bar.ax.annotate(label, (0, 1), (0, 6), "axes fraction", "offset points", fontsize=9, va="bottom")
    return bar
