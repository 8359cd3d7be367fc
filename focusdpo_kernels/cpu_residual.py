"""The masked preference residual (E9, E1) on a CPU, forward and backward, in blocks.

Same results as reference.py, which specifies them. Over whole tensors each of its operations would read and write memory; a
block goes through all of them before the next. The channels of a position share one M, so they are summed first: what M
weights is a small table of one value per position. The reference's error is the policy's and what E9's factors say it has above
that, which saves its difference from the target and a sum, unless it is so much smaller that rounding would show.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from focusdpo_kernels import reference as spec
from focusdpo_kernels.autograd import is_traced, is_transformed, save, saved
from focusdpo_kernels.reference import PreferenceResidual

WIDE = 512  # channels: a norm over more of them, which PyTorch adds up one by one in fp32, shows its rounding
# Elements of a block, for each thread: 1 MiB in fp32. Smaller ones cost more in calls than they save in memory.
BLOCK = 262144
WHOLE = (slice(None),)  # of a prediction that is one block


def takes(*predictions: Tensor) -> bool:
    """Whether these are a CPU's tensors of fp16, bf16 or fp32, with data and not too many channels. A compiler fuses the
    specification, and a trace keeps one way of what depends on values.
    """
    if is_traced() or not predictions[0].is_cpu or predictions[0].shape[_channel_axis(predictions[0])] > WIDE:
        return False
    return all(type(x) in (Tensor, torch.nn.Parameter) and x.is_cpu and x.dtype != torch.float64 for x in predictions)


def preference_residual(
    predictions: Sequence[Tensor], weights: Sequence[Tensor], subjects: Tensor | None, reduction: str, mask_power: int
) -> PreferenceResidual:
    """As reference.preference_residual. A gradient of 0 stays 0 where an error is not finite."""
    by_position = _weights(predictions[0], weights, subjects, reduction, mask_power)
    if torch.is_grad_enabled() and any(x.requires_grad for x in predictions[:2]):
        return PreferenceResidual(*_Residual.apply(*predictions, by_position))  # type: ignore[no-untyped-call]
    return _residual(predictions, by_position)[0]


def _weights(prediction: Tensor, masks: Sequence[Tensor], subjects: Tensor | None, reduction: str, mask_power: int) -> Tensor:
    """M^mask_power times the reduction's scale by position, of winner and loser or of both: [1 or 2, B, P] of tokens,
    [1 or 2, B, H, W] of latents. One value a sample where there is no mask; with subjects [1 or 2, B, R, ...].
    """
    elements = math.prod(prediction.shape[1:])
    if subjects is not None:
        known = [spec.without_negatives(mask, prediction) for mask in masks]
        within = [[mask * shows for mask in known] or [shows] for shows in subjects.unbind(1)]
        parts = [torch.stack([spec.position_weight(mask, prediction, mask_power) for mask in one]) for one in within]
        weights = torch.stack(parts, dim=2)
    elif masks:
        weights = torch.stack([spec.position_weight(mask, prediction, mask_power) for mask in masks])
    else:
        shape = (1, prediction.shape[0], *[1] * (prediction.ndim - 2))
        mass = torch.full(shape, float(elements), dtype=torch.float32, device=prediction.device)
        return spec.reduction_scale(mass, elements, reduction)
    mass = _position_sums(weights, prediction) * prediction.shape[_channel_axis(prediction)]
    scale = spec.reduction_scale(mass, elements, reduction)
    return weights.mul_(scale.reshape(*scale.shape, *[1] * (prediction.ndim - 2)))


def _position_sums(values: Tensor, prediction: Tensor) -> Tensor:
    """Sums over a prediction's positions, the last axes of the values."""
    return values.flatten(2 - prediction.ndim).sum(-1)


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


def _residual(predictions: Sequence[Tensor], weights: Tensor) -> tuple[PreferenceResidual, Sequence[Tensor]]:
    """The results and, for the backward pass, policy - target of winner and loser where one block held everything."""
    policy = predictions[0]
    axis = _channel_axis(policy)
    # Sums over channels: of winner and loser the norm of policy - target, then (p - r)(p - r - 2 (p - t)), by which the squares
    # of the reference exceed the policy's; |g_w|^2 and <g_w, g_l>.
    table = policy.new_zeros((6, *_positions(policy)), dtype=torch.float32)
    rows = table.unbind()
    buffers: Sequence[Tensor] = ()
    part: Sequence[Tensor] = ()
    for block in _blocks(policy):
        out: Sequence[Tensor] = rows
        part = predictions
        if block != WHOLE:
            part, out = [x[block] for x in predictions], [x[block[0], block[-1]] for x in rows]
        if not buffers or buffers[0].shape != part[0].shape:
            buffers = [table.new_empty(part[0].shape) for _ in range(4)]
        *errors, difference, other = buffers
        for side, error in enumerate(errors):
            pairs = zip(part[side::2], (error, difference, other), strict=True)
            policy, reference, target = (x if x.dtype == torch.float32 else memory.copy_(x) for x, memory in pairs)
            torch.sub(policy, reference, out=difference)
            torch.linalg.vector_norm(torch.sub(policy, target, out=error), dim=axis, out=out[side])
            torch.sub(difference, error, alpha=2, out=other)
            torch.sum(difference.mul_(other), axis, out=out[2 + side])
        torch.sum(torch.mul(*errors, out=other), axis, out=out[5])
    table[:2].square_()
    rows[4].copy_(rows[0])
    sums = table.view(3, 2, *rows[0].shape)
    # In place, unless each subject has its own.
    sums = sums.mul_(weights) if weights.ndim == policy.ndim else sums.unsqueeze(3) * weights
    sums[2].mul_(weights[0])
    totals = _position_sums(sums, policy).flatten(0, 1)
    # By way of numpy each row is a tensor of its own: a view of another could not be changed in place.
    win, lose, win_excess, lose_excess, norm, inner = (torch.from_numpy(row) for row in totals.numpy())
    win_reference, lose_reference = win + win_excess, lose + lose_excess
    margin = lose_excess - win_excess
    policies, excesses, _ = totals.reshape(3, -1).tolist()
    # Also where one is not finite.
    if not all(math.inf > 4 * (error + excess) >= error for error, excess in zip(policies, excesses, strict=True)):
        references, exact = totals[:2] + totals[2:4], _errors(predictions[2:4], predictions[4:], weights)
        # Where it is needed: a sample's result does not depend on its batch.
        win_reference, lose_reference = torch.where(4 * references >= totals[:2], references, exact)
        margin = margin + 0 * (win + lose + win_reference + lose_reference)
    results = PreferenceResidual(win, lose, win_reference, lose_reference, margin, norm, inner)
    return results, buffers[:2] if part is predictions else ()


def _positions(prediction: Tensor) -> list[int]:
    axis = _channel_axis(prediction)
    return [*prediction.shape[:axis], *prediction.shape[axis + 1 :]]


def _errors(predictions: Sequence[Tensor], targets: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Of winner and loser, [2, B]."""
    axis = _channel_axis(predictions[0])
    sums = [weights.new_zeros(_positions(x)) for x in predictions]
    for block in _blocks(predictions[0]):
        for total, prediction, target in zip(sums, predictions, targets, strict=True):
            error = prediction[block].to(torch.float32, copy=True).sub_(target[block])
            total[block[0], block[-1]] = torch.linalg.vector_norm(error, dim=axis)
    squares = torch.stack(sums).square_()
    return _position_sums((squares if weights.ndim == squares.ndim else squares.unsqueeze(2)) * weights, predictions[0])


class _Residual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        *predictions, weights = inputs
        results, errors = _residual(predictions, weights)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*results[2:4], *results[5:])
        save(ctx, *predictions[:2], *predictions[4:], weights, *errors)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *results: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = saved(ctx)
        predictions, weights, errors = tensors[:4], tensors[4], tensors[5:]
        grads = [*results[:2], results[4]]
        gradients: list[Tensor | None] = [None, None]
        # A second derivative, or many gradients at once.
        is_plain = not (torch.is_grad_enabled() or any(x is not None and is_transformed(x) for x in grads))
        for side, incoming in enumerate(spec.error_gradients(*grads)):
            if incoming is not None and ctx.needs_input_grad[side]:
                policy, target = predictions[side::2]
                factor, weight = _factor(incoming, weights[side % len(weights)], policy)
                if is_plain:
                    gradients[side] = _policy_gradient(policy, target, errors[side : side + 1], factor, weight)
                else:
                    gradients[side] = spec.side_gradient(factor, policy, target, weight)
        return *gradients, *[None] * 5


def _factor(incoming: Tensor, weight: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor | None]:
    """What policy - target is multiplied by twice, shaped to broadcast over a prediction: incoming gradients [B] and weights by
    position; or of subjects' gradients [B, R] the sum of their products, and no more weights.
    """
    rows = incoming.reshape(*incoming.shape, *[1] * (prediction.ndim - 2))
    if incoming.ndim == 1:
        return spec.by_element(rows, prediction), spec.by_element(weight, prediction)
    return spec.by_element(torch.where(rows == 0, 0, rows * weight).sum(1), prediction), None


def _policy_gradient(policy: Tensor, target: Tensor, error: Sequence[Tensor], factor: Tensor, weight: Tensor | None) -> Tensor:
    """`error` is policy - target where the forward pass has kept it, or nothing."""
    gradient = torch.empty_like(policy)
    twice = 2 * factor if weight is None else 2 * factor * weight
    if error:
        torch.mul(error[0], twice, out=gradient)
    else:
        axis = _channel_axis(policy)
        twice = twice.expand([1 if i == axis else n for i, n in enumerate(policy.shape)])
        for block in _blocks(policy):
            gradient[block] = policy[block].to(torch.float32, copy=True).sub_(target[block]).mul_(twice[block])
    if not factor.all():
        gradient.masked_fill_(factor == 0, 0)  # also where an error is not finite
    return gradient
