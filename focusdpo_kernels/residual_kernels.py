"""Kernels of the masked preference residual (docs/method.md, E9 and the margin of E1), forward and backward.

    e(x)   = scale * sum_i M[i]^power (target[i] - prediction[i])^2
    margin = (e_pol(win) - e_ref(win)) - (e_pol(lose) - e_ref(lose))

The margin comes from (a - t)^2 - (b - t)^2 = (a - b)(a + b - 2t), so it does not cancel and is exactly 0 where policy and
reference agree. Sums run in fp32 over a fixed split of each sample, first within programs, then over the splits: no
atomics, the same bits every time and for every batch size. Bytes: six predictions and the mask once forward; four
predictions and the mask in, two gradients out, backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from focusdpo_kernels.launch import POINTERS, Launch, Registers, next_power_of_2

REDUCTIONS = ("mean", "sum", "masked_mean")
PREDICTIONS = ("policy_win", "policy_lose", "reference_win", "reference_lose", "target_win", "target_lose")
BLOCK = 2048
LANES = 8  # elements of a thread: 16 bytes of fp16 or bf16
MAX_SPLITS = 128
SUMS = 10  # columns of a split's partial sums
# Rows of the results without a gradient: reference_win, reference_lose, winner_norm, inner of PreferenceResidual, the scales of
# winner and loser, and zeros, which the backward pass reads in place of a gradient that nobody asked for.
ROWS = 7
WIN_SCALE, LOSE_SCALE, ZEROS = 4, 5, 6
SCALES = {"WIN_SCALE": WIN_SCALE, "LOSE_SCALE": LOSE_SCALE}


@triton.jit
def _masks(
    weight_win_ptr,
    weight_lose_ptr,
    entropy_ptr,
    prior_ptr,
    extremes_ptr,
    coverage_ptr,
    b,
    P,
    offs,
    valid,
    INNER,
    HEIGHT,
    tau,
    gamma,
    SIDE: tl.constexpr,
    POWER: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """M^POWER of winner and loser at flat offsets of sample b: of [P, C] tokens (SIDE = 0, INNER = C), or of [C, H, W] latents
    in patches of SIDE x SIDE (INNER = W).

    With FIELDS both share one M, formed from M_s (`weight_win_ptr`), entropy, prior, extremes and coverage (E7, E8).
    """
    if SIDE > 0:
        column = offs % INNER
        row = (offs // INNER) % HEIGHT
        patch = (row // SIDE) * (INNER // SIDE) + column // SIDE
    else:
        patch = offs // INNER
    patch += b * P
    win = tl.load(weight_win_ptr + patch, mask=valid, other=0.0).to(tl.float32)
    if FIELDS:
        low = tl.load(extremes_ptr + 2 * b)
        span = tl.load(extremes_ptr + 2 * b + 1) - low
        entropy = tl.load(entropy_ptr + patch, mask=valid, other=0.0)
        detail = tl.where(span == 0, 0.0, tl.div_rn(entropy - low, tl.where(span == 0, 1.0, span)))
        detail = tl.where(tl.load(prior_ptr + patch, mask=valid, other=0) != 0, detail, 0.0)
        win = tl.where(tl.load(coverage_ptr + b) > tau, win, gamma * win + (1 - gamma) * detail)
        win = tl.where(valid, win, 0.0)
        lose = win
    else:
        lose = tl.load(weight_lose_ptr + patch, mask=valid, other=0.0).to(tl.float32)
    if POWER == 2:
        win = win * win
        lose = lose * lose
    return win, lose


@triton.jit
def _side_sums(policy_ptr, reference_ptr, target_ptr, offs, valid, m):
    """M-weighted sums of one side over a block: policy error, reference error, their factored difference; and M (a - t)."""
    a = tl.load(policy_ptr + offs, mask=valid, other=0.0).to(tl.float32)
    b = tl.load(reference_ptr + offs, mask=valid, other=0.0).to(tl.float32)
    t = tl.load(target_ptr + offs, mask=valid, other=0.0).to(tl.float32)
    gradient = m * (a - t)
    return gradient * (a - t), m * (b - t) * (b - t), m * (a - b) * (a + b - 2 * t), gradient


@triton.jit(do_not_specialize=["P", "SPLITS", "HEIGHT"])
def _forward_kernel(
    policy_win_ptr,
    policy_lose_ptr,
    reference_win_ptr,
    reference_lose_ptr,
    target_win_ptr,
    target_lose_ptr,  # six [B, E], samples contiguous
    weight_win_ptr,
    weight_lose_ptr,  # [B, P]
    entropy_ptr,
    prior_ptr,
    extremes_ptr,
    coverage_ptr,  # [B, P] fp32, [B, P] uint8, [B, 2] and [B] fp32, read where FIELDS
    partial_ptr,  # [B, SPLITS, SUMS] fp32
    E,
    P,
    SPLITS,
    INNER,
    HEIGHT,
    stride_pw,
    stride_pl,
    stride_rw,
    stride_rl,
    stride_tw,
    stride_tl,
    tau,
    gamma,
    HAS_WEIGHT: tl.constexpr,
    FIELDS: tl.constexpr,
    SIDE: tl.constexpr,
    POWER: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    split = tl.program_id(1)
    b = tl.program_id(0).to(tl.int64)
    # A thread adds its own LANES elements at once: sums of [BLOCK] would fill its registers.
    zero = tl.zeros([BLOCK // LANES], tl.float32)
    policy_win, policy_lose, reference_win, reference_lose = zero, zero, zero, zero
    difference_win, difference_lose, winner_norm, inner, mass_win, mass_lose = zero, zero, zero, zero, zero, zero
    for start in range(split * BLOCK, E, SPLITS * BLOCK):
        offs = start + LANES * tl.arange(0, BLOCK // LANES)[:, None] + tl.arange(0, LANES)[None, :]
        valid = offs < E
        if HAS_WEIGHT:
            m_win, m_lose = _masks(
                weight_win_ptr,
                weight_lose_ptr,
                entropy_ptr,
                prior_ptr,
                extremes_ptr,
                coverage_ptr,
                b,
                P,
                offs,
                valid,
                INNER,
                HEIGHT,
                tau,
                gamma,
                SIDE,
                POWER,
                FIELDS,
            )
        else:
            m_win = valid.to(tl.float32)
            m_lose = m_win
        error, reference, difference, g_win = _side_sums(
            policy_win_ptr + b * stride_pw,
            reference_win_ptr + b * stride_rw,
            target_win_ptr + b * stride_tw,
            offs,
            valid,
            m_win,
        )
        policy_win += tl.sum(error, axis=1)
        reference_win += tl.sum(reference, axis=1)
        difference_win += tl.sum(difference, axis=1)
        error, reference, difference, g_lose = _side_sums(
            policy_lose_ptr + b * stride_pl,
            reference_lose_ptr + b * stride_rl,
            target_lose_ptr + b * stride_tl,
            offs,
            valid,
            m_lose,
        )
        policy_lose += tl.sum(error, axis=1)
        reference_lose += tl.sum(reference, axis=1)
        difference_lose += tl.sum(difference, axis=1)
        winner_norm += tl.sum(g_win * g_win, axis=1)
        inner += tl.sum(g_win * g_lose, axis=1)
        mass_win += tl.sum(m_win, axis=1)
        mass_lose += tl.sum(m_lose, axis=1)
    out = partial_ptr + (b * SPLITS + split) * COLUMNS
    tl.store(out + 0, tl.sum(policy_win, axis=0))
    tl.store(out + 1, tl.sum(policy_lose, axis=0))
    tl.store(out + 2, tl.sum(reference_win, axis=0))
    tl.store(out + 3, tl.sum(reference_lose, axis=0))
    tl.store(out + 4, tl.sum(difference_win, axis=0))
    tl.store(out + 5, tl.sum(difference_lose, axis=0))
    tl.store(out + 6, tl.sum(winner_norm, axis=0))
    tl.store(out + 7, tl.sum(inner, axis=0))
    tl.store(out + 8, tl.sum(mass_win, axis=0))
    tl.store(out + 9, tl.sum(mass_lose, axis=0))


@triton.jit
def _total(partial_ptr, column: tl.constexpr, offs, SPLITS, COLUMNS: tl.constexpr):
    return tl.sum(tl.load(partial_ptr + offs * COLUMNS + column, mask=offs < SPLITS, other=0.0), axis=0)


@triton.jit(do_not_specialize=["E", "B", "SPLITS"])
def _finish_kernel(
    partial_ptr,  # [B, SPLITS, SUMS] fp32
    policy_win_ptr,
    policy_lose_ptr,
    margin_ptr,  # three [B] fp32
    rest_ptr,  # [ROWS, B] fp32
    E,
    B,
    SPLITS,
    REDUCTION: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    WIN_SCALE: tl.constexpr,
    LOSE_SCALE: tl.constexpr,
    ZEROS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, SPLITS_PAD)
    partial = partial_ptr + b * SPLITS * COLUMNS
    if REDUCTION == "masked_mean":
        mass_win = _total(partial, 8, offs, SPLITS, COLUMNS)
        mass_lose = _total(partial, 9, offs, SPLITS, COLUMNS)
        win = tl.where(mass_win > 0, tl.div_rn(1.0, tl.where(mass_win > 0, mass_win, 1.0)), 0.0)
        lose = tl.where(mass_lose > 0, tl.div_rn(1.0, tl.where(mass_lose > 0, mass_lose, 1.0)), 0.0)
    else:
        count = tl.maximum(E, 1).to(tl.float32)
        win = tl.div_rn(1.0, count) if REDUCTION == "mean" else count / count
        lose = win
    tl.store(policy_win_ptr + b, _total(partial, 0, offs, SPLITS, COLUMNS) * win)
    tl.store(policy_lose_ptr + b, _total(partial, 1, offs, SPLITS, COLUMNS) * lose)
    margin = _total(partial, 4, offs, SPLITS, COLUMNS) * win - _total(partial, 5, offs, SPLITS, COLUMNS) * lose
    tl.store(margin_ptr + b, margin)
    rest = rest_ptr + b
    tl.store(rest, _total(partial, 2, offs, SPLITS, COLUMNS) * win)
    tl.store(rest + B, _total(partial, 3, offs, SPLITS, COLUMNS) * lose)
    tl.store(rest + 2 * B, _total(partial, 6, offs, SPLITS, COLUMNS) * win * win)
    tl.store(rest + 3 * B, _total(partial, 7, offs, SPLITS, COLUMNS) * win * lose)
    tl.store(rest + WIN_SCALE * B, win)
    tl.store(rest + LOSE_SCALE * B, lose)
    tl.store(rest + ZEROS * B, 0.0)


@triton.jit(do_not_specialize=["P", "B", "HEIGHT", "stride_gw", "stride_gl", "stride_gm"])
def _backward_kernel(
    policy_win_grad_ptr,
    policy_lose_grad_ptr,
    margin_grad_ptr,  # three [B] fp32, any strides
    rest_ptr,  # [ROWS, B] fp32, the forward's
    policy_win_ptr,
    policy_lose_ptr,
    target_win_ptr,
    target_lose_ptr,
    weight_win_ptr,
    weight_lose_ptr,
    entropy_ptr,
    prior_ptr,
    extremes_ptr,
    coverage_ptr,
    grad_win_ptr,
    grad_lose_ptr,  # [B, E] contiguous
    E,
    P,
    B,
    INNER,
    HEIGHT,
    stride_gw,
    stride_gl,
    stride_gm,
    stride_pw,
    stride_pl,
    stride_tw,
    stride_tl,
    tau,
    gamma,
    HAS_WEIGHT: tl.constexpr,
    FIELDS: tl.constexpr,
    SIDE: tl.constexpr,
    POWER: tl.constexpr,
    WIN_SCALE: tl.constexpr,
    LOSE_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = offs < E
    margin = tl.load(margin_grad_ptr + b * stride_gm)
    # d margin / d policy is d e / d policy for the winner, and its negative for the loser.
    win = 2 * (tl.load(policy_win_grad_ptr + b * stride_gw) + margin) * tl.load(rest_ptr + WIN_SCALE * B + b)
    lose = 2 * (tl.load(policy_lose_grad_ptr + b * stride_gl) - margin) * tl.load(rest_ptr + LOSE_SCALE * B + b)
    if HAS_WEIGHT:
        m_win, m_lose = _masks(
            weight_win_ptr,
            weight_lose_ptr,
            entropy_ptr,
            prior_ptr,
            extremes_ptr,
            coverage_ptr,
            b,
            P,
            offs,
            valid,
            INNER,
            HEIGHT,
            tau,
            gamma,
            SIDE,
            POWER,
            FIELDS,
        )
    else:
        m_win = 1.0
        m_lose = 1.0
    a = tl.load(policy_win_ptr + b * stride_pw + offs, mask=valid, other=0.0).to(tl.float32)
    t = tl.load(target_win_ptr + b * stride_tw + offs, mask=valid, other=0.0).to(tl.float32)
    tl.store(grad_win_ptr + b * E + offs, (win * (m_win * (a - t))).to(grad_win_ptr.dtype.element_ty), mask=valid)
    a = tl.load(policy_lose_ptr + b * stride_pl + offs, mask=valid, other=0.0).to(tl.float32)
    t = tl.load(target_lose_ptr + b * stride_tl + offs, mask=valid, other=0.0).to(tl.float32)
    tl.store(grad_lose_ptr + b * E + offs, (lose * (m_lose * (a - t))).to(grad_lose_ptr.dtype.element_ty), mask=valid)


MASK_TYPES = {
    **dict.fromkeys(("weight_win_ptr", "weight_lose_ptr", "entropy_ptr", "extremes_ptr", "coverage_ptr"), "*fp32"),
    "prior_ptr": "*u8",
    "tau": "fp32",
    "gamma": "fp32",
}


def _mask_constants(mask: str, side: int, power: int) -> dict[str, Any]:
    """`mask` is "none", "weight" or "fields"; `side` that of a patch of latents, 0 for tokens."""
    return {"HAS_WEIGHT": mask != "none", "FIELDS": mask == "fields", "SIDE": side, "POWER": power}


def forward_launch(dtypes: tuple[torch.dtype, ...], mask: str, side: int, power: int) -> Launch:
    types = {f"{name}_ptr": POINTERS[dtype] for name, dtype in zip(PREDICTIONS, dtypes, strict=True)}
    return Launch(
        _forward_kernel,
        {**_mask_constants(mask, side, power), "COLUMNS": SUMS, "LANES": LANES, "BLOCK": BLOCK},
        threads=256,
        registers=Registers(136, 128, 128, 160),
        types={**types, **MASK_TYPES, "partial_ptr": "*fp32"},
        aligned=("E", "INNER", "stride_pw", "stride_pl", "stride_rw", "stride_rl", "stride_tw", "stride_tl"),
    )


def finish_launch(splits: int, reduction: str) -> Launch:
    return Launch(
        _finish_kernel,
        {"REDUCTION": reduction, "COLUMNS": SUMS, "SPLITS_PAD": next_power_of_2(splits), **SCALES, "ZEROS": ZEROS},
        threads=32,
        # A multiprocessor takes 32 programs at most, and these are one warp each: up to 64 registers cost nothing.
        registers=Registers(32, 32, 32, 16),
        types=dict.fromkeys(("partial_ptr", "policy_win_ptr", "policy_lose_ptr", "margin_ptr", "rest_ptr"), "*fp32"),
        # Fused, the margin's difference would round its two products differently: not antisymmetric, not 0 for equal sides.
        fp_fusion=False,
    )


def backward_launch(dtypes: tuple[torch.dtype, ...], mask: str, side: int, power: int) -> Launch:
    """`dtypes` of policy_win, policy_lose, target_win, target_lose; a gradient has its policy's."""
    pointers = [POINTERS[dtype] for dtype in dtypes]
    names = ("policy_win_ptr", "policy_lose_ptr", "target_win_ptr", "target_lose_ptr", "grad_win_ptr", "grad_lose_ptr")
    types = dict(zip(names, [*pointers, *pointers[:2]], strict=True))
    floats = dict.fromkeys(("policy_win_grad_ptr", "policy_lose_grad_ptr", "margin_grad_ptr", "rest_ptr"), "*fp32")
    return Launch(
        _backward_kernel,
        {**_mask_constants(mask, side, power), **SCALES, "BLOCK": BLOCK},
        threads=256,
        registers=Registers(72, 64, 64, 56),
        types={**types, **MASK_TYPES, **floats},
        aligned=("E", "INNER", "stride_pw", "stride_pl", "stride_tw", "stride_tl"),
    )


def launches() -> Iterator[Launch]:
    """Every shipped launch configuration, for ahead-of-time compilation."""
    half, full = torch.bfloat16, torch.float32
    for dtypes in ((torch.float16,) * 6, (half,) * 6, (full,) * 6, (half, half, half, half, full, full)):
        weights = [("weight", *rest) for rest in ((0, 1), (0, 2), (1, 1), (2, 1))]
        for mask, side, power in (("none", 0, 1), *weights, ("fields", 0, 1)):
            yield forward_launch(dtypes, mask, side, power)
            yield backward_launch((*dtypes[:2], *dtypes[4:]), mask, side, power)
    for reduction in REDUCTIONS:
        for splits in (1, 32, MAX_SPLITS):
            yield finish_launch(splits, reduction)
