"""Masked preference residual (docs/method.md, E9 and the margin of E1): the operators and the public function.

The kernels are in residual_kernels.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from focusdpo_kernels import reference as spec
from focusdpo_kernels.backend import device_guard, resolve_backend
from focusdpo_kernels.checks import FLOATS, check_choice, check_device, check_no_grad, check_shape, check_tensor
from focusdpo_kernels.reference import FocusFields, PreferenceResidual
from focusdpo_kernels.residual_kernels import (
    BLOCK,
    MAX_SPLITS,
    PREDICTIONS,
    REDUCTIONS,
    ROWS,
    SUMS,
    ZEROS,
    backward_launch,
    finish_launch,
    forward_launch,
)

PATCH = 2  # latents along the side of a token


def _by_sample(prediction: Tensor) -> Tensor:
    """The same tensor where each sample is contiguous (a slice of a longer sequence is), else a copy."""
    return prediction if prediction.numel() == 0 or prediction[0].is_contiguous() else prediction.contiguous()


def _sizes(prediction: Tensor, weight: Tensor | None) -> tuple[int, int, int, int, int]:
    """E, P, INNER, HEIGHT and SIDE of `_masks`."""
    if prediction.ndim == 3:
        _, patches, channels = prediction.shape
        return patches * channels, patches, channels, 1, 0
    _, channels, height, width = prediction.shape
    side = 1 if weight is not None and weight.ndim == 3 else PATCH
    return channels * height * width, (height // side) * (width // side), width, height, side


def _mask_arguments(
    weight_win: Tensor | None, weight_lose: Tensor | None, fields: Sequence[Tensor], unused: Tensor
) -> tuple[str, tuple[Tensor, ...]]:
    """The kind of mask and its six pointers; `unused` stands where one is not read."""
    if weight_win is None or weight_lose is None:
        return "none", (unused,) * 6
    if not fields:
        return "weight", (weight_win, weight_lose, *(unused,) * 4)
    return "fields", (weight_win, weight_lose, *fields)


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
    fields: Sequence[Tensor],
    tau: float,
    gamma: float,
    reduction: str,
    mask_power: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """fp32: policy_win, policy_lose and margin [B], and the rest [ROWS, B], which carries no gradient.

    They are separate because PyTorch would gather the gradients of one tensor's rows by ten small kernels.
    `fields` is empty, or entropy, prior (uint8), extremes and coverage, with M_s as both weights.
    """
    predictions = [_by_sample(x) for x in (policy_win, policy_lose, reference_win, reference_lose, target_win, target_lose)]
    batch = policy_win.shape[0]
    elements, patches, inner, height, side = _sizes(policy_win, weight_win)
    win, lose, margin = (torch.empty((batch,), dtype=torch.float32, device=policy_win.device) for _ in range(3))
    rest = torch.empty((ROWS, batch), dtype=torch.float32, device=policy_win.device)
    if batch == 0:
        return win, lose, margin, rest
    splits = max(min(triton.cdiv(elements, BLOCK), MAX_SPLITS), 1)
    partial = torch.empty((batch, splits, SUMS), dtype=torch.float32, device=policy_win.device)
    mask, weights = _mask_arguments(weight_win, weight_lose, fields, partial)
    forward = forward_launch(tuple(x.dtype for x in predictions), mask, side, mask_power)
    with device_guard(policy_win):
        strides = [x.stride(0) for x in predictions]
        sizes = (elements, patches, splits, inner, height, *strides)
        forward((batch, splits), *predictions, *weights, partial, *sizes, tau, gamma)
        finish_launch(splits, reduction)((batch,), partial, win, lose, margin, rest, elements, batch, splits)
    return win, lose, margin, rest


@preference_residual_op.register_fake
def _(policy_win, *args):
    batch = policy_win.shape[0]
    return *(policy_win.new_empty((batch,), dtype=torch.float32) for _ in range(3)), policy_win.new_empty(
        (ROWS, batch), dtype=torch.float32
    )


@torch.library.custom_op("focusdpo::preference_residual_backward", mutates_args=())
def preference_residual_backward_op(
    policy_win_grad: Tensor | None,
    policy_lose_grad: Tensor | None,
    margin_grad: Tensor | None,
    rest: Tensor,
    policy_win: Tensor,
    policy_lose: Tensor,
    target_win: Tensor,
    target_lose: Tensor,
    weight_win: Tensor | None,
    weight_lose: Tensor | None,
    fields: Sequence[Tensor],
    tau: float,
    gamma: float,
    mask_power: int,
) -> tuple[Tensor, Tensor]:
    predictions = [_by_sample(x) for x in (policy_win, policy_lose, target_win, target_lose)]
    batch = policy_win.shape[0]
    elements, patches, inner, height, side = _sizes(policy_win, weight_win)
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (policy_win, policy_lose)]
    if batch * elements == 0:
        return grads[0], grads[1]
    mask, weights = _mask_arguments(weight_win, weight_lose, fields, rest)
    backward = backward_launch(tuple(x.dtype for x in predictions), mask, side, mask_power)
    with device_guard(policy_win):
        incoming = [rest[ZEROS] if x is None else x for x in (policy_win_grad, policy_lose_grad, margin_grad)]
        tensors = (*incoming, rest, *predictions, *weights, *grads)
        strides = [x.stride(0) for x in (*incoming, *predictions)]
        sizes = (elements, patches, batch, inner, height, *strides)
        backward((batch, triton.cdiv(elements, BLOCK)), *tensors, *sizes, tau, gamma)
    return grads[0], grads[1]


@preference_residual_backward_op.register_fake
def _(policy_win_grad, policy_lose_grad, margin_grad, rest, policy_win, policy_lose, *args):
    return policy_win.new_empty(policy_win.shape), policy_lose.new_empty(policy_lose.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    policy_win, policy_lose, _, _, target_win, target_lose, weight_win, weight_lose, fields, tau, gamma, _, mask_power = inputs
    ctx.set_materialize_grads(False)  # a result that nobody used costs no kernel that fills its gradient with zeros
    ctx.save_for_backward(output[3], policy_win, policy_lose, target_win, target_lose, weight_win, weight_lose, *fields)
    ctx.settings = (tau, gamma, mask_power)


def _backward(ctx: Any, win: Tensor | None, lose: Tensor | None, margin: Tensor | None, _: None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    fields = list(saved[7:])
    grad_win, grad_lose = preference_residual_backward_op(win, lose, margin, *saved[:7], fields, *ctx.settings)
    return grad_win, grad_lose, *[None] * 6, [None] * len(fields), *[None] * 4


preference_residual_op.register_autograd(_backward, setup_context=_setup_context)


def _patches(name: str, prediction: Tensor) -> int:
    """P of M [B, P]."""
    if prediction.ndim == 3:
        return prediction.shape[1]
    height, width = prediction.shape[2:]
    if height % PATCH or width % PATCH:
        raise ValueError(
            f"{name}: latents of {height}x{width} have no whole 2x2 patches; height and width must be even, or give one value "
            "per latent, [B, H, W]"
        )
    return (height // PATCH) * (width // PATCH)


def _check_weight(name: str, weight: object, prediction: Tensor) -> Tensor:
    """M [B, P], or of latents [B, H, W]."""
    latents = prediction.ndim == 4
    layout = "[B, P] or, one value per latent, [B, H, W]" if latents else "[B, P]"
    kinds = (*FLOATS, torch.bool, torch.uint8)
    value = check_tensor(name, weight, ndim=(2, 3, 4) if latents else 2, dtypes=kinds, layout=layout)
    if value.ndim == 4 and value.shape[1] == 1:
        value = value[:, 0]
    if value.ndim > 2:
        check_shape(name, value, (prediction.shape[0], *prediction.shape[2:]), "B, H and W of the predictions")
    else:
        why = "B of the predictions, one value per 2x2 latents; or [B, H, W]" if latents else "B and P of the predictions"
        check_shape(name, value, (prediction.shape[0], _patches(name, prediction)), why)
    check_device(name, value, prediction.device, "policy_win")
    check_no_grad(name, value, "the mask carries no gradient (E9)")
    return value


def _formed(weight: Tensor | FocusFields) -> Tensor:
    return spec.fields_mask(weight) if isinstance(weight, FocusFields) else weight


def _check_fields(fields: FocusFields, prediction: Tensor) -> list[Tensor]:
    """Structure, entropy, prior (uint8), extremes and coverage, as the kernel reads them."""
    batch, patches = prediction.shape[0], _patches("weight", prediction)
    shapes = {"structure": (batch, patches), "entropy": (batch, patches), "extremes": (batch, 2), "coverage": (batch,)}
    for name, shape in {**shapes, "prior": (batch, patches)}.items():
        value = check_tensor(f"weight.{name}", getattr(fields, name), ndim=len(shape), layout=str(list(shape)))
        check_shape(f"weight.{name}", value, shape, "B and P of the predictions")
        check_device(f"weight.{name}", value, prediction.device, "policy_win")
        check_no_grad(f"weight.{name}", value, "the mask carries no gradient (E9)")
    prior = spec.binary_prior(fields.prior).contiguous().view(torch.uint8)
    structure, entropy, extremes, coverage = (getattr(fields, name).to(torch.float32).contiguous() for name in shapes)
    return [structure, entropy, prior, extremes, coverage]


def preference_residual(
    policy_win: Tensor,
    policy_lose: Tensor,
    reference_win: Tensor,
    reference_lose: Tensor,
    target_win: Tensor,
    target_lose: Tensor,
    weight: Tensor | FocusFields | None = None,
    *,
    weight_lose: Tensor | FocusFields | None = None,
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
        weight: M [B, P], or None for all ones. Latents take one value per 2x2 patch, row-major: P = (H/2)(W/2); or one per
            latent, M [B, H, W] or [B, 1, H, W]. FocusFields form M on the fly, so that it is not written.
        weight_lose: the loser's own M, of the same layout; None uses `weight` for both.
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
    if weight is None and weight_lose is not None:
        raise ValueError("weight_lose: given without weight; pass weight for the winner as well")
    chosen = resolve_backend(backend, *values)
    fields: list[Tensor] = []
    tau = gamma = 0.0
    weight_win: Tensor | None = None
    weight_other: Tensor | None = None
    if isinstance(weight, FocusFields) and weight_lose is None and chosen == "triton":
        structure, *fields = _check_fields(weight, policy_win)
        weight_win = weight_other = structure
        tau, gamma = float(weight.tau), float(weight.gamma)
    else:
        # One mask for each side, or PyTorch: the mask is formed first, by the same definition.
        if weight is not None:
            weight_win = weight_other = _check_weight("weight", _formed(weight), policy_win)
        if weight_win is not None and weight_lose is not None:
            weight_other = _check_weight("weight_lose", _formed(weight_lose), policy_win)
            check_shape("weight_lose", weight_other, weight_win.shape, "as weight")
    if chosen == "torch":
        return spec.preference_residual(*values, weight_win, weight_other, reduction, mask_power)
    if weight_win is not None and weight_other is not None:
        weight_win, weight_other = (w.to(torch.float32).contiguous() for w in (weight_win, weight_other))
    arguments = (*values, weight_win, weight_other, fields, tau, gamma, reduction, mask_power)
    policy_win_error, policy_lose_error, margin, rest = preference_residual_op(*arguments)
    reference_win_error, reference_lose_error, winner_norm, inner = rest.detach()[:4].unbind(0)
    return PreferenceResidual(
        policy_win_error, policy_lose_error, reference_win_error, reference_lose_error, margin, winner_norm, inner
    )
