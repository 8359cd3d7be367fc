"""Runs tests for what they launch: pytest -p benchmarks.stub_tests, TRITON_INTERPRET=0 and no GPU.

Kernels go through the stub driver, where nothing executes. A test is red where a launch is refused or does not compile, and
green otherwise, whatever its comparisons say of memory that nobody wrote.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any
from unittest import mock

import pytest

import focusdpo_kernels  # noqa: F401, so that every kernel is decorated for the compiler
from focusdpo_kernels.launch import Launch
from focusdpo_kernels.tools import stub_driver

stub_driver.install()
_faults: list[BaseException] = []
_call = Launch.__call__


def _watched(self: Launch, *args: Any) -> Any:
    try:
        return _call(self, *args)
    except BaseException as error:
        _faults.append(error)
        raise


mock.patch.object(Launch, "__call__", _watched).start()


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    _faults.clear()
    with stub_driver.launches() as names, contextlib.suppress(Exception):  # of a comparison, or of what follows from one
        yield
    pyfuncitem.user_properties.append(("launches", len(names)))
    if _faults:
        raise _faults[0]
    return True


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Nothing launched is nothing tried."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(session.config, "workerinput"):
        return
    reports = [report for kind in ("passed", "failed") for report in reporter.stats.get(kind, [])]
    total = sum(value for report in reports for name, value in report.user_properties if name == "launches")
    print(f"\nstub driver: {total} launches")
    if total == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
