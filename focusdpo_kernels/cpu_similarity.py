"""Pooled similarity of fp16 and bf16 hidden states on a CPU: the specification's maths, in blocks of tokens.

The specification makes an fp32 copy of all hidden states before it reads them, twice. A block's copy stays in cache. fp32 needs
no copy, and runs as specified.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from focusdpo_kernels import reference as spec
from focusdpo_kernels.autograd import is_traced, is_transformed

BLOCK = 3 * 2**19  # elements: fewer make more calls of PyTorch and short products, more leave the cache
MIN_ELEMENTS = BLOCK + 1  # of a sample's target tokens: one block's copy is what the specification makes


def takes(target: Tensor, pooling: str) -> bool:
    """Whether a layer [B, P, D] is better computed here. What traces or transforms is given the specification."""
    half = target.dtype in (torch.float16, torch.bfloat16) and target.device.type == "cpu"
    large = target.shape[1] * target.shape[2] >= MIN_ELEMENTS
    return half and large and pooling == "reference" and not is_traced() and not is_transformed()


def _blocks(hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of tokens of [T, D] in fp32, in memory that the next block takes over, as [parts, T / parts, D].

    Several threads take a part each, where the block divides: left alone, BLAS gives a product of a few rows and many columns
    to one of them.
    """
    threads = torch.get_num_threads()
    size = max(BLOCK // max(hidden.shape[1], 1) // threads, 1) * threads
    copy = hidden.new_empty((min(size, hidden.shape[0]), hidden.shape[1]), dtype=torch.float32)
    for first in range(0, hidden.shape[0], size):
        tokens = slice(first, first + size)
        block = hidden[tokens]
        parts = math.gcd(threads, block.shape[0])
        yield tokens, copy[: block.shape[0]].copy_(block).view(parts, block.shape[0] // parts, hidden.shape[1])


def layer_similarity(target: Tensor, reference: Tensor, reference_mask: Tensor) -> Tensor:
    """One term of E4, [B, R, P]; as in the specification."""
    mask = (reference_mask != 0).float()  # [B, R, Q]
    pooled = mask.new_zeros((*mask.shape[:2], target.shape[2]))  # [B, R, D]
    dots = mask.new_empty((*mask.shape[:2], target.shape[1]))  # [B, R, P]
    norms = mask.new_empty((target.shape[0], 1, target.shape[1]))
    # Hooks run inside the model's autocast, which would round the products to bf16.
    with torch.autocast(device_type="cpu", enabled=False):
        for b in range(target.shape[0]):
            for tokens, block in _blocks(reference[b]):
                taken = mask[b, :, tokens].reshape(-1, *block.shape[:2]).transpose(0, 1)  # [parts, R, T / parts]
                pooled[b] += (taken @ block).sum(0)
        pooled /= mask.sum(-1, keepdim=True).clamp_min(1)
        for b in range(target.shape[0]):
            for tokens, block in _blocks(target[b]):
                products = pooled[b].expand(block.shape[0], -1, -1) @ block.mT
                dots[b, :, tokens] = products.transpose(0, 1).flatten(1)
                norms[b, 0, tokens] = torch.linalg.vector_norm(block, dim=-1).flatten()
    norms_pooled = torch.linalg.vector_norm(pooled, dim=-1, keepdim=True).clamp_min(spec.EPS)
    return dots / (norms_pooled * norms.clamp_min(spec.EPS))
