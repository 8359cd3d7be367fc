"""Options of the suite, and what it writes: a record of each case the moment it is known (benchmarks/records.py)."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cases import GROUPS
from benchmarks.inputs import NAMED
from benchmarks.machine import BROKEN_DEVICE, DEVICE, commit_id, device_is_broken, machine_info
from benchmarks.records import Recorder
from benchmarks.timing import measure_limits

LIMITS = "limits"  # a case like the others
_RECORDER = pytest.StashKey[Recorder]()
_BEGUN = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shape", action="append", help="only these shapes, by name and in this order (may be repeated)")
    providers = list(dict.fromkeys(name for group in GROUPS for name in group.providers))
    parser.addoption("--provider", action="append", choices=providers, help="only these providers (may be repeated)")
    parser.addoption(
        "--compile-shape",
        action="append",
        choices=list(NAMED),
        help="torch.compile at these shapes only, by name (may be repeated; default: all named shapes)",
    )
    parser.addoption("--no-sweep", action="store_true", help="named shapes only")
    parser.addoption("--only-sweep", action="store_true", help="only the shapes that vary one size at a time")
    parser.addoption(
        "--result", type=Path, help="file to append records to; cases that have ended in it are left out, so a run can go on"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RECORDER] = recorder = Recorder(config.getoption("--result"))
    if recorder.path is None or config.option.collectonly:
        return
    if config.option.benchmark_disable or hasattr(config, "workerinput") or getattr(config.option, "numprocesses", None):
        raise pytest.UsageError("--result: keeps times, which need one process (no -n) and no --benchmark-disable")
    try:
        recorder.open_run(machine_info(), commit_id())
    except ValueError as error:
        raise pytest.UsageError(f"--result: {error}") from error


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ended = config.stash[_RECORDER].ended()
    config.hook.pytest_deselected(items=[item for item in items if _case(item) in ended])
    items[:] = [item for item in items if _case(item) not in ended]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and session.config.stash[_RECORDER].ended():
        session.exitstatus = pytest.ExitCode.OK  # all was measured before


def _case(item: pytest.Item) -> str:
    return item.name.partition("[")[2].rstrip("]")


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    return machine_info()  # without the names of a machine


@pytest.fixture(scope="session", autouse=True)
def _limits_first(pytestconfig: pytest.Config) -> None:
    """A device that breaks later cannot tell its limits any more; limits that fail leave the cases alone."""
    recorder = pytestconfig.stash[_RECORDER]
    if recorder.path is None or LIMITS in recorder.ended():
        return
    recorder.append("begin", case=LIMITS)
    try:
        recorder.append("limits", **measure_limits(DEVICE))
        recorder.append("done", case=LIMITS)
    except Exception as error:
        recorder.append("failed", case=LIMITS, why=f"{type(error).__name__}: {error}"[:2000])


@pytest.fixture
def case(request: pytest.FixtureRequest) -> str:
    """The name of the running case, which has begun."""
    name = _case(request.node)
    request.node.stash[_BEGUN] = True
    request.config.stash[_RECORDER].append("begin", case=name)
    return name


@pytest.fixture(scope="session")
def recorder(pytestconfig: pytest.Config) -> Recorder:
    return pytestconfig.stash[_RECORDER]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    if call.excinfo is not None and _BEGUN in item.stash:
        kind = "skipped" if report.skipped else "failed"
        item.config.stash[_RECORDER].append(kind, case=_case(item), why=call.excinfo.exconly()[:2000])
    return report


def pytest_runtest_logfinish(nodeid: str, location: Any) -> None:
    """After an error that the device does not recover from, every other case of this process would fail as well."""
    if DEVICE.type == "cuda" and device_is_broken():
        pytest.exit(f"{torch.cuda.get_device_name()} is lost to this process", returncode=BROKEN_DEVICE)


@pytest.hookimpl(wrapper=True)
def pytest_benchmark_generate_json(benchmarks: list[Any]) -> Generator[None, dict[str, Any], dict[str, Any]]:
    for one in benchmarks:
        if not one.stats.data:  # interrupted before its first round
            one.has_error = True
    return (yield)
