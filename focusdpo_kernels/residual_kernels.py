"""Kernels of the masked preference residual (docs/method.md, E9 and the margin of E1), forward and backward.

    e(x)   = scale * sum_i M[i]^power (target[i] - prediction[i])^2
    margin = (e_pol(win) - e_ref(win)) - (e_pol(lose) - e_ref(lose))

The margin comes from (a - t)^2 - (b - t)^2 = (a - b)((a - t) + (b - t)), so it does not cancel and is exactly 0 where policy
and reference agree. Sums run in fp32 over a split of each sample that depends on its size only, first within programs, then
over the splits: no atomics, the same bits every time and for every batch size. Bytes: six predictions and the mask once
forward; four predictions and the mask in, two gradients out, backward. Of several subjects each has its own sums, of the same
pass: B R P bytes more for where each of them is. A program has two of them at most, as its sums would fill the registers that
hold what it has asked for; programs of the same elements and other subjects stand side by side, and share a cache.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from focusdpo_kernels.checks import REDUCTIONS
from focusdpo_kernels.launch import POINTERS, Launch, Registers
from focusdpo_kernels.reference import PreferenceResidual

LANES = 8  # elements of a thread: 16 bytes of fp16 or bf16
# A program of the forward pass ends with a sum over its threads, during which it loads nothing. So it has several blocks where
# that leaves enough programs, and few threads, so that a multiprocessor has others to run meanwhile.
FORWARD_BLOCK = 1024
MIN_BLOCKS = 2  # of a program
MAX_SPLITS = 128
BACKWARD_BLOCK = 2048
# Sums of a split: errors of policy (win, lose) and reference (win, lose), the differences of winner and loser, |g_w|^2,
# <g_w, g_l>, and the masks' own.
SUMS = 10
ROWS = 3  # of scales: zeros, which the backward pass reads where a result has no gradient; the winner's; the loser's


class Side(NamedTuple):
    """Pointers to one side's tensors [B, E], samples contiguous, and the strides between samples. `other` holds the reference's
    predictions in the forward pass, and takes the policy's gradient in the backward pass.
    """

    policy: Any
    other: Any
    target: Any
    policy_stride: Any
    other_stride: Any
    target_stride: Any


class Incoming(NamedTuple):
    """Pointers to the gradients [B] of results. Their strides, of which 0 and 1 are common, are arguments of their own: Triton
    would specialise on those within a tuple, whatever it is told.
    """

    policy_win: Any
    policy_lose: Any
    margin: Any


@triton.jit
def _tokens(offs, INNER, HEIGHT, SIDE: tl.constexpr):
    """Tokens at flat offsets of a sample: of [P, C] (SIDE = 0, INNER = C), or of [C, H, W] latents in patches of SIDE x SIDE
    (INNER = W).
    """
    token = offs // INNER
    if SIDE > 0:
        token = (token % HEIGHT // SIDE) * (INNER // SIDE) + offs % INNER // SIDE
    return token


@triton.jit
def _masks(win_ptr, lose_ptr, b, P, tokens, valid, POWER: tl.constexpr):
    """M^POWER of winner and loser at tokens of sample b. Without a mask 1, without the loser's own the winner's; NaN where
    M < 0.
    """
    win = tl.full(valid.shape, 1.0, tl.float32)
    lose = win
    if win_ptr is not None:
        win = _mask(win_ptr + b * P + tokens, valid, POWER)
        lose = win
        if lose_ptr is not None:
            lose = _mask(lose_ptr + b * P + tokens, valid, POWER)
    return win, lose


@triton.jit
def _shows(subjects_ptr, row, P, tokens, valid):
    """1 where the subject of a row is, and 0 elsewhere."""
    return tl.load(subjects_ptr + row * P + tokens, mask=valid, other=0).to(tl.float32)


@triton.jit
def _mask(ptrs, valid, POWER: tl.constexpr):
    m = tl.load(ptrs, mask=valid, other=0.0)
    m = tl.where(m < 0, float("nan"), m)
    if POWER == 2:
        m = m * m
    return m


@triton.jit
def _load(ptr, stride, b, offs, valid):
    return tl.load(ptr + b * stride + offs, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def _side_products(side, b, offs, valid, m):
    """M (a - t), and M-weighted at each element: policy error, reference error, their factored difference."""
    policy = _load(side.policy, side.policy_stride, b, offs, valid)
    reference = _load(side.other, side.other_stride, b, offs, valid)
    target = _load(side.target, side.target_stride, b, offs, valid)
    a = policy - target
    r = reference - target
    g = m * a
    return g, g * a, m * r * r, m * (policy - reference) * (a + r)


@triton.jit
def _add(a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, b0, b1, b2, b3, b4, b5, b6, b7, b8, b9):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6, a7 + b7, a8 + b8, a9 + b9


@triton.jit(do_not_specialize=["P", "SPLITS", "HEIGHT", "SUBJECTS"])
def _forward_kernel(
    win,  # Side
    lose,
    win_mask_ptr,  # [B, P] fp32 or None
    lose_mask_ptr,
    subjects_ptr,  # [B, R, P] bytes of 0 and 1, or None
    partial_ptr,  # [B, SUBJECTS or 1, COLUMNS, SPLITS] fp32
    E,
    P,
    SPLITS,
    INNER,
    HEIGHT,
    SUBJECTS,
    SIDE: tl.constexpr,
    POWER: tl.constexpr,
    SHARED: tl.constexpr,  # LANES elements have one M
    R: tl.constexpr,  # subjects of a program; 0 without
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    split = tl.program_id(1)
    b = tl.program_id(0).to(tl.int64)
    row = b  # of results: the first of this program's
    left = 1
    if R > 0:
        groups = tl.cdiv(SUBJECTS, R)
        first_subject = (b % groups).to(tl.int32) * R
        b = b // groups
        row = b * SUBJECTS + first_subject
        left = SUBJECTS - first_subject
    # A thread adds its own LANES elements at once: sums of [BLOCK] would fill its registers.
    zero = tl.zeros([BLOCK // LANES], tl.float32)
    sums = ()
    for _ in tl.static_range(COLUMNS * (1 if R == 0 else R)):
        sums += (zero,)  # type: ignore[assignment]
    for start in range(split * BLOCK, E, SPLITS * BLOCK):
        first = start + LANES * tl.arange(0, BLOCK // LANES)[:, None]
        offs = first + tl.arange(0, LANES)[None, :]
        valid = offs < E
        offs_m = first if SHARED else offs
        tokens = _tokens(offs_m, INNER, HEIGHT, SIDE)
        m_win, m_lose = _masks(win_mask_ptr, lose_mask_ptr, b, P, tokens, offs_m < E, POWER)
        g_win, policy_win, reference_win, difference_win = _side_products(win, b, offs, valid, m_win)
        g_lose, policy_lose, reference_lose, difference_lose = _side_products(lose, b, offs, valid, m_lose)
        errors = (policy_win, policy_lose, reference_win, reference_lose, difference_win, difference_lose)
        masses = (m_win + tl.zeros_like(g_win), m_lose + tl.zeros_like(g_win))
        products = errors + (g_win * g_win, g_win * g_lose) + masses  # noqa: RUF005  (Triton knows no *)
        lanes = ()
        for column in tl.static_range(COLUMNS):
            lanes += (tl.sum(products[column], axis=1),)  # type: ignore[assignment]
        added = ()
        for r in tl.static_range(1 if R == 0 else R):
            if R > 0:
                shows = _shows(subjects_ptr, row + r, P, tokens, (offs_m < E) & (r < left))
                shown = tl.sum(shows, axis=1)  # of LANES elements, where they have one token
            for column in tl.static_range(COLUMNS):
                value = lanes[column]  # type: ignore[var-annotated]
                if R > 0:
                    value = shown * value if SHARED else tl.sum(shows * products[column], axis=1)
                added += (sums[r * COLUMNS + column] + value,)  # type: ignore[assignment]
        sums = added
    for r in tl.static_range(1 if R == 0 else R):
        part = ()
        for column in tl.static_range(COLUMNS):
            part += (sums[r * COLUMNS + column],)  # type: ignore[assignment]
        part = tl.reduce(part, 0, _add)
        out = partial_ptr + (row + r) * COLUMNS * SPLITS + split
        for column in tl.static_range(COLUMNS):
            tl.store(out + column * SPLITS, part[column], mask=r < left)


@triton.jit
def _scale(mass):
    """1 / mass, and 0 for no mass."""
    return tl.where(mass == 0, 0.0, tl.div_rn(1.0, tl.where(mass == 0, 1.0, mass)))


@triton.jit(do_not_specialize=["E", "B", "SPLITS"])
def _finish_kernel(
    partial_ptr,  # [B, COLUMNS, SPLITS] fp32
    out,  # PreferenceResidual of seven [B] fp32
    scales_ptr,  # [ROWS, B] fp32
    E,
    B,
    SPLITS,
    REDUCTION: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    partial = partial_ptr + b * COLUMNS * SPLITS
    offs = tl.arange(0, SPLITS_PAD)
    columns = ()
    for column in tl.static_range(COLUMNS):
        value = tl.load(partial + column * SPLITS + offs, mask=offs < SPLITS, other=0.0)
        columns += (value,)  # type: ignore[assignment]
    sums = tl.reduce(columns, 0, _add)
    if REDUCTION == "masked_mean":
        win = _scale(sums[8])
        lose = _scale(sums[9])
    else:
        count = tl.maximum(E, 1).to(tl.float32)
        win = tl.div_rn(1.0, count) if REDUCTION == "mean" else count / count
        lose = win
    tl.store(out.policy_win + b, sums[0] * win)
    tl.store(out.policy_lose + b, sums[1] * lose)
    tl.store(out.reference_win + b, sums[2] * win)
    tl.store(out.reference_lose + b, sums[3] * lose)
    # NaN where an error is infinite: such a pair has no margin, and an infinite one could pass for a pair that is told apart.
    not_finite = 0.0 * (sums[0] * win) + 0.0 * (sums[1] * lose) + 0.0 * (sums[2] * win) + 0.0 * (sums[3] * lose)
    tl.store(out.margin + b, sums[4] * win - sums[5] * lose + not_finite)
    tl.store(out.winner_norm + b, sums[6] * win * win)
    tl.store(out.inner + b, sums[7] * win * lose)
    tl.store(scales_ptr + b, 0.0)
    tl.store(scales_ptr + B + b, win)
    tl.store(scales_ptr + 2 * B + b, lose)


@triton.jit
def _policy_gradient(side, b, offs, valid, m, factor):
    a = _load(side.policy, side.policy_stride, b, offs, valid)
    t = _load(side.target, side.target_stride, b, offs, valid)
    # A result that nobody counts has no gradient, also where it is not finite.
    gradient = tl.where(factor == 0, 0.0, 2 * factor * (m * (a - t)))
    tl.store(side.other + b * side.other_stride + offs, gradient.to(side.other.dtype.element_ty), mask=valid)


@triton.jit
def _factors(incoming, scales_ptr, row, ROWS, policy_win_stride, policy_lose_stride, margin_stride):
    """What the errors of winner and loser in a row of results are multiplied by: incoming gradients and scales."""
    # d margin / d policy is d e / d policy for the winner, and its negative for the loser.
    margin = tl.load(incoming.margin + row * margin_stride)
    to_win = tl.load(incoming.policy_win + row * policy_win_stride) + margin
    to_lose = tl.load(incoming.policy_lose + row * policy_lose_stride) - margin
    win = tl.where(to_win == 0, 0.0, to_win * tl.load(scales_ptr + ROWS + row))
    lose = tl.where(to_lose == 0, 0.0, to_lose * tl.load(scales_ptr + 2 * ROWS + row))
    return win, lose


@triton.jit(do_not_specialize=["P", "B", "HEIGHT", "policy_win_stride", "policy_lose_stride", "margin_stride"])
def _backward_kernel(
    incoming,  # Incoming, fp32
    scales_ptr,  # [ROWS, B, R or 1] fp32, the forward's
    win,  # Side
    lose,
    win_mask_ptr,  # [B, P] fp32 or None
    lose_mask_ptr,
    subjects_ptr,  # [B, R, P] bytes of 0 and 1, or None
    E,
    P,
    B,
    INNER,
    HEIGHT,
    policy_win_stride,
    policy_lose_stride,
    margin_stride,
    SIDE: tl.constexpr,
    POWER: tl.constexpr,
    SHARED: tl.constexpr,
    R: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK + LANES * tl.arange(0, BLOCK // LANES)[:, None]
    offs = first + tl.arange(0, LANES)[None, :]
    valid = offs < E
    offs_m = first if SHARED else offs
    tokens = _tokens(offs_m, INNER, HEIGHT, SIDE)
    m_win, m_lose = _masks(win_mask_ptr, lose_mask_ptr, b, P, tokens, offs_m < E, POWER)
    if R == 0:
        to_win, to_lose = _factors(incoming, scales_ptr, b, B, policy_win_stride, policy_lose_stride, margin_stride)
    else:
        to_win = tl.zeros(offs_m.shape, tl.float32)
        to_lose = to_win
        for r in tl.static_range(R):
            row = b * R + r
            shows = _shows(subjects_ptr, row, P, tokens, offs_m < E)
            own_win, own_lose = _factors(incoming, scales_ptr, row, B * R, policy_win_stride, policy_lose_stride, margin_stride)
            to_win += shows * own_win
            to_lose += shows * own_lose
    _policy_gradient(win, b, offs, valid, m_win, to_win)
    _policy_gradient(lose, b, offs, valid, m_lose, to_lose)


class Mask(NamedTuple):
    """How M lies over a prediction: how many there are, for both sides or each its own; the side of a patch of latents (0 for
    tokens); the power; whether LANES elements have one M; and of how many subjects each has results of its own (0: there are
    results of the whole).
    """

    number: int = 0
    side: int = 0
    power: int = 1
    shared: bool = False
    subjects: int = 0

    @property
    def subjects_at_once(self) -> int:
        """Of a program of the forward pass: its sums are ten of each, and of LANES tokens each where those have their own M."""
        return min(self.subjects, 2 if self.shared else 1)

    @property
    def types(self) -> dict[str, str | None]:
        return {
            "win_mask_ptr": "*fp32" if self.number else None,
            "lose_mask_ptr": "*fp32" if self.number == 2 else None,
            "subjects_ptr": "*u8" if self.subjects else None,
        }

    @property
    def constants(self) -> dict[str, Any]:
        return {"SIDE": self.side, "POWER": self.power, "SHARED": self.shared, "R": self.subjects, "LANES": LANES}


def _types(dtypes: tuple[torch.dtype, ...], mask: Mask) -> dict[str, Any]:
    """Of sides and masks, from the dtypes of winner's and loser's tensors in turn."""
    sides = [Side(*(POINTERS[dtype] for dtype in dtypes[side::2]), *["i32"] * 3) for side in range(2)]
    return {"win": sides[0], "lose": sides[1], **mask.types}


@functools.cache
def forward_launch(dtypes: tuple[torch.dtype, ...], mask: Mask) -> Launch:
    """`dtypes` of the predictions."""
    mask = mask._replace(subjects=mask.subjects_at_once)
    return Launch(
        _forward_kernel,
        {**mask.constants, "COLUMNS": SUMS, "BLOCK": FORWARD_BLOCK},
        threads=FORWARD_BLOCK // LANES,
        registers=Registers(128, 128, 128, 160),
        programs=4,
        types={**_types(dtypes, mask), "partial_ptr": "*fp32"},
        aligned=("win", "lose", "E", "INNER"),
    )


@functools.cache
def finish_launch(splits_pad: int, reduction: str) -> Launch:
    return Launch(
        _finish_kernel,
        {"REDUCTION": reduction, "COLUMNS": SUMS, "SPLITS_PAD": splits_pad},
        threads=32,
        # A multiprocessor takes 32 programs at most, and these are one warp each: up to 64 registers cost nothing.
        registers=Registers(64, 64, 64, 64),
        types={"partial_ptr": "*fp32", "out": PreferenceResidual._make(["*fp32"] * 7), "scales_ptr": "*fp32"},
        # Fused, the margin's difference would round its two products differently: not antisymmetric, not 0 for equal sides.
        fp_fusion=False,
    )


@functools.cache
def backward_launch(dtypes: tuple[torch.dtype, ...], mask: Mask) -> Launch:
    """`dtypes` of the policy's predictions, their gradients and their targets."""
    return Launch(
        _backward_kernel,
        {**mask.constants, "BLOCK": BACKWARD_BLOCK},
        threads=BACKWARD_BLOCK // LANES,
        registers=Registers(72, 64, 64, 56) if mask.shared or not mask.subjects else Registers(120, 112, 112, 80),
        types={**_types(dtypes, mask), "incoming": Incoming(*["*fp32"] * 3), "scales_ptr": "*fp32"},
        aligned=("win", "lose", "E", "INNER"),
    )


def launches() -> Iterator[Launch]:
    """Every shipped launch configuration, for ahead-of-time compilation."""
    half, full = torch.bfloat16, torch.float32
    for dtypes in ((torch.float16,) * 6, (half,) * 6, (full,) * 6, (half, half, half, half, full, full)):
        masks = [Mask(1, *rest) for rest in ((0, 1, True), (0, 2, True), (0,), (1,), (2,))]
        for mask in (Mask(), *masks, Mask(2, shared=True), Mask(2, side=2)):
            yield forward_launch(dtypes, mask)
            yield backward_launch((*dtypes[:2], *dtypes[:2], *dtypes[4:]), mask)
        masks = [Mask(number, 0, 1, True, subjects) for number in (0, 1) for subjects in (1, 2, 3, 6)]
        for mask in (*masks, Mask(1, 2, 1, False, 2), Mask(1, 2, 1, False, 4), Mask(2, 0, 1, True, 2)):
            yield forward_launch(dtypes, mask)
            yield backward_launch((*dtypes[:2], *dtypes[:2], *dtypes[4:]), mask)
    for reduction in REDUCTIONS:
        for splits in (1, 32, MAX_SPLITS):
            yield finish_launch(splits, reduction)
