"""Figures of several panels, drawn without a screen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the choice of a backend that needs no screen


def new_figure(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Figure, Any]:
    """A figure of `size` inches and its axes [rows, columns], laid out by matplotlib; options as `plt.subplots` has them."""
    return plt.subplots(rows, columns, figsize=size, squeeze=False, constrained_layout=True, **options)


def save_figure(figure: Figure, path: Path, dpi: int = 110) -> None:
    """Writes a figure, and forgets it."""
    figure.savefig(path, dpi=dpi)
    plt.close(figure)
