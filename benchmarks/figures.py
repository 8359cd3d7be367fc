"""The figures of a result: a summary, a roofline, bars against the peers, scaling curves, training steps."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from benchmarks.results import COMPILE, COMPILE_MAX, EAGER, OURS, PIECES, PLAIN_STEP, Result, Step

COLOURS = {
    OURS: "#0b5394",
    EAGER: "#e69138",
    COMPILE: "#6aa84f",
    COMPILE_MAX: "#38761d",
    PIECES: "#a64d79",
    "kornia": "#999999",
    "scikit-image": "#666666",
}
OTHER = "#000000"
GROUP_MARKERS = "osD^vP*Xd"
ON_CPU = "Times of a CPU: they say nothing about a GPU, and the Triton kernels are not among them."


def draw_roofline(result: Result, path: Path) -> None:
    """Bytes that have to move per second, over those bytes, below what the device can do."""
    rows = [row for row in result.rows if row.sweep is None]
    if not rows:
        return
    figure = Figure(figsize=(9, 5.5))
    axes = figure.subplots()
    x = np.geomspace(min(row.bytes for row in rows) / 2, max(row.bytes for row in rows) * 2, 200)
    handles = []
    if result.copy_bandwidth:
        roof = np.full_like(x, result.copy_bandwidth)
        if result.empty_launch:
            roof = np.minimum(roof, x / result.empty_launch)
        name = "a copy" + (" and one empty launch" if result.empty_launch else "")
        handles += axes.plot(x, roof / 1e9, color="black", linewidth=1.5, label=name)
    markers = dict(zip(result.groups(), itertools.cycle(GROUP_MARKERS), strict=False))
    for row in rows:
        style = {"color": _colour(row.provider), "marker": markers[row.group], "linestyle": "none", "alpha": 0.85}
        axes.plot(row.bytes, row.bandwidth / 1e9, markersize=6, **style)
    # Colours say who, shapes say what: names beside the points would lie on each other.
    handles += [Line2D([], [], color=_colour(p), marker="s", linestyle="none", label=p) for p in _providers(result)]
    handles += [Line2D([], [], color="grey", marker=m, linestyle="none", label=group) for group, m in markers.items()]
    axes.set(xscale="log", yscale="log", xlabel="bytes that have to move", ylabel="GB/s of those bytes (higher is better)")
    axes.legend(handles=handles, fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    _save(figure, result, path)


def draw_peers(result: Result, path: Path) -> None:
    """Time of every provider relative to ours, for the named shapes."""
    labels, shown = [], []
    for group in result.groups():
        for shape in dict.fromkeys(row.shape for row in result.rows if row.group == group and row.sweep is None):
            times = result.times(group, shape)
            if result.ours in times and len(times) > 1:
                labels.append(f"{group}\n{shape}, {time_text(times[result.ours].median)}")
                ratios = {name: row.median / times[result.ours].median for name, row in times.items()}
                shown.append({name: (ratio, f"{ratio:.3g}x") for name, ratio in ratios.items()})
    if not shown:
        return
    figure = Figure(figsize=(9, 0.75 * len(shown) + 1.5))
    axes = figure.subplots()
    _draw_bars(axes, result, labels, shown)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_ylim(len(shown), -0.3)
    axes.margins(x=0.12)
    axes.set(xscale="log", xlabel=f"time relative to {result.ours} (shorter is faster)")
    axes.legend(fontsize=7, loc="best")
    axes.grid(alpha=0.25, axis="x")
    _save(figure, result, path)


def draw_scaling(result: Result, path: Path) -> None:
    """Time over one size at a time."""
    pairs = [(g, s) for g in result.groups() for s in "NPR" if any(r.group == g and r.sweep == s for r in result.rows)]
    if not pairs:
        return
    columns = 3
    lines = -(-len(pairs) // columns)
    figure = Figure(figsize=(11, 2.7 * lines + 0.6))
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(pairs) :]:
        axes.remove()
    handles: dict[str, Any] = {}
    for axes, (group, size) in zip(grid.flat, pairs, strict=False):
        swept = [row for row in result.rows if row.group == group and row.sweep == size]
        for provider in _providers(result):
            rows = sorted((row for row in swept if row.provider == provider), key=lambda row: row.sizes[size])
            if rows:
                x, y = [row.sizes[size] for row in rows], [row.median * 1e6 for row in rows]
                error = [row.spread * 1e6 / 2 for row in rows]
                style = {"color": _colour(provider), "marker": "o", "markersize": 4}
                handles[provider] = axes.errorbar(x, y, error, **style)
        others = ", ".join(f"{name}={value}" for name, value in swept[0].sizes.items() if name != size)
        axes.set_title(f"{group}\n{others}", fontsize=7)
        axes.set(xscale="log", yscale="log", xlabel=size, ylabel="microseconds (lower is better)")
        axes.xaxis.label.set_size(7)
        axes.yaxis.label.set_size(7)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(values := sorted({row.sizes[size] for row in swept}), [str(value) for value in values])
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
    figure.legend(handles.values(), handles, loc="lower center", ncols=len(handles), fontsize=8)
    _save(figure, result, path, bottom=0.05)


def draw_steps(result: Result, path: Path) -> None:
    """Seconds and peak memory of each variant of a training step, and what the focus costs."""
    steps = [step for step in result.steps if step.variants]
    if not steps:
        return
    heights = [len(step.variants) + 2.5 for step in steps]
    figure = Figure(figsize=(11, 0.38 * sum(heights) + 0.8))
    grid = figure.subplots(len(steps), 2, height_ratios=heights, squeeze=False)
    for (left, right), step in zip(grid, steps, strict=True):
        timed = list(step.variants.values())
        names = [variant.name for variant in timed]
        colours = [COLOURS[OURS] if "this library" in name else "#9fc5e8" for name in names]
        bars = left.barh(names, [v.median for v in timed], xerr=[v.spread / 2 for v in timed], color=colours)
        left.bar_label(bars, labels=[f"{v.median:.4g} s{_more(step, v.name)}" for v in timed], fontsize=7, padding=3)
        left.set_xlabel("seconds per step (lower is better)", fontsize=8)
        left.set_title(f"{step.backbone}, {step.measure}: {step.setting}", fontsize=8, loc="left")
        memory = [(v.peak_memory or 0) / 2**30 for v in timed]
        if any(memory):
            right.bar_label(right.barh(names, memory, color=colours), fmt="%.4g", fontsize=7, padding=3)
            if "estimated_memory" in step.facts:
                estimate = step.facts["estimated_memory"] / 2**30
                right.axvline(estimate, color="black", linewidth=0.8, linestyle="--")
                right.set_title(f"dashed: estimate of `focusdpo models`, {estimate:.4g} GiB", fontsize=7, loc="right")
            right.set_xlabel("peak memory, GiB (lower is better)", fontsize=8)
            right.set_yticks([])
        else:
            right.set_axis_off()  # a CPU's is not measured
        for axes in (left, right):
            axes.invert_yaxis()
            axes.margins(x=0.45)
            axes.tick_params(labelsize=7)
    _save(figure, result, path)


def draw_summary(result: Result, path: Path) -> None:
    """What a reader asks first, on one page: kernels against their peers, memory, and what the focus costs in a step."""
    shapes = dict.fromkeys(row.shape.split(" B=")[0] for row in result.rows if row.sweep is None)
    steps = [(step, step.overhead()) for step in result.steps if step.measure == "overhead" and step.overhead() is not None]
    if not shapes or not steps:
        return
    compared = {
        shape: [g for g in result.groups() if result.ours in result.times(g, shape) and len(result.times(g, shape)) > 1]
        for shape in shapes
    }
    shape = next((shape for shape in shapes if compared[shape]), None)  # the plans begin with the one that matters
    if shape is None:
        return
    groups = compared[shape]
    figure = Figure(figsize=(14, 0.62 * len(groups) + 1.6))
    times, memory, overhead = figure.subplots(1, 3, width_ratios=(5, 3, 3.4))
    rows = [result.times(group, shape) for group in groups]
    starred = any(row.method == "events" for of_group in rows for row in of_group.values())
    note = "; * not from a graph: the host's launches count" if starred else ""
    for axes, value, label in (
        (times, lambda row: row.median * 1e6, f"microseconds (lower is better){note}"),
        (memory, lambda row: (row.extra_memory or 0) / 2**20, "extra memory, MiB (lower is better)"),
    ):
        bars: list[dict[str, tuple[float, str]]] = [{} for _ in rows]
        for group, of_group in zip(bars, rows, strict=True):
            for name, row in of_group.items():
                mark = "*" if axes is times and row.method == "events" else ""
                group[name] = value(row), f"{value(row):,.0f}{mark}" if value(row) >= 100 else f"{value(row):.3g}{mark}"
        _draw_bars(axes, result, groups, bars)
        axes.set(xlabel=label, ylim=(len(groups) - 0.1, -0.3), xscale="log" if axes is times else "symlog")
        axes.margins(x=0.14)
    times.set_title(f"kernels at {shape}", fontsize=9, loc="left")
    times.legend(fontsize=7, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(times.containers), frameon=False)
    memory.set_yticks([])
    for y, (step, interval) in enumerate(steps):
        assert interval is not None
        plain = step.variants[PLAIN_STEP].median
        middle, low, high = interval.percent_of(plain)
        overhead.errorbar(middle, y, xerr=[[middle - low], [high - middle]], fmt="o", color=COLOURS[OURS], capsize=4)
        words = f"{step.backbone}, {step.setting.removeprefix('one pair at ')}\n{plain:.3g} s a step"
        overhead.annotate(words, (0.02, y - 0.2), xycoords=("axes fraction", "data"), fontsize=7)
    overhead.axvline(0, color="black", linewidth=0.8)
    overhead.set(ylim=(len(steps) - 0.3, -0.7), yticks=[], xlabel="% added to a plain DPO step (lower is better)")
    overhead.set_title("paired steps: median and interval of 95 % or more", fontsize=9, loc="left")
    for axes in (times, memory, overhead):
        axes.grid(alpha=0.25, axis="x")
        axes.tick_params(labelsize=7)
        axes.xaxis.label.set_size(8)
    _save(figure, result, path)


def _draw_bars(axes: Axes, result: Result, names: Sequence[str], groups: Sequence[Mapping[str, tuple[float, str]]]) -> None:
    """Groups of bars under their names: for each provider that there is a bar, of a length and with a label."""
    providers = [p for p in _providers(result) if any(p in group for group in groups)]
    height = 0.8 / len(providers)
    for i, provider in enumerate(providers):
        bars = {y + i * height: group[provider] for y, group in enumerate(groups) if provider in group}
        lengths, labels = zip(*bars.values(), strict=True)
        drawn = axes.barh(list(bars), lengths, height, color=_colour(provider), label=provider)
        axes.bar_label(drawn, labels, fontsize=6, padding=2)
    axes.set_yticks(np.arange(len(groups)) + 0.4 - height / 2, names, fontsize=7)


def _more(step: Step, name: str) -> str:
    """A variant's overhead over the plain step, where they took turns."""
    overhead = step.overhead(name)
    if name == PLAIN_STEP or overhead is None:
        return ""
    return f"  ({100 * overhead.median / step.variants[PLAIN_STEP].median:+.2f} %)"


def time_text(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.4g} us"


def _colour(provider: str) -> str:
    return COLOURS.get(provider, OTHER)


def _providers(result: Result) -> list[str]:
    present = dict.fromkeys(row.provider for row in result.rows)
    return [*(p for p in COLOURS if p in present), *(p for p in present if p not in COLOURS)]


def _save(figure: Figure, result: Result, path: Path, bottom: float = 0.0) -> None:
    figure.suptitle(result.title, fontsize=9)
    if result.on_cpu:
        # Across the picture: whoever finds it without its text must not take it for a GPU's.
        figure.text(0.5, 0.5, "CPU", fontsize=120, color="red", alpha=0.08, ha="center", va="center", rotation=30)
        figure.text(0.5, 0.003, ON_CPU, fontsize=7, color="#990000", ha="center", va="bottom")
        bottom += 0.02
    figure.tight_layout(rect=(0, bottom, 1, 1))
    figure.savefig(path, dpi=130)
