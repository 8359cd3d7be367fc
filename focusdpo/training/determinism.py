"""Gradients that depend on their inputs alone, so that a resumed run comes to the same numbers.

Attention's backward pass adds up the queries' gradient in the order in which a GPU's blocks happen to end, unless it is told
otherwise: on an H200 two runs of klein-4B's size differed from the first step's gradient on (docs/performance.md).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def repeatable(wanted: bool = True) -> Iterator[None]:
    """Within it PyTorch takes algorithms that always give the same bits; what it had before comes back in the end.

    Args:
        wanted: False leaves PyTorch as it is.

    Raises:
        RuntimeError: an operation has no such algorithm; the message says what to set.
    """
    if not wanted:
        yield
        return
    # Of the process, and left there: cuBLAS asks for it whenever it is used, with a size that is PyTorch's own on Hopper.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    mode = torch.get_deterministic_debug_mode()
    filled: Any = torch.utils.deterministic  # whose setting mypy does not see
    fill = filled.fill_uninitialized_memory
    # Not warn_only: attention would warn, and then do it the other way (pytorch/pytorch#182551).
    torch.use_deterministic_algorithms(True)
    filled.fill_uninitialized_memory = False  # a debugging aid, and slow
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        hint = "deterministic=false trains without; a run that is resumed then differs in rounding"
        raise RuntimeError(f"deterministic: {error}\n{hint}") from error
    finally:
        torch.use_deterministic_algorithms(mode > 0, warn_only=mode == 1)
        filled.fill_uninitialized_memory = fill
