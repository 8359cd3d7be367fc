"""Progress bars, which are tqdm's wherever they come from: ours and those of the libraries.

A terminal shows bars, as wide as it is and without colour where NO_COLOR asks for that. In a pipe or a file, where a bar would
leave its every state, each has a line a minute instead.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

logger = logging.getLogger(__name__)

HIDDEN = "TQDM_DISABLE"  # what tqdm itself reads, but only at its import and where a bar does not say whether it is shown
EVERY = 60.0  # seconds between two lines of a bar that is not drawn
UNKNOWN = 80  # columns of a terminal that does not know its size, as those of some services
_make = tqdm.__init__


class Lines:
    """The file of a bar that is not drawn: of all its states, one a minute goes to the log."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self._last = time.monotonic()

    def write(self, text: str) -> None:
        """Takes what tqdm writes: a state of the bar, blanks over an earlier one, or moves of the cursor."""
        state = text.replace("\x1b[A", "").strip()
        if state and time.monotonic() - self._last >= EVERY:
            logger.info("%s", state)
            self._last = time.monotonic()

    def flush(self) -> None:
        pass


def hide_progress_bars() -> None:
    """No bar is shown from now on, in this process and in those that it starts."""
    os.environ[HIDDEN] = "1"
    _make_all(disable=True)


@contextmanager
def progress_bars(hidden: bool = False) -> Iterator[None]:
    """Inside, bars are shown as fits where they go to, and the log does not tear them.

    Args:
        hidden: whether none is shown, as where the environment says so.
    """
    before, width = os.environ.get(HIDDEN), terminal_width()
    if hidden or before:
        hide_progress_bars()
    elif width is not None:
        settings: dict[str, Any] = {"dynamic_ncols": True} if width else {"ncols": UNKNOWN, "nrows": 24}
        if os.environ.get("NO_COLOR"):
            settings["colour"] = None
        _make_all(**settings)
    else:
        _make_all(lines=True)
    try:
        # Where nothing is drawn nothing tears; and a bar that logs would wait for the log, and the log for the bar.
        with nullcontext() if width is None else logging_redirect_tqdm():
            yield
    finally:
        tqdm.__init__ = _make  # type: ignore[method-assign]
        if hidden and before is None:
            os.environ.pop(HIDDEN, None)


def terminal_width() -> int | None:
    """Columns of the terminal that bars and messages go to, 0 where it does not know; None where the cursor cannot be moved."""
    try:
        drawn = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        return os.get_terminal_size(sys.stderr.fileno()).columns if drawn else None
    except (AttributeError, OSError, ValueError):  # none, closed, or somebody's own
        return None


def _make_all(lines: bool = False, **settings: Any) -> None:
    """Has every bar made from now on have these settings.

    Args:
        lines: whether those for the terminal write lines, without a bar in them.
        settings: of tqdm.
    """

    def make(bar: tqdm[Any], *args: Any, **given: Any) -> None:
        if lines and given.get("file") in (None, sys.stdout, sys.stderr):
            given |= {"file": Lines(), "ncols": 0, "dynamic_ncols": False}
        _make(bar, *args, **given | settings)

    tqdm.__init__ = make  # type: ignore[method-assign, assignment]
