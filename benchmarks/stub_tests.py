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


def _watched(self: Launch, *args: Any) -> None:
    try:
        _call(self, *args)
    except BaseException as error:
        _faults.append(error)
        raise


mock.patch.object(Launch, "__call__", _watched).start()


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Generator[None, Any, Any]:
    _faults.clear()
    with contextlib.suppress(Exception):  # of a comparison, or of what follows from one
        yield
    if _faults:
        raise _faults[0]
    return True
