"""`focusdpo demo`: the method on a small scale, end to end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from focusdpo.demo.config import DemoConfig
from focusdpo.demo.run import DEMO_WRITTEN, run_demo
from focusdpo.foundation.output_folder import OutputFolder


def prepare(config: DemoConfig) -> Callable[[], None]:
    """Refuses to write over an earlier demo (unless `overwrite` is on), or over anything else, and returns the demo."""
    out = OutputFolder("out", Path(config.out), "demo", DEMO_WRITTEN)
    out.check(config.overwrite or out.is_unfinished)

    def work() -> None:
        with out.begin():
            run_demo(config)

    return work
