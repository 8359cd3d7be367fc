"""What the tests of every backbone need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn


def recorded_call(transformer: nn.Module, run: Callable[[], object]) -> dict[str, Any]:
    """Arguments and output of the one call of the transformer in `run`."""
    calls = []
    handle = transformer.register_forward_hook(
        lambda module, args, kwargs, output: calls.append({**kwargs, "output": output[0]}), with_kwargs=True
    )
    run()
    handle.remove()
    assert len(calls) == 1
    return calls[0]


def photos(*sizes: tuple[int, int]) -> tuple[list[Image.Image], list[Tensor]]:
    """Noise of (height, width) pixels, as images and as pixels in [0, 1]."""
    arrays = [np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8) for i, size in enumerate(sizes)]
    return [Image.fromarray(a) for a in arrays], [torch.from_numpy(a[None]).permute(0, 3, 1, 2) / 255 for a in arrays]


def image_streams(transformer: nn.Module, blocks: list[nn.Module], run: Callable[[], object]) -> list[Tensor]:
    """Image streams after each of `blocks` in `run`, from what the next part of the transformer is given.

    For transformers whose blocks are all given the image stream by itself.
    """
    streams: list[Tensor] = []

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        streams.append((kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).detach())

    parts = (*blocks[1:], transformer.get_submodule("norm_out"))
    handles = [part.register_forward_pre_hook(keep, with_kwargs=True) for part in parts]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return streams
