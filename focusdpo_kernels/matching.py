"""Exact top-K and the structure field (docs/method.md, E5, E6 and E8's coverage).

    M'[r] = indicator of the K_r largest S[r, :]          ties to the lower index; NaN and -inf never matched
    M_s   = prior * (1 - OR_r M'[r])                      or OR_r prior[r] * (1 - M'[r]) per subject
    A     = |M_s| / |prior|

The K-th largest score is found on the exact bit pattern: an order-preserving map to uint32, then its 32 bits from the
top, each decided by a count. Nothing is sorted and nothing is rounded. Up to BLOCK scores stay in registers; longer rows
are read again from cache for each bit. Bytes: 4 B R P in, 4 B P out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from focusdpo_kernels import reference as spec
from focusdpo_kernels.backend import device_guard, resolve_backend
from focusdpo_kernels.checks import check_device, check_k, check_prior, check_scores
from focusdpo_kernels.launch import Launch, Registers, next_power_of_2

BLOCK = 16384  # scores of all rows of a program that are held at once


@triton.jit
def _load_keys(scores_ptr, rows, mask_r, stride_r, stride_p, start, P, BLOCK_P: tl.constexpr):
    """Scores [R_PAD, BLOCK_P] as uint32 in the same order; 0 where absent, NaN or -inf."""
    offs_p = start + tl.arange(0, BLOCK_P)
    offsets = rows[:, None] * stride_r + offs_p.to(tl.int64)[None, :] * stride_p
    x = tl.load(scores_ptr + offsets, mask=mask_r[:, None] & (offs_p < P)[None, :], other=float("-inf")).to(tl.float32)
    x = tl.where(x == 0, 0.0, x)  # -0 and +0 are a tie
    bits = x.to(tl.uint32, bitcast=True)
    keys = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where((x == x) & (x > float("-inf")), keys, 0)


@triton.jit
def _select(scores_ptr, rows, mask_r, k, stride_r, stride_p, P, R_PAD: tl.constexpr, BLOCK_P: tl.constexpr, ONE: tl.constexpr):
    """Per row: the k-th largest key (0 where fewer are valid), and how many equal to it are still to be taken."""
    threshold = tl.zeros([R_PAD], tl.uint32)
    one = threshold + 1
    if ONE:
        keys = _load_keys(scores_ptr, rows, mask_r, stride_r, stride_p, 0, P, BLOCK_P)
    for i in range(32):
        candidate = threshold | (one << (31 - i))
        if ONE:
            count = tl.sum((keys >= candidate[:, None]).to(tl.int32), axis=1)
        else:
            count = tl.zeros([R_PAD], tl.int32)
            for start in range(0, P, BLOCK_P):
                chunk = _load_keys(scores_ptr, rows, mask_r, stride_r, stride_p, start, P, BLOCK_P)
                count += tl.sum((chunk >= candidate[:, None]).to(tl.int32), axis=1)
        threshold = tl.where(count >= k, candidate, threshold)
    above = tl.zeros([R_PAD], tl.int32)
    if ONE:
        above = tl.sum((keys > threshold[:, None]).to(tl.int32), axis=1)
    else:
        for start in range(0, P, BLOCK_P):
            chunk = _load_keys(scores_ptr, rows, mask_r, stride_r, stride_p, start, P, BLOCK_P)
            above += tl.sum((chunk > threshold[:, None]).to(tl.int32), axis=1)
    return threshold, k - above


@triton.jit
def _matched(keys, threshold, ties_left):
    """The rows' matches among these keys, and the ties that remain for the keys after them."""
    tie = (keys == threshold[:, None]) & (keys > 0)
    position = tl.cumsum(tie.to(tl.int32), axis=1)
    match = (keys > threshold[:, None]) | (tie & (position <= ties_left[:, None]))
    return match, ties_left - tl.sum(tie.to(tl.int32), axis=1)


@triton.jit
def _narrow(k, P):
    """Counts of any integer type as int32, clamped first because int64 may not fit."""
    return tl.minimum(tl.maximum(k.to(tl.int64), -1), P).to(tl.int32)


@triton.jit(do_not_specialize=["P", "k_value"])
def _topk_kernel(
    scores_ptr,  # [M, P]
    k_ptr,  # [M] integers of any type, read where K_TENSOR
    out_ptr,  # [M, P] uint8
    P,
    k_value,
    stride_r,
    stride_p,
    K_TENSOR: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    ONE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    rows = row + tl.zeros([1], tl.int64)
    mask_r = rows >= 0
    k = tl.zeros([1], tl.int32) + (_narrow(tl.load(k_ptr + row), P) if K_TENSOR else k_value)
    threshold, ties = _select(scores_ptr, rows, mask_r, k, stride_r, stride_p, P, 1, BLOCK_P, ONE)
    for start in range(0, P, BLOCK_OUT):
        keys = _load_keys(scores_ptr, rows, mask_r, stride_r, stride_p, start, P, BLOCK_OUT)
        match, ties = _matched(keys, threshold, ties)
        offs_p = start + tl.arange(0, BLOCK_OUT)
        tl.store(out_ptr + rows[:, None] * P + offs_p[None, :], match.to(tl.uint8), mask=(offs_p < P)[None, :])


@triton.jit(do_not_specialize=["P", "k_value"])
def _structure_kernel(
    scores_ptr,  # [B, R, P]
    k_ptr,  # [B, R] integers of any type, read where K_TENSOR
    prior_ptr,  # [B, R or 1, P] uint8
    structure_ptr,  # [B, P] fp32
    coverage_ptr,  # [B] fp32
    P,
    k_value,
    stride_sb,
    stride_sr,
    stride_sp,
    stride_mb,
    stride_mr,
    stride_mp,
    R: tl.constexpr,
    R_PAD: tl.constexpr,
    PRIOR_ROWS: tl.constexpr,
    PER_SUBJECT: tl.constexpr,
    K_TENSOR: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    ONE: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    offs_r = tl.arange(0, R_PAD)
    rows = offs_r.to(tl.int64)
    mask_r = offs_r < R
    scores_ptr += b * stride_sb
    k = tl.zeros([R_PAD], tl.int32)
    k += _narrow(tl.load(k_ptr + b * R + offs_r, mask=mask_r, other=0), P) if K_TENSOR else k_value
    threshold, ties = _select(scores_ptr, rows, mask_r, k, stride_sr, stride_sp, P, R_PAD, BLOCK_P, ONE)
    inside = tl.full([], 0, tl.int32)
    remaining = tl.full([], 0, tl.int32)
    for start in range(0, P, BLOCK_OUT):
        keys = _load_keys(scores_ptr, rows, mask_r, stride_sr, stride_sp, start, P, BLOCK_OUT)
        match, ties = _matched(keys, threshold, ties)
        offs_p = start + tl.arange(0, BLOCK_OUT)
        mask_p = offs_p < P
        offsets = b * stride_mb + rows[:, None] * stride_mr + offs_p.to(tl.int64)[None, :] * stride_mp
        prior = tl.load(prior_ptr + offsets, mask=(offs_r < PRIOR_ROWS)[:, None] & mask_p[None, :], other=0) != 0
        union = tl.max(prior.to(tl.int32), axis=0)  # [BLOCK_OUT]
        if PER_SUBJECT:
            structure = tl.max((prior & (match == 0)).to(tl.int32), axis=0)
        else:
            structure = union * (1 - tl.max(match.to(tl.int32), axis=0))
        tl.store(structure_ptr + b * P + offs_p, structure.to(tl.float32), mask=mask_p)
        inside += tl.sum(union, axis=0)
        remaining += tl.sum(structure, axis=0)
    size = tl.maximum(inside, 1).to(tl.float32)
    tl.store(coverage_ptr + b, tl.div_rn(remaining.to(tl.float32), size))


def _blocking(rows: int, patches: int) -> tuple[dict[str, Any], int]:
    """Block sizes for so many rows a program, and the threads: each holds at most 32 keys while it selects."""
    limit = BLOCK // rows if rows < 8 else BLOCK // (2 * rows)  # eight thresholds leave fewer registers for keys
    # A row that does not fit is read again for each bit anyway: small blocks then. Rows up to 256 share one variant.
    block = max(next_power_of_2(patches) if patches <= limit else min(8192 // rows, limit), 256)
    threads = min(max(rows * block // 16, 128), 512)
    # The output pass reads the scores once more, in blocks of 4 keys a thread: its masks and sums need registers too.
    return {"BLOCK_P": block, "BLOCK_OUT": max(min(block, 4 * threads // rows), 256), "ONE": patches <= block}, threads


def _topk_launch(patches: int, k_tensor: bool, dtype: torch.dtype) -> Launch:
    blocks, threads = _blocking(1, patches)
    pointer = {torch.float16: "*fp16", torch.bfloat16: "*bf16"}.get(dtype, "*fp32")
    return Launch(
        _topk_kernel,
        {"K_TENSOR": k_tensor, **blocks},
        threads=threads,
        registers=Registers(80, 80, 72, 80),
        types={"scores_ptr": pointer, "k_ptr": "*i64", "out_ptr": "*u8"},
        aligned=("stride_r",),
        ones=("stride_p",),
    )


def _structure_launch(
    subjects: int, patches: int, prior_rows: int, per_subject: bool, k_tensor: bool, dtype: torch.dtype
) -> Launch:
    padded = next_power_of_2(max(subjects, prior_rows))
    blocks, threads = _blocking(padded, patches)
    pointer = {torch.float16: "*fp16", torch.bfloat16: "*bf16"}.get(dtype, "*fp32")
    return Launch(
        _structure_kernel,
        {
            "R": subjects,
            "R_PAD": padded,
            "PRIOR_ROWS": prior_rows,
            "PER_SUBJECT": per_subject,
            "K_TENSOR": k_tensor,
            **blocks,
        },
        threads=threads,
        # A program serves a whole sample, so a multiprocessor seldom has two: registers are free up to what spills.
        registers=Registers(128, 128, 128, 120),
        types={"scores_ptr": pointer, "k_ptr": "*i64", "prior_ptr": "*u8", "structure_ptr": "*fp32", "coverage_ptr": "*fp32"},
        aligned=("stride_sb", "stride_sr", "stride_mb", "stride_mr"),
        ones=("stride_sp", "stride_mp"),
    )


def _k_arguments(k: Tensor | None, k_value: int, scores: Tensor) -> tuple[Tensor, int]:
    """The kernel's k pointer (any valid one where k is a number) and value."""
    if k is None:
        return scores, k_value
    return k.contiguous(), k_value


@torch.library.custom_op("focusdpo::topk_mask", mutates_args=())
def topk_mask_op(scores: Tensor, k: Tensor | None, k_value: int) -> Tensor:
    out = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    if out.numel() == 0:
        return out
    rows = scores.reshape(-1, scores.shape[-1])
    k_ptr, k_value = _k_arguments(None if k is None else k.reshape(-1), k_value, scores)
    launch = _topk_launch(rows.shape[1], k is not None, scores.dtype)
    with device_guard(scores):
        launch((rows.shape[0],), rows, k_ptr, out.view(torch.uint8), rows.shape[1], k_value, *rows.stride())
    return out


@topk_mask_op.register_fake
def _(scores, k, k_value):
    return torch.empty(scores.shape, dtype=torch.bool, device=scores.device)


@torch.library.custom_op("focusdpo::structure_field", mutates_args=())
def structure_field_op(
    scores: Tensor, k: Tensor | None, k_value: int, prior: Tensor, per_subject: bool
) -> tuple[Tensor, Tensor]:
    batch, subjects, patches = scores.shape
    structure = torch.empty((batch, patches), dtype=torch.float32, device=scores.device)
    coverage = torch.empty((batch,), dtype=torch.float32, device=scores.device)
    if batch == 0:
        return structure, coverage
    inside = spec.binary_prior(prior).view(torch.uint8)
    inside = inside if inside.ndim == 3 else inside[:, None]
    k_ptr, k_value = _k_arguments(k, k_value, scores)
    launch = _structure_launch(subjects, patches, inside.shape[1], per_subject, k is not None, scores.dtype)
    with device_guard(scores):
        tensors = (scores, k_ptr, inside, structure, coverage)
        launch((batch,), *tensors, patches, k_value, *scores.stride(), *inside.stride())
    return structure, coverage


@structure_field_op.register_fake
def _(scores, k, k_value, prior, per_subject):
    batch, _, patches = scores.shape
    return scores.new_empty((batch, patches), dtype=torch.float32), scores.new_empty((batch,), dtype=torch.float32)


def topk_mask(scores: Tensor, k: int | Tensor, *, backend: str | None = None) -> Tensor:
    """Marks the k largest scores of each row, exactly (E5).

    Args:
        scores: [..., P] fp16, bf16 or fp32 (float64 on the torch backend).
        k: an int from 0 to P, or an integer tensor that broadcasts to [...] on the scores' device (values beyond the row's
            finite scores select those only; negative ones select none).
        backend: "triton", "torch" or None; see `focusdpo_kernels.backend`.

    Returns:
        bool [..., P]. Ties go to the lower index; NaN and -inf are never selected.

    Raises:
        TypeError, ValueError: arguments of wrong type, shape, dtype or device, or an int k outside 0..P.
    """
    scores = check_scores("scores", scores).detach()
    k = check_k(k, scores)
    if resolve_backend(backend, scores) == "torch":
        return spec.topk_mask(scores, k)
    return topk_mask_op(scores, k, 0) if isinstance(k, Tensor) else topk_mask_op(scores, None, k)


def structure_field(
    scores: Tensor, k: int | Tensor, prior: Tensor, *, per_subject: bool = False, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Subject regions that are not yet aligned, and their share of the prior (E5, E6, E8).

    Args:
        scores: S [B, R, P] fp16, bf16 or fp32 (float64 on the torch backend).
        k: an int, or an integer tensor that broadcasts to [B, R]: matches per subject; see `topk_mask`.
        prior: [B, P], or [B, R, P] with one region per subject. Booleans and integers count where not 0, floats where
            above one half.
        per_subject: False takes the union of the subjects' matches from the union of the priors; True takes each
            subject's own matches from its own prior, which needs a prior [B, R, P].
        backend: "triton", "torch" or None; see `focusdpo_kernels.backend`.

    Returns:
        (M_s [B, P] of 0 and 1, coverage A [B] in [0, 1]; 0 for an empty prior), fp32 (float64 for float64 scores).

    Raises:
        TypeError, ValueError: arguments of wrong type, shape, dtype or device, each named.
    """
    scores = check_scores("scores", scores, ndim=3).detach()
    k = check_k(k, scores)
    batch, subjects, patches = scores.shape
    prior = check_prior(prior, batch, subjects, patches).detach()
    check_device("prior", prior, scores.device, "scores")
    if per_subject and prior.ndim == 2:
        raise ValueError("prior: per_subject=True needs one prior per subject [B, R, P], got [B, P]")
    if resolve_backend(backend, scores) == "torch":
        return spec.structure_field(scores, k, prior, per_subject)
    if isinstance(k, Tensor):
        return structure_field_op(scores, k, 0, prior, per_subject)
    return structure_field_op(scores, None, k, prior, per_subject)


def launches() -> Iterator[Launch]:
    """Every shipped launch configuration, for ahead-of-time compilation."""
    for patches in (256, 1024, 4096, 16384, 65536):
        yield _topk_launch(patches, True, torch.float32)
        for subjects in (1, 2, 4, 6):
            yield _structure_launch(subjects, patches, 1, False, True, torch.float32)
    for subjects in (1, 2, 4, 6):
        yield _structure_launch(subjects, 4096, subjects, True, True, torch.float32)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        yield _topk_launch(4096, False, dtype)
        yield _structure_launch(2, 4096, 1, False, False, dtype)
