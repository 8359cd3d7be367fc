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


def serves(*predictions: Tensor) -> bool:
    """Whether these are a CPU's tensors of fp16, bf16 or fp32. A compiler fuses the specification itself."""
    plain = all(x.device.type == "cpu" and x.dtype != torch.float64 for x in predictions)
    return plain and not torch.compiler.is_compiling()


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
    win = lose = None
    if weight_win is not None:
        win = lose = _by_position(weight_win, policy_win, mask_power)
        if weight_lose is not None:
            lose = _by_position(weight_lose, policy_win, mask_power)
    if torch.is_grad_enabled() and (policy_win.requires_grad or policy_lose.requires_grad):
        return PreferenceResidual(*_Residual.apply(*predictions, win, lose, reduction)[:-1])  # type: ignore[no-untyped-call]
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
    samples, part = max(size // elements, 1), max(size * rows // elements, 1)
    for b in range(0, batch, samples):
        for row in range(0, rows, part):
            some = (slice(b, b + samples), slice(row, row + part))
            yield some if axis == 2 else (some[0], slice(None), some[1])


def _side_sums(side: Sequence[Tensor], axis: int, out: Tensor) -> Tensor:
    """Of policy, reference and target: a - t; and into `out` [3, ...] the sums over channels of E9's three."""
    policy, reference, target = (x.float() for x in side)
    difference = policy - reference
    a, r = policy - target, reference - target
    for error, norm in ((a, out[0]), (r, out[1])):
        torch.linalg.vector_norm(error, dim=axis, out=norm).square_()
    torch.sum(difference.mul_(r.add_(a)), axis, out=out[2])
    return a


def _residual(*inputs: Any) -> tuple[PreferenceResidual, Tensor]:
    """Of six predictions, two masks as `_by_position` makes them, and the reduction: the results, and both scales [2, B]."""
    *predictions, weight_win, weight_lose, reduction = inputs
    policy: Tensor = predictions[0]
    axis = _channel_axis(policy)
    positions = [n for i, n in enumerate(policy.shape) if i != axis]
    sums = policy.new_zeros((2, 3, *positions), dtype=torch.float32)  # over channels, of winner and loser
    products = sums.new_zeros(positions)  # <a - t of the winner, a - t of the loser>
    for block in _blocks(policy):
        b, rows = block[0], block[-1]
        win, lose = (_side_sums([x[block] for x in predictions[side::2]], axis, sums[side, :, b, rows]) for side in (0, 1))
        torch.sum(win.mul_(lose), axis, out=products[b, rows])
    norms, size = sums[0, 0], math.prod(policy.shape[1:])
    scales = sums.new_full((2, policy.shape[0]), 1.0 if reduction == "sum" else 1 / max(size, 1))
    if weight_win is not None:
        weights = torch.stack((weight_win, weight_lose))  # [2, B, ...]
        if reduction == "masked_mean":
            mass = weights.flatten(2).sum(-1) * policy.shape[axis]
            scales = torch.where(mass == 0, 0, 1 / torch.where(mass == 0, 1, mass))
        norms, products = norms * weight_win * weight_win, products * weight_win * weight_lose
        sums = sums * weights[:, None]
    errors = sums.flatten(3).sum(-1) * scales[:, None]  # [2, 3, B]
    (win, win_reference, win_difference), (lose, lose_reference, lose_difference) = (side.unbind() for side in errors.unbind())
    win_scale, lose_scale = scales.unbind()
    norm = norms.flatten(1).sum(1) * win_scale * win_scale
    inner = products.flatten(1).sum(1) * win_scale * lose_scale
    return PreferenceResidual(win, lose, win_reference, lose_reference, win_difference - lose_difference, norm, inner), scales


class _Residual(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        results, scales = _residual(*inputs)
        return *(x.clone() for x in results), scales  # not views of one tensor

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        policy_win, policy_lose, _, _, target_win, target_lose, weight_win, weight_lose, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[2:4], *output[5:])
        save(ctx, output[-1], policy_win, policy_lose, target_win, target_lose, weight_win, weight_lose)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        scales, *tensors = saved(ctx)
        results: list[Tensor | None] = [None] * 9
        for side, incoming in enumerate(spec.error_gradients(grads[0], grads[1], grads[4])):
            if incoming is not None and ctx.needs_input_grad[side]:
                policy, target, weight = tensors[side::2]
                scale = scales[side]
                if torch.is_grad_enabled():  # for a second derivative
                    results[side] = spec.policy_gradient(policy, target, weight, incoming, scale, 1)
                else:
                    results[side] = _policy_gradient(policy, target, weight, incoming, scale)
        return tuple(results)


def _policy_gradient(policy: Tensor, target: Tensor, weight: Tensor | None, incoming: Tensor, scale: Tensor) -> Tensor:
    axis = _channel_axis(policy)
    factor = (2 * incoming * scale).reshape(-1, *[1] * (policy.ndim - 1))  # [B, 1, 1] or [B, 1, 1, 1]
    if weight is not None:
        factor = factor * weight.unsqueeze(axis)
    factor = factor.expand([1 if i == axis else n for i, n in enumerate(policy.shape)])
    gradient = torch.empty_like(policy)
    for block in _blocks(policy):
        gradient[block] = (policy[block].float() - target[block].float()).mul_(factor[block])
    gradient[incoming == 0] = 0  # also where an error is not finite
    return gradient
