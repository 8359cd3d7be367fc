"""What the operators with a gradient have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """Keeps tensors for the backward pass, also those made under inference_mode, which `save_for_backward` refuses.

    Nothing can tell whether such a tensor is changed before the backward pass: PyTorch does not count its changes.
    """
    ctx.untracked = [x if x is not None and x.is_inference() else None for x in tensors]
    ctx.save_for_backward(*(x if other is None else None for x, other in zip(tensors, ctx.untracked, strict=True)))


def saved(ctx: Any) -> tuple[Any, ...]:
    """What `save` kept."""
    return tuple(x if other is None else other for x, other in zip(ctx.saved_tensors, ctx.untracked, strict=True))


def is_transformed(*tensors: Tensor) -> bool:
    """Whether torch.func, forward-mode differentiation or a batch of incoming gradients is at work.

    All of them see through PyTorch's own operators only.
    """
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return True
    return any(torch._C._functorch.is_legacy_batchedtensor(x) or has_tangent(x) for x in tensors)


def is_traced() -> bool:
    """Whether a compiler, a tracer or a mode that changes PyTorch's operators looks on, which sees no other code."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._is_tracing() or torch._C._len_torch_dispatch_stack() > 0


def has_tangent(tensor: Tensor) -> bool:
    """Whether a tensor carries the derivative of forward-mode differentiation."""
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]
