"""Figures of several panels, drawn without a screen."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure


def new_figure(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Figure, Any]:
    """A figure of `size` inches and its axes [rows, columns], laid out by matplotlib; options as `Figure.subplots` has them."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)
