"""Looks after processes that tests start."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psutil


@contextmanager
def started(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process; waited for at the end, and killed where a test has failed, which would wait for it without end."""
    with subprocess.Popen(command, text=True, **options) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def lives(process: psutil.Process) -> bool:
    """One whose parent does not take its status is dead as well."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def assert_gone(processes: Sequence[psutil.Process], seconds: float = 60.0) -> None:
    """That none lives after so long; those that do are killed."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(map(lives, processes)):
        time.sleep(0.02)
    alive = [process for process in processes if lives(process)]
    for process in alive:
        process.kill()
    assert not alive


def workers_of(pid: int) -> list[psutil.Process]:
    """The processes of `focusdpo.foundation.workers` that a process has started."""
    return [child for child in psutil.Process(pid).children() if "focusdpo.foundation.workers" in " ".join(child.cmdline())]
