"""Preference residual: kernel against float64, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import forward_ad

from focusdpo_kernels import preference_residual
from tests.conftest import DEVICE, HALF_AND_FULL

pytestmark = pytest.mark.usefixtures("poisoned")
BACKENDS = ["triton", "torch"]
REDUCTIONS = ["mean", "sum", "masked_mean"]
SHAPES = [(2, 37, 5), (1, 1, 1), (3, 130, 64), (2, 3, 4, 6), (1, 4, 10, 2)]


def make(shape, dtype, weighted=True):
    predictions = [torch.randn(shape, device=DEVICE).to(dtype) for _ in range(6)]
    patches = shape[1] if len(shape) == 3 else shape[2] * shape[3] // 4
    weight = torch.rand(shape[0], patches, device=DEVICE) if weighted else None
    return predictions, weight


def errors(policy, reference, target, weight, reduction, power):
    """E9 for one side in float64, written out per element."""
    a, b, t = policy.double(), reference.double(), target.double()
    if weight is None:
        m = torch.ones_like(t)
    elif t.ndim == 3:
        m = weight.double()[:, :, None].expand_as(t)
    else:
        rows, columns = t.shape[2:]
        m = torch.empty_like(t)
        for i in range(rows):
            for j in range(columns):
                m[:, :, i, j] = weight[:, (i // 2) * (columns // 2) + j // 2, None].double()
    m = m**power
    size = {"sum": torch.ones(len(t)), "mean": torch.full((len(t),), t[0].numel()), "masked_mean": m.flatten(1).sum(1)}[
        reduction
    ]
    scale = 1 / size.to(m)
    return [(m * (x - t) ** 2).flatten(1).sum(1) * scale for x in (a, b)] + [
        m * (a - t) * scale.reshape(-1, *[1] * (t.ndim - 1))
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradient(shape, reduction, dtype, backend):
    for power, weighted in ((1, True), (2, True), (1, False)):
        predictions, weight = make(shape, dtype, weighted)
        policy = [x.clone().requires_grad_() for x in predictions[:2]]
        out = preference_residual(*policy, *predictions[2:], weight, reduction=reduction, mask_power=power, backend=backend)
        sides = [errors(*predictions[side::2], weight, reduction, power) for side in (0, 1)]
        (win, reference_win, gradient_win), (lose, reference_lose, gradient_lose) = sides
        margin = (win - reference_win) - (lose - reference_lose)
        axes = tuple(range(1, len(shape)))
        expected = [win, lose, reference_win, reference_lose, margin]
        expected += [(gradient_win**2).sum(axes), (gradient_win * gradient_lose).sum(axes)]
        for name, actual, value in zip(out._fields, out, expected, strict=True):
            scale = float(win.abs().max() + lose.abs().max())
            torch.testing.assert_close(actual.double(), value, rtol=2e-6, atol=2e-6 * scale, msg=lambda m, n=name: f"{n}: {m}")
        # d/d policy of 3 margin + 0.5 (e_win + e_lose)
        (3 * out.margin + 0.5 * (out.policy_win + out.policy_lose)).sum().backward()
        rounding = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
        for side, gradient, factor in ((0, gradient_win, 3.5), (1, gradient_lose, -2.5)):
            assert policy[side].grad.dtype == dtype
            torch.testing.assert_close(policy[side].grad.double(), 2 * factor * gradient, rtol=rounding, atol=rounding * 1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_margin_is_exactly_zero_at_initialisation(backend):
    predictions, weight = make((2, 64, 16), torch.bfloat16)
    predictions[0:2] = [x.clone() for x in predictions[2:4]]
    out = preference_residual(*predictions, weight, backend=backend)
    assert (out.margin == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_margin_does_not_cancel(backend):
    """Errors near 1.35 that differ by 1e-7 of themselves: subtracting fp32 errors would leave noise."""
    predictions, weight = make((4, 256, 64), torch.float32)
    for side in (0, 1):
        predictions[side] = predictions[side + 2] + 1e-6 * torch.randn_like(predictions[side])
    exact = preference_residual(*[x.double() for x in predictions], weight, backend="torch").margin
    actual = preference_residual(*predictions, weight, backend=backend)
    assert (actual.margin.double() - exact).abs().max() < 1e-4 * exact.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_masked(backend, reduction):
    predictions, weight = make((2, 9, 4), torch.float32)
    policy = [x.requires_grad_() for x in predictions[:2]]
    out = preference_residual(*policy, *predictions[2:], torch.zeros_like(weight), reduction=reduction, backend=backend)
    assert all((value == 0).all() for value in out)
    (out.margin + out.policy_win).sum().backward()
    assert all((x.grad == 0).all() for x in policy)


@pytest.mark.parametrize("backend", BACKENDS)
def test_own_mask_for_the_loser(backend):
    predictions, weight = make((2, 9, 4), torch.float32)
    weight_lose = torch.rand_like(weight)
    out = preference_residual(*predictions, weight, weight_lose=weight_lose, reduction="masked_mean", backend=backend)
    win = preference_residual(*predictions, weight, reduction="masked_mean", backend=backend)
    lose = preference_residual(*predictions, weight_lose, reduction="masked_mean", backend=backend)
    torch.testing.assert_close(out.policy_win, win.policy_win, rtol=1e-6, atol=0)
    torch.testing.assert_close(out.policy_lose, lose.policy_lose, rtol=1e-6, atol=0)


@pytest.mark.parametrize("empty", [(0, 5, 4), (2, 0, 4), (2, 5, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_empty(backend, empty, reduction):
    predictions, weight = make(empty, torch.float32)
    policy = [x.requires_grad_() for x in predictions[:2]]
    out = preference_residual(*policy, *predictions[2:], weight, reduction=reduction, backend=backend)
    assert out.margin.shape == (empty[0],) and (out.margin == 0).all()
    out.margin.sum().backward()
    assert policy[0].grad.shape == empty


def test_slices_expanded_and_transposed_inputs():
    wide = [torch.randn(2, 30, 8, device=DEVICE) for _ in range(6)]
    predictions = [x[:, 4:21] for x in wide[:3]]  # slices of a longer sequence
    predictions += [
        torch.randn(1, 17, 8, device=DEVICE).expand(2, -1, -1),
        torch.randn(8, 17, 2, device=DEVICE).permute(2, 1, 0),
    ]
    predictions += [torch.randn(2, 17, 8, device=DEVICE)]
    weight = torch.rand(17, 2, device=DEVICE).T
    results = []
    for backend in BACKENDS:
        policy = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in predictions[:2]]
        out = preference_residual(*policy, *predictions[2:], weight, backend=backend)
        out.margin.expand(2).sum().backward()  # an incoming gradient of stride 0
        results.append([*[x.detach() for x in out], *[x.grad for x in policy]])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


def test_mixed_dtypes():
    """Under autocast predictions arrive in bf16 while targets are fp32."""
    predictions, weight = make((2, 17, 8), torch.float32)
    mixed = [x.bfloat16() if i < 4 else x for i, x in enumerate(predictions)]
    out = preference_residual(*mixed, weight, backend="triton")
    expected = preference_residual(*[x.double() for x in mixed], weight, backend="torch")
    for actual, value in zip(out, expected, strict=True):
        torch.testing.assert_close(actual.double(), value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_deterministic_and_independent_of_the_batch(reduction):
    predictions, weight = make((3, 300, 33), torch.bfloat16)
    first = preference_residual(*predictions, weight, reduction=reduction, backend="triton")
    again = preference_residual(*predictions, weight, reduction=reduction, backend="triton")
    alone = preference_residual(*[x[1:2] for x in predictions], weight[1:2], reduction=reduction, backend="triton")
    for a, b, c in zip(first, again, alone, strict=True):
        assert torch.equal(a, b) and torch.equal(a[1:2], c)


@pytest.mark.parametrize("shape", [(2, 6, 3), (1, 2, 4, 4)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(shape, reduction):
    predictions, weight = make(shape, torch.float64)
    fixed = predictions[2:]

    def function(a, b):
        out = preference_residual(a, b, *fixed, weight.double(), reduction=reduction, mask_power=2)
        return out.policy_win, out.policy_lose, out.margin

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in predictions[:2]])


def test_a_mask_in_float64_keeps_its_digits():
    six = [torch.randn(2, 5, 3, dtype=torch.float64, device=DEVICE) for _ in range(6)]
    weight = torch.rand(2, 5, dtype=torch.float64, device=DEVICE)
    found = preference_residual(*six, weight, mask_power=2)
    expected = ((weight**2)[:, :, None] * (six[0] - six[4]) ** 2).mean((1, 2))
    torch.testing.assert_close(found.policy_win, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("mask_power", [1, 2])
def test_a_mask_of_booleans(backend, mask_power):
    six = [torch.randn(2, 5, 3, device=DEVICE) for _ in range(6)]
    weight = torch.rand(2, 5, device=DEVICE) > 0.5
    found = preference_residual(*six, weight, mask_power=mask_power, backend=backend)
    expected = preference_residual(*six, weight.float(), mask_power=mask_power, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def margins(predictions, weight, backend):
    """The margin as a function of the winner's prediction."""
    return lambda win: preference_residual(win, *predictions[1:], weight, reduction="masked_mean", backend=backend).margin


def exact_margins(predictions, weight):
    """The same in float64, of its own formula."""
    _, lose, win_reference, lose_reference, win_target, lose_target = (x.double() for x in predictions)
    m = weight.double()[:, :, None]

    def error(a, t):
        return (m * (a - t) ** 2).sum((1, 2)) / (m.sum((1, 2)) * a.shape[2])

    def margin(win):
        loser = error(lose, lose_target) - error(lose_reference, lose_target)
        return error(win.double(), win_target) - error(win_reference, win_target) - loser

    return margin


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_mode_and_transforms(backend):
    """What PyTorch offers beside a backward pass is right, not 0."""
    predictions, weight = make((2, 9, 4), torch.float32)
    win, direction = predictions[0], torch.randn_like(predictions[0])
    margin, exact = margins(predictions, weight, backend), exact_margins(predictions, weight)
    _, expected = torch.func.jvp(exact, (win.double(),), (direction.double(),))
    assert (expected.abs() > 1e-2).all()
    close = {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(torch.func.jvp(margin, (win,), (direction,))[1], expected, **close)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(margin(forward_ad.make_dual(win, direction))).tangent
    torch.testing.assert_close(found, expected, **close)
    gradient = torch.func.grad(lambda x: exact(x).sum())(win.double())
    torch.testing.assert_close(torch.func.grad(lambda x: margin(x).sum())(win), gradient, **close)

    def of_one(*sample):
        *one, mask = (x[None] for x in sample)
        return margins(one, mask, backend)(one[0])[0]

    torch.testing.assert_close(torch.func.vmap(of_one)(*predictions, weight), exact(win), **close)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 9, 4), (2, 3, 4, 6)], ids=str)
def test_second_derivative(backend, shape):
    predictions, weight = make(shape, torch.float32)
    results = []
    for kind, chosen in ((torch.float32, backend), (torch.float64, "torch")):
        policy = [x.detach().to(kind, copy=True).requires_grad_() for x in predictions[:2]]
        out = preference_residual(*policy, *[x.to(kind) for x in predictions[2:]], weight, mask_power=2, backend=chosen)
        first = torch.autograd.grad((out.margin**2 + out.policy_lose).sum(), policy, create_graph=True)
        second = torch.autograd.grad(sum((x**2).sum() for x in first), policy)
        results.append([*first, *second])
    for found, expected in zip(*results, strict=True):
        assert expected.abs().max() > 1e-5
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()), check_dtype=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivative_where_the_first_is_zero(backend):
    """At initialisation the margin is 0, and so is the gradient of its square, but not that gradient's derivative."""
    predictions, weight = make((2, 3, 4), torch.float32)
    predictions[2:4] = [x.clone() for x in predictions[:2]]
    direction = torch.randn(2, 3, 4, device=DEVICE)
    results = []
    for kind, chosen in ((torch.float32, backend), (torch.float64, "torch")):
        _, lose, *others = (x.to(kind) for x in predictions)

        def results_of(policy, rest=(lose, *others), chosen=chosen):
            return preference_residual(policy, *rest, weight, backend=chosen)

        policy = predictions[0].to(kind)
        functional = torch.autograd.functional
        hessian = functional.hessian(lambda x: (results_of(x).margin ** 2).sum(), policy)
        _, along = functional.jvp(lambda x: results_of(x).policy_win, policy, direction.to(kind))
        results.append((hessian, along))
    for found, expected in zip(*results, strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_an_error_that_is_not_finite_has_no_margin(value, backend):
    """An infinite one would pass for a pair that is told apart, or hide that the model overflowed."""
    for index in range(6):
        predictions, weight = make((2, 3, 4), torch.float32)
        predictions[index][0, 1, 2] = value
        margin = preference_residual(*predictions, weight, backend=backend).margin
        assert margin.isfinite().tolist() == [False, True] and margin[0].isnan(), index
        if value == math.inf:  # also where it is the square that has no number
            predictions[index][0, 1, 2] = 1e25
            margin = preference_residual(*predictions, weight, backend=backend).margin
            assert margin.isfinite().tolist() == [False, True] and margin[0].isnan(), index


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_can_be_changed_in_place(backend):
    for needs_gradient in (False, True):
        predictions, weight = make((2, 3, 4), torch.float32)
        predictions[0].requires_grad_(needs_gradient)
        results = preference_residual(*predictions, weight, backend=backend)
        before = [x.detach().clone() for x in results]
        factor = torch.tensor([2.0, 3.0], device=DEVICE).requires_grad_()
        for result in results:
            result.mul_(factor)
        assert all(torch.equal(x, factor * b) for x, b in zip(results, before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index", [*range(2, 6), "weight"])
def test_a_tangent_that_would_be_lost_is_refused(backend, index):
    predictions, weight = make((2, 9, 4), torch.float32)
    with forward_ad.dual_level():
        if index == "weight":
            weight = forward_ad.make_dual(weight, weight)
        else:
            predictions[index] = forward_ad.make_dual(predictions[index], predictions[index])
        with pytest.raises(ValueError, match=": has a tangent, but (the mask carries|gradient reaches)"):
            preference_residual(*predictions, weight, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_made_under_inference_mode(backend, dtype):
    predictions, weight = make((2, 9, 4), dtype)
    with torch.inference_mode():
        made = [x.clone() for x in predictions]
        made_weight = weight.clone()
    results = []
    for others, mask in ((predictions[1:], weight), (made[1:], made_weight)):
        win = predictions[0].clone().requires_grad_()
        preference_residual(win, *others, mask, backend=backend).margin.sum().backward()
        results.append(win.grad)
    assert results[0].any() and torch.equal(*results)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("power", [1, 2])
def test_a_negative_mask_shows(backend, reduction, power):
    """Also where it adds up to 0, which would pass for a sample without a mask."""
    predictions, weight = make((3, 9, 4), torch.float32)
    weight[0, :2] = torch.tensor([0.5, -0.5])
    weight[0, 2:] = 0
    out = preference_residual(*predictions, weight, reduction=reduction, mask_power=power, backend=backend)
    for value in out:
        assert value[0].isnan() and value[1:].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_of_zero_is_zero(backend, value):
    """Also where the error is not finite."""
    predictions, weight = make((3, 9, 4), torch.float32)
    predictions[0][1, 2, 3] = predictions[5][1, 0, 0] = value
    policy = [x.requires_grad_() for x in predictions[:2]]
    out = preference_residual(*policy, *predictions[2:], weight, backend=backend)
    if out.margin.is_cpu or backend == "triton":  # the specification alone needs to be told, as the loss does
        out.margin.backward(torch.tensor([1.0, 0.0, 2.0], device=DEVICE))
        for x in policy:
            assert (x.grad[1] == 0).all() and x.grad[::2].isfinite().all() and x.grad[::2].any()


def test_masks_of_every_dtype():
    predictions, weight = make((2, 9, 4), torch.bfloat16)
    weight = (weight > 0.5).double()
    expected = preference_residual(*predictions, weight.float(), backend="triton")
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.uint8):
        found = preference_residual(*predictions, weight.to(dtype), weight_lose=weight.to(dtype), backend="triton")
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_sample_of_several_splits_does_not_depend_on_its_batch(batch):
    predictions, weight = make((5, 80, 64), torch.float16)
    every = preference_residual(*predictions, weight, reduction="masked_mean", backend="triton")
    some = preference_residual(*[x[:batch] for x in predictions], weight[:batch], reduction="masked_mean", backend="triton")
    assert all(torch.equal(a[:batch], b) for a, b in zip(every, some, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_many_incoming_gradients_at_once(backend, weighted):
    """As `torch.autograd.functional.jacobian(..., vectorize=True)` sends them."""
    predictions, weight = make((3, 8, 4), torch.float32, weighted)

    def margin(policy):
        return preference_residual(policy, *predictions[1:], weight, backend=backend).margin

    jacobian = torch.autograd.functional.jacobian(margin, predictions[0], vectorize=True)
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(margin, predictions[0]), rtol=1e-6, atol=1e-9)
    assert jacobian[1, 1].any() and not jacobian[1, 0].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("result", ["policy_win", "policy_lose", "margin"])
def test_the_gradient_that_can_be_differentiated_is_the_same(backend, result):
    """In bf16, whose differences have to be formed in fp32, and where one side alone has a gradient.

    The interpreter rounds to bf16 in another way, so the usual gradient is PyTorch's.
    """
    predictions, weight = make((2, 40, 24), torch.bfloat16)
    policy = [x.requires_grad_() for x in predictions[:2]]
    gradients = []
    for backend_of, create_graph in (("torch", False), (backend, True)):
        out = getattr(preference_residual(*predictions, weight, backend=backend_of), result).sum()
        gradients.append(torch.autograd.grad(out, policy, create_graph=create_graph, materialize_grads=True))
    for side, usual, found in zip(("policy_win", "policy_lose"), *gradients, strict=True):
        assert usual.any() == (result in (side, "margin")) and usual.dtype == found.dtype
        assert (usual == found).float().mean() > 0.98  # the factors may be multiplied in another order


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 37, 5), (2, 40, 64), (2, 3, 4, 6), (4, 2, 4, 6)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_results_of_subjects(shape, reduction, backend):
    """Each subject's results, of one call, are those of the mask within it; and so is the gradient of all of them."""
    predictions, weight = make(shape, torch.float32)
    layouts = [weight.shape[1:]] if len(shape) == 3 else [weight.shape[1:], shape[2:]]
    factors = torch.arange(1.0, 3 * shape[0] + 1, device=DEVICE).reshape(shape[0], 3)
    for power, layout, kind in ((1, layouts[0], "one"), (2, layouts[-1], "each"), (1, layouts[-1], "none")):
        subjects = torch.rand(shape[0], 3, *layout, device=DEVICE) > 0.5
        subjects[0, 1] = False  # a subject that is nowhere
        own = torch.rand(2, shape[0], *layout, device=DEVICE)
        weights = {"one": [own[0]], "each": [own[0], own[1]], "none": []}[kind]
        policy = [x.clone().requires_grad_() for x in predictions[:2]]
        given = dict(zip(("weight", "weight_lose"), weights, strict=False))
        settings = {"reduction": reduction, "mask_power": power}
        out = preference_residual(*policy, *predictions[2:], **given, subjects=subjects, **settings, backend=backend)
        (factors * out.margin + 0.3 * out.policy_win).sum().backward()

        exact = [x.double().requires_grad_(n < 2) for n, x in enumerate(x.clone() for x in predictions)]
        parts, total = [], 0
        for r in range(3):
            shown = subjects[:, r].double()
            within = {name: one.double() * shown for name, one in given.items()} or {"weight": shown}
            parts.append(preference_residual(*exact, **within, **settings, backend="torch"))
            total = total + (factors[:, r] * parts[-1].margin + 0.3 * parts[-1].policy_win).sum()
        total.backward()
        for name, actual, *of_subjects in zip(out._fields, out, *parts, strict=True):
            truth = torch.stack(of_subjects, dim=1).detach()
            assert actual.shape == (shape[0], 3), name
            torch.testing.assert_close(actual.double(), truth, rtol=3e-6, atol=3e-6 * float(truth.abs().max()), msg=name)
            assert actual[0, 1] == 0
        for ours, theirs in zip(policy, exact, strict=False):
            scale = float(theirs.grad.abs().max())
            torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=3e-6, atol=3e-6 * scale)
        if kind == "none":
            hidden = ~subjects.any(1)
            tokens = hidden if len(shape) == 3 else hidden[:, None].expand(shape)
            assert (policy[0].grad[tokens] == 0).all(), "nothing outside of all subjects"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_negative_entry_is_none_for_any_subject(backend):
    predictions, weight = make((3, 9, 4), torch.float32)
    weight[1, 3] = -1
    subjects = torch.zeros(3, 2, 9, dtype=torch.bool, device=DEVICE)
    subjects[:, 0, :2], subjects[:, 1, 5:] = True, True  # the entry lies in neither
    for out in preference_residual(*predictions, weight, subjects=subjects, backend=backend):
        assert out[1].isnan().all() and out[::2].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_marks_subjects(backend):
    """Bytes that are not 0, and floats above one half, as priors are; a second derivative; a silent gradient is none."""
    predictions, weight = make((2, 9, 4), torch.float32)
    subjects = torch.rand(2, 2, 9, device=DEVICE)
    plain = preference_residual(*predictions, weight, subjects=subjects > 0.5, backend=backend)
    for marks in (subjects, 3 * (subjects > 0.5).to(torch.uint8)):
        for one, other in zip(plain, preference_residual(*predictions, weight, subjects=marks, backend=backend), strict=True):
            assert torch.equal(one, other)
    policy = predictions[0].clone().requires_grad_()
    out = preference_residual(policy, *predictions[1:], weight, subjects=subjects > 0.5, backend=backend)
    (first,) = torch.autograd.grad((out.policy_win**2).sum(), policy, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), policy)
    exact = predictions[0].double().requires_grad_()
    truth = preference_residual(
        exact, *[x.double() for x in predictions[1:]], weight, subjects=subjects > 0.5, backend="torch"
    ).policy_win
    (expected,) = torch.autograd.grad((truth**2).sum(), exact, create_graph=True)
    (expected,) = torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(second.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))

    spoilt = [x.clone() for x in predictions]
    marks = torch.zeros(2, 2, 9, dtype=torch.bool, device=DEVICE)
    marks[:, 0, :4], marks[:, 1, 4:] = True, True
    spoilt[0][0, 5] = math.inf  # where the second subject is
    policy = spoilt[0].requires_grad_()
    out = preference_residual(policy, *spoilt[1:], weight, subjects=marks, backend=backend)
    out.policy_win[:, 0].sum().backward()
    assert policy.grad[:, 4:].eq(0).all() and policy.grad[:, :4].ne(0).any()
