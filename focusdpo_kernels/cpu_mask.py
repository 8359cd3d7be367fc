"""Top-K and patch entropy on a CPU: the results of `reference.py` from fewer operations.

For fp16, bf16, fp32 and uint8; float64 and compiled graphs take the specification itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from focusdpo_kernels import reference as spec

PIXELS = 1 << 16  # at a time: what is made of them stays in a cache
NARROW = 0.2  # widths of a bin: exponents up to 3
NEGLIGIBLE = 27.0  # a weight of exp(-27) beside its pixel's largest is left out: 2e-12


def takes(tensor: Tensor) -> bool:
    """Whether the functions below stand in for the specification."""
    return tensor.device.type == "cpu" and tensor.dtype != torch.float64 and not torch.compiler.is_compiling()


def topk_mask(scores: Tensor, k: int | Tensor) -> Tensor:
    """E5 by `torch.topk`; where scores tie with the last, by a running count."""
    patches = scores.shape[-1]
    x = scores.to(torch.float32)
    if isinstance(k, int) and (index := _indices(x, k)) is not None:
        return torch.zeros(x.shape, dtype=torch.bool).view(-1, patches).scatter_(-1, index, True).view(x.shape)
    x = x.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    if x.numel() == 0:
        return torch.zeros(x.shape, dtype=torch.bool)
    limit = torch.as_tensor(k).long().clamp(0, patches).unsqueeze(-1)  # [..., 1]
    values = x.topk(max(int(limit.max()), 1)).values
    least = values.gather(-1, (limit - 1).clamp_min(0).expand(*x.shape[:-1], 1))
    matched = (x >= least) & (x > -math.inf)
    surplus = matched.sum(-1, keepdim=True) - limit
    if not (surplus > 0).any():
        return matched
    tie = matched & (x == least)
    return matched & ~(tie & (tie.cumsum(-1) > tie.sum(-1, keepdim=True) - surplus))


def _indices(x: Tensor, k: int) -> Tensor | None:
    """Of the k largest of each row, [rows, k], or None where they are not the matches: ties, NaN, -inf."""
    if not 0 < k < x.shape[-1] or x.numel() == 0:
        return None
    values, indices = x.flatten(0, -2).topk(k + 1)
    # As numbers: a row has three that matter. NaN counts as the largest there, and compares as false here.
    largest, edges = values[:, 0].tolist(), values[:, k - 1 :].tolist()
    if all(first >= last > next_one for first, (last, next_one) in zip(largest, edges, strict=True)):
        return indices[:, :k]
    return None


def structure_field(scores: Tensor, k: int | Tensor, prior: Tensor, per_subject: bool) -> tuple[Tensor, Tensor]:
    """E5, E6 and E8's coverage."""
    index = _indices(scores.to(torch.float32), k) if isinstance(k, int) and not per_subject else None
    if index is None:
        return spec.uncovered(topk_mask(scores, k), prior, per_subject, torch.float32)
    inside = spec.binary_prior(prior)
    union = (inside if inside.ndim == 2 else inside.any(1)).to(torch.float32)
    size = union.sum(-1)
    structure = union.scatter_(1, index.reshape(len(union), -1), 0.0)  # in place: the floats of a bool are nobody else's
    return structure, structure.sum(-1) / size.clamp_min_(1)


def patch_entropy(images: Tensor, patch_size: int, bins: int, sigma: float, method: str, normalize: bool) -> Tensor:
    """E7, from the bins near each pixel where these are few."""
    rows = max(PIXELS // max(len(images) * images.shape[3] * patch_size, 1), 1) * patch_size
    blocks = [_block_entropy(part, patch_size, bins, sigma, method) for part in torch.split(images, rows, dim=2)]
    entropy = torch.cat(blocks, dim=1) if len(blocks) > 1 else blocks[0]
    return spec.normalize_complexity(entropy) if normalize else entropy


def _block_entropy(images: Tensor, patch_size: int, bins: int, sigma: float, method: str) -> Tensor:
    if method == "histogram":
        patches = spec.gray_patches(images, patch_size)
    else:
        # In float64, as fp32 rounds gray values off by 1e-5 of a narrow kernel's width.
        gray = images[:, :1].to(torch.float64)
        if images.shape[1] == 3:
            gray = gray.mul(spec.LUMA[0]).add_(images[:, 1:2], alpha=spec.LUMA[1]).add_(images[:, 2:], alpha=spec.LUMA[2])
        if images.dtype == torch.uint8:
            gray = gray / 255
        patches = spec.in_patches(gray[:, 0], patch_size)
        low, high = patches.aminmax() if patches.numel() else (0, 0)
        if not (low >= -spec.RANGE_TOLERANCE and high <= 1 + spec.RANGE_TOLERANCE):
            patches = spec.only_in_range(patches)
    weight = _weights(patches.flatten(0, 1), bins, sigma, method)
    return spec.entropy_of(weight).to(torch.float32).reshape(patches.shape[:2])


def _weights(patches: Tensor, bins: int, sigma: float, method: str) -> Tensor:
    """Weights [n, bins] of patches [n, pixels], not normalised."""
    if method == "histogram":
        level = (patches * bins).floor_().clamp_(0, bins - 1)
        # One more bin for pixels that are none.
        index = level.nan_to_num_(nan=bins).long()
        weight = patches.new_zeros(len(patches), bins + 1).scatter_add_(1, index, torch.ones_like(patches))
        return weight[:, :bins].masked_fill(weight[:, bins:] > 0, math.nan)
    # Bins farther than so many from the nearest one, next to which a pixel stands at most half way, are left out.
    reach = math.ceil(0.5 + math.sqrt(0.25 + 2 * NEGLIGIBLE * (sigma * (bins - 1)) ** 2)) - 1
    # A narrow kernel's exponents are so large between two bins that fp32 rounds them off.
    dtype = torch.float64 if sigma * (bins - 1) < NARROW else torch.float32
    if 3 * reach > bins:
        weight = torch.empty(len(patches), bins, dtype=dtype)
        for b in range(bins):
            weight[:, b] = _gaussian_((patches - b / (bins - 1)).to(dtype), sigma).sum(-1)
        return weight
    nearest = (patches * (bins - 1)).round_().clamp_(0, bins - 1).nan_to_num_(nan=0)
    index = nearest.long()
    distance = (patches - nearest.div_(bins - 1)).to(dtype)
    weight = torch.zeros(len(patches), bins + 2 * reach, dtype=dtype)  # bins beyond either end are cut off below
    for offset in range(-reach, reach + 1):
        weight.scatter_add_(1, index + (reach + offset), _gaussian_(distance - offset / (bins - 1), sigma))
    return weight[:, reach : reach + bins]


def _gaussian_(distance: Tensor, sigma: float) -> Tensor:
    return distance.div_(sigma).square_().mul_(-0.5).exp_()
