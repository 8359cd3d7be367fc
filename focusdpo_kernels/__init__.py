"""Fused Triton kernels of FocusDPO, with PyTorch references that specify them. Tensors only: torch and triton."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from focusdpo_kernels.entropy import patch_entropy
    from focusdpo_kernels.estimate import estimate_alignment
    from focusdpo_kernels.fusion import focus_field, focus_field_of_images, fuse_focus
    from focusdpo_kernels.matching import structure_field, topk_mask
    from focusdpo_kernels.reference import FocusField, PreferenceResidual
    from focusdpo_kernels.residual import preference_residual
    from focusdpo_kernels.similarity import SimilarityAccumulator, cross_layer_similarity

_HOMES = {
    "entropy": ("patch_entropy",),
    "estimate": ("estimate_alignment",),
    "fusion": ("focus_field", "focus_field_of_images", "fuse_focus"),
    "matching": ("structure_field", "topk_mask"),
    "reference": ("FocusField", "PreferenceResidual"),
    "residual": ("preference_residual",),
    "similarity": ("SimilarityAccumulator", "cross_layer_similarity"),
}
__all__ = [
    "FocusField",
    "PreferenceResidual",
    "SimilarityAccumulator",
    "cross_layer_similarity",
    "estimate_alignment",
    "focus_field",
    "focus_field_of_images",
    "fuse_focus",
    "patch_entropy",
    "preference_residual",
    "structure_field",
    "topk_mask",
]


def __getattr__(name: str) -> Any:
    """The public names when they are asked for: choices.py is read where nobody needs torch."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
