"""The mask on a CPU: the results of `reference.py` from fewer operations.

For fp16, bf16, fp32 and uint8; float64 and compiled graphs take the specification itself.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from focusdpo_kernels import reference as spec
from focusdpo_kernels.autograd import is_traced

PIXELS = 1 << 16  # at a time: what is made of them stays in a cache
NARROW = 0.2  # widths of a bin: exponents up to 3
FARTHEST = 9.3  # exp(-FARTHEST^2) is a normal fp32 number
NEGLIGIBLE = 27.0  # a weight of exp(-27) beside its pixel's largest is left out: 2e-12


def takes(tensor: Tensor) -> bool:
    """Whether the functions below, which read memory, stand in for the specification, which can be traced and transformed."""
    return (
        not is_traced()
        and tensor.is_cpu
        and type(tensor) is Tensor
        and tensor.dtype != torch.float64
        and not tensor.is_neg()
        and not torch._C._are_functorch_transforms_active()
    )


def topk_mask(scores: Tensor, k: int | Tensor) -> Tensor:
    """E5."""
    return torch.from_numpy(_matches(scores, k))


def _matches(scores: Tensor, k: int | Tensor) -> np.ndarray:
    """E5 with numpy, whose partition and calls take a fraction of the time of PyTorch's: bool [..., P]."""
    x = scores.float().numpy()
    patches = x.shape[-1]
    counts = k if isinstance(k, int) else np.minimum(np.maximum(k.numpy().astype(np.int64), 0), patches)
    if x.size == 0 or (isinstance(counts, int) and counts == 0):
        return np.zeros(x.shape, np.bool_)
    rows = x.size // patches
    if isinstance(counts, np.ndarray):
        total = counts.sum()
        last = np.maximum(patches - 1 - counts, 0)
        limit = np.sort(x).reshape(-1)[last + np.arange(0, x.size, patches).reshape(last.shape)][..., None]
    elif counts < patches:
        total = counts * rows
        limit = np.partition(x, patches - 1 - counts)[..., patches - 1 - counts, None]
    else:
        return x > -np.inf
    # Above the largest that is no match are at most k; fewer where it ties with a match, or NaN or -inf are among the k.
    matched = x > limit
    return matched if np.count_nonzero(matched) == total else _exact_matches(x, counts)


def _exact_matches(x: np.ndarray, counts: int | np.ndarray) -> np.ndarray:
    """E5 whatever the scores [..., P] are."""
    valid = x > -np.inf
    x = np.where(valid, x, -np.inf)
    wanted = np.minimum(counts, valid.sum(-1))[..., None]
    least = np.take_along_axis(np.sort(x), x.shape[-1] - np.maximum(wanted, 1), -1)
    matched, tie = x > least, x == least
    places = wanted - matched.sum(-1, keepdims=True)
    return matched | (tie & (tie.cumsum(-1, dtype=np.int32) <= places))


def structure_field(scores: Tensor, k: int | Tensor, prior: Tensor, per_subject: bool) -> tuple[Tensor, Tensor]:
    """E5, E6 and E8's coverage."""
    matched = _matches(scores, k)
    inside = spec.binary_prior(prior).numpy()
    union = inside if inside.ndim == 2 else np.logical_or.reduce(inside, axis=1)
    # Of booleans, greater is "and not".
    structure = np.asarray(np.greater(inside, matched).any(1) if per_subject else np.greater(union, matched.any(1)))
    size = np.maximum(union.sum(-1, dtype=np.int32), 1)
    coverage = np.divide(structure.sum(-1, dtype=np.int32), size, dtype=np.float32)
    return torch.from_numpy(structure.astype(np.float32)), torch.from_numpy(coverage)


def patch_entropy(images: Tensor, patch_size: int, bins: int, sigma: float, method: str, normalize: bool) -> Tensor:
    """E7, from the bins near each pixel where these are few."""
    if method not in ("kde", "histogram"):  # which has no faster way here
        return spec.patch_entropy(images, patch_size, bins, sigma, method, normalize)
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
    scale = math.sqrt(0.5) / sigma
    patches = patches * scale
    step = scale / (bins - 1)  # from bin to bin
    if 3 * reach > bins:
        weight = patches.new_empty((len(patches), bins), dtype=dtype)
        for b in range(bins):
            distance = (patches - b * step).to(dtype)
            if dtype == torch.float32:
                # A CPU is slow with what is too small for full precision, and beside the nearest bin it is nothing.
                distance.clamp_(-FARTHEST, FARTHEST)
            weight[:, b] = _gaussian_(distance).sum(-1)
        return weight
    nearest = (patches / step).round_().clamp_(0, bins - 1).nan_to_num_(nan=0)
    index = nearest.long()
    distance = patches.sub_(nearest, alpha=step).to(dtype)
    weight = patches.new_zeros((len(patches), bins + 2 * reach), dtype=dtype)  # bins beyond either end are cut off below
    for offset in range(-reach, reach + 1):
        weight.scatter_add_(1, index + (reach + offset), _gaussian_(distance - offset * step))
    return weight[:, reach : reach + bins]


def _gaussian_(distance: Tensor) -> Tensor:
    """exp(-distance^2), in place."""
    return distance.square_().neg_().exp_()
