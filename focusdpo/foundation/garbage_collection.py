"""When Python looks for garbage that hangs in cycles."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused(wanted: bool = True) -> Iterator[None]:
    """Python looks for cycles each time that there are some more objects: where all are kept, it does little else.

    Args:
        wanted: whether to pause it; decoded images may well hang in cycles.
    """
    paused = wanted and gc.isenabled()
    if paused:
        gc.disable()
    try:
        yield
    finally:
        if paused:
            gc.enable()
