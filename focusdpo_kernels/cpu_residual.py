"""The masked preference residual (E9, E1) on a CPU, forward and backward, in blocks that stay in its cache.

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
from focusdpo_kernels.autograd import save, saved
from focusdpo_kernels.reference import PreferenceResidual

# Elements of a block, for each thread: 256 KiB in fp32. Smaller ones cost more in calls than they save in memory.
BLOCK = 65536
WHOLE = (slice(None),)  # of a prediction that is one block


def serves(*predictions: Tensor) -> bool:
    """Whether these are a CPU's tensors of fp16, bf16 or fp32, with data. A compiler fuses the specification itself."""
    if torch.compiler.is_compiling() or any(type(x) not in (Tensor, torch.nn.Parameter) for x in predictions):
        return False
    return all(x.device.type == "cpu" and x.dtype != torch.float64 for x in predictions)


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
    win, lose = (w if w is None else _by_position(w, policy_win, mask_power) for w in (weight_win, weight_lose))
    if torch.is_grad_enabled() and (policy_win.requires_grad or policy_lose.requires_grad):
        return PreferenceResidual(*_Residual.apply(*predictions, win, lose, reduction))  # type: ignore[no-untyped-call]
    return _residual(*predictions, win, lose, reduction)[0]


def _by_position(weight: Tensor, prediction: Tensor, mask_power: int) -> Tensor:
    """M^mask_power of each position: [B, P] of tokens, [B, H, W] of latents."""
    return spec.element_weight(weight, prediction, mask_power).squeeze(_channel_axis(prediction))


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


def _side_sums(side: Sequence[Tensor], scratch: Sequence[Tensor], axis: int, out: Sequence[Tensor]) -> None:
    """Of policy, reference and target: norms of both errors over channels, and the sum of E9's factored difference.

    Leaves the policy's error in the first of four buffers.
    """
    a, r, t, difference = scratch
    for buffer, prediction in zip(scratch, side, strict=False):
        buffer.copy_(prediction)
    torch.sub(a, r, out=difference)
    torch.linalg.vector_norm(a.sub_(t), dim=axis, out=out[0])
    torch.linalg.vector_norm(r.sub_(t), dim=axis, out=out[1])
    torch.sum(difference.mul_(r.add_(a)), axis, out=out[2])


def _weigh(rows: Tensor, win: Tensor | float, lose: Tensor | float | None) -> None:
    """Multiplies rows as `_residual` orders them by what belongs to each side, in place."""
    if lose is None:
        rows.mul_(win)
        rows[6:].mul_(win)
    else:
        rows[:3].mul_(win)
        rows[3:6].mul_(lose)
        rows[6].mul_(win).mul_(lose)
        rows[7].mul_(win).mul_(win)


def _residual(*inputs: Any) -> tuple[PreferenceResidual, list[Any]]:
    """Of predictions, masks by position and the reduction: the results, and the scales of winner and loser, or one for both."""
    *predictions, win_mask, lose_mask, reduction = inputs
    policy: Tensor = predictions[0]
    axis = _channel_axis(policy)
    positions = [n for i, n in enumerate(policy.shape) if i != axis]
    # Sums over channels: three of `_side_sums` for the winner, three for the loser, <g_w, g_l> and |g_w|^2.
    rows = policy.new_zeros((8, *positions), dtype=torch.float32)
    buffers: Sequence[Tensor] = ()
    for block in _blocks(policy):
        part = predictions if block == WHOLE else [x[block] for x in predictions]
        shape = part[0].shape
        if not buffers or buffers[0].shape != shape:
            buffers = rows.new_empty((5, *shape)).unbind()
        win, lose, *shared = buffers
        out = (rows if block == WHOLE else rows[:, block[0], block[-1]]).unbind()
        _side_sums(part[::2], (win, *shared), axis, out[:3])
        _side_sums(part[1::2], (lose, *shared), axis, out[3:6])
        torch.sum(win.mul_(lose), axis, out=out[6])
    rows[:6].view(2, 3, *positions)[:, :2].square_()
    rows[7] = rows[0]
    size = math.prod(policy.shape[1:])
    scales: list[Any] = [1.0 if reduction == "sum" else 1 / max(size, 1)]
    if win_mask is not None:
        _weigh(rows, win_mask, lose_mask)
        if reduction == "masked_mean":
            masses = [mask.flatten(1).sum(1) * policy.shape[axis] for mask in (win_mask, lose_mask) if mask is not None]
            scales = [torch.where(mass == 0, 0, 1 / torch.where(mass == 0, 1, mass)) for mass in masses]
    totals = rows.flatten(2).sum(2)
    _weigh(totals, scales[0], scales[1] if scales[1:] else None)
    win, win_reference, win_difference, lose, lose_reference, lose_difference, inner, norm = totals.unbind()
    results = PreferenceResidual(win, lose, win_reference, lose_reference, win_difference - lose_difference, norm, inner)
    return results, scales


class _Residual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        policy_win, policy_lose, _, _, target_win, target_lose, win_mask, lose_mask, _ = inputs
        results, ctx.scales = _residual(*inputs)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*results[2:4], *results[5:])
        save(ctx, policy_win, policy_lose, target_win, target_lose, win_mask, win_mask if lose_mask is None else lose_mask)
        # Views of one tensor could not be changed in place.
        return results.policy_win.clone(), results.policy_lose.clone(), *results[2:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = saved(ctx)
        results: list[Tensor | None] = [None] * 9
        for side, incoming in enumerate(spec.error_gradients(grads[0], grads[1], grads[4])):
            if incoming is not None and ctx.needs_input_grad[side]:
                policy, target, weight = tensors[side::2]
                scale = ctx.scales[side % len(ctx.scales)]
                if torch.is_grad_enabled():  # for a second derivative
                    results[side] = spec.policy_gradient(policy, target, weight, incoming, scale, 1)
                else:
                    results[side] = _policy_gradient(policy, target, weight, incoming, scale)
        return tuple(results)


def _policy_gradient(policy: Tensor, target: Tensor, weight: Tensor | None, incoming: Tensor, scale: Tensor | float) -> Tensor:
    axis = _channel_axis(policy)
    factor = (2 * incoming * scale).reshape(-1, *[1] * (policy.ndim - 1))  # [B, 1, 1] or [B, 1, 1, 1]
    if weight is not None:
        factor = factor * weight.unsqueeze(axis)
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
