"""Says what became slower between two results of the same device; exits with 1 if something did.

python -m benchmarks.compare OLD.jsonl NEW.jsonl [--threshold 0.05]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.results import Result, read_result


def times(result: Result) -> dict[str, float]:
    """Seconds of our own cases and of the steps, by name."""
    kernels = {f"{row.group}, {row.shape}": row.median for row in result.rows if row.provider == result.ours}
    steps = {
        f"step, {step.measure}, {step.backbone}, {step.setting}, {timed.name}": timed.median
        for step in result.steps
        for timed in step.variants.values()
    }
    return kernels | steps


def compare(old: Result, new: Result, threshold: float) -> tuple[list[str], bool]:
    """Lines to print, and whether something lost more than the threshold.

    Raises:
        ValueError: the results are of different devices, or have nothing in common.
    """
    if old.machine["device"] != new.machine["device"]:
        raise ValueError(f"{old.path} is of {old.machine['device']!r}, {new.path} of {new.machine['device']!r}: not comparable")
    before, after = times(old), times(new)
    common = [name for name in before if name in after]
    if not common:
        raise ValueError(f"{old.path} and {new.path} have no case in common")
    lines, lost = [], False
    for name in common:
        change = after[name] / before[name] - 1
        mark = "LOST" if change > threshold else "won" if change < -threshold else ""
        lost |= mark == "LOST"
        lines.append(
            f"{name:70} {before[name] * 1e6:12.2f} us {after[name] * 1e6:12.2f} us {100 * change:+7.1f} % {mark}".rstrip()
        )
    missing = [name for name in before if name not in after]
    lines += [f"{name:70} is missing in {new.path}" for name in missing]
    return lines, lost


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--threshold", type=float, default=0.05, help="share of the time above which a loss is flagged")
    arguments = parser.parse_args(argv)
    try:
        old, new = read_result(arguments.old), read_result(arguments.new)
        lines, lost = compare(old, new, arguments.threshold)
    except (OSError, ValueError) as error:
        sys.exit(f"benchmarks.compare: error: {error}")
    print("\n".join(lines))
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()
