"""Appends the outcome of every test to a result the moment it is known: pytest -p benchmarks.record_tests --record FILE.

With pytest-xdist, a worker whose GPU is lost after an error ends itself, and the next tests run in a fresh one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.machine import BROKEN_DEVICE, DEVICE, commit_id, device_is_broken, machine_info
from benchmarks.records import Recorder
from benchmarks.supervise import end_with_parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="file to append the outcomes to")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--record")
    if hasattr(config, "workerinput"):
        end_with_parent()  # a test that hangs would keep the GPU
    if path is not None and not hasattr(config, "workerinput") and not config.option.collectonly:
        config.pluginmanager.register(_Outcomes(path))


class _Outcomes:
    """Lives in the process that hears of all tests."""

    def __init__(self, path: Path) -> None:
        self._recorder = Recorder(path)
        self._recorder.open_run(machine_info(), commit_id())
        self._seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        seconds = self._seconds[report.nodeid] = self._seconds.get(report.nodeid, 0.0) + report.duration
        if report.when == "call" or report.outcome != "passed":
            why = {} if report.outcome == "passed" else {"why": _why(report)}
            self._recorder.append("test", case=report.nodeid, outcome=report.outcome, seconds=round(seconds, 3), **why)


def _why(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):  # of a skipped test: file, line and reason
        return str(report.longrepr[2])[:500]
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash is not None else report.longrepr)[:2000]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    result = yield
    if DEVICE.type == "cuda" and device_is_broken():
        print(f"{item.nodeid}: the GPU is lost to this process", file=sys.stderr, flush=True)
        if hasattr(item.config, "workerinput"):
            os._exit(BROKEN_DEVICE)
        pytest.exit("the GPU is lost to this process", returncode=BROKEN_DEVICE)
    return result
