"""Leaving cleanly: SIGTERM (a scheduler takes the machine back), SIGHUP (a terminal closes) and Ctrl-C let the step finish."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def leave_to_parent(worker: int) -> None:
    """Makes a loader's process pass over the signals above, which reach a whole process group: its parent still needs it.

    A parent that dies takes it along all the same: PyTorch's loop looks for that.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StopSignals:
    """Context manager that notes the first signal in `received` instead of letting it end the process; a second one does.

    Outside the main thread, where Python handles no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            # Under nohup SIGHUP is to stay without effect.
            ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            heard = [number for number in SIGNALS if number != signal.SIGHUP or not ignored]
            self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()
        logger.warning("%s: finishing this step and saving it; once more stops at once", self.received.name)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._restore()
