"""The masked preference residual (E9, E1) on a CPU, forward and backward, in blocks.

Same results as reference.py, which specifies them. Over whole tensors each of its operations would read and write memory; a
block goes through all of them before the next. The channels of a position share one M, so they are summed first: what M
weights is a small table of one value per position.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from focusdpo_kernels import reference as spec
from focusdpo_kernels.autograd import is_transformed, save, saved
from focusdpo_kernels.reference import PreferenceResidual

# Elements of a block, for each thread: 1 MiB in fp32. Smaller ones cost more in calls than they save in memory.
BLOCK = 262144
WHOLE = (slice(None),)  # of a prediction that is one block


def takes(*predictions: Tensor) -> bool:
    """Whether these are a CPU's tensors of fp16, bf16 or fp32, with data. A compiler fuses the specification itself."""
    if torch.compiler.is_compiling() or not predictions[0].is_cpu:
        return False
    return all(type(x) in (Tensor, torch.nn.Parameter) and x.is_cpu and x.dtype != torch.float64 for x in predictions)


def preference_residual(
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
) -> PreferenceResidual:
    """As reference.preference_residual. A gradient of 0 stays 0 where an error is not finite."""
    predictions = (policy_win, policy_lose, reference_win, reference_lose, target_win, target_lose)
    masks = [x for x in (weight_win, weight_lose) if x is not None]
    weights = _weights(policy_win, masks, reduction, mask_power)
    if torch.is_grad_enabled() and (policy_win.requires_grad or policy_lose.requires_grad):
        return PreferenceResidual(*_Residual.apply(*predictions, weights))  # type: ignore[no-untyped-call]
    return _residual(predictions, weights)


def _weights(prediction: Tensor, masks: Sequence[Tensor], reduction: str, mask_power: int) -> Tensor:
    """M^mask_power times the reduction's scale by position, of winner and loser or of both: [1 or 2, B, P] of tokens,
    [1 or 2, B, H, W] of latents. One value a sample where there is no mask.
    """
    axis, size = _channel_axis(prediction), math.prod(prediction.shape[1:])
    scale = 1.0 if reduction == "sum" else 1 / max(size, 1)
    if not masks:
        shape = (1, prediction.shape[0], *[1] * (prediction.ndim - 2))
        return torch.full(shape, scale, dtype=torch.float32, device=prediction.device)
    by_position = [spec.element_weight(mask, prediction, mask_power).squeeze(axis) for mask in masks]
    weights = by_position[0][None] if len(masks) == 1 else torch.stack(by_position)
    if reduction == "masked_mean":
        mass = weights.flatten(2).sum(2) * prediction.shape[axis]
        scales = torch.where(mass == 0, 0, 1 / torch.where(mass == 0, 1, mass))
        return weights * scales.reshape(*mass.shape, *[1] * (prediction.ndim - 2))
    return weights if reduction == "sum" else weights * scale


def _channel_axis(prediction: Tensor) -> int:
    """Of [B, P, C] or [B, C, H, W]."""
    return 2 if prediction.ndim == 3 else 1


def _blocks(prediction: Tensor) -> Iterator[tuple[slice, ...]]:
    """Indices that cut predictions into blocks: of samples, and of tokens or of rows of latents."""
    axis = _channel_axis(prediction)
    batch, rows = prediction.shape[0], prediction.shape[3 - axis]
    if prediction.numel() == 0:
        return
    elements = prediction.numel() // batch
    size = BLOCK * torch.get_num_threads()
    if prediction.numel() <= size:
        yield WHOLE
        return
    samples, part = max(size // elements, 1), max(size * rows // elements, 1)
    for b in range(0, batch, samples):
        for row in range(0, rows, part):
            some = (slice(b, b + samples), slice(row, row + part))
            yield some if axis == 2 else (some[0], slice(None), some[1])


def _side_sums(side: Sequence[Tensor], buffers: Sequence[Tensor], axis: int, out: Sequence[Tensor]) -> None:
    """Of policy, reference and target: norms of both errors over channels, and the sum of E9's factored difference.

    Leaves the policy's error in the first buffer.
    """
    a, r, t, difference = buffers
    for buffer, prediction in zip((a, r, t), side, strict=True):
        buffer.copy_(prediction)
    torch.sub(a, r, out=difference)
    torch.linalg.vector_norm(a.sub_(t), dim=axis, out=out[0])
    torch.linalg.vector_norm(r.sub_(t), dim=axis, out=out[2])
    torch.sum(difference.mul_(r.add_(a)), axis, out=out[4])


def _residual(predictions: Sequence[Tensor], weights: Tensor) -> PreferenceResidual:
    policy = predictions[0]
    axis = _channel_axis(policy)
    # Sums over channels in the order of the results, those of each side for the margin's two, and <g_w, g_l> before |g_w|^2.
    positions = [n for i, n in enumerate(policy.shape) if i != axis]
    rows = policy.new_zeros((8, *positions), dtype=torch.float32)
    buffers: Sequence[Tensor] = ()
    for block in _blocks(policy):
        part = predictions if block == WHOLE else [x[block] for x in predictions]
        shape = part[0].shape
        if not buffers or buffers[0].shape != shape:
            buffers = rows.new_empty((5, *shape)).unbind()
        win, lose, *shared = buffers
        out = (rows if block == WHOLE else rows[:, block[0], block[-1]]).unbind()
        _side_sums(part[::2], (win, *shared), axis, out)
        _side_sums(part[1::2], (lose, *shared), axis, out[1:])
        torch.sum(win.mul_(lose), axis, out=out[6])
    sides = rows.view(4, 2, *positions)
    sides[:2].square_()
    sides[:3].mul_(weights)
    rows[7] = rows[0]
    rows[6:].mul_(weights[0])
    rows[6].mul_(weights[-1])
    totals = rows.flatten(2).sum(2).unbind()
    win, lose, win_reference, lose_reference, win_difference, lose_difference, inner, norm = totals
    return PreferenceResidual(win, lose, win_reference, lose_reference, win_difference - lose_difference, norm, inner)


class _Residual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        *predictions, weights = inputs
        results = _residual(predictions, weights)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*results[2:4], *results[5:])
        save(ctx, *predictions[:2], *predictions[4:], weights)
        # Views of one tensor could not be changed in place.
        return results.policy_win.clone(), results.policy_lose.clone(), *results[2:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, weights = saved(ctx)
        results: list[Tensor | None] = [None] * 7
        for side, incoming in enumerate(spec.error_gradients(grads[0], grads[1], grads[4])):
            if incoming is not None and ctx.needs_input_grad[side]:
                policy, target = tensors[side::2]
                weight = weights[side % len(weights)]
                if torch.is_grad_enabled() or is_transformed(incoming):  # a second derivative, or many at once
                    results[side] = spec.policy_gradient(policy, target, weight, incoming, 1.0, 1)
                else:
                    results[side] = _policy_gradient(policy, target, weight, incoming)
        return tuple(results)


def _policy_gradient(policy: Tensor, target: Tensor, weight: Tensor, incoming: Tensor) -> Tensor:
    axis = _channel_axis(policy)
    factor = ((2 * incoming).reshape(-1, *[1] * (policy.ndim - 2)) * weight).unsqueeze(axis)
    gradient = torch.empty_like(policy)
    for block in _blocks(policy):
        if block == WHOLE:
            a, t, f, out = policy, target, factor, gradient
        else:
            every = factor.expand([1 if i == axis else n for i, n in enumerate(policy.shape)])
            a, t, f, out = policy[block], target[block], every[block], gradient[block]
        out.copy_(a.to(torch.float32, copy=True).sub_(t).mul_(f))
    if not incoming.all():
        gradient[incoming == 0] = 0  # also where an error is not finite
    return gradient
