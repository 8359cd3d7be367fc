"""Stages that the actors in test_ray.py run."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from focusdpo.building.candidate import Candidate, Rejected
from tests import PATIENCE


class WaitFor:
    """The last candidate waits for a file, the others are done at once."""

    device = "cpu"

    def __init__(self, last: int, file: Path) -> None:
        self._last, self._file = last, file

    def __call__(self, candidate: Candidate) -> None:
        until = time.monotonic() + PATIENCE
        while candidate.index == self._last and not self._file.exists():
            if time.monotonic() > until:
                raise TimeoutError(f"{self._file} never came")
            time.sleep(0.02)
        raise Rejected("seen")


class Killed:
    """The process of candidate 1 is killed, as often as `times` says."""

    device = "cpu"

    def __init__(self, folder: Path, times: int) -> None:
        self._folder, self._times = folder, times

    def __call__(self, candidate: Candidate) -> None:
        if candidate.index == 1 and len(list(self._folder.iterdir())) < self._times:
            (self._folder / str(os.getpid())).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        raise Rejected("seen")


class Broken:
    """A stage that cannot be made."""

    def __init__(self) -> None:
        raise FileNotFoundError("no such model")
