"""Exact top-K and the structure field (docs/method.md, E5, E6 and E8's coverage).

    M'[r] = indicator of the K_r largest S[r, :]          ties to the lower index; NaN and -inf never matched
    M_s   = prior * (1 - OR_r M'[r])                      or OR_r prior[r] * (1 - M'[r]) per subject
    A     = |M_s| / |prior|

The K-th largest score is searched between two bounds by counting the scores above a guess: nothing is sorted and nothing is
rounded. Guesses are interpolated from the counts at the bounds; those that do not help, and all after the first GUESSES, halve
what is left. The search ends as soon as exactly K are above. Up to BLOCK scores stay in registers; longer rows are read again
from cache for each guess. Bytes: 4 B R P in and the prior, 4 B P out.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from focusdpo_kernels import cpu_mask
from focusdpo_kernels import reference as spec
from focusdpo_kernels.backend import device_guard, resolve_backend
from focusdpo_kernels.checks import check_device, check_k, check_per_subject, check_prior, check_scores
from focusdpo_kernels.launch import POINTERS, Launch, Registers, next_power_of_2

BLOCK = 16384  # scores that a program holds at once, of all its rows
LONGEST = 8192  # rows of which one program takes all of a sample
DIGITS = tl.constexpr(BLOCK.bit_length())
GUESSES = tl.constexpr(12)  # interpolated ones, before halving: at most 32 more


class Rows(NamedTuple):
    """A tensor [B, R, P] as a kernel takes it: pointer and strides."""

    ptr: Any
    stride_b: Any
    stride_r: Any
    stride_p: Any


class Counts(NamedTuple):
    """k [B, R], integers of any type."""

    ptr: Any
    stride_b: Any
    stride_r: Any


@triton.jit
def ordered(x):
    """fp32 numbers as int32 of the same order, both zeros as 0; the same again gives the numbers' bits back."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -0x80000000 - bits, bits)


@triton.jit
def unordered(keys):
    return tl.where(keys < 0, -0x80000000 - keys, keys).to(tl.float32, bitcast=True)


@triton.jit
def _load_scores(ptr, rows, mask_r, stride_r, stride_p, start, P, BLOCK_P: tl.constexpr):
    """Scores [ROWS, BLOCK_P] in fp32; -inf where absent or NaN."""
    offs_p = start + tl.arange(0, BLOCK_P)
    offsets = rows[:, None] * stride_r + offs_p.to(tl.int64)[None, :] * stride_p
    x = tl.load(ptr + offsets, mask=mask_r[:, None] & (offs_p < P)[None, :], other=float("-inf")).to(tl.float32)
    return tl.where(x > float("-inf"), x, float("-inf"))


@triton.jit
def _count(x, limit):
    """Per row: how many scores are above a limit."""
    return tl.sum((x > limit[:, None]).to(tl.int32), axis=1)


@triton.jit
def _count_rows(x, limit, ptr, rows, mask_r, stride_r, stride_p, P, BLOCK_P: tl.constexpr):
    """The same of rows that are not held."""
    if x is not None:
        return _count(x, limit)
    count = _count(_load_scores(ptr, rows, mask_r, stride_r, stride_p, 0, P, BLOCK_P), limit)
    for start in range(BLOCK_P, P, BLOCK_P):
        count += _count(_load_scores(ptr, rows, mask_r, stride_r, stride_p, start, P, BLOCK_P), limit)
    return count


@triton.jit
def _bounds(x):
    """Per row: how many scores are valid, the least of them, and the largest."""
    valid = x > float("-inf")
    least = tl.min(tl.where(valid, x, float("inf")), axis=1)
    return tl.sum(valid.to(tl.int32), axis=1), least, tl.max(x, axis=1)


@triton.jit
def _select(x, ptr, rows, mask_r, k, stride_r, stride_p, P, BLOCK_P: tl.constexpr):
    """Per row: all scores above `threshold` are among the k largest, and of those equal to it the first `ties`.

    `x` [ROWS, BLOCK_P] are the rows, or None: then they are read block by block. Returns (threshold, ties, valid scores).
    """
    if x is None:
        valid, least, high = _bounds(_load_scores(ptr, rows, mask_r, stride_r, stride_p, 0, P, BLOCK_P))
        for start in range(BLOCK_P, P, BLOCK_P):
            more, lower, higher = _bounds(_load_scores(ptr, rows, mask_r, stride_r, stride_p, start, P, BLOCK_P))
            valid, least, high = valid + more, tl.minimum(least, lower), tl.maximum(high, higher)
    else:
        valid, least, high = _bounds(x)
    # The k-th largest is above low and at most high: k or more scores are above low, fewer are above high.
    k = tl.minimum(tl.maximum(k, 0), valid)
    low = tl.where(k == 0, high, unordered(ordered(least) - 1))
    above = tl.where(k == 0, 0, valid - k).to(tl.float32)
    below = k.to(tl.float32)
    was_enough = k < 0
    several = (above > 0).to(tl.int32)  # 1 where more scores than are wanted may be above low
    left = tl.max(several, axis=0)
    for step in range(GUESSES + 32):
        if left > 0:
            guess = low + (high - low) * (above / (above + below))
            between = (guess > low) & (guess < high) & (step < GUESSES)
            guess = tl.where(between, guess, low)
            halve = tl.where(between, 0, several)
            if tl.max(halve, axis=0) > 0:
                key_low = ordered(low)
                key_high = ordered(high)
                middle = (key_low >> 1) + (key_high >> 1) + (key_low & key_high & 1)
                guess = tl.where(halve > 0, unordered(middle), guess)
                several = tl.where((halve > 0) & (middle == key_low), 0, several)  # nothing is between
            count = _count_rows(x, guess, ptr, rows, mask_r, stride_r, stride_p, P, BLOCK_P) - k
            enough = count >= 0
            # The Illinois variant of regula falsi: a bound that stays where it is counts half as much each time.
            faded = tl.where(enough == was_enough, 0.5, 1.0)
            above = tl.where(enough, count.to(tl.float32), above * faded)
            below = tl.where(enough, below * faded, -count.to(tl.float32))
            low = tl.where(enough, guess, low)
            high = tl.where(enough, high, guess)
            was_enough = enough
            several = tl.where(count == 0, 0, several)
            left = tl.max(several, axis=0)
    exact = above == 0
    threshold = tl.where(exact, low, high)
    ties = tl.zeros_like(k)
    if tl.max((above > 0).to(tl.int32), axis=0) > 0:
        count = _count_rows(x, threshold, ptr, rows, mask_r, stride_r, stride_p, P, BLOCK_P)
        ties = tl.where(exact, 0, k - count)
    return threshold, ties, valid


@triton.jit
def _matched(x, threshold, ties, BLOCK_P: tl.constexpr):
    """The rows' matches among these scores, and the ties that remain for the scores after them."""
    match = x > threshold[:, None]
    if tl.max(ties, axis=0) > 0:
        # Where to cut, digit by digit: a running count would need more registers than all of the search.
        tie = x == threshold[:, None]
        offs_p = tl.arange(0, BLOCK_P)[None, :]
        cut = tl.zeros_like(ties)
        for digit in range(DIGITS):
            further = cut + (BLOCK_P >> digit)
            before = tl.sum((tie & (offs_p < further[:, None])).to(tl.int32), axis=1)
            cut = tl.where(before <= ties, further, cut)
        match = match | (tie & (offs_p < cut[:, None]) & (ties > 0)[:, None])
        ties -= tl.sum(tie.to(tl.int32), axis=1)
    return match, ties


@triton.jit
def _narrow(k, P):
    """Counts of any integer type as int32 from 0 to P, clamped first because int64 may not fit."""
    return tl.minimum(tl.maximum(k.to(tl.int64), 0), P).to(tl.int32)


@triton.jit(do_not_specialize=["P", "k_value"])
def _topk_kernel(
    scores_ptr,  # [M, P]
    k_ptr,  # [M] integers of any type, or None
    out_ptr,  # [M, P] uint8
    P,
    k_value,
    stride_r,
    stride_p,
    BLOCK_P: tl.constexpr,
    FULL: tl.constexpr,
    ONE: tl.constexpr,
):
    if FULL:
        P = BLOCK_P
    row = tl.program_id(0).to(tl.int64)
    rows = row + tl.zeros([1], tl.int64)
    mask_r = rows >= 0
    k = tl.zeros([1], tl.int32) + (k_value if k_ptr is None else _narrow(tl.load(k_ptr + row), P))
    if ONE:
        x = _load_scores(scores_ptr, rows, mask_r, stride_r, stride_p, 0, P, BLOCK_P)
        threshold, ties, _ = _select(x, scores_ptr, rows, mask_r, k, stride_r, stride_p, P, BLOCK_P)
        match, ties = _matched(x, threshold, ties, BLOCK_P)
        offs_p = tl.arange(0, BLOCK_P)
        tl.store(out_ptr + rows[:, None] * P + offs_p[None, :], match.to(tl.uint8), mask=(offs_p < P)[None, :])
    else:
        threshold, ties, _ = _select(None, scores_ptr, rows, mask_r, k, stride_r, stride_p, P, BLOCK_P)
        for start in range(0, P, BLOCK_P):
            x = _load_scores(scores_ptr, rows, mask_r, stride_r, stride_p, start, P, BLOCK_P)
            match, ties = _matched(x, threshold, ties, BLOCK_P)
            offs_p = start + tl.arange(0, BLOCK_P)
            tl.store(out_ptr + rows[:, None] * P + offs_p[None, :], match.to(tl.uint8), mask=(offs_p < P)[None, :])


@triton.jit
def load_inside(ptr, offsets, mask):
    """A prior as 0 and 1: booleans and integers count where not 0, floats where above one half."""
    prior = tl.load(ptr + offsets, mask=mask, other=0)
    if prior.dtype.is_floating():
        if prior.dtype.primitive_bitwidth < 32:
            prior = prior.to(tl.float32)
        return (prior > 0.5).to(tl.int32)
    else:
        return (prior != 0).to(tl.int32)


@triton.jit
def uncovered(
    scores,
    k,
    k_value,
    prior,
    b,
    P,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    PRIOR_ROWS: tl.constexpr,
    PER_SUBJECT: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """A sample's structure and union of priors [BLOCK_P], 0 and 1; what its matches leave of the prior at least; and whether
    some subject may match every token.

    ROWS subjects at a time.
    """
    offs_p = tl.arange(0, BLOCK_P)
    mask_p = offs_p < P
    prior_ptr = prior.ptr + b * prior.stride_b
    prior_offsets = offs_p.to(tl.int64) * prior.stride_p
    union = tl.zeros([BLOCK_P], tl.int32)
    covered = tl.zeros([BLOCK_P], tl.int32)
    structure = tl.zeros([BLOCK_P], tl.int32)
    matches = 0
    rest = 0
    all_matched = 0
    for start in range(0, R, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask_r = rows < R
        scores_ptr = scores.ptr + b * scores.stride_b
        x = _load_scores(scores_ptr, rows.to(tl.int64), mask_r, scores.stride_r, scores.stride_p, 0, P, BLOCK_P)
        wanted = tl.zeros([ROWS], tl.int32)
        if k is None:
            wanted += k_value
        else:
            offsets = b * k.stride_b + rows.to(tl.int64) * k.stride_r
            wanted += _narrow(tl.load(k.ptr + offsets, mask=mask_r, other=0), P)
        threshold, ties, valid = _select(x, scores.ptr, rows, mask_r, wanted, scores.stride_r, scores.stride_p, P, BLOCK_P)
        match, ties = _matched(x, threshold, ties, BLOCK_P)
        # The prior only now, because the search needs the registers.
        if PRIOR_ROWS > 1 or PER_SUBJECT:
            offsets = rows.to(tl.int64)[:, None] * prior.stride_r + prior_offsets[None, :]
            inside = load_inside(prior_ptr, offsets, mask_r[:, None] & mask_p[None, :])
            union |= tl.max(inside, axis=0)
        if PER_SUBJECT:
            structure |= tl.max(tl.where(match, 0, inside), axis=0)
        else:
            covered |= tl.max(match.to(tl.int32), axis=0)
        wanted = tl.where(mask_r & (valid > 0), wanted, 0)  # an absent subject matches nothing
        if PER_SUBJECT:
            rest = tl.maximum(rest, tl.max(tl.sum(inside, axis=1) - wanted, axis=0))
        matches += tl.sum(wanted, axis=0)
        all_matched |= tl.max((mask_r & (wanted >= P)).to(tl.int32), axis=0)
    if PRIOR_ROWS == 1:
        union = load_inside(prior_ptr, prior_offsets, mask_p)
    if not PER_SUBJECT:
        structure = union * (1 - covered)
    return structure, union, matches, rest, all_matched


@triton.jit
def share(structure, union):
    """A of E8, the structure's share of the prior, and the prior's size."""
    # Both counts in one sum: 16 bits each are enough for BLOCK.
    sizes = tl.sum(union + structure * 65536, axis=0)
    size = sizes & 0xFFFF
    return tl.div_rn((sizes >> 16).to(tl.float32), tl.maximum(size, 1).to(tl.float32)), size


@triton.jit(do_not_specialize=["P", "k_value"])
def _structure_kernel(
    scores,  # [B, R, P]
    k,  # [B, R] or None
    prior,  # [B, PRIOR_ROWS, P] of any type
    structure_ptr,  # [B, P] fp32
    coverage_ptr,  # [B] fp32
    P,
    k_value,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    PRIOR_ROWS: tl.constexpr,
    PER_SUBJECT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    FULL: tl.constexpr,
):
    if FULL:
        P = BLOCK_P  # a number that the compiler knows: loads of 16 bytes
    b = tl.program_id(0).to(tl.int64)
    structure, union, _, _, _ = uncovered(
        scores, k, k_value, prior, b, P, R=R, ROWS=ROWS, PRIOR_ROWS=PRIOR_ROWS, PER_SUBJECT=PER_SUBJECT, BLOCK_P=BLOCK_P
    )
    coverage, _ = share(structure, union)
    offs_p = tl.arange(0, BLOCK_P)
    tl.store(structure_ptr + b * P + offs_p, structure.to(tl.float32), mask=offs_p < P)
    tl.store(coverage_ptr + b, coverage)


def _blocking(rows: int, patches: int) -> tuple[dict[str, int], int]:
    """Subjects and scores that a program takes at a time, and its threads: each holds at most 64 scores."""
    block = max(next_power_of_2(patches), 256)  # rows up to 256 share one variant
    rows = min(next_power_of_2(rows), max(BLOCK // block, 1), 8)
    # The more threads, the more often the few numbers of the search are computed.
    return {"ROWS": rows, "BLOCK_P": block}, min(max(rows * block // 32, 128), 256)


def row_types(scores: str, prior: str, k: str | None) -> dict[str, Any]:
    """Triton types of the arguments of a kernel that calls `uncovered`."""
    return {
        "scores": Rows(scores, "i32", "i32", "i32"),
        "prior": Rows(prior, "i32", "i32", "i32"),
        "k": k if k is None else Counts(k, "i32", "i32"),
    }


ROW_ALIGNED = ("scores.stride_b", "scores.stride_r", "prior.stride_b", "prior.stride_r")
ROW_ONES = ("scores.stride_p", "prior.stride_p", "k.stride_r")


def row_constants(subjects: int, patches: int, prior_rows: int, per_subject: bool) -> tuple[dict[str, Any], int]:
    """Constants of a kernel that calls `uncovered`, and its threads."""
    blocks, threads = _blocking(subjects, patches)
    full = patches == blocks["BLOCK_P"]
    return {"R": subjects, "PRIOR_ROWS": prior_rows, "PER_SUBJECT": per_subject, **blocks, "FULL": full}, threads


@functools.cache
def _topk_launch(patches: int, k_tensor: bool, dtype: torch.dtype) -> Launch:
    one = patches <= BLOCK
    # A row that does not fit is read again for each guess anyway.
    block = max(next_power_of_2(patches), 256) if one else 8192
    return Launch(
        _topk_kernel,
        {"BLOCK_P": block, "FULL": patches == block, "ONE": one},
        threads=min(max(block // 32, 128), 512),
        registers=Registers(208, 208, 208, 176),
        types={"scores_ptr": POINTERS[dtype], "k_ptr": "*i64" if k_tensor else None, "out_ptr": "*u8"},
        aligned=("stride_r",),
        ones=("stride_p",),
    )


@functools.cache
def _structure_launch(
    subjects: int, patches: int, prior_rows: int, per_subject: bool, k_tensor: bool, dtype: torch.dtype
) -> Launch:
    constants, threads = row_constants(subjects, patches, prior_rows, per_subject)
    return Launch(
        _structure_kernel,
        constants,
        threads=threads,
        # A program serves a whole sample, so a multiprocessor seldom has two: registers are free up to what spills.
        registers=Registers(248, 248, 248, 248),
        types={
            **row_types(POINTERS[dtype], "*u8", "*i64" if k_tensor else None),
            "structure_ptr": "*fp32",
            "coverage_ptr": "*fp32",
        },
        aligned=ROW_ALIGNED,
        ones=ROW_ONES,
    )


def run_topk(scores: Tensor, k: Tensor | None, k_value: int) -> Tensor:
    """`topk_mask` by the kernel: a program a row."""
    out = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    if out.numel() == 0:
        return out
    rows = scores.reshape(-1, scores.shape[-1])
    launch = _topk_launch(rows.shape[1], k is not None, scores.dtype)
    counts = None if k is None else k.reshape(-1).contiguous()
    with device_guard(scores):
        launch((rows.shape[0],), rows, counts, out.view(torch.uint8), rows.shape[1], k_value, *rows.stride())
    return out


topk_mask_op = torch.library.custom_op("focusdpo::topk_mask", run_topk, mutates_args=())


@topk_mask_op.register_fake
def _(scores, k, k_value):
    return torch.empty(scores.shape, dtype=torch.bool, device=scores.device)


def row_arguments(rows: Tensor) -> Rows:
    """Scores [B, R, P], or a prior [B, P] or [B, R, P], as a kernel takes them."""
    rows = rows if rows.ndim == 3 else rows[:, None]
    return Rows(rows.view(torch.uint8) if rows.dtype == torch.bool else rows, *rows.stride())


def counts_arguments(k: Tensor | None) -> Counts | None:
    """k [B, R], or None where it is a number."""
    return None if k is None else Counts(k, *k.stride())


@torch.library.custom_op("focusdpo::structure_field", mutates_args=())
def structure_field_op(
    scores: Tensor, k: Tensor | None, k_value: int, prior: Tensor, per_subject: bool
) -> tuple[Tensor, Tensor]:
    batch, subjects, patches = scores.shape
    if patches > LONGEST:
        return spec.uncovered(run_topk(scores, k, k_value), prior, per_subject, torch.float32)
    structure = torch.empty((batch, patches), dtype=torch.float32, device=scores.device)
    coverage = torch.empty((batch,), dtype=torch.float32, device=scores.device)
    if batch == 0:
        return structure, coverage
    prior_rows = prior.shape[1] if prior.ndim == 3 else 1
    launch = _structure_launch(subjects, patches, prior_rows, per_subject, k is not None, scores.dtype)
    with device_guard(scores):
        rows = (row_arguments(scores), counts_arguments(k), row_arguments(prior))
        launch((batch,), *rows, structure, coverage, patches, k_value)
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
        return (cpu_mask if cpu_mask.takes(scores) else spec).topk_mask(scores, k)
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
    check_per_subject(per_subject, prior)
    if resolve_backend(backend, scores) == "torch":
        return (cpu_mask if cpu_mask.takes(scores) else spec).structure_field(scores, k, prior, per_subject)
    if isinstance(k, Tensor):
        return structure_field_op(scores, k, 0, prior, per_subject)
    return structure_field_op(scores, None, k, prior, per_subject)


def launches() -> Iterator[Launch]:
    """Every shipped launch configuration, for ahead-of-time compilation."""
    for patches in (256, 1024, 4096, 16384, 65536):
        yield _topk_launch(patches, True, torch.float32)
    for patches in (256, 1024, 4000, 4096, 8192):
        for subjects in (1, 2, 4, 6):
            yield _structure_launch(subjects, patches, 1, False, True, torch.float32)
    for subjects in (1, 2, 4, 6):
        yield _structure_launch(subjects, 4096, subjects, True, True, torch.float32)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        yield _topk_launch(4096, False, dtype)
        yield _structure_launch(2, 4096, 1, False, False, dtype)
