"""What goes into the suite's JSON beside pytest-benchmark's own."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from benchmarks.machine import DEVICE, commit_info, machine_info
from benchmarks.timing import measure_limits


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shape", action="append", help="only these shapes, by name (may be repeated)")
    parser.addoption("--no-sweep", action="store_true", help="named shapes only")


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    return machine_info()


def pytest_benchmark_generate_commit_info(config: pytest.Config) -> dict[str, Any]:
    return commit_info()


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    output_json["limits"] = measure_limits(DEVICE).as_dict()
    output_json["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    for one in output_json["benchmarks"]:
        one["stats"].pop("data", None)
        for repeated in ("params", "param", "fullname", "options"):
            one.pop(repeated, None)
