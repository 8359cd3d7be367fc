"""Leaving cleanly: SIGTERM (a scheduler takes the machine back), SIGHUP (a terminal closes) and Ctrl-C."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from focusdpo.foundation.launch import Launch

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Seconds in which further signals are the same stop: a scheduler sends one to every process of a job, and the launcher, which
# gets it too, passes it on. Who presses Ctrl-C again means it.
GRACE = {signal.SIGTERM: 30.0, signal.SIGHUP: 30.0, signal.SIGINT: 2.0}


def leave_to_parent(worker: int) -> None:
    """Makes a loader's process pass over the signals above, which reach a whole process group: its parent still needs it.

    A parent that dies takes it along all the same: PyTorch's loop looks for that.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StopError(Exception):
    """Raised where a run is to stop: in all processes of its launch at the same place."""


class StopSignals:
    """Context manager that notes the first signal in `received` instead of letting it end the process.

    Another one, after the time in which it counts as the same, ends it. Outside the main thread, where Python handles no
    signals, it does nothing.

    Args:
        launch: whose processes stop together.
    """

    def __init__(self, launch: Launch) -> None:
        self.received: signal.Signals | None = None
        self._launch = launch
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            # Under nohup SIGHUP is to stay without effect.
            ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            heard = [number for number in SIGNALS if number != signal.SIGHUP or not ignored]
            self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def check(self) -> None:
        """StopError where a process of the launch was told to stop; all of them call this equally often."""
        if self._launch.stops_here(self.received is not None):
            raise StopError

    def _note(self, number: int, frame: FrameType | None) -> None:
        received, now = signal.Signals(number), time.monotonic()
        if self.received is None:
            self.received, self._since = received, now
            if self._launch.is_main:
                again = f"once more after {GRACE[received]:.0f} s stops at once"
                logger.warning("%s: stopping after this batch, with all steps saved; %s", received.name, again)
        elif now - self._since > GRACE[received]:
            self._restore()
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._restore()
