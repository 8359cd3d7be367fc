"""FocusDPO: Diffusion-DPO that looks where subjects are not yet aligned, then at detail (arXiv 2509.01181)."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from focusdpo.loss import FocusDPOOutput, convert_beta, focus_dpo_loss
    from focusdpo.mask import FocusMask, focus_mask

__all__ = ["FocusDPOOutput", "FocusMask", "convert_beta", "focus_dpo_loss", "focus_mask"]
__version__ = "0.2.0.dev0"

# This process, and the one that started it: a launcher may be gone when imports are through, and with it its number.
_STARTED = os.getpid(), os.getppid()

_HOMES = {"loss": ("FocusDPOOutput", "convert_beta", "focus_dpo_loss"), "mask": ("FocusMask", "focus_mask")}


def __getattr__(name: str) -> Any:
    """The public names when they are asked for: the kernels take 150 MB, which checking a dataset need not."""
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
