"""Settings of the demo."""

from __future__ import annotations

from dataclasses import dataclass

from focusdpo.foundation.choices import KernelBackend
from focusdpo.foundation.settings import require


@dataclass
class DemoConfig:
    """The demo: scenes composed of real photographs, a tiny random FLUX, the real training path.

    Args:
        out: Folder for everything the demo writes.
        pairs: Training pairs to compose.
        held_out: Held-out pairs to compose.
        steps: Optimiser steps.
        batch_size: Pairs per step.
        resolution: Side of a scene in pixels; a multiple of 16.
        seed: Seed of scenes, model and training.
        overlays: Held-out pairs whose masks are drawn.
        backend: Kernels: "triton", "torch", or chosen by device.
        overwrite: Delete what an earlier demo left in `out`.
    """

    out: str = "demo-output"
    pairs: int = 96
    held_out: int = 48
    steps: int = 200
    batch_size: int = 4
    resolution: int = 192
    seed: int = 0
    overlays: int = 3
    backend: KernelBackend | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("pairs", "held_out", "steps", "batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        fits = self.resolution >= 64 and self.resolution % 16 == 0
        require(fits, "resolution", self.resolution, "a multiple of 16, at least 64")
        require(0 <= self.overlays <= self.held_out, "overlays", self.overlays, f"0 to held_out = {self.held_out}")
        require(0 <= self.seed < 2**32, "seed", self.seed, "0 <= seed < 2^32")
