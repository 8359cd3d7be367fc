"""A result file: JSON Lines, where every record is appended the moment it is known.

A process may be killed at any moment, and several may write to one file: a record is one line, written at once, and a line
that was cut short is passed over. Records by their "kind":

    run       device, versions, commit and date, by the first process that measures
    plan      a part of a run on a GPU, and the seconds it may take; `part` says how it ended
    limits    what the device can do, measured in the same run
    begin     a case has begun; it ends with `kernel`, `variant`, `done`, `failed` or `skipped` of the same "case"
    cut       a case that had begun when its part's time was over: another run may take it up
    kernel    a `Row`
    variant   another launch configuration of a kernel, and its time
    workload  a model, what of it is trained, and what is known of its step beside its time
    training  a whole run of `focusdpo train`: pairs a second, memory and its estimate, and what differs after a kill
    step      one timed training step; steps of the same case and round took turns
    warm-up   one that is not timed
    test      a test and its outcome
    note      what a reader has to know of the run, in words

This module imports neither torch nor the library: what watches over a run must not break with it.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

# What must agree for two processes to write into one file.
IDENTITY = ("device", "python", "torch", "triton", "commit")
ENDS = ("kernel", "variant", "done", "failed", "skipped")
TIMES = ("median", "seconds")
NEEDED: dict[str, tuple[str, ...]] = {
    "run": ("device", "device_type", "torch", "triton"),
    "plan": ("name",),
    "part": ("name", "ended"),
    "begin": ("case",),
    "done": ("case",),
    "skipped": ("case",),
    "failed": ("case", "why"),
    "cut": ("case", "why"),
    "variant": ("case", "kernel", "shape", "constants", "options", "splits", "median", "bytes"),
    "workload": ("backbone", "setting"),
    "step": ("case", "measure", "backbone", "setting", "variant", "round", "seconds", "peak_memory"),
    "training": ("case", "backbone", "setting", "pairs_per_second", "peak_memory", "estimated_memory"),
    "test": ("case", "outcome"),
    "note": ("text",),
}


class Recorder:
    """Appends records to a file; without a path it forgets them.

    Args:
        path: of the file, made with its folder where there is none.
    """

    def __init__(self, path: str | Path | None) -> None:
        self.path = None if path is None else Path(path)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def append(self, kind: str, **record: Any) -> None:
        if self.path is None:
            return
        line = json.dumps({"kind": kind, **record}) + "\n"
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = "\n" + line  # what somebody was killed over
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def open_run(self, machine: Mapping[str, Any], commit: str | None) -> None:
        """Says what is measured, once a file.

        Raises:
            ValueError: the file has records of another device, of other versions or of another commit, or is something else.
        """
        if self.path is None:
            return
        if is_foreign(self.path):
            raise ValueError(f"{self.path}: is not a result of these benchmarks; choose another file")
        now = {**machine, "commit": commit or ""}
        begun = next((record for record in self.records() if record["kind"] == "run"), None)
        if begun is None:
            self.append("run", date=datetime.datetime.now(datetime.UTC).date().isoformat(), **now)
        elif differing := [name for name in IDENTITY if begun.get(name) != now.get(name)]:
            what = ", ".join(f"{name} {begun.get(name)!r} and not {now.get(name)!r}" for name in differing)
            raise ValueError(f"{self.path}: holds a run of {what}; one file is for one run, choose another")

    def ended(self) -> set[str]:
        """The cases that need not be begun again."""
        return {r["case"] for r in self.records() if r["kind"] in ENDS}

    def unfinished(self, since: int = 0) -> list[str]:
        """The cases that were begun and have not ended, of those begun after so many records."""
        ended = self.ended()
        begun = (r["case"] for r in self.records()[since:] if r["kind"] == "begin")
        return list(dict.fromkeys(case for case in begun if case not in ended))

    def records(self) -> list[dict[str, Any]]:
        return [] if self.path is None else read_records(self.path)


def is_foreign(path: Path) -> bool:
    """Whether a file is something else than a result, or than the beginning of one."""
    if not path.exists() or read_records(path):
        return False
    with path.open("rb") as stream:
        start = stream.read(10)
    return not b'{"kind": "'.startswith(start)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file in order, none where there is no file.

    Lines that were cut short, and records without what their kind needs or with a time that is none, are passed over.
    """
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and _is_whole(record):
            records.append(record)
    return records


def _is_whole(record: dict[str, Any]) -> bool:
    kind = record.get("kind")
    if not isinstance(kind, str) or any(name not in record for name in NEEDED.get(kind, ())):
        return False
    times = [record[name] for name in TIMES if name in record and kind in ("kernel", "variant", "step")]
    return all(isinstance(t, float | int) and 0 < t < float("inf") for t in times)


@dataclass(frozen=True)
class Row:
    """One provider of one group at one shape. Times in seconds."""

    group: str
    shape: str
    sweep: str | None
    sizes: dict[str, int]
    provider: str
    median: float
    spread: float  # between the quartiles
    bytes: int
    formula: str
    launches: int | None
    extra_memory: int | None
    error: float
    method: str
    cold: bool  # whether the inputs do not fit the cache together

    @property
    def bandwidth(self) -> float:
        """Bytes that have to move, per second."""
        return self.bytes / self.median


NEEDED["kernel"] = ("case", *(f.name for f in fields(Row)))
