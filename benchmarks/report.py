"""Draws a result: a roofline, bars against the peers, scaling curves, and a Markdown table.

python -m benchmarks.report RESULT.json [--out FOLDER]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the choice of a backend without a display
import numpy as np
from matplotlib.ticker import NullLocator

from benchmarks.cases import COMPILE, COMPILE_MAX, EAGER, OURS, PIECES
from benchmarks.results import Result, Row, read_result

COLOURS = {
    OURS: "#0b5394",
    EAGER: "#e69138",
    COMPILE: "#6aa84f",
    COMPILE_MAX: "#38761d",
    PIECES: "#a64d79",
    "kornia": "#999999",
    "scikit-image": "#666666",
}
MARKERS = dict(zip(COLOURS, "osvDPX*", strict=True))


def draw_roofline(result: Result, path: Path) -> None:
    """Bytes that have to move per second, over those bytes, below what the device can do."""
    rows = [row for row in result.rows if row.sweep is None]
    figure, axes = plt.subplots(figsize=(9, 5.5))
    x = np.geomspace(min(row.bytes for row in rows) / 2, max(row.bytes for row in rows) * 2, 200)
    if result.copy_bandwidth:
        roof = np.full_like(x, result.copy_bandwidth)
        if result.empty_launch:
            roof = np.minimum(roof, x / result.empty_launch)
        name = "copy bandwidth" + (" and one empty launch" if result.empty_launch else "")
        axes.plot(x, roof / 1e9, color="black", linewidth=1.5, label=f"limit: {name}")
    for provider in _providers(result):
        own = [row for row in rows if row.provider == provider]
        if own:
            axes.scatter(
                [row.bytes for row in own],
                [row.bandwidth / 1e9 for row in own],
                color=COLOURS[provider],
                marker=MARKERS[provider],
                s=30,
                alpha=0.85,
                label=provider,
            )
    best: dict[str, Row] = {}
    for row in rows:
        if row.provider == result.ours and row.bytes >= best.get(row.group, row).bytes:
            best[row.group] = row
    for row in best.values():
        axes.annotate(row.group, (row.bytes, row.bandwidth / 1e9), (5, 4), textcoords="offset points", fontsize=7)
    axes.set(xscale="log", yscale="log", xlabel="bytes that have to move", ylabel="GB/s of those bytes")
    _finish(figure, axes, result, path)


def draw_peers(result: Result, path: Path) -> None:
    """Time of every provider relative to ours, for the named shapes."""
    labels, shown = [], []
    for group in result.groups():
        for shape in dict.fromkeys(row.shape for row in result.rows if row.group == group and row.sweep is None):
            times = result.times(group, shape)
            if result.ours in times and len(times) > 1:
                labels.append(f"{group}\n{shape}, {_time(times[result.ours].median)}")
                shown.append({name: row.median / times[result.ours].median for name, row in times.items()})
    if not shown:
        return
    figure, axes = plt.subplots(figsize=(9, 0.75 * len(shown) + 1.5))
    height = 0.8 / len(_providers(result))
    for i, provider in enumerate(_providers(result)):
        places = [(y, ratios[provider]) for y, ratios in enumerate(shown) if provider in ratios]
        axes.barh([y + i * height for y, _ in places], [r for _, r in places], height, color=COLOURS[provider], label=provider)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(np.arange(len(shown)) + 0.4, labels, fontsize=7)
    axes.set_ylim(len(shown), -0.2)
    axes.set(xscale="log", xlabel=f"time relative to {result.ours} (less is faster)")
    _finish(figure, axes, result, path)


def draw_scaling(result: Result, path: Path) -> None:
    """Time over one size at a time."""
    pairs = [(g, s) for g in result.groups() for s in "NPR" if any(r.group == g and r.sweep == s for r in result.rows)]
    if not pairs:
        return
    columns = 3
    lines = -(-len(pairs) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(11, 2.7 * lines), squeeze=False)
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
                style = {"color": COLOURS[provider], "marker": MARKERS[provider], "markersize": 4}
                handles[provider] = axes.errorbar(x, y, error, **style)
        others = ", ".join(f"{name}={value}" for name, value in swept[0].sizes.items() if name != size)
        axes.set_title(f"{group}\n{others}", fontsize=7)
        axes.set(xscale="log", yscale="log", xlabel=size, ylabel="microseconds")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(values := sorted({row.sizes[size] for row in swept}), [str(value) for value in values])
        axes.tick_params(labelsize=7, which="both")
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=len(handles), fontsize=8, frameon=False)
    figure.suptitle(result.title, fontsize=9)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_steps(result: Result, path: Path) -> None:
    """Seconds and peak memory of each variant of a training step."""
    if not result.steps:
        return
    figure, grid = plt.subplots(len(result.steps), 2, figsize=(10, 0.42 * sum(len(s["variants"]) + 3 for s in result.steps)))
    for (left, right), step in zip(np.reshape(grid, (-1, 2)), result.steps, strict=True):
        names = [v["name"] for v in step["variants"]]
        values = [(left, [v["seconds"] for v in step["variants"]], "seconds per step")]
        if all(v["peak_memory"] is not None for v in step["variants"]):
            values.append((right, [v["peak_memory"] / 2**30 for v in step["variants"]], "peak memory, GiB"))
        else:
            right.set_axis_off()  # a CPU's is not measured
        for axes, bars, label in values:
            drawn = axes.barh(names, bars, color=[COLOURS[OURS] if "this library" in n else "#9fc5e8" for n in names])
            axes.bar_label(drawn, fmt="%.4g", fontsize=7, padding=2)
            axes.invert_yaxis()
            axes.margins(x=0.15)
            axes.set_xlabel(label, fontsize=8)
            axes.tick_params(labelsize=7)
        right.set_yticks([])
        left.set_title(f"{step['backbone']}, {step['setting']}", fontsize=8, loc="left")
    figure.suptitle(result.title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def markdown(result: Result) -> str:
    """The tables."""
    lines = [f"# {result.title}", ""]
    if result.copy_bandwidth:
        limits = f"Measured in the same run: copy {result.copy_bandwidth / 1e9:.0f} GB/s (read plus written)"
        if result.empty_launch:
            limits += f", empty launch {result.empty_launch * 1e6:.2f} us"
        lines += [f"{limits}.", ""]
    if result.tests:
        lines += [f"**{result.tests}**", ""]
    if result.machine["device_type"] == "cpu":
        lines += ["These are times of a CPU. They say nothing about a GPU, and the Triton kernels are not among them.", ""]
    for group in result.groups():
        formula = next(row.formula for row in result.rows if row.group == group)
        lines += [f"## {group}", "", f"Bytes that have to move per pair: {formula} (pixels and scores fp32, states bf16).", ""]
        lines += ["| shape | provider | time | spread | GB/s | of copy | vs ours | launches | extra memory | error | timing |"]
        lines += ["|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---|", *_table_rows(result, group), ""]
    for step in result.steps:
        lines += [f"## Step: {step['backbone']}, {step['setting']}", ""]
        lines += ["| variant | s per step | spread | vs first | in the focus part | pairs/s | peak memory, GiB |"]
        lines += ["|---|---:|---:|---:|---:|---:|---:|"]
        first = step["variants"][0]["seconds"]
        for v in step["variants"]:
            memory = "-" if v["peak_memory"] is None else f"{v['peak_memory'] / 2**30:.3f}"
            share = "-" if v["focus_share"] is None else f"{100 * v['focus_share']:.2f} %"
            ratio = v["seconds"] / first
            cells = (
                v["name"],
                f"{v['seconds']:.4f}",
                f"{v['spread']:.4f}",
                f"{ratio:.4f}",
                share,
                f"{v['pairs_per_second']:.3f}",
            )
            lines.append(f"| {' | '.join(cells)} | {memory} |")
        lines.append("")
    return "\n".join(lines)


def _table_rows(result: Result, group: str) -> Iterator[str]:
    for row in (row for row in result.rows if row.group == group):
        ours = result.times(group, row.shape).get(result.ours)
        copy = f"{100 * row.bandwidth / result.copy_bandwidth:.0f} %" if result.copy_bandwidth else "-"
        cells = (
            row.shape,
            row.provider,
            _time(row.median),
            f"{100 * row.spread / row.median:.0f} %",
            f"{row.bandwidth / 1e9:.1f}",
            copy,
            f"{row.median / ours.median:.2f}x" if ours else "-",
            "-" if row.launches is None else str(row.launches),
            "-" if row.extra_memory is None else f"{row.extra_memory / 2**20:.2f} MiB",
            f"{row.error:.0e}",
            row.method + ("" if row.cold or result.machine["device_type"] == "cpu" else ", inputs in the cache"),
        )
        yield f"| {' | '.join(cells)} |"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.2f} us"


def _providers(result: Result) -> list[str]:
    present = {row.provider for row in result.rows}
    return [provider for provider in COLOURS if provider in present]


def _finish(figure: plt.Figure, axes: plt.Axes, result: Result, path: Path) -> None:
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, loc="best")
    axes.set_title(result.title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write_report(result: Result, folder: Path) -> list[Path]:
    """Writes report.md and its figures; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / "report.md"
    report.write_text(markdown(result) + "\n")
    if result.rows:
        draw_roofline(result, folder / "roofline.png")
        draw_peers(result, folder / "peers.png")
        draw_scaling(result, folder / "scaling.png")
    draw_steps(result, folder / "steps.png")
    names = ("report.md", "roofline.png", "peers.png", "scaling.png", "steps.png")
    return [folder / name for name in names if (folder / name).exists()]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, help="JSON file of a run")
    parser.add_argument("--out", type=Path, help="folder for report.md and the figures (default: beside the result)")
    arguments = parser.parse_args(argv)
    try:
        result = read_result(arguments.result)
    except (OSError, ValueError) as error:
        sys.exit(f"benchmarks.report: error: {error}")
    for path in write_report(result, arguments.out or arguments.result.parent):
        print(path)


if __name__ == "__main__":
    main()
