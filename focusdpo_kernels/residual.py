"""Masked preference residual (docs/method.md, E9 and the margin of E1): the operators and the public function.

The kernels are in residual_kernels.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from focusdpo_kernels import cpu_residual
from focusdpo_kernels import reference as spec
from focusdpo_kernels import residual_kernels as kernels
from focusdpo_kernels.autograd import is_transformed, save, saved
from focusdpo_kernels.backend import device_guard, resolve_backend
from focusdpo_kernels.checks import PATCH, check_residual
from focusdpo_kernels.launch import by_sample, ceil_div, next_power_of_2
from focusdpo_kernels.reference import Predictions, PreferenceResidual
from focusdpo_kernels.residual_kernels import Incoming, Mask, Side


def _sides(tensors: Sequence[Tensor]) -> Iterator[Side]:
    """Of winner and loser, whose tensors [B, ...] take turns; samples contiguous."""
    rows = [by_sample(x) for x in tensors]
    return (Side(*side, *(x.stride(0) for x in side)) for side in (rows[::2], rows[1::2]))


def _pair(weights: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """M of winner and loser as the kernels take them: without the loser's own, the winner's is for both."""
    return (*weights, None, None)[:2]


def _layout(
    prediction: Tensor, weights: Sequence[Tensor], subjects: Tensor | None, power: int
) -> tuple[Mask, tuple[int, int, int, int]]:
    """How masks lie over a prediction, and E, P, INNER and HEIGHT of the kernels."""
    if prediction.ndim == 3:
        _, patches, channels = prediction.shape
        elements, inner, height, side = patches * channels, channels, 1, 0
    else:
        _, channels, height, inner = prediction.shape
        per_latent = subjects.ndim == 4 if subjects is not None else bool(weights) and weights[0].ndim == 3
        side = 1 if per_latent else PATCH
        elements, patches = channels * height * inner, (height // side) * (inner // side)
    sizes = (elements, patches, inner, height)
    if not weights and subjects is None:
        return Mask(), sizes
    shared = side == 0 and inner % kernels.LANES == 0
    return Mask(len(weights), side, power, shared, 0 if subjects is None else subjects.shape[1]), sizes


def _rows(prediction: Tensor, subjects: Tensor | None) -> tuple[int, ...]:
    """Shape of a result: [B], or [B, R] with subjects."""
    return (prediction.shape[0],) if subjects is None else tuple(subjects.shape[:2])


def _empty_results(
    predictions: Sequence[Tensor], weights: Sequence[Tensor], subjects: Tensor | None, *args: object
) -> list[Tensor]:
    rows = _rows(predictions[0], subjects)
    shapes = [rows] * len(PreferenceResidual._fields) + [(kernels.ROWS, *rows)]
    return [predictions[0].new_empty(shape, dtype=torch.float32) for shape in shapes]


@torch.library.custom_op("focusdpo::preference_residual", mutates_args=())
def preference_residual_op(
    predictions: Sequence[Tensor], weights: Sequence[Tensor], subjects: Tensor | None, reduction: str, mask_power: int
) -> list[Tensor]:
    """The fields of PreferenceResidual, fp32 [B] or [B, R], and the scales [kernels.ROWS, ...] that the backward pass needs.

    predictions: as `Predictions`.
    weights: M of both sides, or of winner and loser, fp32; or none.
    subjects: where each is, uint8 [B, R, P] or [B, R, H, W], or None.
    """
    *results, scales = _empty_results(predictions, weights, subjects)
    if scales.numel() == 0:
        return [*results, scales]
    mask, (elements, patches, inner, height) = _layout(predictions[0], weights, subjects, mask_power)
    splits = min(max(elements // (kernels.FORWARD_BLOCK * kernels.MIN_BLOCKS), 1), kernels.MAX_SPLITS)
    rows = results[0].numel()
    partial = scales.new_empty((rows, kernels.SUMS, splits))
    forward = kernels.forward_launch(tuple(x.dtype for x in predictions), mask)
    weighted = bool(weights) or subjects is not None
    finish = kernels.finish_launch(next_power_of_2(splits), reduction if weighted or reduction == "sum" else "mean")
    with device_guard(scales):
        numbers = (elements, patches, splits, inner, height, mask.subjects)
        programs = predictions[0].shape[0] * ceil_div(max(mask.subjects, 1), max(mask.subjects_at_once, 1))
        forward((programs, splits), *_sides(predictions), *_pair(weights), subjects, partial, *numbers)
        finish((rows,), partial, PreferenceResidual(*results), scales, elements, rows, splits)
    return [*results, scales]


def _empty_gradients(grads: Sequence[Tensor | None], predictions: Sequence[Tensor], *args: object) -> list[Tensor]:
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in predictions[:2]]


@torch.library.custom_op("focusdpo::preference_residual_backward", mutates_args=())
def preference_residual_backward_op(
    grads: Sequence[Tensor | None],
    predictions: Sequence[Tensor],
    weights: Sequence[Tensor],
    subjects: Tensor | None,
    scales: Tensor,
    mask_power: int,
) -> list[Tensor]:
    """Gradients of both predictions of the policy.

    grads: of policy_win, policy_lose and margin, fp32 [B] or [B, R].
    predictions: the policy's, then their targets.
    """
    gradients = _empty_gradients(grads, predictions)
    batch = predictions[0].shape[0]
    mask, (elements, patches, inner, height) = _layout(predictions[0], weights, subjects, mask_power)
    if batch * elements == 0:
        return gradients
    tensors = (*predictions[:2], *gradients, *predictions[2:])
    # The first row of the scales is zeros. A gradient of results [B] may be one number for all; of [B, R] it is laid out.
    given = [scales[0] if x is None else x for x in grads]
    given = [x if x.ndim == 1 else x.contiguous().view(-1) for x in given]
    backward = kernels.backward_launch(tuple(x.dtype for x in tensors), mask)
    with device_guard(scales):
        grid = (batch, ceil_div(elements, kernels.BACKWARD_BLOCK))
        numbers = (elements, patches, batch, inner, height, *(x.stride(-1) for x in given))
        backward(grid, Incoming(*given), scales, *_sides(tensors), *_pair(weights), subjects, *numbers)
    return gradients


preference_residual_op.register_fake(_empty_results)
preference_residual_backward_op.register_fake(_empty_gradients)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    predictions, weights, subjects, _, ctx.mask_power = inputs
    ctx.set_materialize_grads(False)  # a result that nobody used costs no kernel that fills its gradient with zeros
    ctx.mark_non_differentiable(*output[2:4], *output[5:])
    save(ctx, *predictions[:2], *predictions[4:], output[-1], subjects, *weights)


def _backward(ctx: Any, results: list[Tensor | None]) -> tuple[Any, ...]:
    tensors = saved(ctx)
    predictions, scales, subjects, weights = list(tensors[:4]), tensors[4], tensors[5], list(tensors[6:])
    grads = [*results[:2], results[4]]
    gradients: Sequence[Tensor | None] = [None, None]
    # A second derivative, or many gradients at once.
    if torch.is_grad_enabled() or is_transformed(*(x for x in grads if x is not None)):
        gradients = spec.policy_gradients(grads, predictions, weights, subjects, scales[1:], ctx.mask_power)
    elif any(x is not None for x in grads):
        gradients = preference_residual_backward_op(grads, predictions, weights, subjects, scales, ctx.mask_power)
    return [*gradients, *[None] * 4], [None] * len(weights), None, None, None


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
    subjects: Tensor | None = None,
    reduction: str = "mean",
    mask_power: int = 1,
    backend: str | None = None,
) -> PreferenceResidual:
    """Masked errors of policy and reference on winner and loser, and their margin (E9, E1), of images or of their subjects.

    Args:
        policy_win, policy_lose: the policy's predictions, [B, P, C] tokens or [B, C, H, W] latents; fp16, bf16, fp32
            (float64 on the torch backend). Gradient reaches these two only.
        reference_win, reference_lose: the reference model's predictions, same shape.
        target_win, target_lose: what they should be (velocity or noise), same shape.
        weight: M >= 0, [B, P], of any floating dtype, bool or uint8; or None for all ones. Latents take one value per 2x2
            patch, row-major: P = (H/2)(W/2); or one per latent, M [B, H, W] or [B, 1, H, W].
        weight_lose: the loser's own M, of the same layout; None uses `weight` for both.
        subjects: where each of R subjects is, [B, R, P] (bool, integers that are not 0, floats above one half), or of latents
            [B, R, H, W] where `weight` has one value per latent. Each then has results of its own, of M within it; all of them
            come from one pass. None gives those of the whole image.
        reduction: "mean" over P*C, so that M = 1 is plain Diffusion-DPO; "sum"; or "masked_mean", divided by the sum of
            M^mask_power over all elements (0 where that is 0).
        mask_power: 1 weights the squared difference by M, 2 by M^2 (the mask inside the norm).
        backend: "triton", "torch" or None; see `focusdpo_kernels.backend`. Under torch.func's transforms and forward-mode
            differentiation it is always "torch".

    Returns:
        PreferenceResidual of tensors [B], with subjects [B, R], fp32 (float64 for float64 predictions), differentiable.
        The margin is exactly 0 where policy and reference agree, and NaN where one of the four errors is not finite; a mask
        of zeros gives zeros, a negative entry NaN for its sample. With Triton, and on a CPU in fp16 to fp32, a sample whose
        incoming gradient is 0 gets gradient 0 whatever its error.

    Raises:
        TypeError, ValueError: arguments of wrong type, shape, dtype or device, or a reference, target or weight that
            requires grad; each named.
    """
    values = Predictions(policy_win, policy_lose, reference_win, reference_lose, target_win, target_lose)
    masks = {"weight": weight, "weight_lose": weight_lose}
    return masked_residual(values, masks, subjects, reduction=reduction, mask_power=mask_power, backend=backend)


def masked_residual(
    values: Predictions,
    masks: Mapping[str, Tensor | None],
    subjects: Tensor | None = None,
    *,
    silent: Tensor | None = None,
    reduction: str = "mean",
    mask_power: int = 1,
    backend: str | None = None,
) -> PreferenceResidual:
    """`preference_residual`, with masks by the names that the caller gives them.

    silent: bool [B], samples whose results the caller leaves out, or None; their gradient is 0, whatever their error.
    """
    weights, subjects = check_residual(values._asdict(), masks, subjects, reduction, mask_power)
    transformed = is_transformed(values.policy_win, values.policy_lose)
    if resolve_backend(backend, *values) == "torch" or transformed:
        if cpu_residual.takes(*values) and not transformed:
            return cpu_residual.preference_residual(values, weights, subjects, reduction, mask_power)
        if silent is not None:
            # A gradient of 0 times an error that is not finite would be NaN.
            rows = silent.reshape(-1, *[1] * (values.policy_win.ndim - 1))
            win, lose = (torch.where(rows, x.detach(), x) for x in (values.policy_win, values.policy_lose))
            values = values._replace(policy_win=win, policy_lose=lose)
        return spec.preference_residual(values, weights, subjects, reduction, mask_power)
    weights = [x.to(torch.float32).contiguous() for x in weights]
    if subjects is not None:
        subjects = subjects.contiguous().view(torch.uint8)
    return PreferenceResidual(*preference_residual_op(list(values), weights, subjects, reduction, mask_power)[:-1])
