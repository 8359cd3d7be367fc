"""Masked preference residual (docs/method.md, E9 and the margin of E1), forward and backward.

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
from torch import Tensor

from focusdpo_kernels import reference as spec
from focusdpo_kernels.backend import device_guard, resolve_backend
from focusdpo_kernels.checks import FLOATS, check_choice, check_device, check_no_grad, check_shape, check_tensor
from focusdpo_kernels.launch import POINTERS, Launch, next_power_of_2
from focusdpo_kernels.reference import PreferenceResidual

REDUCTIONS = ("mean", "sum", "masked_mean")
BLOCK = 2048
MAX_SPLITS = 128
SUMS = 10  # columns of a split's partial sums
ROWS = 9  # rows of the result: the seven fields of PreferenceResidual, then the scales of winner and loser


@triton.jit
def _mask_value(weight_ptr, offs, valid, INNER, HEIGHT, LATENT: tl.constexpr, POWER: tl.constexpr):
    """M^POWER at flat offsets of a sample: [P, C] tokens (INNER = C), or [C, H, W] latents in 2x2 patches (INNER = W)."""
    if LATENT:
        column = offs % INNER
        row = (offs // INNER) % HEIGHT
        patch = (row // 2) * (INNER // 2) + column // 2
    else:
        patch = offs // INNER
    m = tl.load(weight_ptr + patch, mask=valid, other=0.0).to(tl.float32)
    return m * m if POWER == 2 else m


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
    HAS_WEIGHT: tl.constexpr,
    LATENT: tl.constexpr,
    POWER: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    split = tl.program_id(1)
    b = tl.program_id(0).to(tl.int64)
    zero = tl.zeros([BLOCK], tl.float32)
    policy_win, policy_lose, reference_win, reference_lose = zero, zero, zero, zero
    difference_win, difference_lose, winner_norm, inner, mass_win, mass_lose = zero, zero, zero, zero, zero, zero
    for start in range(split * BLOCK, E, SPLITS * BLOCK):
        offs = start + tl.arange(0, BLOCK)
        valid = offs < E
        if HAS_WEIGHT:
            m_win = _mask_value(weight_win_ptr + b * P, offs, valid, INNER, HEIGHT, LATENT, POWER)
            m_lose = _mask_value(weight_lose_ptr + b * P, offs, valid, INNER, HEIGHT, LATENT, POWER)
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
        policy_win += error
        reference_win += reference
        difference_win += difference
        error, reference, difference, g_lose = _side_sums(
            policy_lose_ptr + b * stride_pl,
            reference_lose_ptr + b * stride_rl,
            target_lose_ptr + b * stride_tl,
            offs,
            valid,
            m_lose,
        )
        policy_lose += error
        reference_lose += reference
        difference_lose += difference
        winner_norm += g_win * g_win
        inner += g_win * g_lose
        mass_win += m_win
        mass_lose += m_lose
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
    out_ptr,  # [ROWS, B] fp32
    E,
    B,
    SPLITS,
    REDUCTION: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, SPLITS_PAD)
    partial = partial_ptr + b * SPLITS * COLUMNS
    if REDUCTION == "masked_mean":
        mass_win = _total(partial, 8, offs, SPLITS, COLUMNS)
        mass_lose = _total(partial, 9, offs, SPLITS, COLUMNS)
        win = tl.where(mass_win > 0, 1.0 / tl.where(mass_win > 0, mass_win, 1.0), 0.0)
        lose = tl.where(mass_lose > 0, 1.0 / tl.where(mass_lose > 0, mass_lose, 1.0), 0.0)
    else:
        count = tl.maximum(E, 1).to(tl.float32)
        win = 1.0 / count if REDUCTION == "mean" else count / count
        lose = win
    out = out_ptr + b
    tl.store(out, _total(partial, 0, offs, SPLITS, COLUMNS) * win)
    tl.store(out + B, _total(partial, 1, offs, SPLITS, COLUMNS) * lose)
    tl.store(out + 2 * B, _total(partial, 2, offs, SPLITS, COLUMNS) * win)
    tl.store(out + 3 * B, _total(partial, 3, offs, SPLITS, COLUMNS) * lose)
    margin = _total(partial, 4, offs, SPLITS, COLUMNS) * win - _total(partial, 5, offs, SPLITS, COLUMNS) * lose
    tl.store(out + 4 * B, margin)
    tl.store(out + 5 * B, _total(partial, 6, offs, SPLITS, COLUMNS) * win * win)
    tl.store(out + 6 * B, _total(partial, 7, offs, SPLITS, COLUMNS) * win * lose)
    tl.store(out + 7 * B, win)
    tl.store(out + 8 * B, lose)


@triton.jit(do_not_specialize=["P", "B", "HEIGHT", "stride_gr", "stride_gb"])
def _backward_kernel(
    grad_ptr,  # [ROWS, B] fp32, any strides
    result_ptr,  # [ROWS, B] fp32, the forward's
    policy_win_ptr,
    policy_lose_ptr,
    target_win_ptr,
    target_lose_ptr,
    weight_win_ptr,
    weight_lose_ptr,
    grad_win_ptr,
    grad_lose_ptr,  # [B, E] contiguous
    E,
    P,
    B,
    INNER,
    HEIGHT,
    stride_gr,
    stride_gb,
    stride_pw,
    stride_pl,
    stride_tw,
    stride_tl,
    HAS_WEIGHT: tl.constexpr,
    LATENT: tl.constexpr,
    POWER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = offs < E
    grad = grad_ptr + b * stride_gb
    margin = tl.load(grad + 4 * stride_gr)
    # d margin / d policy is d e / d policy for the winner, and its negative for the loser.
    win = 2 * (tl.load(grad) + margin) * tl.load(result_ptr + 7 * B + b)
    lose = 2 * (tl.load(grad + stride_gr) - margin) * tl.load(result_ptr + 8 * B + b)
    if HAS_WEIGHT:
        m_win = _mask_value(weight_win_ptr + b * P, offs, valid, INNER, HEIGHT, LATENT, POWER)
        m_lose = _mask_value(weight_lose_ptr + b * P, offs, valid, INNER, HEIGHT, LATENT, POWER)
    else:
        m_win = 1.0
        m_lose = 1.0
    a = tl.load(policy_win_ptr + b * stride_pw + offs, mask=valid, other=0.0).to(tl.float32)
    t = tl.load(target_win_ptr + b * stride_tw + offs, mask=valid, other=0.0).to(tl.float32)
    tl.store(grad_win_ptr + b * E + offs, (win * (m_win * (a - t))).to(grad_win_ptr.dtype.element_ty), mask=valid)
    a = tl.load(policy_lose_ptr + b * stride_pl + offs, mask=valid, other=0.0).to(tl.float32)
    t = tl.load(target_lose_ptr + b * stride_tl + offs, mask=valid, other=0.0).to(tl.float32)
    tl.store(grad_lose_ptr + b * E + offs, (lose * (m_lose * (a - t))).to(grad_lose_ptr.dtype.element_ty), mask=valid)


PREDICTIONS = ("policy_win", "policy_lose", "reference_win", "reference_lose", "target_win", "target_lose")


def _forward_launch(dtypes: tuple[torch.dtype, ...], has_weight: bool, latent: bool, power: int) -> Launch:
    types = {f"{name}_ptr": POINTERS[dtype] for name, dtype in zip(PREDICTIONS, dtypes, strict=True)}
    floats = ("weight_win_ptr", "weight_lose_ptr", "partial_ptr")
    return Launch(
        _forward_kernel,
        {"HAS_WEIGHT": has_weight, "LATENT": latent, "POWER": power, "COLUMNS": SUMS, "BLOCK": BLOCK},
        threads=256,
        registers=(240, 184),
        types={**types, **dict.fromkeys(floats, "*fp32")},
        aligned=("E", "INNER", "stride_pw", "stride_pl", "stride_rw", "stride_rl", "stride_tw", "stride_tl"),
    )


def _finish_launch(splits: int, reduction: str) -> Launch:
    return Launch(
        _finish_kernel,
        {"REDUCTION": reduction, "COLUMNS": SUMS, "SPLITS_PAD": next_power_of_2(splits)},
        threads=32,
        registers=(32, 32),
        types={"partial_ptr": "*fp32", "out_ptr": "*fp32"},
        # Fused, the margin's difference would round its two products differently: not antisymmetric, not 0 for equal sides.
        fp_fusion=False,
    )


def _backward_launch(dtypes: tuple[torch.dtype, ...], has_weight: bool, latent: bool, power: int) -> Launch:
    """`dtypes` of policy_win, policy_lose, target_win, target_lose; a gradient has its policy's."""
    pointers = [POINTERS[dtype] for dtype in dtypes]
    names = ("policy_win_ptr", "policy_lose_ptr", "target_win_ptr", "target_lose_ptr", "grad_win_ptr", "grad_lose_ptr")
    floats = ("grad_ptr", "result_ptr", "weight_win_ptr", "weight_lose_ptr")
    return Launch(
        _backward_kernel,
        {"HAS_WEIGHT": has_weight, "LATENT": latent, "POWER": power, "BLOCK": BLOCK},
        threads=256,
        registers=(72, 56),
        types={**dict(zip(names, [*pointers, *pointers[:2]], strict=True)), **dict.fromkeys(floats, "*fp32")},
        aligned=("E", "INNER", "stride_pw", "stride_pl", "stride_tw", "stride_tl"),
    )


def _by_sample(prediction: Tensor) -> Tensor:
    """The same tensor where each sample is contiguous (a slice of a longer sequence is), else a copy."""
    return prediction if prediction.numel() == 0 or prediction[0].is_contiguous() else prediction.contiguous()


def _sizes(prediction: Tensor) -> tuple[int, int, int, int]:
    """E, P, INNER and HEIGHT of `_mask_value`."""
    if prediction.ndim == 3:
        _, patches, channels = prediction.shape
        return patches * channels, patches, channels, 1
    _, channels, height, width = prediction.shape
    return channels * height * width, (height // 2) * (width // 2), width, height


@torch.library.custom_op("focusdpo::preference_residual", mutates_args=())
def preference_residual_op(
    policy_win: Tensor,
    policy_lose: Tensor,
    reference_win: Tensor,
    reference_lose: Tensor,
    target_win: Tensor,
    target_lose: Tensor,
    weight_win: Tensor | None,
    weight_lose: Tensor | None,
    reduction: str,
    mask_power: int,
) -> Tensor:
    """[ROWS, B] fp32: the fields of PreferenceResidual, then the scales of winner and loser."""
    predictions = [_by_sample(x) for x in (policy_win, policy_lose, reference_win, reference_lose, target_win, target_lose)]
    batch = policy_win.shape[0]
    elements, patches, inner, height = _sizes(policy_win)
    out = torch.empty((ROWS, batch), dtype=torch.float32, device=policy_win.device)
    if batch == 0:
        return out
    splits = max(min(triton.cdiv(elements, BLOCK), MAX_SPLITS), 1)
    partial = torch.empty((batch, splits, SUMS), dtype=torch.float32, device=policy_win.device)
    weights = (partial, partial) if weight_win is None or weight_lose is None else (weight_win, weight_lose)
    forward = _forward_launch(tuple(x.dtype for x in predictions), weight_win is not None, policy_win.ndim == 4, mask_power)
    with device_guard(policy_win):
        strides = [x.stride(0) for x in predictions]
        forward((batch, splits), *predictions, *weights, partial, elements, patches, splits, inner, height, *strides)
        _finish_launch(splits, reduction)((batch,), partial, out, elements, batch, splits)
    return out


@preference_residual_op.register_fake
def _(policy_win, *args):
    return policy_win.new_empty((ROWS, policy_win.shape[0]), dtype=torch.float32)


@torch.library.custom_op("focusdpo::preference_residual_backward", mutates_args=())
def preference_residual_backward_op(
    grad: Tensor,
    result: Tensor,
    policy_win: Tensor,
    policy_lose: Tensor,
    target_win: Tensor,
    target_lose: Tensor,
    weight_win: Tensor | None,
    weight_lose: Tensor | None,
    mask_power: int,
) -> tuple[Tensor, Tensor]:
    predictions = [_by_sample(x) for x in (policy_win, policy_lose, target_win, target_lose)]
    batch = policy_win.shape[0]
    elements, patches, inner, height = _sizes(policy_win)
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (policy_win, policy_lose)]
    if batch * elements == 0:
        return grads[0], grads[1]
    weights = (result, result) if weight_win is None or weight_lose is None else (weight_win, weight_lose)
    backward = _backward_launch(tuple(x.dtype for x in predictions), weight_win is not None, policy_win.ndim == 4, mask_power)
    with device_guard(policy_win):
        tensors = (grad, result, *predictions, *weights, *grads)
        strides = (*grad.stride(), *(x.stride(0) for x in predictions))
        backward((batch, triton.cdiv(elements, BLOCK)), *tensors, elements, patches, batch, inner, height, *strides)
    return grads[0], grads[1]


@preference_residual_backward_op.register_fake
def _(grad, result, policy_win, policy_lose, *args):
    return policy_win.new_empty(policy_win.shape), policy_lose.new_empty(policy_lose.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    policy_win, policy_lose, _, _, target_win, target_lose, weight_win, weight_lose, _, mask_power = inputs
    ctx.save_for_backward(output, policy_win, policy_lose, target_win, target_lose, weight_win, weight_lose)
    ctx.mask_power = mask_power


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_win, grad_lose = preference_residual_backward_op(grad, *ctx.saved_tensors, ctx.mask_power)
    return grad_win, grad_lose, *[None] * 8


preference_residual_op.register_autograd(_backward, setup_context=_setup_context)


def _check_weight(name: str, weight: object, prediction: Tensor, patches: int) -> Tensor:
    value = check_tensor(name, weight, ndim=2, dtypes=(*FLOATS, torch.bool, torch.uint8), layout="[B, P]")
    why = "B and P of the predictions" if prediction.ndim == 3 else "B of the predictions, one value per 2x2 latents"
    check_shape(name, value, (prediction.shape[0], patches), why)
    check_device(name, value, prediction.device, "policy_win")
    check_no_grad(name, value, "the mask carries no gradient (E9)")
    return value


def preference_residual(
    policy_win: Tensor,
    policy_lose: Tensor,
    reference_win: Tensor,
    reference_lose: Tensor,
    target_win: Tensor,
    target_lose: Tensor,
    weight: Tensor | None = None,
    *,
    weight_lose: Tensor | None = None,
    reduction: str = "mean",
    mask_power: int = 1,
    backend: str | None = None,
) -> PreferenceResidual:
    """Masked errors of policy and reference on winner and loser, and their margin (E9, E1).

    Args:
        policy_win, policy_lose: the policy's predictions, [B, P, C] tokens or [B, C, H, W] latents; fp16, bf16, fp32
            (float64 on the torch backend). Gradient reaches these two only.
        reference_win, reference_lose: the reference model's predictions, same shape.
        target_win, target_lose: what they should be (velocity or noise), same shape.
        weight: M [B, P], or None for all ones. Latents take one value per 2x2 patch, row-major: P = (H/2)(W/2).
        weight_lose: the loser's own M; None uses `weight` for both.
        reduction: "mean" over P*C, so that M = 1 is plain Diffusion-DPO; "sum"; or "masked_mean", divided by the sum of
            M^mask_power over all elements (0 where that is 0).
        mask_power: 1 weights the squared difference by M, 2 by M^2 (the mask inside the norm).
        backend: "triton", "torch" or None; see `focusdpo_kernels.backend`.

    Returns:
        PreferenceResidual of tensors [B], fp32 (float64 for float64 predictions), differentiable once. The margin is
        exactly 0 where policy and reference agree, and no mask leads to NaN.

    Raises:
        TypeError, ValueError: arguments of wrong type, shape, dtype or device, or a reference, target or weight that
            requires grad; each named.
    """
    values = (policy_win, policy_lose, reference_win, reference_lose, target_win, target_lose)
    for name, value in zip(PREDICTIONS, values, strict=True):
        check_tensor(name, value, ndim=(3, 4), dtypes=FLOATS, layout="[B, P, C] or [B, C, H, W]")
        check_shape(name, value, policy_win.shape, "as policy_win")
        check_device(name, value, policy_win.device, "policy_win")
        if not name.startswith("policy"):
            check_no_grad(name, value, "gradient reaches the two policy predictions only (E9)")
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("mask_power", mask_power, (1, 2))
    _, patches, inner, height = _sizes(policy_win)
    if weight is None and weight_lose is not None:
        raise ValueError("weight_lose: given without weight; pass weight for the winner as well")
    if weight is not None and policy_win.ndim == 4 and (height % 2 or inner % 2):
        raise ValueError(f"weight: latents of {height}x{inner} have no whole 2x2 patches; height and width must be even")
    weight_win = None if weight is None else _check_weight("weight", weight, policy_win, patches)
    weight_lose = weight_win if weight_lose is None else _check_weight("weight_lose", weight_lose, policy_win, patches)
    if resolve_backend(backend, *values) == "torch":
        return spec.preference_residual(*values, weight_win, weight_lose, reduction, mask_power)
    if weight_win is not None and weight_lose is not None:
        weight_win, weight_lose = (w.to(torch.float32).contiguous() for w in (weight_win, weight_lose))
    rows = preference_residual_op(*values, weight_win, weight_lose, reduction, mask_power).unbind(0)
    gradient_free = [row.detach() for row in rows]
    return PreferenceResidual(rows[0], rows[1], gradient_free[2], gradient_free[3], rows[4], gradient_free[5], gradient_free[6])


def launches() -> Iterator[Launch]:
    """Every shipped launch configuration, for ahead-of-time compilation."""
    half, full = torch.bfloat16, torch.float32
    for dtypes in ((torch.float16,) * 6, (half,) * 6, (full,) * 6, (half, half, half, half, full, full)):
        for has_weight, latent, power in ((False, False, 1), (True, False, 1), (True, False, 2), (True, True, 1)):
            yield _forward_launch(dtypes, has_weight, latent, power)
            yield _backward_launch((*dtypes[:2], *dtypes[4:]), has_weight, latent, power)
    for reduction in REDUCTIONS:
        for splits in (1, 32, MAX_SPLITS):
            yield _finish_launch(splits, reduction)
