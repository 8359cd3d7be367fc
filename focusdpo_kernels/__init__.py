"""Fused Triton kernels of FocusDPO, with PyTorch references that specify them. Tensors only: torch and triton."""

from focusdpo_kernels.entropy import patch_entropy
from focusdpo_kernels.fusion import fuse_focus
from focusdpo_kernels.matching import structure_field, topk_mask
from focusdpo_kernels.reference import PreferenceResidual
from focusdpo_kernels.residual import preference_residual
from focusdpo_kernels.similarity import SimilarityAccumulator, cross_layer_similarity

__all__ = [
    "PreferenceResidual",
    "SimilarityAccumulator",
    "cross_layer_similarity",
    "fuse_focus",
    "patch_entropy",
    "preference_residual",
    "structure_field",
    "topk_mask",
]
