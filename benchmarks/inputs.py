"""Sizes to measure at, and random inputs of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from focusdpo_kernels.shapes import SHAPES, bytes_moved

Sizes = dict[str, int]

TINY = {"N": 3, "P": 64, "Q": 40, "D": 64, "R": 2, "C": 16}
NAMED = {"tiny": TINY, **SHAPES}
SWEEP = {"N": (1, 4, 19, 57), "P": (256, 1024, 4096, 16384), "R": (1, 2, 4, 6)}
# From which one size at a time departs in the sweep.
SWEEP_BASE = {"cuda": {"N": 19, "P": 4096, "Q": 1600, "D": 3072, "R": 2, "C": 64}, "cpu": {**TINY, "P": 256, "D": 256}}
SWEEP_LIMIT = {"cuda": {"N": 57, "P": 16384}, "cpu": {"N": 19, "P": 1024}}
LARGEST = {"cuda": 40 << 30, "cpu": 300 << 20}  # bytes of hidden states


@dataclass(frozen=True)
class Shape:
    """A named size. `sweep` names the size that was varied, if any."""

    name: str
    sizes: Sizes
    batch: int = 1
    sweep: str | None = None

    @property
    def label(self) -> str:
        return self.name if self.batch == 1 else f"{self.name} B={self.batch}"


def shapes(device: torch.device) -> Iterator[Shape]:
    """The named shapes that fit the device, and the sweep."""
    for name, sizes in NAMED.items():
        if bytes_moved(**sizes)["similarity"] <= LARGEST[device.type]:
            yield Shape(name, sizes)
    base, limit = SWEEP_BASE[device.type], SWEEP_LIMIT[device.type]
    for size, values in SWEEP.items():
        for value in values:
            if value <= limit.get(size, value):
                yield Shape(f"{size}={value}", {**base, size: value}, sweep=size)


@dataclass
class FocusInputs:
    """Inputs of every group at one shape; those not needed are empty."""

    target: list[Tensor] = field(default_factory=list)
    reference: list[Tensor] = field(default_factory=list)
    reference_mask: Tensor | None = None
    prior: Tensor | None = None
    images: Tensor | None = None
    scores: Tensor | None = None
    k: int = 0
    predictions: list[Tensor] = field(default_factory=list)
    mask: Tensor | None = None
    subjects: Tensor | None = None
    latents: list[Tensor] = field(default_factory=list)
    prediction_scale: Tensor | None = None

    @property
    def bytes(self) -> int:
        tensors = [t for v in vars(self).values() for t in (v if isinstance(v, list) else [v]) if isinstance(t, Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)


def similarity_inputs(shape: Shape, device: torch.device) -> FocusInputs:
    s, b = shape.sizes, shape.batch
    # Target and reference are slices of one sequence, as in a model.
    states = [torch.randn(b, s["P"] + s["Q"], s["D"], device=device).bfloat16() for _ in range(s["N"])]
    owner = torch.arange(s["Q"], device=device) * s["R"] // s["Q"]  # one reference after the other
    mask = (owner == torch.arange(s["R"], device=device)[:, None]).expand(b, -1, -1).contiguous()
    target, reference = [h[:, : s["P"]] for h in states], [h[:, s["P"] :] for h in states]
    return FocusInputs(target=target, reference=reference, reference_mask=mask)


def field_inputs(shape: Shape, device: torch.device) -> FocusInputs:
    s, b = shape.sizes, shape.batch
    return FocusInputs(
        scores=torch.randn(b, s["R"], s["P"], device=device),
        prior=torch.rand(b, s["P"], device=device) > 0.6,
        k=s["P"] // (3 * s["R"]),
    )


def image_inputs(shape: Shape, device: torch.device) -> FocusInputs:
    side = 16 * round(shape.sizes["P"] ** 0.5)
    rows = shape.sizes["P"] * 256 // side
    # Smooth colour with noise of changing strength: patches between flat and rich.
    smooth = F.interpolate(torch.rand(shape.batch, 3, 4, 4, device=device), (rows, side), mode="bilinear")
    noise = torch.rand(shape.batch, 3, rows, side, device=device) - 0.5
    return FocusInputs(images=(smooth + noise * torch.linspace(0, 0.6, side, device=device)).clamp(0, 1))


def prediction_inputs(shape: Shape, device: torch.device) -> FocusInputs:
    s, b = shape.sizes, shape.batch
    targets = [torch.randn(b, s["P"], s["C"], device=device) for _ in range(2)]
    references = [t + 0.3 * torch.randn_like(t) for t in targets]
    policies = [r + 0.03 * torch.randn_like(r) for r in references]
    predictions = [x.bfloat16() for x in (*policies, *references, *targets)]
    return FocusInputs(predictions=predictions, mask=torch.rand(b, s["P"], device=device))


def subject_inputs(shape: Shape, device: torch.device) -> FocusInputs:
    """Subjects side by side, as their priors are."""
    s, b = shape.sizes, shape.batch
    owner = torch.arange(s["P"], device=device) * s["R"] // s["P"]
    subjects = (owner == torch.arange(s["R"], device=device)[:, None]).expand(b, -1, -1).contiguous()
    return FocusInputs(subjects=subjects)


def estimate_inputs(shape: Shape, device: torch.device) -> FocusInputs:
    """A prediction in bf16, and latents in fp32: noised, of the winner, of the loser."""
    s, b = shape.sizes, shape.batch
    latents = [torch.randn(b, s["P"], s["C"], device=device) for _ in range(4)]
    return FocusInputs(latents=[latents[0].bfloat16(), *latents[1:]], prediction_scale=-torch.rand(b, device=device))


def _merged(*parts: Callable[[Shape, torch.device], FocusInputs]) -> Callable[[Shape, torch.device], FocusInputs]:
    def inputs(shape: Shape, device: torch.device) -> FocusInputs:
        merged: dict[str, Any] = {}
        for part in parts:
            made = vars(part(shape, device))
            merged |= {name: value for name, value in made.items() if isinstance(value, Tensor) or value}
        return FocusInputs(**merged)

    return inputs


subject_prediction_inputs = _merged(prediction_inputs, subject_inputs)
mask_inputs = _merged(field_inputs, image_inputs)
step_inputs = _merged(similarity_inputs, field_inputs, image_inputs, prediction_inputs)
