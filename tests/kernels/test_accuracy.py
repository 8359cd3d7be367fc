"""A kernel is no worse against float64 than PyTorch's own arithmetic at the same input dtype, plus a small stated bound.

With Gaussian inputs and with heavy tails: hidden states of FLUX have channels that are 100 times larger than the rest.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from focusdpo_kernels import cross_layer_similarity, patch_entropy, preference_residual
from focusdpo_kernels.backend import INTERPRETED
from tests.conftest import DEVICE, HALF_AND_FULL

BOUND = 2e-6  # relative to the largest value: a few units in the last place of fp32


def gaussian(*shape):
    return torch.randn(shape, device=DEVICE)


def heavy_tailed(*shape):
    """Student's t with 2.5 degrees of freedom, and a few channels 100 times larger."""
    t = torch.distributions.StudentT(2.5).sample(shape).to(DEVICE)
    t[..., :: max(shape[-1] // 3, 1)] *= 100
    return t


@pytest.fixture(params=[gaussian, heavy_tailed], ids=["gaussian", "heavy tails"])
def draw(request):
    return request.param


def assert_no_worse(actual, pytorch, exact, what):
    scale = float(exact.abs().max())
    error = float((actual.double() - exact).abs().max()) / scale
    own = float((pytorch.double() - exact).abs().max().nan_to_num(0.0)) / scale  # fp16 overflows in PyTorch, not here
    # The interpreter cuts fp32 off to bf16 where a GPU rounds: half a unit in the last place more.
    cut = 2**-8 if actual.dtype == torch.bfloat16 and INTERPRETED else 0.0
    assert error <= own + cut + BOUND, f"{what}: error {error:.2e}, PyTorch's own {own:.2e}"


@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
@pytest.mark.parametrize("pooling", ["reference", "max"])
def test_similarity(draw, dtype, pooling):
    target, reference = [draw(1, 40, 200).to(dtype)], [draw(1, 24, 200).to(dtype)]
    mask = torch.rand(1, 2, 24, device=DEVICE) > 0.3
    exact = cross_layer_similarity([target[0].double()], [reference[0].double()], mask, pooling=pooling)
    if pooling == "reference":
        own = [F.cosine_similarity(reference[0][:, mask[0, r]].mean(1)[:, None], target[0], dim=-1) for r in range(2)]
    else:
        pairs = F.cosine_similarity(reference[0][:, :, None], target[0][:, None], dim=-1)
        own = [pairs[:, mask[0, r]].amax(1) for r in range(2)]
    actual = cross_layer_similarity(target, reference, mask, pooling=pooling, backend="triton")
    assert_no_worse(actual, torch.stack(own, 1), exact, "S")


@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
def test_residual_and_gradient(draw, dtype):
    predictions = [draw(2, 50, 64) for _ in range(6)]
    for side in (0, 1):
        predictions[side] = predictions[side + 2] + 0.01 * gaussian(2, 50, 64)
    predictions = [x.to(dtype) for x in predictions]
    weight = torch.rand(2, 50, device=DEVICE)

    def plain(policy_win, policy_lose, reference_win, reference_lose, target_win, target_lose, m):
        """As a training script has it: errors, and their difference."""
        errors = [
            (m[:, :, None] * (p - t) ** 2).mean((1, 2))
            for p, t in (
                (policy_win, target_win),
                (policy_lose, target_lose),
                (reference_win, target_win),
                (reference_lose, target_lose),
            )
        ]
        return (*errors, (errors[0] - errors[2]) - (errors[1] - errors[3]))

    results = {}
    for name, kind in (("kernel", dtype), ("pytorch", dtype), ("exact", torch.float64)):
        policy = [x.to(kind).clone().requires_grad_() for x in predictions[:2]]
        others = [x.to(kind) for x in predictions[2:]]
        if name == "kernel":
            out = preference_residual(*policy, *others, weight, backend="triton")[:5]
        else:
            out = plain(*policy, *others, weight.to(kind))
        out[4].sum().backward()
        results[name] = [*[x.detach() for x in out], *[x.grad for x in policy]]
    names = ["policy_win", "policy_lose", "reference_win", "reference_lose", "margin", "d policy_win", "d policy_lose"]
    for what, actual, own, exact in zip(names, *results.values(), strict=True):
        assert_no_worse(actual, own, exact, what)


@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
def test_entropy(dtype):
    images = torch.rand(1, 1, 32, 48, device=DEVICE).to(dtype)
    patches = images.reshape(2, 16, 3, 16).transpose(1, 2).reshape(6, 256, 1)

    def plain(x):
        mu = torch.linspace(0, 1, 32, dtype=x.dtype, device=DEVICE)
        q = torch.exp(-0.5 * ((x - mu) / 0.01) ** 2).mean(1)
        q = q / q.sum(-1, keepdim=True)
        return -(q * torch.log(q.clamp_min(1e-30 if x.dtype != torch.float16 else 1e-7))).sum(-1)

    assert_no_worse(patch_entropy(images, backend="triton")[0], plain(patches), plain(patches.double()), "H")
