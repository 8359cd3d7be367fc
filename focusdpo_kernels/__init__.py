"""Fused Triton kernels of FocusDPO, with PyTorch references that specify them. Tensors only: torch and triton."""

from focusdpo_kernels.entropy import patch_entropy
from focusdpo_kernels.fusion import focus_field, focus_field_of_images, fuse_focus
from focusdpo_kernels.matching import structure_field, topk_mask
from focusdpo_kernels.reference import FocusField, PreferenceResidual
from focusdpo_kernels.residual import preference_residual
from focusdpo_kernels.similarity import SimilarityAccumulator, cross_layer_similarity

__all__ = [
    "FocusField",
    "PreferenceResidual",
    "SimilarityAccumulator",
    "cross_layer_similarity",
    "focus_field",
    "focus_field_of_images",
    "fuse_focus",
    "patch_entropy",
    "preference_residual",
    "structure_field",
    "topk_mask",
]
