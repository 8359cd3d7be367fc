"""Counts the launches of the library's calls through the stub driver, and prints them as JSON; tests/kernels/test_launches.py.

python -m tests.kernels.launch_worker [--names]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from focusdpo import focus_dpo_loss, focus_mask
from focusdpo.features import SimilarityTap
from focusdpo.mask import FocusMask
from focusdpo_kernels import (
    SimilarityAccumulator,
    cross_layer_similarity,
    dense_similarity,
    estimate_alignment,
    fuse_focus,
    layers,
    patch_entropy,
    pooled_similarity,
    preference_residual,
    structure_field,
    topk_mask,
)
from focusdpo_kernels.tools import stub_driver

# They reserve memory, or look at a scalar that the host has already: no kernel.
FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "detach_", "_unsafe_view")
# Out of place it copies, then fills.
COST = {"masked_fill": 2}
B, P, Q, D, R, C = 2, 64, 48, 64, 2, 16  # images of 8 x 8 patches


class TorchLaunches(TorchDispatchMode):
    """Names of the ATen operators that would launch a kernel or a copy if these tensors were a GPU's."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "focusdpo":
            # The mode is off while it handles an operator; within ours it is wanted.
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        with self:  # `to`, say, is a copy or nothing
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        name = func._schema.name.removeprefix("aten::")
        if not (func.is_view or name in FREE):
            self.names += [name] * COST.get(name, 1)
        return func(*args, **kwargs)


def count(call: Callable[[], Any]) -> dict[str, list[str]]:
    """What a call launches: the library's kernels, and PyTorch's operators."""
    torch_launches = TorchLaunches()

    def copied_table(*arguments: Any) -> Tensor:
        torch_launches.names.append("copy of the pointer table")  # to the device; here it is there already
        return layers.pointer_table(*arguments)

    with ExitStack() as stack:
        for module in (pooled_similarity, dense_similarity):
            stack.enter_context(mock.patch.object(module, "pointer_table", copied_table))
        ours = stack.enter_context(stub_driver.launches())
        stack.enter_context(torch_launches)
        call()
    return {"ours": ours, "torch": torch_launches.names}


class Block(nn.Module):
    """A transformer block that has its output ready: its own launches are not what is counted."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self) -> Tensor:
        return self.output


def main(names: bool) -> None:
    stub_driver.install()
    torch.manual_seed(0)
    reference_mask = torch.rand(B, R, Q) > 0.5
    prior = torch.rand(B, P) > 0.5
    float_prior = prior.float()
    images = torch.rand(B, 3, 128, 128)
    scores = torch.randn(B, R, P)
    counts = torch.ones(B, R, dtype=torch.int64)
    weight = torch.rand(B, P)
    subjects = torch.rand(B, R, P) > 0.5
    latents = [torch.randn(B, P, C) for _ in range(4)]
    predictions = [torch.randn(B, P, C, dtype=torch.bfloat16, requires_grad=i < 2) for i in range(6)]
    hidden = [torch.randn(B, P + Q, D, dtype=torch.bfloat16) for _ in range(5)]

    def backward(result: Tensor, incoming: Tensor | None = None) -> None:
        torch.autograd.grad(result, predictions[:2], incoming)

    def mask(similarity: Tensor) -> FocusMask:
        # Pixels on a GPU are not looked at.
        return focus_mask(similarity, prior, images, reference_mask=reference_mask, check_range=False)

    def loss(similarity: Tensor) -> Tensor:
        return focus_dpo_loss(*predictions, focus=mask(similarity)).loss

    def at_once(number: int, pooling: str = "reference") -> Tensor:
        target, reference = [h[:, :P] for h in hidden[:number]], [h[:, P:] for h in hidden[:number]]
        return cross_layer_similarity(target, reference, reference_mask, pooling=pooling)

    def streamed(number: int) -> Tensor:
        model = nn.ModuleList(Block(h) for h in hidden[:number])
        paths = [str(n) for n in range(number)]
        arguments = {"image_tokens": lambda output: output, "num_target": P, "reference_mask": reference_mask}
        with SimilarityTap(model, paths, **arguments) as tap:
            for block in model:
                block()
        return tap.scores()

    def accumulate(accumulator: SimilarityAccumulator) -> None:
        accumulator.update(hidden[0][:, :P], hidden[0][:, P:])

    accumulator = SimilarityAccumulator(reference_mask)
    accumulate(accumulator)
    ones, of_subjects = torch.ones(B), torch.ones(B, R)
    coverage = torch.rand(B)
    cases: dict[str, Callable[[], Any]] = {
        "cross_layer_similarity": lambda: at_once(3),
        "cross_layer_similarity, 1 layer": lambda: at_once(1),
        "cross_layer_similarity, max": lambda: at_once(3, "max"),
        "accumulator, first update": lambda: accumulate(SimilarityAccumulator(reference_mask)),
        "accumulator, next update": lambda: accumulate(accumulator),
        "accumulator, result": accumulator.result,
        "topk_mask": lambda: topk_mask(scores, 3),
        "topk_mask, k tensor": lambda: topk_mask(scores, counts),
        "structure_field": lambda: structure_field(scores, 3, prior),
        "structure_field, k tensor": lambda: structure_field(scores, counts, prior),
        "structure_field, float prior": lambda: structure_field(scores, counts, float_prior),
        "patch_entropy": lambda: patch_entropy(images, check_range=False),
        "patch_entropy, normalized": lambda: patch_entropy(images, normalize=True, check_range=False),
        "fuse_focus": lambda: fuse_focus(weight, coverage, weight, prior),
        "focus_mask": lambda: mask(scores),
        "estimate_alignment": lambda: estimate_alignment(*latents, coverage),
        "focus_mask, estimate": lambda: focus_mask(weight, prior, images, source="estimate", check_range=False),
        "residual, forward": lambda: preference_residual(*predictions, weight),
        "residual of subjects, forward and backward": lambda: backward(
            preference_residual(*predictions, weight, subjects=subjects).margin, of_subjects
        ),
        "residual, forward and backward": lambda: backward(preference_residual(*predictions, weight).margin, ones),
        "loss, forward": lambda: focus_dpo_loss(*predictions, focus=weight),
        "loss, forward and backward": lambda: backward(focus_dpo_loss(*predictions, focus=weight).loss),
        "step at once, 3 layers": lambda: backward(loss(at_once(3))),
        "step at once, 5 layers": lambda: backward(loss(at_once(5))),
        "step streamed, 3 layers": lambda: backward(loss(streamed(3))),
        "step streamed, 5 layers": lambda: backward(loss(streamed(5))),
    }
    counted = {name: count(call) for name, call in cases.items()}
    if names:
        for name, found in counted.items():
            print(f"{name}\n  {' '.join(found['ours'])}\n  {len(found['torch'])}: {' '.join(found['torch'])}")
    else:
        print(json.dumps(counted))


if __name__ == "__main__":
    main("--names" in sys.argv[1:])
