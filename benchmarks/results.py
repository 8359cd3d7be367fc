"""What the records of a run (benchmarks/records.py) say together: rows, steps and their paired differences, tests, failures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from benchmarks.records import ENDS, Row, read_records

OURS, EAGER, COMPILE, COMPILE_MAX, PIECES = "focusdpo", "eager", "torch.compile", "torch.compile max-autotune", "pieces"
PLAIN_STEP, FOCUS_STEP = "plain Diffusion-DPO", "FocusDPO, this library"


@dataclass
class Timed:
    """The timed steps of one variant, in order: seconds, and bytes at the peak where the device tells them.

    `turns` has both by case and round.
    """

    name: str
    turns: dict[tuple[str, int], tuple[float, int | None]] = field(default_factory=dict)

    def add(self, case: str, round_: int, seconds: float, peak: int | None) -> None:
        self.turns.setdefault((case, round_), (seconds, peak))  # not the same line twice

    def forget(self, case: str) -> None:
        """Leaves out what a process measured of a case that another began anew."""
        self.turns = {turn: step for turn, step in self.turns.items() if turn[0] != case}

    @property
    def seconds(self) -> list[float]:
        return [seconds for seconds, _ in self.turns.values()]

    @property
    def peak_memory(self) -> int | None:
        return max((peak for _, peak in self.turns.values() if peak is not None), default=None)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Between the quartiles."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return high - low


@dataclass(frozen=True)
class Interval:
    """The median of paired differences and an interval that holds the true one with at least the given confidence."""

    median: float
    low: float
    high: float
    confidence: float
    pairs: int

    def percent_of(self, time: float) -> tuple[float, float, float]:
        """Median, low and high as shares of a time."""
        one = time / 100
        return self.median / one, self.low / one, self.high / one


@dataclass
class Step:
    """What was measured of a training step of one model at one setting, in one go.

    `measure` is "overhead", "keeping" or "throughput" (benchmarks/step.py); `facts` are of the model and the setting.
    """

    backbone: str
    setting: str
    measure: str
    facts: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, Timed] = field(default_factory=dict)

    def overhead(self, name: str = FOCUS_STEP, against: str = PLAIN_STEP) -> Interval | None:
        """Seconds that one variant takes longer than another, from the rounds in which they took turns."""
        return paired_interval([one - other for (one, _), (other, _) in self._pairs(name, against)])

    def extra_memory(self, name: str = FOCUS_STEP, against: str = PLAIN_STEP) -> int | None:
        """Bytes by which one variant's peak is above another's, at most in a round in which they took turns; None on a CPU."""
        peaks = [(one, other) for (_, one), (_, other) in self._pairs(name, against)]
        return max((one - other for one, other in peaks if one is not None and other is not None), default=None)

    def _pairs(self, name: str, against: str) -> list[tuple[tuple[float, int | None], tuple[float, int | None]]]:
        one, other = (self.variants[each].turns if each in self.variants else {} for each in (name, against))
        return [(one[turn], other[turn]) for turn in one if turn in other]


def paired_interval(differences: list[float], confidence: float = 0.95) -> Interval | None:
    """Median of differences between order statistics that hold the true median, whatever the distribution (a sign test).

    None for fewer than six: all of five differences hold it with a confidence of 0.94 only.
    """
    n, ordered = len(differences), sorted(differences)
    inside = None
    for k in range(1, n // 2 + 1):  # between the k-th smallest and the k-th largest
        coverage = 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n
        if coverage < confidence:
            break
        inside = Interval(statistics.median(ordered), ordered[k - 1], ordered[n - k], coverage, n)
    return inside


@dataclass(frozen=True)
class Result:
    """A result file as a whole."""

    path: Path
    machine: dict[str, Any]
    copy_bandwidth: float | None
    read_bandwidth: float | None
    empty_launch: float | None
    rows: list[Row]
    steps: list[Step]
    variants: list[dict[str, Any]]
    training: list[dict[str, Any]]
    tests: dict[str, list[dict[str, Any]]]  # by outcome
    failed: list[dict[str, Any]]  # cases that gave no number, each with why
    notes: list[str]
    parts: list[dict[str, Any]]  # of the plan, with `ended` and `seconds` where they ran

    @property
    def on_cpu(self) -> bool:
        return bool(self.machine["device_type"] == "cpu")

    @property
    def ours(self) -> str:
        """What the library runs on this device; older runs on a CPU have it as the specification."""
        return OURS if any(row.provider == OURS for row in self.rows) or not self.on_cpu else EAGER

    @property
    def title(self) -> str:
        m = self.machine
        commit = (m.get("commit") or "unknown")[:10]
        return f"{m['device']}, torch {m['torch']}, triton {m['triton']}, {m.get('date', '')}, commit {commit}"

    def groups(self) -> list[str]:
        return list(dict.fromkeys(row.group for row in self.rows))

    def times(self, group: str, shape: str) -> dict[str, Row]:
        """Rows of one group and shape by provider."""
        return {row.provider: row for row in self.rows if row.group == group and row.shape == shape}


def read_result(path: str | Path) -> Result:
    """Reads a result file, whole or cut short; ValueError where it is none."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file")
    records = read_records(path)
    runs = [record for record in records if record["kind"] == "run"]
    if not runs:
        raise ValueError(f"{path}: names no run; expected a file that `make bench` or benchmarks/gpu.sh wrote")
    limits: dict[str, Any] = next((r for r in reversed(records) if r["kind"] == "limits"), {})
    names = {f.name for f in fields(Row)}
    rows = {r["case"]: Row(**{k: v for k, v in r.items() if k in names}) for r in records if r["kind"] == "kernel"}
    variants = {r["case"]: r for r in records if r["kind"] == "variant"}
    tests: dict[str, list[dict[str, Any]]] = {}
    for test in _last_of_each(records).values():
        tests.setdefault(test["outcome"], []).append(test)
    return Result(
        path,
        runs[0],
        limits.get("copy_bytes_per_second"),
        limits.get("read_bytes_per_second"),
        limits.get("empty_launch_seconds"),
        list(rows.values()),
        list(_steps(records)),
        list(variants.values()),
        list({r["case"]: r for r in records if r["kind"] == "training"}.values()),
        tests,
        list(_failed(records)),
        [r["text"] for r in records if r["kind"] == "note"],
        list(_parts(records)),
    )


def _last_of_each(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of a test that ran twice the last outcome counts, but a failure's own reason before that of the worker it took along."""
    tests: dict[str, dict[str, Any]] = {}
    for record in records:
        if record["kind"] == "test":
            earlier = tests.get(record["case"])
            if earlier is None or not earlier["outcome"] == record["outcome"] == "failed":
                tests[record["case"]] = record
    return tests


def _failed(records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Cases that ended without a number, or not at all, and in no later process with one."""
    failed: dict[str, dict[str, Any]] = {}
    for record in records:
        kind, case = record["kind"], record.get("case", "")
        if kind in ("failed", "cut"):
            failed[case] = record
        elif kind == "begin":
            failed[case] = {"case": case, "why": "cut short"}
        elif kind in ENDS:
            failed.pop(case, None)
    yield from failed.values()


def _steps(records: list[dict[str, Any]]) -> Iterator[Step]:
    steps: dict[tuple[str, str, str], Step] = {}
    facts: dict[tuple[str, str], dict[str, Any]] = {}
    begun: set[str] = set()  # anew, without a step since
    for record in records:
        kind, case = record["kind"], record.get("case", "")
        if kind == "begin":
            begun.add(case)
        elif kind == "workload":
            known = facts.setdefault((record["backbone"], record["setting"]), {})
            known |= {k: v for k, v in record.items() if k not in ("kind", "backbone", "setting")}
        elif kind == "step":
            key = record["backbone"], record["setting"], record["measure"]
            step = steps.setdefault(key, Step(*key))
            if case in begun:
                begun.remove(case)
                for timed in step.variants.values():
                    timed.forget(case)
            timed = step.variants.setdefault(record["variant"], Timed(record["variant"]))
            timed.add(case, record["round"], record["seconds"], record["peak_memory"])
    for where in facts:
        if not any(key[:2] == where for key in steps):
            steps[*where, "facts"] = Step(*where, "facts")
    for step in steps.values():
        step.facts = facts.get((step.backbone, step.setting), {})
        step.variants = {name: timed for name, timed in step.variants.items() if timed.seconds}
        yield step


def _parts(records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    parts: dict[str, dict[str, Any]] = {}
    for record in records:
        fields_ = {k: v for k, v in record.items() if k != "kind"}
        if record["kind"] == "plan":
            parts[record["name"]] = fields_
        elif record["kind"] == "part":
            parts.setdefault(record["name"], {}).update(fields_)
    yield from parts.values()
