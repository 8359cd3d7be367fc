"""Masked preference residual (docs/method.md, E9 and the margin of E1): the operators and the public function.

The kernels are in residual_kernels.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from focusdpo_kernels import cpu_residual
from focusdpo_kernels import reference as spec
from focusdpo_kernels import residual_kernels as kernels
from focusdpo_kernels.autograd import is_transformed, save, saved
from focusdpo_kernels.backend import device_guard, resolve_backend
from focusdpo_kernels.checks import PATCH, check_choice, check_predictions, check_shape, check_weight
from focusdpo_kernels.launch import ceil_div, next_power_of_2
from focusdpo_kernels.reference import PreferenceResidual
from focusdpo_kernels.residual_kernels import REDUCTIONS, Incoming, Mask, Side, Update


class Predictions(NamedTuple):
    """[B, P, C] tokens or [B, C, H, W] latents, of one shape."""

    policy_win: Tensor
    policy_lose: Tensor
    reference_win: Tensor
    reference_lose: Tensor
    target_win: Tensor
    target_lose: Tensor


def _by_sample(prediction: Tensor) -> Tensor:
    """The same tensor where each sample is contiguous (a slice of a longer sequence is), else a copy."""
    return prediction if prediction.numel() == 0 or prediction[0].is_contiguous() else prediction.contiguous()


def _layout(prediction: Tensor, win: Tensor | None, lose: Tensor | None, power: int) -> tuple[Mask, tuple[int, int, int, int]]:
    """How masks lie over a prediction, and E, P, INNER and HEIGHT of the kernels."""
    if prediction.ndim == 3:
        _, patches, channels = prediction.shape
        elements, inner, height, side = patches * channels, channels, 1, 0
    else:
        _, channels, height, inner = prediction.shape
        side = 1 if win is not None and win.ndim == 3 else PATCH
        elements, patches = channels * height * inner, (height // side) * (inner // side)
    sizes = (elements, patches, inner, height)
    if win is None:
        return Mask(False, False, 0, 1, False), sizes
    return Mask(True, lose is not None, side, power, side == 0 and inner % kernels.LANES == 0), sizes


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of PreferenceResidual, fp32 [B], and the scales [kernels.ROWS, B] that the backward pass needs.

    `weight_lose` None takes `weight_win` for both.
    """
    predictions = [_by_sample(x) for x in (policy_win, policy_lose, reference_win, reference_lose, target_win, target_lose)]
    batch = policy_win.shape[0]
    results, scales = _results(policy_win)
    if batch == 0:
        return *results, scales
    mask, sizes = _layout(policy_win, weight_win, weight_lose, mask_power)
    elements, patches, inner, height = sizes
    splits = min(max(elements // (kernels.FORWARD_BLOCK * kernels.MIN_BLOCKS), 1), kernels.MAX_SPLITS)
    partial = torch.empty((batch, kernels.SUMS, splits), dtype=torch.float32, device=policy_win.device)
    win, lose = (Side(*side, *(x.stride(0) for x in side)) for side in (predictions[::2], predictions[1::2]))
    forward = kernels.forward_launch(tuple(x.dtype for x in predictions), mask)
    finish = kernels.finish_launch(next_power_of_2(splits), reduction if mask.given or reduction == "sum" else "mean")
    with device_guard(policy_win):
        numbers = (elements, patches, splits, inner, height)
        forward((batch, splits), win, lose, weight_win, weight_lose, partial, *numbers)
        finish((batch,), partial, results, scales, elements, batch, splits)
    return *results, scales


def _results(prediction: Tensor) -> tuple[PreferenceResidual, Tensor]:
    shapes = [prediction.shape[:1]] * len(PreferenceResidual._fields) + [(kernels.ROWS, prediction.shape[0])]
    *results, scales = (prediction.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return PreferenceResidual(*results), scales


@preference_residual_op.register_fake
def _(policy_win, *args):
    results, scales = _results(policy_win)
    return *results, scales


@torch.library.custom_op("focusdpo::preference_residual_backward", mutates_args=())
def preference_residual_backward_op(
    policy_win_grad: Tensor | None,
    policy_lose_grad: Tensor | None,
    margin_grad: Tensor | None,
    scales: Tensor,
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
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (policy_win, policy_lose)]
    mask, sizes = _layout(policy_win, weight_win, weight_lose, mask_power)
    elements, patches, inner, height = sizes
    if batch * elements == 0:
        return grads[0], grads[1]
    # The first row of the scales is zeros.
    given = [scales if x is None else x for x in (policy_win_grad, policy_lose_grad, margin_grad)]
    incoming, strides = Incoming(*given), [x.stride(-1) for x in given]
    sides = zip(predictions[:2], predictions[2:], grads, strict=True)
    win, lose = (Update(policy, target, grad, policy.stride(0), target.stride(0)) for policy, target, grad in sides)
    backward = kernels.backward_launch(tuple(x.dtype for x in predictions), mask)
    with device_guard(policy_win):
        grid = (batch, ceil_div(elements, kernels.BACKWARD_BLOCK))
        numbers = (elements, patches, batch, inner, height, *strides)
        backward(grid, incoming, scales, win, lose, weight_win, weight_lose, *numbers)
    return grads[0], grads[1]


@preference_residual_backward_op.register_fake
def _(policy_win_grad, policy_lose_grad, margin_grad, scales, policy_win, policy_lose, *args):
    return policy_win.new_empty(policy_win.shape), policy_lose.new_empty(policy_lose.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    policy_win, policy_lose, _, _, target_win, target_lose, weight_win, weight_lose, _, ctx.mask_power = inputs
    ctx.set_materialize_grads(False)  # a result that nobody used costs no kernel that fills its gradient with zeros
    *results, scales = output
    fields = PreferenceResidual(*results)
    ctx.mark_non_differentiable(fields.reference_win, fields.reference_lose, fields.winner_norm, fields.inner, scales)
    save(ctx, scales, policy_win, policy_lose, target_win, target_lose, weight_win, weight_lose)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    policy_win, policy_lose, _, _, margin, *_ = grads  # as the fields of PreferenceResidual
    if policy_win is None and policy_lose is None and margin is None:
        return (None,) * 10
    if torch.is_grad_enabled():  # for a second derivative
        scales, *tensors = saved(ctx)
        tensors[5] = tensors[4] if tensors[5] is None else tensors[5]
        gradients: list[Tensor | None] = [None, None]
        for side, incoming in enumerate(spec.error_gradients(policy_win, policy_lose, margin)):
            if incoming is not None:
                policy, target, weight = tensors[side::2]
                gradients[side] = spec.policy_gradient(policy, target, weight, incoming, scales[1 + side], ctx.mask_power)
        return *gradients, *[None] * 8
    return *preference_residual_backward_op(policy_win, policy_lose, margin, *saved(ctx), ctx.mask_power), *[None] * 8


preference_residual_op.register_autograd(_backward, setup_context=_setup_context)


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
        weight: M >= 0, [B, P], of any floating dtype, bool or uint8; or None for all ones. Latents take one value per 2x2
            patch, row-major: P = (H/2)(W/2); or one per latent, M [B, H, W] or [B, 1, H, W].
        weight_lose: the loser's own M, of the same layout; None uses `weight` for both.
        reduction: "mean" over P*C, so that M = 1 is plain Diffusion-DPO; "sum"; or "masked_mean", divided by the sum of
            M^mask_power over all elements (0 where that is 0).
        mask_power: 1 weights the squared difference by M, 2 by M^2 (the mask inside the norm).
        backend: "triton", "torch" or None; see `focusdpo_kernels.backend`. Under torch.func's transforms and forward-mode
            differentiation it is always "torch".

    Returns:
        PreferenceResidual of tensors [B], fp32 (float64 for float64 predictions), differentiable. The margin is
        exactly 0 where policy and reference agree; a mask of zeros gives zeros, a negative entry NaN for its sample. With
        Triton, and on a CPU in fp16 to fp32, a sample whose incoming gradient is 0 gets gradient 0 whatever its error.

    Raises:
        TypeError, ValueError: arguments of wrong type, shape, dtype or device, or a reference, target or weight that
            requires grad; each named.
    """
    values = Predictions(policy_win, policy_lose, reference_win, reference_lose, target_win, target_lose)
    return masked_residual(values, weight, weight_lose, reduction=reduction, mask_power=mask_power, backend=backend)


def masked_residual(
    values: Predictions,
    weight: Tensor | None,
    weight_lose: Tensor | None,
    *,
    names: tuple[str, str] = ("weight", "weight_lose"),
    silent: Tensor | None = None,
    reduction: str = "mean",
    mask_power: int = 1,
    backend: str | None = None,
) -> PreferenceResidual:
    """`preference_residual`; `names` are what the caller calls the masks.

    silent: bool [B], samples whose results the caller leaves out, or None; their gradient is 0, whatever their error.
    """
    policy = values.policy_win
    check_predictions(values._asdict())
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("mask_power", mask_power, (1, 2))
    if weight is not None:
        weight = check_weight(names[0], weight, policy)
    if weight_lose is not None:
        if weight is None:
            raise ValueError(f"{names[1]}: given without {names[0]}; pass {names[0]} for the winner as well")
        weight_lose = check_weight(names[1], weight_lose, policy)
        check_shape(names[1], weight_lose, weight.shape, f"as {names[0]}")
    transformed = is_transformed(values.policy_win, values.policy_lose)
    if resolve_backend(backend, *values) == "torch" or transformed:
        if cpu_residual.takes(*values) and not transformed:
            return cpu_residual.preference_residual(*values, weight, weight_lose, reduction, mask_power)
        if silent is not None:
            # A gradient of 0 times an error that is not finite would be NaN.
            rows = silent.reshape(-1, *[1] * (policy.ndim - 1))
            win, lose = (torch.where(rows, x.detach(), x) for x in (values.policy_win, values.policy_lose))
            values = values._replace(policy_win=win, policy_lose=lose)
        return spec.preference_residual(*values, weight, weight_lose, reduction, mask_power)
    weights = (x if x is None else x.to(torch.float32).contiguous() for x in (weight, weight_lose))
    return PreferenceResidual(*preference_residual_op(*values, *weights, reduction, mask_power)[:-1])
