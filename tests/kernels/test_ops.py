"""The kernels as citizens of PyTorch: registered operators, and compilation."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing

import focusdpo_kernels as kernels
from focusdpo import focus_dpo_loss
from focusdpo_kernels.entropy import patch_entropy_op
from focusdpo_kernels.estimate import estimate_alignment_op
from focusdpo_kernels.fusion import focus_field_op, fuse_focus_op, image_field_op
from focusdpo_kernels.matching import structure_field_op, topk_mask_op
from focusdpo_kernels.residual import preference_residual_backward_op, preference_residual_op
from focusdpo_kernels.residual_kernels import ROWS
from focusdpo_kernels.similarity import cross_layer_similarity_op
from tests.conftest import DEVICE


def operators():
    def tensor(*shape):
        return torch.randn(shape, device=DEVICE)

    predictions = [tensor(2, 6, 4) for _ in range(6)]
    policy = [x.requires_grad_() for x in predictions[:2]]
    mask = torch.ones(2, 3, 5, device=DEVICE)
    k = torch.full((2, 3), 2, device=DEVICE)
    prior = torch.ones(2, 6, device=DEVICE)
    weight = torch.rand(2, 6, device=DEVICE)
    subjects = (torch.rand(2, 3, 6, device=DEVICE) > 0.5).view(torch.uint8)
    plain = [x.detach() for x in predictions]
    rows, scales = tensor(3, 2), tensor(ROWS, 2)
    return {
        "similarity": (cross_layer_similarity_op, ([tensor(2, 6, 4)], [tensor(2, 5, 4)], mask, "reference")),
        "dense similarity": (
            cross_layer_similarity_op,
            ([tensor(2, 6, 4)] * 2, [tensor(2, 5, 4)] * 2, mask, "max"),
        ),
        "top-K": (topk_mask_op, (tensor(2, 3, 6), k, 0)),
        "structure": (structure_field_op, (tensor(2, 3, 6), None, 2, prior, False)),
        "entropy": (patch_entropy_op, (torch.rand(1, 3, 32, 32, device=DEVICE), 16, 32, 0.01, "kde", True)),
        "focus field": (focus_field_op, (tensor(2, 3, 6), k, 0, prior > 0, weight, False, 0.1, 0.3)),
        "focus field, per subject": (
            focus_field_op,
            (tensor(2, 3, 6), None, 2, mask.new_ones(2, 3, 6), weight, True, 0.1, 0.3),
        ),
        "focus field of images": (
            image_field_op,
            (
                tensor(1, 3, 4),
                None,
                2,
                prior[:1, :4],
                torch.rand(1, 3, 32, 32, device=DEVICE),
                16,
                32,
                0.01,
                "kde",
                False,
                0.1,
                0.3,
            ),
        ),
        "fusion": (fuse_focus_op, (prior, weight[:, 0], weight, prior, 0.1, 0.3)),
        "residual": (preference_residual_op, ([*policy, *plain[2:]], [weight], None, "mean", 1)),
        "residual, two masks": (
            preference_residual_op,
            ([*policy, *plain[2:]], [weight, weight.clone()], None, "masked_mean", 2),
        ),
        "residual without mask": (preference_residual_op, ([*policy, *plain[2:]], [], None, "masked_mean", 2)),
        "residual of subjects": (preference_residual_op, ([*policy, *plain[2:]], [weight], subjects, "masked_mean", 2)),
        "residual of subjects, without mask": (preference_residual_op, ([*policy, *plain[2:]], [], subjects, "mean", 1)),
        "residual backward, subjects": (
            preference_residual_backward_op,
            ([tensor(2, 3), None, tensor(2, 3)], [*plain[:2], *plain[4:]], [weight], subjects, tensor(ROWS, 2, 3), 1),
        ),
        "estimate": (estimate_alignment_op, (*plain[:4], weight[:, 0], None)),
        "estimate, scaled": (estimate_alignment_op, (*plain[:4], weight[:, 0], weight[:, 1])),
        "residual backward": (
            preference_residual_backward_op,
            (list(rows), [*plain[:2], *plain[4:]], [weight, weight.clone()], None, scales, 1),
        ),
        "residual backward, margin alone": (
            preference_residual_backward_op,
            ([None, None, rows[2]], [*plain[:2], *plain[4:]], [], None, scales, 1),
        ),
    }


@pytest.mark.parametrize("name", operators())
def test_opcheck(name):
    torch.library.opcheck(*operators()[name])


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("weighted", [False, True])
def test_compiled_loss_is_the_same(backend, weighted):
    predictions = [torch.randn(2, 6, 4, device=DEVICE) for _ in range(6)]
    weight = torch.rand(2, 6, device=DEVICE)
    of_pairs = {name: torch.rand(2, device=DEVICE) for name in ("timestep_weight", "sample_weight") if weighted}

    def loss(policy_win, policy_lose):
        return focus_dpo_loss(
            policy_win, policy_lose, *predictions[2:], focus=weight, beta=1.0, backend=backend, **of_pairs
        ).loss

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        policy = [x.clone().requires_grad_() for x in predictions[:2]]
        value = function(*policy)
        value.backward()
        results.append([value.detach(), *[x.grad for x in policy]])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-9)


def test_compiled_mask_is_the_same():
    scores, prior = torch.randn(2, 3, 6, device=DEVICE), torch.rand(2, 6, device=DEVICE) > 0.5

    def fields(scores):
        return kernels.structure_field(scores, 2, prior, backend="triton")

    compiled = torch.compile(fields, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(fields(scores), compiled(scores), strict=True))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_sizes_may_vary_without_recompilation(backend):
    """B, P and Q vary; after the first sizes nothing is compiled again."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(target, reference, mask, prior, predictions):
        scores = kernels.cross_layer_similarity([target], [reference], mask, backend=backend)
        structure, _ = kernels.structure_field(scores, 3, prior, backend=backend)
        return focus_dpo_loss(*predictions, focus=structure, backend=backend).loss

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for batch, patches, tokens in ((3, 7, 5), (5, 11, 6), (9, 13, 19), (6, 64, 32)):
        arguments = (
            torch.randn(batch, patches, 8, device=DEVICE),
            torch.randn(batch, tokens, 8, device=DEVICE),
            torch.ones(batch, 2, tokens, device=DEVICE),
            torch.rand(batch, patches, device=DEVICE) > 0.5,
            [torch.randn(batch, patches, 4, device=DEVICE) for _ in range(6)],
        )
        torch.testing.assert_close(compiled(*arguments), step(*arguments), rtol=1e-5, atol=1e-6)
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1, compilations


def test_compiled_with_inductor():
    """The default compiler, for the PyTorch backend that runs on CPUs."""
    predictions = [torch.randn(2, 6, 4, device=DEVICE) for _ in range(6)]
    weight = torch.rand(2, 6, device=DEVICE)

    def loss(policy_win, policy_lose):
        return focus_dpo_loss(policy_win, policy_lose, *predictions[2:], focus=weight, beta=1.0).loss

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        policy = [x.clone().requires_grad_() for x in predictions[:2]]
        value = function(*policy)
        value.backward()
        results.append([value.detach(), *[x.grad for x in policy]])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-7)
