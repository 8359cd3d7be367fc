"""What a user would otherwise put together from well-known functions, in the inputs' own precision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def similarity(target: Sequence[Tensor], reference: Sequence[Tensor], reference_mask: Tensor) -> Tensor:
    """`F.cosine_similarity` of each subject's mean token with the target, layer by layer, then the mean: [B, R, P]."""
    share = reference_mask.to(target[0].dtype)
    share = share / share.sum(-1, keepdim=True)
    scores = []
    for h_tgt, h_ref in zip(target, reference, strict=True):
        pooled = share @ h_ref  # [B, R, D]
        scores.append(torch.stack([F.cosine_similarity(c[:, None], h_tgt, dim=-1) for c in pooled.unbind(1)], dim=1))
    return torch.stack(scores).mean(0)


def structure(scores: Tensor, k: int, prior: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.topk` and scatter: the prior without the k best patches of each subject, and its share."""
    index = torch.topk(scores, k, dim=-1).indices
    matched = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, index, True).any(1)
    field = prior & ~matched
    return field.float(), field.sum(-1) / prior.sum(-1).clamp_min(1)


def _gray(images: Tensor) -> Tensor:
    return (0.2989 * images[:, 0] + 0.587 * images[:, 1] + 0.114 * images[:, 2])[:, None]


def entropy(images: Tensor, patch_size: int = 16, bins: int = 32, sigma: float = 0.01) -> Tensor:
    """Entropy of a Gaussian kernel estimate over all patches, pixels and bins at once: [B, P]."""
    pixels = F.unfold(_gray(images), patch_size, stride=patch_size).transpose(1, 2)  # [B, P, pixels]
    centres = torch.linspace(0, 1, bins, device=images.device)
    weight = torch.exp(-0.5 * ((pixels[..., None] - centres) / sigma) ** 2).mean(2)
    q = weight / weight.sum(-1, keepdim=True)
    return -(q * q.clamp_min(1e-12).log()).sum(-1)


def kornia_entropy(images: Tensor) -> Tensor:
    """The same estimate by kornia's `marginal_pdf`."""
    from kornia.enhance.histogram import marginal_pdf

    pixels = F.unfold(_gray(images), 16, stride=16).transpose(1, 2)
    batch, patches, count = pixels.shape
    centres, sigma = torch.linspace(0, 1, 32, device=images.device), torch.tensor(0.01, device=images.device)
    q, _ = marginal_pdf(pixels.reshape(-1, count, 1), centres, sigma)
    return -(q * q.clamp_min(1e-12).log()).sum(-1).reshape(batch, patches)


def skimage_entropy(images: Tensor) -> Tensor:
    """scikit-image's `shannon_entropy` of each patch's 32 gray levels."""
    from skimage.measure import shannon_entropy

    patches = F.unfold(_gray(images), 16, stride=16).transpose(1, 2)
    levels = (patches * 32).floor().clamp(0, 31).to(torch.uint8).numpy()
    return torch.tensor([[shannon_entropy(patch, base=math.e) for patch in sample] for sample in levels])


def fuse(structure: Tensor, coverage: Tensor, entropy: Tensor, prior: Tensor, *, tau: float, gamma: float) -> Tensor:
    """The focus mask of its fields: [B, P]."""
    low, high = entropy.amin(-1, keepdim=True), entropy.amax(-1, keepdim=True)
    detail = (entropy - low) / (high - low) * prior
    return torch.where(coverage[:, None] > tau, structure, gamma * structure + (1 - gamma) * detail)


def residual(
    policy_win: Tensor,
    policy_lose: Tensor,
    reference_win: Tensor,
    reference_lose: Tensor,
    target_win: Tensor,
    target_lose: Tensor,
    mask: Tensor | None,
) -> tuple[Tensor, ...]:
    """Errors and margin as a DPO script has them: winner and loser as one batch, squared errors, then differences."""
    target = torch.cat([target_win, target_lose])
    weight = 1 if mask is None else mask.repeat(2, 1)[..., None]
    policy = (weight * (torch.cat([policy_win, policy_lose]).float() - target.float()) ** 2).mean(dim=(1, 2))
    reference = (weight * (torch.cat([reference_win, reference_lose]).float() - target.float()) ** 2).mean(dim=(1, 2))
    (win, lose), (win_reference, lose_reference) = policy.chunk(2), reference.chunk(2)
    return win, lose, win_reference, lose_reference, (win - lose) - (win_reference - lose_reference)


def dpo_loss(*args: Any, beta: float) -> Tensor:
    """The loss of a DPO script on the margin of `residual`, of what that takes."""
    return -F.logsigmoid(-0.5 * beta * residual(*args)[4]).mean()
