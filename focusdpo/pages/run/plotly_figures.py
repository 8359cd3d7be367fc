"""Panels of a run and its heat map as Plotly figures, which its page has people zoom and point at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from focusdpo.drawing.training_curves import Floats, Panel, smooth, value_of
from focusdpo.pages.run.binning import BinnedRun, Curve

STEPS = "steps"  # the plots of this group zoom together
ALARM = "#d08a00"
BAD = "#d62f2f"
UNIFORM = "Viridis"  # perceptually uniform
GRAY = "#888888"
MARKS = 200  # held-out values of a line, and alarms, at most
RARE, SPIKE = 0.5, 1.0  # percent of the bins at each end that may leave the axis, if they go further than it is high


def panel_figure(
    panel: Panel,
    run: BinnedRun,
    held_out: Sequence[dict[str, float]],
    alarms: Sequence[dict[str, Any]],
    colours: Sequence[str],
) -> go.Figure | None:
    """A panel's lines over the steps: range and smoothed mean of training, held-out values as points, alarms as marks.

    None where the run has none of the lines.
    """
    figure = go.Figure()
    curves = [run.curves[line] for line in panel.lines if line in run.curves]
    limits = None if panel.unit_range or panel.log else _limits(curves)
    for (line, label), colour in zip(panel.lines.items(), colours, strict=False):
        curve = run.curves.get(line)
        if curve is not None:
            _training(figure, run, curve, label, colour, panel)
            if limits is not None:
                _beyond(figure, run, curve, label, colour, limits)
        points = [(row["step"], value) for row in held_out if (value := value_of(row, line)) is not None]
        if points:
            _held_out(figure, points, label, colour)
    if not figure.data:
        return None
    if panel.level is not None:
        height, meaning = panel.level
        line_style = {"color": GRAY, "dash": "dot", "width": 1}
        note = {"font": {"size": 10, "color": GRAY}}
        figure.add_hline(height, line=line_style, annotation_text=meaning, annotation_position="top right", annotation=note)
    _alarms(figure, alarms)
    figure.update_layout(
        title_text=panel.title[0].upper() + panel.title[1:],
        meta={"x": STEPS, "note": panel.note},
        xaxis={"title": {"text": "optimiser step"}, "rangemode": "tozero"},
        yaxis={
            "type": "log" if panel.log else "linear",
            "exponentformat": "power",
            "rangemode": None if panel.smoothed else "tozero",
            "range": (-0.03, 1.03) if panel.unit_range else limits,
        },
        showlegend=len(panel.lines) > 1,
    )
    return figure


def heat_map(run: BinnedRun, lines: Sequence[str], tau: float) -> go.Figure | None:
    """Shares of pairs by their coverage A, over the steps; None where the run has none.

    Args:
        run: of the rows.
        lines: the bins of A, from 0 up, alike in width.
        tau: at which a pair changes its branch.
    """
    if not all(line in run.curves for line in lines):
        return None
    width = 1 / len(lines)
    figure = go.Figure(
        go.Heatmap(
            x=_f4(run.steps),
            y=[(i + 0.5) * width for i in range(len(lines))],
            z=_f4(np.stack([run.curves[line].mean for line in lines])),
            colorscale=UNIFORM,
            zmin=0,
            colorbar={"title": {"text": "share of pairs"}, "thickness": 14},
            hovertemplate="step %{x:.0f}<br>A about %{y:.2f}<br>%{z:.0%} of pairs<extra></extra>",
        )
    )
    # Over the map's colours, which are the same in light and dark.
    for line, name, dash in (("focus/coverage_chance", "A by chance", "dot"), ("focus/coverage_floor", "lowest A", "longdash")):
        if line in run.curves:
            level = {"color": "white", "dash": dash, "width": 1.5}
            figure.add_scatter(x=_f4(run.steps), y=_f4(run.curves[line].mean), name=name, mode="lines", line=level)
    figure.add_hline(
        tau, line={"color": "white", "dash": "dash", "width": 1.5}, annotation_text="tau", annotation_font_color="white"
    )
    figure.update_layout(
        title_text="Coverage A of the pairs",
        meta={
            "x": STEPS,
            "wide": True,
            "note": "Each column is a histogram: how many pairs have which A. What lies below tau is in the detail branch. "
            "Dotted: A of an S that knows nothing; long dashes: the lowest that so many matches can reach.",
        },
        xaxis={"title": {"text": "optimiser step"}},
        yaxis={"title": {"text": "coverage A"}, "range": [0, 1]},
        hovermode="closest",
        height=340,
        showlegend=False,
    )
    return figure


def _training(figure: go.Figure, run: BinnedRun, curve: Curve, label: str, colour: str, panel: Panel) -> None:
    there = np.isfinite(curve.mean)
    steps = run.steps[there]
    group = {"legendgroup": label}
    if run.width > 1:
        edge = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False, **group}
        figure.add_scatter(x=_f4(steps), y=_f4(curve.high[there]), name=f"{label}, highest", **edge)
        figure.add_scatter(
            x=_f4(steps),
            y=_f4(curve.low[there]),
            name=f"{label}, lowest",
            fill="tonexty",
            fillcolor=_clear(colour, 0.22 if len(panel.lines) < 3 else 0.12),
            **edge,
        )
    elif panel.smoothed:
        thin = {"color": _clear(colour, 0.4 if len(panel.lines) < 3 else 0.2), "width": 1}
        figure.add_scatter(
            x=_f4(steps), y=_f4(curve.mean[there]), mode="lines", line=thin, hoverinfo="skip", showlegend=False, **group
        )
    shown = smooth(curve.mean)[there] if panel.smoothed else curve.mean[there]
    figure.add_scatter(
        x=_f4(steps),
        y=_f4(shown),
        customdata=_f4(np.stack([curve.low[there], curve.high[there]], 1)),
        name=label,
        mode="lines",
        line={"color": colour, "width": 2},
        hovertemplate=f"%{{y:.4g}}  (%{{customdata[0]:.4g}} to %{{customdata[1]:.4g}})<extra>{label}</extra>",
        **group,
    )
    bad = curve.bad > 0
    if bad.any():
        figure.add_scatter(
            x=_f4(run.steps[bad]),
            y=_f4(_carried(curve.mean)[bad]),
            customdata=curve.bad[bad].astype("i4"),
            name=f"{label}: not finite",
            mode="markers",
            marker={"symbol": "x", "size": 8, "color": BAD},
            hovertemplate="%{customdata} values that are not finite<extra>" + label + "</extra>",
            **group,
        )


def _limits(curves: Sequence[Curve]) -> tuple[float, float] | None:
    """Limits of the axis where a few spikes would press all else flat; None where there are none."""
    if not curves:
        return None
    low, high = (np.concatenate([getattr(curve, side) for curve in curves]) for side in ("low", "high"))
    low, high = low[np.isfinite(low)], high[np.isfinite(high)]
    if not len(low):
        return None
    bottom, top = float(np.percentile(low, RARE)), float(np.percentile(high, 100 - RARE))
    span = top - bottom
    if span <= 0 or (high.max() - top <= SPIKE * span and bottom - low.min() <= SPIKE * span):
        return None
    return bottom - 0.15 * span, top + 0.15 * span


def _beyond(figure: go.Figure, run: BinnedRun, curve: Curve, label: str, colour: str, limits: tuple[float, float]) -> None:
    """Marks at the edge of the axis for what lies beyond it."""
    for edge, values, symbol, inwards in (
        (limits[1], curve.high, "triangle-up", -1),
        (limits[0], curve.low, "triangle-down", 1),
    ):
        with np.errstate(invalid="ignore"):
            beyond = (values - edge) * -inwards > 0
        if beyond.any():
            figure.add_scatter(
                x=_f4(run.steps[beyond]),
                y=np.full(int(beyond.sum()), edge + inwards * 0.1 * (limits[1] - limits[0]), np.float32),
                customdata=_f4(values[beyond]),
                name=f"{label}: off the axis",
                mode="markers",
                marker={"symbol": symbol, "size": 9, "color": colour, "line": {"color": BAD, "width": 1.5}},
                hovertemplate=f"off the axis: %{{customdata:.4g}}<extra>{label}</extra>",
                showlegend=False,
                legendgroup=label,
            )


def _held_out(figure: go.Figure, points: list[tuple[float, float]], label: str, colour: str) -> None:
    """Held-out values; of more than MARKS every n-th, and the last."""
    points = [*points[: -1 : max(-(-len(points) // MARKS), 1)], points[-1]]
    figure.add_scatter(
        x=[step for step, _ in points],
        y=[value for _, value in points],
        name=f"{label}, held out",
        mode="lines+markers",
        line={"color": colour, "width": 1.5, "dash": "dash"},
        marker={"size": 7, "line": {"color": GRAY, "width": 1}},
        hovertemplate=f"%{{y:.4g}}<extra>{label}, held out</extra>",
        legendgroup=label,
        showlegend=False,
    )


def _counted(names: Iterable[str]) -> str:
    return ", ".join(f"{count} {name}" if count > 1 else name for name, count in Counter(names).items())


def _alarms(figure: go.Figure, alarms: Sequence[dict[str, Any]]) -> None:
    """Marks at the top, on an axis of their own so that they do not change that of the values, and lines down from them."""
    if not alarms:
        return
    # Where they crowd, those of neighbouring steps share the mark of the first.
    first, last = (pick(alarm["step"] for alarm in alarms) for pick in (min, max))
    width = -(-(last - first + 1) // MARKS)
    together: dict[int, list[dict[str, Any]]] = {}
    for alarm in alarms:
        together.setdefault(int(alarm["step"] - first) // width, []).append(alarm)
    steps = [min(alarm["step"] for alarm in some) for some in together.values()]
    on_top: dict[str, Any] = {"yaxis": "y2", "name": "alarms", "showlegend": False}
    figure.add_scatter(
        x=[x for step in steps for x in (step, step, None)],
        y=[0, 1, None] * len(steps),
        mode="lines",
        line={"color": _clear(ALARM, 0.55), "width": 1, "dash": "dot"},
        hoverinfo="skip",
        **on_top,
    )
    figure.add_scatter(
        x=steps,
        y=[0.97] * len(steps),
        mode="markers",
        marker={"symbol": "triangle-down", "size": 9, "color": ALARM},
        text=[_counted(alarm["name"] for alarm in some) for some in together.values()],
        hovertemplate="%{text}<extra>alarm</extra>",
        **on_top,
    )
    figure.update_layout(yaxis2={"overlaying": "y", "visible": False, "range": [0, 1], "fixedrange": True})


def _carried(values: Floats) -> Floats:
    """The values, with the last finite one before it in place of each that is not; before the first, the first."""
    finite = np.flatnonzero(np.isfinite(values))
    if not len(finite):
        return np.zeros_like(values)
    places = np.searchsorted(finite, np.arange(len(values)), side="right") - 1
    return values[finite[places.clip(0)]]


def _f4(values: Floats) -> np.ndarray:
    """Four bytes a value are enough for a picture, and halve the page."""
    return values.astype(np.float32)


def _clear(colour: str, opacity: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"
