"""Progress bars, which are tqdm's wherever they come from: ours and those of the libraries."""

from __future__ import annotations

import os
from typing import Any

from tqdm import tqdm

HIDDEN = "TQDM_DISABLE"  # what tqdm itself reads, but only at its import and where a bar does not say whether it is shown


def hide_progress_bars() -> None:
    """No bar is shown from now on, in this process and in those that it starts."""
    os.environ[HIDDEN] = "1"
    make = tqdm.__init__

    def make_hidden(bar: tqdm[Any], *args: Any, **settings: Any) -> None:
        make(bar, *args, **settings | {"disable": True})

    tqdm.__init__ = make_hidden  # type: ignore[method-assign, assignment]
