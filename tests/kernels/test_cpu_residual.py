"""The residual in blocks, as CPUs compute it, against its specification in float64."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from focusdpo_kernels import cpu_residual, preference_residual
from focusdpo_kernels import reference as spec
from tests.conftest import HALF_AND_FULL

SHAPES = [(3, 37, 5), (1, 1, 1), (2, 130, 64), (3, 3, 4, 6), (1, 4, 10, 2)]
# Tokens have no mask by latent.
MASKED = [(shape, m) for shape in SHAPES for m in ("none", "both", "each", "latents") if m != "latents" or len(shape) == 4]


def make(shape, dtype, masks):
    predictions = [torch.randn(shape).to(dtype) for _ in range(6)]
    size = shape[:2] if len(shape) == 3 else (shape[0], shape[2] * shape[3] // 4)
    if masks == "latents":
        size = (shape[0], *shape[2:])
    number = {"none": 0, "both": 1}.get(masks, 2)
    return predictions, [torch.rand(size) for _ in range(number)]


@pytest.mark.parametrize("block", [1, 64, 1000, cpu_residual.BLOCK])
@pytest.mark.parametrize(("shape", "masks"), MASKED, ids=str)
def test_as_the_specification(monkeypatch, shape, masks, block):
    monkeypatch.setattr(cpu_residual, "BLOCK", block)
    for dtype in HALF_AND_FULL:
        for reduction, power in (("mean", 1), ("sum", 2), ("masked_mean", 1), ("masked_mean", 2)):
            predictions, weights = make(shape, dtype, masks)
            results = []
            for module, kind in ((cpu_residual, dtype), (spec, torch.float64)):
                policy = [x.detach().to(kind, copy=True).requires_grad_() for x in predictions[:2]]
                others = [x.to(kind) for x in predictions[2:]]
                out = module.preference_residual([*policy, *others], weights, None, reduction, power)
                assert [x.requires_grad for x in out] == [True, True, False, False, True, False, False]
                (3 * out.margin + 0.5 * (out.policy_win + out.policy_lose)).sum().backward()
                results.append((out, [x.grad for x in policy]))
            (found, gradients), (expected, exact_gradients) = results
            scale = float(expected.policy_win.max() + expected.policy_lose.max())
            for a, e in zip(found, expected, strict=True):
                torch.testing.assert_close(a.double(), e, rtol=2e-6, atol=2e-6 * scale)
            rounding = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
            for a, e in zip(gradients, exact_gradients, strict=True):
                assert a.dtype == dtype
                torch.testing.assert_close(a.double(), e, rtol=rounding, atol=rounding * 1e-2)


def test_slices_expanded_and_transposed():
    predictions = [
        torch.randn(2, 30, 8)[:, 4:21],
        torch.randn(1, 17, 8).expand(2, -1, -1),
        torch.randn(8, 17, 2).permute(2, 1, 0),
    ] * 2
    weight = torch.rand(17, 2).T
    found = cpu_residual.preference_residual(predictions, [weight], None, "mean", 1)
    expected = spec.preference_residual([x.double() for x in predictions], [weight], None, "mean", 1)
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_one_side_alone(needed):
    predictions, weights = make((2, 9, 4), torch.float32, "both")
    policy = [x.requires_grad_(is_needed) for x, is_needed in zip(predictions[:2], needed, strict=True)]
    cpu_residual.preference_residual([*policy, *predictions[2:]], weights, None, "mean", 1).margin.sum().backward()
    assert [x.grad is not None for x in policy] == list(needed)


def test_accuracy_of_a_long_sample():
    """No worse than sums in one go: a block's sums are added as a table of one value per token."""
    predictions, weights = make((1, 4096, 64), torch.bfloat16, "both")
    exact = spec.preference_residual([x.double() for x in predictions], weights, None, "mean", 1)
    found, plain = (m.preference_residual(predictions, weights, None, "mean", 1) for m in (cpu_residual, spec))
    for a, b, e in zip(found[:4], plain[:4], exact[:4], strict=True):
        assert (a.double() - e).abs() <= (b.double() - e).abs() + 2e-7 * e


@pytest.mark.parametrize("shape", [(1, 1, 512), (1, 2, 1 << 20), (1, 70000, 2, 2)], ids=str)
def test_accuracy_of_many_channels(shape):
    predictions = [torch.full(shape, value) for value in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)]
    exact = preference_residual(*[x.double() for x in predictions])
    for a, e in zip(preference_residual(*predictions), exact, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=4e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
def test_margin_of_one_bit(dtype):
    """One value of a sample differs, by its last bit (fp32: by 1e-4): nothing of the equal rest may show."""
    predictions, weights = make((1, 64, 64), dtype, "both")
    predictions[2:4] = [x.clone() for x in predictions[:2]]
    size = 1e-4 if dtype == torch.float32 else torch.finfo(dtype).eps
    predictions[0][0, 5, 7], predictions[2][0, 5, 7] = 1 + size, 1
    found, exchanged = (
        cpu_residual.preference_residual([predictions[i] for i in order], weights, None, "mean", 1).margin
        for order in (range(6), (1, 0, 3, 2, 5, 4))
    )
    exact = spec.preference_residual([x.double() for x in predictions], weights, None, "mean", 1).margin
    assert torch.equal(found, -exchanged)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("block", [64, cpu_residual.BLOCK])
@pytest.mark.parametrize("shape", [(3, 37, 5), (2, 3, 4, 6)])
def test_a_reference_far_better_than_the_policy(monkeypatch, shape, block):
    """Its error is not the difference of two numbers that are a million times as large."""
    monkeypatch.setattr(cpu_residual, "BLOCK", block)
    predictions, weights = make(shape, torch.float32, "each")
    predictions[2:4] = [target + 1e-3 * torch.randn(shape) for target in predictions[4:]]
    predictions[3][1] = predictions[5][1]  # and one without any
    found = cpu_residual.preference_residual(predictions, weights, None, "mean", 1)
    exact = spec.preference_residual([x.double() for x in predictions], weights, None, "mean", 1)
    assert found.reference_lose[1] == 0
    for a, e in zip(found[:4], exact[:4], strict=True):
        torch.testing.assert_close(a.double(), e, rtol=2e-6, atol=0)


def test_a_sample_does_not_depend_on_its_batch():
    """Also beside one whose reference is far better than its policy."""
    for _ in range(20):
        predictions, weights = make((3, 64, 16), torch.float32, "both")
        predictions[2][1] = predictions[4][1] + 1e-3
        together = cpu_residual.preference_residual(predictions, weights, None, "mean", 1)
        for b in range(3):
            alone = cpu_residual.preference_residual(
                [x[b : b + 1] for x in predictions], [weights[0][b : b + 1]], None, "mean", 1
            )
            assert all(torch.equal(a, t[b : b + 1]) for a, t in zip(alone, together, strict=True))


@pytest.mark.parametrize("share", [0.26, 0.5, 0.9])
def test_a_reference_better_than_the_policy(share):
    """By less than what makes its error a sum of its own."""
    predictions, weights = make((4, 64, 64), torch.float32, "both")
    predictions[2:4] = [t + share**0.5 * (p - t) for p, t in zip(predictions[:2], predictions[4:], strict=True)]
    found = cpu_residual.preference_residual(predictions, weights, None, "mean", 1)
    exact = spec.preference_residual([x.double() for x in predictions], weights, None, "mean", 1)
    for a, e in zip(found[:4], exact[:4], strict=True):
        torch.testing.assert_close(a.double(), e, rtol=2e-6, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_policy_that_is_not_finite_leaves_the_reference(value):
    predictions, weights = make((2, 9, 4), torch.float32, "both")
    predictions[1][0, 3, 2] = value
    found, plain = (m.preference_residual(predictions, weights, None, "mean", 1) for m in (cpu_residual, spec))
    torch.testing.assert_close(found.reference_lose, plain.reference_lose)
    assert found.reference_lose.isfinite().all() and found.policy_lose.isfinite().tolist() == [False, True]


def test_a_policy_changed_before_the_backward_pass_is_refused():
    """Though its difference from the target was kept."""
    predictions, weights = make((2, 9, 4), torch.float32, "both")
    leaf = predictions[0].requires_grad_()
    policy = leaf * 1
    margin = cpu_residual.preference_residual([policy, *predictions[1:]], weights, None, "mean", 1).margin
    with torch.no_grad():
        policy.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        margin.sum().backward()


def test_nothing_stays_after_the_backward_pass():
    predictions, weights = make((2, 9, 4), torch.float32, "both")
    predictions[0].requires_grad_()
    margin = cpu_residual.preference_residual(predictions, weights, None, "mean", 1).margin
    kept = [weakref.ref(x) for x in margin.grad_fn.saved_tensors[5:]]
    assert [x().shape for x in kept] == [(2, 9, 4)] * 2
    margin.sum().backward()
    assert [x() for x in kept] == [None] * 2


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_is_given_the_specification():
    """It would keep one way of what depends on values."""
    first = make((1, 64, 16), torch.float32, "both")[0]
    second = [*first[:2], first[4] + 1e-4 * torch.randn(1, 64, 16), *first[3:]]

    def error(*predictions):
        return preference_residual(*predictions, backend="torch").reference_win

    exact = spec.preference_residual([x.double() for x in second], [], None, "mean", 1).reference_win
    for trace in (make_fx(error)(*first), torch.jit.trace(error, tuple(first))):
        torch.testing.assert_close(trace(*second).double(), exact, rtol=2e-6, atol=0)


def test_what_it_takes():
    cpu = torch.zeros(1, 1, 1)
    assert cpu_residual.takes(cpu, cpu.half(), cpu.bfloat16())
    assert not cpu_residual.takes(cpu, cpu.double()) and not cpu_residual.takes(torch.zeros(1, 1, 1, device="meta"))
