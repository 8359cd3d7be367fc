"""Exact top-K and the structure field (docs/method.md, E5, E6 and E8's coverage).

    M'[r] = indicator of the K_r largest S[r, :]          ties to the lower index; NaN and -inf never matched
    M_s   = prior * (1 - OR_r M'[r])                      or OR_r prior[r] * (1 - M'[r]) per subject
    A     = |M_s| / |prior|

A program takes a row. The K-th largest score is searched between two bounds by counting the scores above two guesses in each
pass: nothing is sorted and nothing is rounded. The first guesses are those of a normal distribution, the next are interpolated
from the counts at the bounds, a little below and a little above what is wanted; where that does not help, and after GUESSES
passes, the bounds' distance is divided by three. The search ends as soon as exactly K are above. Short rows stay in registers;
longer ones are read again from cache in each pass. Bytes: 4 B R P in, B R P out; M_s and A read those and the prior, and write
4 B P.
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
from focusdpo_kernels.checks import FLOATS, check_field, check_k, check_tensor
from focusdpo_kernels.launch import POINTERS, Launch, Registers, next_power_of_2

DIGITS = tl.constexpr(15)  # of a place among the scores that a program looks at in one go, 16384 at most
GUESSES = tl.constexpr(8)  # passes by the scores' values, before those by their bits: at most 22 more


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


class Selected(NamedTuple):
    """M' of rows [B, R, P] as bytes of 0 and 1, and [B, R] int32, how many those are at most: 0 of an absent subject."""

    matches: Any
    wanted: Any

    @classmethod
    def empty(cls, scores: Tensor) -> Selected:
        return cls(
            torch.empty(scores.shape, dtype=torch.uint8, device=scores.device),
            torch.empty(scores.shape[:2], dtype=torch.int32, device=scores.device),
        )


@triton.jit
def ordered(x):
    """fp32 numbers as int32 of the same order, both zeros as 0; the same again gives the numbers' bits back."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -0x80000000 - bits, bits)


@triton.jit
def unordered(keys):
    return tl.where(keys < 0, -0x80000000 - keys, keys).to(tl.float32, bitcast=True)


@triton.jit
def _load_scores(ptr, stride_p, start, P, BLOCK_P: tl.constexpr):
    """Scores [BLOCK_P] of a row in fp32; -inf where absent or NaN."""
    offs_p = start + tl.arange(0, BLOCK_P)
    x = tl.load(ptr + offs_p.to(tl.int64) * stride_p, mask=offs_p < P, other=float("-inf")).to(tl.float32)
    return tl.where(x > float("-inf"), x, float("-inf"))


@triton.jit
def _count(x, first, second, ptr, stride_p, P, BLOCK_P: tl.constexpr):
    """How many scores of a row are above two limits, the first at most the second."""
    if x is not None:
        # Both in one number, and so in one sum over all threads.
        both = tl.sum(tl.where(x > second, 0x10001, tl.where(x > first, 1, 0)), axis=0)
        return both & 0xFFFF, both >> 16
    above_first = tl.zeros([BLOCK_P], tl.int32)
    above_second = tl.zeros([BLOCK_P], tl.int32)
    for start in range(0, P, BLOCK_P):
        block = _load_scores(ptr, stride_p, start, P, BLOCK_P)
        above_first += (block > first).to(tl.int32)
        above_second += (block > second).to(tl.int32)
    return tl.sum(above_first, axis=0), tl.sum(above_second, axis=0)


@triton.jit
def _add(count, least, largest, total, squares, more, lower, higher, sums, powers):
    return count + more, tl.minimum(least, lower), tl.maximum(largest, higher), total + sums, squares + powers


@triton.jit
def _measure(x, ptr, stride_p, P, BLOCK_P: tl.constexpr):
    """Of a row's valid scores: how many, the least and the largest, their sum and their squares' sum."""
    if x is not None:
        return tl.reduce(_parts(x), axis=0, combine_fn=_add)
    count, least, largest, total, squares = _parts(_load_scores(ptr, stride_p, 0, P, BLOCK_P))
    for start in range(BLOCK_P, P, BLOCK_P):
        more, lower, higher, sums, powers = _parts(_load_scores(ptr, stride_p, start, P, BLOCK_P))
        count, least, largest, total, squares = _add(count, least, largest, total, squares, more, lower, higher, sums, powers)
    return tl.reduce((count, least, largest, total, squares), axis=0, combine_fn=_add)


@triton.jit
def _parts(x):
    valid = x > float("-inf")
    number = tl.where(valid, x, 0.0)
    return valid.to(tl.int32), tl.where(valid, x, float("inf")), x, number, number * number


@triton.jit
def _select(x, ptr, k, stride_p, P, BLOCK_P: tl.constexpr):
    """All scores of a row above `threshold` are among the k largest, and of those equal to it the first `ties`.

    `x` [BLOCK_P] is the row, or None: then it is read block by block. Returns (threshold, ties, valid scores).
    """
    valid, least, high, total, squares = _measure(x, ptr, stride_p, P, BLOCK_P)
    # The k-th largest is above low and at most high: k + above scores are above low, k - below are above high.
    k = tl.minimum(tl.maximum(k, 0), valid)
    low = tl.where(k == 0, high, unordered(ordered(least) - 1))
    above = tl.where(k == 0, 0, valid - k)
    below = k
    going = above > 0  # more scores than are wanted may be above low
    # A normal distribution's quantile, nearly: Tukey's lambda.
    mean = total / tl.maximum(valid, 1)
    deviation = tl.sqrt(tl.maximum(squares / tl.maximum(valid, 1) - mean * mean, 0.0))
    chance = (k + 0.5) / (valid + 1)
    middle = mean + deviation * (tl.exp2(0.135 * tl.log2(1 - chance)) - tl.exp2(0.135 * tl.log2(chance))) / 0.1975
    first = middle - 0.1 * deviation
    second = middle + 0.1 * deviation
    for step in range(1, GUESSES + 23):
        if going:
            first = tl.where(first > low, tl.where(first < high, first, high), low)  # which may have been no number
            second = tl.where(second > first, tl.where(second < high, second, high), first)
            before = above + below
            over_first, over_second = _count(x, first, second, ptr, stride_p, P, BLOCK_P)
            over_first -= k
            over_second -= k
            above = tl.where(over_second >= 0, over_second, tl.where(over_first >= 0, over_first, above))
            below = tl.where(over_first < 0, -over_first, tl.where(over_second < 0, -over_second, below))
            low = tl.where(over_second >= 0, second, tl.where(over_first >= 0, first, low))
            high = tl.where(over_first < 0, first, tl.where(over_second < 0, second, high))
            going = above > 0
            if step < GUESSES:
                # Around the interpolated one, as far as the counts of so many random scores stray.
                left = (above + below).to(tl.float32)
                margin = 0.5 * tl.sqrt(left)
                under = tl.maximum(above - margin, 0.5 * above) / left
                over = tl.maximum(below - margin, 0.5 * below) / left
                helped = 2 * (above + below) <= before
                first = low + (high - low) * tl.where(helped, under, 1 / 3)
                second = high - (high - low) * tl.where(helped, over, 1 / 3)
            else:
                key_low = ordered(low)
                key_high = ordered(high)
                distance = (key_high - key_low).to(tl.uint32, bitcast=True)
                going = going & (distance > 1)  # else nothing is between
                third = ((distance + 2) // 3).to(tl.int32, bitcast=True)
                first = unordered(key_low + third)
                second = unordered(key_high - third)
    threshold = tl.where(above == 0, low, high)
    ties = 0
    if above > 0:
        larger, _ = _count(x, threshold, threshold, ptr, stride_p, P, BLOCK_P)
        ties = k - larger
    return threshold, ties, valid


@triton.jit
def _matched(x, threshold, ties, BLOCK_P: tl.constexpr):
    """The row's matches among these scores, and the ties that remain for the scores after them."""
    match = x > threshold
    if ties > 0:
        # Where to cut, digit by digit: a running count would need more registers than all of the search.
        tie = x == threshold
        offs_p = tl.arange(0, BLOCK_P)
        cut = 0
        for digit in range(DIGITS):
            further = cut + (BLOCK_P >> digit)
            before = tl.sum((tie & (offs_p < further)).to(tl.int32), axis=0)
            cut = tl.where(before <= ties, further, cut)
        match = match | (tie & (offs_p < cut))
        ties -= tl.sum(tie.to(tl.int32), axis=0)
    return match, ties


@triton.jit
def narrow(k, P):
    """Counts of any integer type as int32 from 0 to P, clamped first because int64 may not fit."""
    return tl.minimum(tl.maximum(k.to(tl.int64), 0), P).to(tl.int32)


@triton.jit
def write_matches(scores, k, k_value, selected, R, P, row, BLOCK_P: tl.constexpr, ONE: tl.constexpr):
    """M'[row] of all B R rows, as 0 and 1 of one byte; and how many are wanted, 0 where the subject is absent."""
    b = (row // R).to(tl.int64)
    r = (row % R).to(tl.int64)
    ptr = scores.ptr + b * scores.stride_b + r * scores.stride_r
    matches_ptr = selected.matches + row.to(tl.int64) * P
    wanted = k_value if k is None else narrow(tl.load(k.ptr + b * k.stride_b + r * k.stride_r), P)
    x = _load_scores(ptr, scores.stride_p, 0, P, BLOCK_P) if ONE else None
    threshold, ties, valid = _select(x, ptr, wanted, scores.stride_p, P, BLOCK_P)
    tl.store(selected.wanted + row, tl.where(valid > 0, wanted, 0))
    for start in range(0, P, BLOCK_P):
        block = x if ONE else _load_scores(ptr, scores.stride_p, start, P, BLOCK_P)
        match, ties = _matched(block, threshold, ties, BLOCK_P)
        offs_p = start + tl.arange(0, BLOCK_P)
        tl.store(matches_ptr + offs_p, match.to(tl.uint8), mask=offs_p < P)


@triton.jit(do_not_specialize=["k_value"])
def _topk_kernel(
    scores,  # [B, R, P]
    k,  # [B, R], or None where it is a number
    selected,
    R,
    P,
    k_value,
    BLOCK_P: tl.constexpr,
    ONE: tl.constexpr,
):
    write_matches(scores, k, k_value, selected, R, P, tl.program_id(0), BLOCK_P=BLOCK_P, ONE=ONE)


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
    matches_ptr, prior, b, start, P, R: tl.constexpr, PRIOR_ROWS: tl.constexpr, PER_SUBJECT: tl.constexpr, BLOCK: tl.constexpr
):
    """A sample's structure and union of priors [BLOCK] from token `start` on, 0 and 1."""
    offs_p = start + tl.arange(0, BLOCK)
    mask_p = offs_p < P
    matches_ptr += b * R * P + offs_p
    prior_ptr = prior.ptr + b * prior.stride_b + offs_p.to(tl.int64) * prior.stride_p
    union = tl.zeros([BLOCK], tl.int32)
    covered = tl.zeros([BLOCK], tl.int32)
    structure = tl.zeros([BLOCK], tl.int32)
    for r in tl.static_range(R):
        match = tl.load(matches_ptr + tl.cast(r, tl.int64) * P, mask=mask_p, other=0).to(tl.int32)
        covered |= match
        if PRIOR_ROWS > 1 or PER_SUBJECT:
            inside = load_inside(prior_ptr, tl.cast(r, tl.int64) * prior.stride_r, mask_p)
            union |= inside
            structure |= inside & (1 - match)
    if PRIOR_ROWS == 1:
        union = load_inside(prior_ptr, 0, mask_p)
    if not PER_SUBJECT:
        structure = union & (1 - covered)
    return structure, union


@triton.jit
def share(structure, union):
    """A of E8, the structure's share of the prior's size."""
    return tl.div_rn(structure.to(tl.float32), tl.maximum(union, 1).to(tl.float32))


@triton.jit
def _structure_kernel(
    matches_ptr,  # [B, R, P] of 0 and 1
    prior,  # [B, PRIOR_ROWS, P] of any type
    structure_ptr,  # [B, P] fp32
    coverage_ptr,  # [B] fp32
    P,
    R: tl.constexpr,
    PRIOR_ROWS: tl.constexpr,
    PER_SUBJECT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    structures = tl.zeros([BLOCK], tl.int32)
    unions = tl.zeros([BLOCK], tl.int32)
    for start in range(0, P, BLOCK):
        structure, union = uncovered(
            matches_ptr, prior, b, start, P, R=R, PRIOR_ROWS=PRIOR_ROWS, PER_SUBJECT=PER_SUBJECT, BLOCK=BLOCK
        )
        structures += structure
        unions += union
        offs_p = start + tl.arange(0, BLOCK)
        tl.store(structure_ptr + b * P + offs_p, structure.to(tl.float32), mask=offs_p < P)
    tl.store(coverage_ptr + b, share(tl.sum(structures, axis=0), tl.sum(unions, axis=0)))


def row_types(kind: str) -> Rows:
    """Triton types of rows [B, R, P]."""
    return Rows(kind, "i32", "i32", "i32")


def count_types(kind: str | None) -> Counts | None:
    """The same of k [B, R], or None where it is a number."""
    return None if kind is None else Counts(kind, "i32", "i32")


SCORES_ALIGNED = ("scores.stride_b", "scores.stride_r")
PRIOR_ALIGNED = ("prior.stride_b", "prior.stride_r")


def row_constants(patches: int, threads: int, held: int) -> dict[str, int | bool]:
    """Constants of a kernel that calls `write_matches`. A row of more than `held` scores a thread is read in parts."""
    block = max(next_power_of_2(patches), 256)  # rows up to 256 share one variant
    one = block <= held * threads
    return {"BLOCK_P": block if one else 8 * threads, "ONE": one}


def field_constants(subjects: int, patches: int, prior_rows: int, per_subject: bool) -> tuple[dict[str, int | bool], int]:
    """Constants of a kernel that calls `uncovered`, and its threads: 8 tokens each, where there are as many."""
    block = min(max(next_power_of_2(patches), 256), 4096)
    return {"R": subjects, "PRIOR_ROWS": prior_rows, "PER_SUBJECT": per_subject, "BLOCK": block}, max(block // 8, 128)


@functools.cache
def _topk_launch(patches: int, k_tensor: bool, dtype: torch.dtype) -> Launch:
    threads = min(max(next_power_of_2(patches) // 16, 128), 512)
    return Launch(
        _topk_kernel,
        row_constants(patches, threads, held=32),
        threads=threads,
        registers=Registers(128, 128, 128, 128),
        types={
            "scores": row_types(POINTERS[dtype]),
            "k": count_types("*i64" if k_tensor else None),
            "selected": Selected("*u8", "*i32"),
        },
        aligned=(*SCORES_ALIGNED, "P"),
        ones=("scores.stride_p", "k.stride_r"),
    )


@functools.cache
def _structure_launch(subjects: int, patches: int, prior_rows: int, per_subject: bool) -> Launch:
    constants, threads = field_constants(subjects, patches, prior_rows, per_subject)
    return Launch(
        _structure_kernel,
        constants,
        threads=threads,
        registers=Registers(128, 128, 128, 128),
        types={"matches_ptr": "*u8", "prior": row_types("*u8"), "structure_ptr": "*fp32", "coverage_ptr": "*fp32"},
        aligned=(*PRIOR_ALIGNED, "P"),
        ones=("prior.stride_p",),
    )


def run_topk(scores: Tensor, k: Tensor | None, k_value: int) -> Selected:
    """The k largest of each row of scores [B, R, P]; k is [B, R], or None where it is one number."""
    batch, subjects, patches = scores.shape
    selected = Selected.empty(scores)
    if selected.matches.numel():
        launch = _topk_launch(patches, k is not None, scores.dtype)
        with device_guard(scores):
            rows = (row_arguments(scores), counts_arguments(k), selected)
            launch((batch * subjects,), *rows, subjects, patches, k_value)
    return selected


@torch.library.custom_op("focusdpo::topk_mask", mutates_args=())
def topk_mask_op(scores: Tensor, k: Tensor | None, k_value: int) -> Tensor:
    rows = scores.reshape(1, -1, scores.shape[-1]) if scores.numel() else scores.new_empty(0, 0, 0)
    matches = run_topk(rows, None if k is None else k.reshape(1, -1), k_value).matches
    return matches.view(torch.bool).view(scores.shape)


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
    structure = torch.empty((batch, patches), dtype=torch.float32, device=scores.device)
    coverage = torch.empty((batch,), dtype=torch.float32, device=scores.device)
    if batch == 0:
        return structure, coverage
    selected = run_topk(scores, k, k_value)
    inside = row_arguments(prior)
    launch = _structure_launch(subjects, patches, inside.ptr.shape[1], per_subject)
    with device_guard(scores):
        launch((batch,), selected.matches, inside, structure, coverage, patches)
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
    scores = check_tensor("scores", scores, ndim=tuple(range(1, 9)), dtypes=FLOATS, layout="[..., P]").detach()
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
    scores, k, prior = check_field(scores, k, prior, per_subject)
    if resolve_backend(backend, scores) == "torch":
        return (cpu_mask if cpu_mask.takes(scores) else spec).structure_field(scores, k, prior, per_subject)
    if isinstance(k, Tensor):
        return structure_field_op(scores, k, 0, prior, per_subject)
    return structure_field_op(scores, None, k, prior, per_subject)


def launches() -> Iterator[Launch]:
    """Every shipped launch configuration, for ahead-of-time compilation."""
    for patches in (256, 1024, 4096, 16384, 65536):
        yield _topk_launch(patches, True, torch.float32)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        yield _topk_launch(4096, False, dtype)
    for subjects in (1, 2, 4, 6):
        for patches in (256, 1024, 4096, 16384):
            yield _structure_launch(subjects, patches, 1, False)
            yield _structure_launch(subjects, patches, subjects, True)
