"""A result file: pytest-benchmark's JSON with our figures in `extra_info`, the device's limits, and the steps measured."""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import EAGER, OURS
from benchmarks.machine import commit_info, machine_info


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


@dataclass(frozen=True)
class Result:
    """A result file."""

    path: Path
    machine: dict[str, Any]
    commit: str
    date: str
    copy_bandwidth: float | None
    empty_launch: float | None
    rows: list[Row]
    steps: list[dict[str, Any]]
    tests: str  # what is to be known of the tests of the same run

    @property
    def ours(self) -> str:
        """What the library runs on this device: its kernels, or on a CPU its PyTorch backend."""
        return OURS if self.machine["device_type"] != "cpu" else EAGER

    @property
    def title(self) -> str:
        m = self.machine
        return f"{m['device']}, torch {m['torch']}, triton {m['triton']}, {self.date}, commit {self.commit[:10] or 'unknown'}"

    def groups(self) -> list[str]:
        return list(dict.fromkeys(row.group for row in self.rows))

    def times(self, group: str, shape: str) -> dict[str, Row]:
        """Rows of one group and shape by provider."""
        return {row.provider: row for row in self.rows if row.group == group and row.shape == shape}


def read_result(path: str | Path) -> Result:
    """Reads a result file; ValueError where it is none."""
    path = Path(path)
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: no JSON: {error}") from error
    if "machine_info" not in content or "benchmarks" not in content:
        raise ValueError(
            f"{path}: has no machine_info or benchmarks; expected a file that `make bench` or benchmarks.step wrote"
        )
    limits, rows = content.get("limits", {}), []
    for one in content["benchmarks"]:
        info, stats = one["extra_info"], one["stats"]
        named = {field.name: info[field.name] for field in fields(Row) if field.name in info}
        rows.append(Row(median=stats["median"], spread=stats["iqr"], **named))
    commit = (content.get("commit_info") or {}).get("id") or ""
    return Result(
        path,
        content["machine_info"],
        commit,
        content.get("date", ""),
        limits.get("copy_bytes_per_second"),
        limits.get("empty_launch_seconds"),
        rows,
        content.get("steps", []),
        content.get("tests", ""),
    )


def add_step(path: Path, step: dict[str, Any], device: torch.device) -> None:
    """Puts a measured step into a result file, in place of one of the same backbone and setting.

    The file is made where there is none; ValueError for one of another device.
    """
    if path.exists():
        machine = read_result(path).machine
        if machine["device"] != machine_info(device)["device"]:
            raise ValueError(f"{path}: is of {machine['device']!r}; one file holds the results of one device")
        content = json.loads(path.read_text())
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        content = {"machine_info": machine_info(device), "commit_info": commit_info(), "date": date, "benchmarks": []}
    same = (step["backbone"], step["setting"])
    others = [one for one in content.get("steps", []) if (one["backbone"], one["setting"]) != same]
    content["steps"] = [*others, step]
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1))
    partial.replace(path)
