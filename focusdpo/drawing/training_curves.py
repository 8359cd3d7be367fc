"""Curves of a training run: which metrics belong together in one panel, what they are called, how they are smoothed; as a PNG.

The page of a run draws the same panels, see `focusdpo.pages.run.plotly_figures`.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from focusdpo.foundation.journals import Row

SHOWN = ("loss", "accuracy", "error_change", "focus", "gradient_norm", "learning_rate")
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Panel:
    """One picture of a run.

    Args:
        title: what it shows.
        lines: names of metrics, or differences of two such as "a-b", each with its label.
        note: how to read it, in a sentence.
        level: a value to compare with, and what it means.
        unit_range: whether the values are shares, from 0 to 1.
        log: whether the axis is logarithmic.
        smoothed: whether a smoothed line says more than the values.
    """

    title: str
    lines: Mapping[str, str]
    note: str
    level: tuple[float, str] | None = None
    unit_range: bool = False
    log: bool = False
    smoothed: bool = True


WINNER, LOSER = "error/policy_win", "error/policy_lose"
LN_2 = (math.log(2), "ln 2: no preference")
CHANCE = (0.5, "chance")

PANELS = {
    "loss": Panel(
        "loss", {"loss": "loss"}, "With the sigmoid loss: at ln 2 the model prefers neither image, below it the winner.", LN_2
    ),
    "margin": Panel(
        "margin",
        {"margin": "margin"},
        "Winner's error minus the loser's, each compared with the reference model. Below 0 the winner is preferred.",
        (0.0, "no preference"),
    ),
    "accuracy": Panel(
        "implicit accuracy",
        {"accuracy": "accuracy"},
        "Share of pairs of which the model prefers the winner.",
        CHANCE,
        unit_range=True,
    ),
    "error_change": Panel(
        "error minus the reference model's",
        {f"{WINNER}-error/reference_win": "winner", f"{LOSER}-error/reference_lose": "loser"},
        "The winner should fall or stay, the loser rise. Where both rise, the margin grows by spoiling both.",
        (0.0, "the reference model"),
    ),
    "errors": Panel(
        "errors",
        {
            WINNER: "winner",
            LOSER: "loser",
            "error/reference_win": "winner, reference model",
            "error/reference_lose": "loser, reference model",
        },
        "The weighted squared errors that the loss compares.",
    ),
    "drift": Panel(
        "drift from the reference model",
        {"drift/inside": "within the prior", "drift/outside": "outside"},
        "Mean square of the policy's predictions less the reference model's. What is gained outside of the prior is only lost.",
    ),
    "gradient_factor": Panel(
        "gradient left by the sigmoid",
        {"gradient_factor": "gradient factor"},
        "1 where a pair teaches all it can, near 0 where pairs are told apart and teach no more.",
    ),
    "focus": Panel(
        "coverage A and share in the detail branch",
        {
            "focus/coverage": "coverage A",
            "focus/coverage_chance": "A by chance",
            "focus/coverage_floor": "lowest A",
            "focus/detail_share": "detail share",
        },
        "A is the share of the prior that is not aligned yet; a pair whose A is at most tau gives details weight. An S that "
        "knows nothing has A by chance; one that puts every match within the prior the lowest.",
        unit_range=True,
    ),
    "coverage_floor": Panel(
        "limits of the mask",
        {
            "focus/detail_unreachable": "pairs that cannot reach tau",
            "focus/all_matched": "pairs that match every token",
        },
        "Both should be 0: those pairs never get details, or have no structure to look at.",
        unit_range=True,
    ),
    "gradient_norm": Panel(
        "gradient norm", {"gradient_norm": "gradient norm"}, "Before clipping, on a logarithmic axis.", log=True
    ),
    "learning_rate": Panel("learning rate", {"learning_rate": "learning rate"}, "As the schedule sets it.", smoothed=False),
    "beta": Panel("beta", {"beta": "beta"}, "Constant, unless loss.auto_beta moves it.", smoothed=False),
    "skipped": Panel(
        "skipped steps in a row",
        {"skipped_in_a_row": "skipped"},
        "Steps without a finite gradient change nothing; ten in a row stop the run.",
        smoothed=False,
    ),
    "speed": Panel("pairs per second", {"pairs_per_second": "pairs per second"}, "Of all processes together."),
    "memory": Panel(
        "peak memory, MiB",
        {"peak_memory_mib": "peak memory"},
        "Of the main process: allocated on the accelerator, or resident on a CPU.",
        smoothed=False,
    ),
}

# Metrics of the pairs whose t lies in one bin.
BY_TIME = {
    "margin": Panel("margin by t", {"margin": "margin"}, "Which times tell winner and loser apart.", (0.0, "no preference")),
    "accuracy": Panel("implicit accuracy by t", {"accuracy": "accuracy"}, "At which times the winner is preferred.", CHANCE,
                      unit_range=True),
    WINNER: Panel("winner's error by t", {WINNER: "winner"}, "Compare a curve with its own start: the level depends on t."),
    LOSER: Panel("loser's error by t", {LOSER: "loser"}, "Should rise against its own start while the winner's does not."),
    "focus/coverage": Panel("coverage A by t", {"focus/coverage": "coverage A"}, "t is 1 where the target is all noise. "
                            "A by chance does not depend on t.", unit_range=True),
    "share": Panel("share of pairs by t", {"share": "share of pairs"}, "How often a bin of t is drawn.", unit_range=True),
}  # fmt: skip


def value_of(row: Mapping[str, Any], line: str) -> Any:
    """A panel's line in one row of metrics, or in arrays of several rows' metrics; None where they do not have it."""
    first, second = names_of(line)
    if first not in row or (second and second not in row):
        return None
    return row[first] - row[second] if second else row[first]


def names_of(line: str) -> tuple[str, str]:
    """The metric that a panel's line shows, and the one that is taken from it, or ""."""
    first, _, second = line.partition("-")
    return first, second


def smooth(values: Floats, share: float = 0.05) -> Floats:
    """Running mean over a share of the run, of the finite values that there are; NaN where there are none."""
    kernel = np.ones(max(int(len(values) * share), 1))
    finite = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        means: Floats = np.convolve(np.where(finite, values, 0.0), kernel, "same") / np.convolve(finite, kernel, "same")
    return means


def draw_curves(rows: Iterable[Row], validation: Iterable[Row], path: Path) -> None:
    """Draws a run's curves to a PNG.

    Args:
        rows: metrics.jsonl, a row per optimiser step; of a long run only what is drawn of them is kept.
        validation: rows of the held-out evaluations, may be empty.
        path: the PNG.
    """
    from matplotlib.figure import Figure  # half a second, for which a page's reader of rows does not wait

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
