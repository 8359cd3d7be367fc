"""Draws a result: figures (benchmarks/figures.py), and Markdown tables.

python -m benchmarks.report RESULT.jsonl [--out FOLDER]

A result that was cut short is drawn as far as it goes.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import figures
from benchmarks.figures import ON_CPU, time_text
from benchmarks.records import Row
from benchmarks.results import FOCUS_STEP, PLAIN_STEP, Interval, Result, Step, Timed, read_result


def markdown(result: Result) -> str:
    """The tables."""
    lines = [f"# {result.title}", ""]
    if result.on_cpu:
        lines += [f"**{ON_CPU}**", ""]
    lines += [line for note in result.notes for line in (f"> {note}", "")]
    lines += [*_tests(result), *_limits(result)]
    for group in result.groups():
        formula = next(row.formula for row in result.rows if row.group == group)
        lines += [f"## {group}", "", f"Bytes that have to move per pair: {formula} (pixels and scores fp32, states bf16).", ""]
        lines += _table([_kernel(row, result) for row in result.rows if row.group == group])
    for step in result.steps:
        lines += [f"## Step, {step.measure}: {step.backbone}, {step.setting}", "", *_step(step), ""]
    for run in result.training:
        lines += [f"## focusdpo train: {run['backbone']}, {run['setting']}", "", *_training(run), ""]
    if result.variants:
        lines += ["## Launch configurations", "", *_table([_variant(one, result) for one in result.variants])]
    if result.failed:
        lines += ["## Gave no number", ""]
        lines += [f"- {failed['case']}: {_line(failed['why'])}" for failed in result.failed] + [""]
    if result.parts:
        lines += ["## How the run went", "", *_table([_part(part) for part in result.parts])]
    return "\n".join(lines)


def _tests(result: Result) -> list[str]:
    if not result.tests:
        return []
    counts = ", ".join(f"{len(tests)} {outcome}" for outcome, tests in sorted(result.tests.items(), key=lambda t: -len(t[1])))
    red = result.tests.get("failed", [])
    text = f"Tests of this run: {counts}." + (" Times below passed the gates of their own cases." if red else "")
    lines = [f"**{text}**" if red else text, ""]
    lines += [f"- {test['case']}: {_line(test.get('why', ''))}" for test in red]
    cut = [p["name"] for p in result.parts if p["name"].endswith("tests") and not p.get("ended", "").startswith("done")]
    lines += [f"**{' and '.join(cut)} did not come to their end: what did not run is not counted.**", ""] if cut else []
    return [*lines, ""] if red else lines


def _line(text: str) -> str:
    return (text.splitlines() or ["no reason is recorded"])[0][:300]


def _limits(result: Result) -> list[str]:
    if not result.copy_bandwidth:
        return []
    text = f"Measured in the same run: copy {_significant(result.copy_bandwidth / 1e9)} GB/s (read plus written)"
    if result.read_bandwidth:
        text += f", reading {_significant(result.read_bandwidth / 1e9)} GB/s"
    if result.empty_launch:
        text += f", empty launch {result.empty_launch * 1e6:.2f} us"
    return [f"{text}.", ""]


Cells = dict[str, str | None]  # of a table's row, by column; None where nothing was measured


def _table(rows: Sequence[Cells], words: int = 2) -> list[str]:
    """A Markdown table of the columns in which something was measured, of which the first few have words and not numbers."""
    columns = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    lines = [columns, *([row[name] or "-" for name in columns] for row in rows)]
    head, *body = ["| " + " | ".join(cells) + " |" for cells in lines]
    return [head, "|" + "".join("---|" if i < words else "---:|" for i in range(len(columns))), *body, ""]


def _kernel(row: Row, result: Result) -> Cells:
    ours = result.times(row.group, row.shape).get(result.ours)
    return {
        "shape": row.shape,
        "provider": row.provider,
        "time (lower is better)": time_text(row.median),
        "spread": f"{100 * row.spread / row.median:.0f} %",
        **_rates(row.bandwidth, result),
        "time vs ours": f"{row.median / ours.median:.2f}x" if ours else None,
        "launches": None if row.launches is None else str(row.launches),
        "extra memory": None if row.extra_memory is None else f"{row.extra_memory / 2**20:.2f} MiB",
        "error": f"{row.error:.0e}",
        "timing": row.method + ("" if row.cold or result.on_cpu else ", inputs in the cache"),
    }


def _rates(bandwidth: float, result: Result) -> Cells:
    share = f"{100 * bandwidth / result.copy_bandwidth:.1f} %" if result.copy_bandwidth else None
    return {"GB/s (higher is better)": _significant(bandwidth / 1e9), "of copy": share}


def _variant(variant: dict[str, Any], result: Result) -> Cells:
    splits = {} if variant["splits"] is None else {"splits": variant["splits"]}
    changed = variant["constants"] | variant["options"] | splits
    return {
        "kernel, shape": f"{variant['kernel']}, {variant['shape']}",
        "configuration": ", ".join(f"{name}={value}" for name, value in changed.items()) or "as shipped",
        "time (lower is better)": time_text(variant["median"]),
        **_rates(variant["bytes"] / variant["median"], result),
    }


def _part(part: dict[str, Any]) -> Cells:
    seconds, limit = str(part.get("seconds", "-")), f"{part.get('limit', 0):.0f}"
    return {"part": part["name"], "ended": part.get("ended", "cut short"), "seconds": seconds, "at most": limit}


def _timed(timed: Timed) -> Cells:
    return {
        "variant": timed.name,
        "s per step (lower is better)": f"{timed.median:.4f}",
        "spread": f"{timed.spread:.4f}",
        "steps": str(len(timed.seconds)),
        "pairs/s (higher is better)": f"{1 / timed.median:.3f}",
        "peak memory (lower is better)": None if timed.peak_memory is None else f"{timed.peak_memory / 2**30:.3f} GiB",
    }


def _step(step: Step) -> Iterator[str]:
    facts = step.facts
    if "parameters" in facts:
        yield f"{facts['parameters'] / 1e9:.2f} B parameters, {facts['lora_parameters'] / 1e6:.2f} M trained, {facts['dtype']}."
        yield ""
    if step.variants:
        yield from _table([_timed(timed) for timed in step.variants.values()], words=1)
    for name in step.variants:
        overhead = step.overhead(name)
        if overhead is not None and name != PLAIN_STEP:
            yield f"- {name} against {PLAIN_STEP}, in turn: {overhead_text(overhead, step.variants[PLAIN_STEP].median)}."
    if step.measure not in ("overhead", "facts"):
        return
    extra = step.extra_memory()
    if extra is not None:
        yield f"- Peak memory of the focus above the plain step of the same round: {extra / 2**20:+.2f} MiB at most."
    focus = step.variants[FOCUS_STEP].peak_memory if FOCUS_STEP in step.variants else None
    if "estimated_memory" in facts and focus:
        estimate = facts["estimated_memory"]
        yield f"- `focusdpo models` estimates {estimate / 2**30:.3f} GiB, {100 * (estimate / focus - 1):+.1f} % of the peak."
    for name, part in facts.get("focus_part", {}).items():
        device = "" if part["device_seconds"] is None else f", {part['device_seconds'] * 1e6:.0f} us on the device"
        yield f"- `{name}`: {part['calls']:.0f} calls a step, {part['host_seconds'] * 1e6:.0f} us of the host{device}."
    launches = facts.get("launches", {})
    if PLAIN_STEP in launches and FOCUS_STEP in launches:
        plain, focus = launches[PLAIN_STEP], launches[FOCUS_STEP]
        yield f"- Launches a step: {plain['all']} plain, {focus['all']} with the focus, of them {focus['ours']} our kernels."


def _training(run: dict[str, Any]) -> Iterator[str]:
    peak, estimate = run["peak_memory"], run["estimated_memory"]
    yield f"- {run['steps']} steps, {run['pairs_per_second']:.3f} pairs/s, {run['seconds']:.0f} s in all."
    share = f"{100 * (estimate / peak - 1):+.1f} %"
    yield f"- Peak {peak / 2**30:.3f} GiB; `focusdpo models` estimates {estimate / 2**30:.3f} for a GPU, {share}."
    if "killed_after" in run:
        bits = "; ".join(run["differences"]) or "the same numbers and the same adapter, bit by bit"
        yield f"- Killed after step {run['killed_after']} and resumed: {bits}."


def overhead_text(overhead: Interval, of: float) -> str:
    """A paired difference in milliseconds and as a share of a time."""
    middle, low, high = overhead.percent_of(of)
    return (
        f"{1e3 * overhead.median:+.2f} ms [{1e3 * overhead.low:+.2f}, {1e3 * overhead.high:+.2f}], {middle:+.2f} % "
        f"[{low:+.2f}, {high:+.2f}] (median of {overhead.pairs} pairs, {100 * overhead.confidence:.1f} % interval)"
    )


def _significant(value: float) -> str:
    """Four significant digits, without an exponent."""
    digits = max(3 - math.floor(math.log10(value)), 0) if value > 0 else 0
    return f"{value:.{digits}f}"


def write_report(result: Result, folder: Path) -> list[Path]:
    """Writes report.md and its figures; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / "report.md"
    report.write_text(markdown(result) + "\n")
    written = [report]
    for name in ("summary", "roofline", "peers", "scaling", "steps"):
        file = folder / f"{name}.png"
        getattr(figures, f"draw_{name}")(result, file)
        written += [file] * file.exists()
    return written


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, help="JSON Lines of a run")
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
