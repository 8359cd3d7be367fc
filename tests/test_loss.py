"""The loss family, and the invariants of docs/method.md. test_peers.py compares with other people's losses."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from focusdpo import FocusDPOOutput, convert_beta, focus_dpo_loss, focus_mask
from focusdpo.loss import pair_accuracy
from focusdpo_kernels import cross_layer_similarity, residual
from tests.conftest import DEVICE

BACKENDS = ["triton", "torch"]
TOKENS = (4, 24, 8)


def make(shape=TOKENS, dtype=torch.float32):
    predictions = [torch.randn(shape, device=DEVICE).to(dtype) for _ in range(6)]
    # Policy near reference, as in training: the loss is then neither saturated nor flat.
    for side in (0, 1):
        predictions[side] = predictions[side + 2] + 1e-3 * torch.randn_like(predictions[side])
    return predictions, torch.rand(shape[:2], device=DEVICE)


def loss_and_gradients(predictions, backend, **options):
    policy = [x.detach().clone().requires_grad_() for x in predictions[:2]]
    out = focus_dpo_loss(*policy, *predictions[2:], backend=backend, **options)
    out.loss.backward()
    return out, [x.grad for x in policy]


@pytest.mark.parametrize("backend", BACKENDS)
def test_invariant_1_initialisation(backend):
    predictions, weight = make(dtype=torch.bfloat16)
    predictions[:2] = predictions[2:4]
    out, _ = loss_and_gradients(predictions, backend, focus=weight)
    assert (out.logits == 0).all()
    assert out.loss.item() == pytest.approx(math.log(2), abs=1e-7)
    assert float(out.accuracy) == 0.5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "masked_mean"])
@pytest.mark.parametrize("loser_scale", [None, "sdpo"])
def test_invariant_2_nothing_in_focus(backend, reduction, loser_scale):
    predictions, weight = make()
    out, gradients = loss_and_gradients(
        predictions, backend, focus=torch.zeros_like(weight), reduction=reduction, loser_scale=loser_scale
    )
    assert (out.logits == 0).all()
    assert out.loss.item() == pytest.approx(math.log(2), abs=1e-7)
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_invariant_3_exchange_and_scale(backend):
    predictions, weight = make()
    out = focus_dpo_loss(*predictions, focus=weight, backend=backend)
    exchanged = [predictions[i] for i in (1, 0, 3, 2, 5, 4)]
    swapped = focus_dpo_loss(*exchanged, focus=weight, backend=backend)
    assert torch.equal(out.logits, -swapped.logits)
    assert float(out.accuracy + swapped.accuracy) == 1.0

    focus, features = make_focus(backend)
    scaled, _ = make_focus(backend, features, scale=256.0)
    assert torch.equal(focus.mask, scaled.mask)


@pytest.mark.parametrize("backend", BACKENDS)
def test_invariant_4_permutation(backend):
    """The image is permuted patch by patch together with tokens and prior."""
    focus, features = make_focus(backend)
    target, reference, mask, prior, images = features
    order = torch.randperm(24, device=DEVICE)
    patches = images.reshape(2, 3, 4, 16, 6, 16).permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 24, 16, 16)[:, :, order]
    permuted = patches.reshape(2, 3, 4, 6, 16, 16).permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 64, 96)
    moved, _ = make_focus(backend, ([h[:, order] for h in target], reference, mask, prior[..., order], permuted))
    torch.testing.assert_close(moved.mask, focus.mask[:, order], rtol=0, atol=1e-6)


def make_focus(backend, features=None, scale=1.0):
    if features is None:
        target = [torch.randn(2, 24, 16, device=DEVICE) for _ in range(3)]
        reference = [torch.randn(2, 10, 16, device=DEVICE) for _ in range(3)]
        mask = torch.zeros(2, 2, 10, device=DEVICE)
        mask[:, 0, :3] = 1
        mask[:, 1, 6:] = 1
        prior = torch.rand(2, 2, 24, device=DEVICE) > 0.5
        features = (target, reference, mask, prior, torch.rand(2, 3, 64, 96, device=DEVICE))
    target, reference, mask, prior, images = features
    scores = cross_layer_similarity([h * scale for h in target], [h * scale for h in reference], mask, backend=backend)
    return focus_mask(scores, prior, images, reference_mask=mask, tau=0.75, backend=backend), features


@pytest.mark.parametrize("name", ["reference_win", "reference_lose", "target_win", "target_lose"])
def test_invariant_5_only_the_policy_learns(name):
    names = ["policy_win", "policy_lose", "reference_win", "reference_lose", "target_win", "target_lose"]
    predictions, weight = make()
    arguments = dict(zip(names, predictions, strict=True))
    arguments[name] = arguments[name].clone().requires_grad_()
    with pytest.raises(ValueError, match=f"{name}: requires grad, but gradient reaches the two policy"):
        focus_dpo_loss(**arguments)
    with pytest.raises(ValueError, match="^focus: requires grad"):
        focus_dpo_loss(*predictions, focus=weight.requires_grad_())


@pytest.mark.parametrize("backend", BACKENDS)
def test_invariant_6_form_of_the_gradient(backend):
    predictions, weight = make()
    _, (gradient, _) = loss_and_gradients(predictions, backend, focus=weight)
    direction = weight[:, :, None] * (predictions[0] - predictions[4])
    scale = (gradient * direction).sum((1, 2)) / (direction**2).sum((1, 2))
    torch.testing.assert_close(gradient, scale[:, None, None] * direction, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_family(backend):
    predictions, weight = make()
    options = {"focus": weight, "beta": 500.0, "backend": backend}
    base = focus_dpo_loss(*predictions, **options)
    logits = base.logits.double()

    def loss(**more):
        return float(focus_dpo_loss(*predictions, **options, **more).loss)

    assert loss() == pytest.approx(float(-F.logsigmoid(logits).mean()), rel=1e-6)
    smoothed = -(0.9 * F.logsigmoid(logits) + 0.1 * F.logsigmoid(-logits)).mean()
    assert loss(label_smoothing=0.1) == pytest.approx(float(smoothed), rel=1e-6)
    assert loss(loss_type="hinge") == pytest.approx(float(torch.relu(1 - logits).mean()), rel=1e-6)
    assert loss(loss_type="ipo") == pytest.approx(float(((2 * logits / 500 - 1 / 500) ** 2).mean()), rel=1e-5)
    assert loss(winner_anchor=0.7) == pytest.approx(loss() + 0.7 * float(base.policy_win.double().mean()), rel=1e-6)
    assert loss(loss_type="sft") == pytest.approx(float(base.policy_win.double().mean()), rel=1e-6)
    with pytest.raises(TypeError, match="policy_lose: expected a tensor"):
        focus_dpo_loss(*[torch.ones(1, 4, 2, device=DEVICE) if i != 1 else None for i in range(6)], loss_type="sft")
    halved = torch.full((4,), 0.5, device=DEVICE)
    assert loss(loss_type="sft", timestep_weight=halved) == pytest.approx(loss(loss_type="sft") / 2, rel=1e-6)
    weights = torch.rand(4, device=DEVICE)
    assert loss(sample_weight=weights) == pytest.approx(float((-F.logsigmoid(logits) * weights.double()).mean()), rel=1e-6)
    times = torch.rand(4, device=DEVICE)
    assert loss(timestep_weight=times) == pytest.approx(float(-F.logsigmoid(logits * times.double()).mean()), rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sdpo_scales_only_the_losers_gradient(backend):
    predictions, weight = make()
    # Make the two sides' residuals alike, so that the loser's ascent would hurt the winner, in half of the pairs.
    predictions[1][:2], predictions[5][:2] = 1.5 * predictions[0][:2], 1.5 * predictions[4][:2]
    plain, (plain_win, plain_lose) = loss_and_gradients(predictions, backend, focus=weight)
    safe, (safe_win, safe_lose) = loss_and_gradients(predictions, backend, focus=weight, loser_scale="sdpo", sdpo_mu=0.2)
    assert torch.equal(plain.loss, safe.loss) and torch.equal(plain_win, safe_win)
    g_win = weight[:, :, None] * (predictions[0] - predictions[4])
    g_lose = weight[:, :, None] * (predictions[1] - predictions[5])
    inner, norm = (g_win * g_lose).sum((1, 2)), (g_win**2).sum((1, 2))
    scale = torch.where(inner > 0, (0.8 * norm / inner).clamp(max=1), 1)
    assert (scale[:2] < 0.6).all()
    torch.testing.assert_close(safe_lose, scale[:, None, None] * plain_lose, rtol=1e-4, atol=1e-9)
    # The step's effect on the winner's error, to first order in output space: not above -mu |g_w|^2 of its share.
    assert ((-norm + scale * inner)[:2] <= -0.2 * norm[:2] * (1 - 1e-5)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_reference_anchor(backend):
    """Beside its value, its gradient: to the reference, on both sides, whatever mask and loss."""
    predictions, weight = make()
    for loss_type in ("sigmoid", "sft"):
        options = {"focus": weight, "loss_type": loss_type, "beta": 500.0}
        plain, plain_gradients = loss_and_gradients(predictions, backend, **options)
        held, gradients = loss_and_gradients(predictions, backend, reference_anchor=0.8, **options)
        drift = [(predictions[i] - predictions[i + 2]).double() for i in (0, 1)]
        expected = float(plain.loss) + 0.4 * float(sum((d**2).mean() for d in drift))
        assert float(held.loss) == pytest.approx(expected, rel=1e-6)
        for before, after, difference in zip(plain_gradients, gradients, drift, strict=True):
            added = 0.8 * difference / difference.numel()
            expected = added if before is None else before.double() + added
            torch.testing.assert_close(after.double(), expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
    assert plain_gradients[1] is None, "supervised fine-tuning alone leaves the loser out"


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_convert_beta(reduction):
    predictions, weight = make()
    other = {"mean": "sum", "sum": "mean"}[reduction]
    beta = 500.0 if reduction == "mean" else 500.0 / 192
    converted = convert_beta(beta, 192, source=reduction, target=other)
    first = focus_dpo_loss(*predictions, focus=weight, beta=beta, reduction=reduction)
    second = focus_dpo_loss(*predictions, focus=weight, beta=converted, reduction=other)
    torch.testing.assert_close(first.logits, second.logits, rtol=1e-5, atol=1e-7)
    assert convert_beta(2000.0, 65536, source="mean", target="sum") == pytest.approx(0.0305, rel=1e-2)
    assert convert_beta(7.0, 1, source="mean", target="sum") == 7.0 == convert_beta(7.0, 9, source="sum", target="sum")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"elements": 0}, "elements: got 0; expected the number of elements of one prediction, at least 1"),
        ({"source": "masked_mean"}, "source: got 'masked_mean'; expected one of 'mean', 'sum'"),
        ({"target": "masked_mean"}, "target: got 'masked_mean'; expected one of 'mean', 'sum'"),
    ],
)
def test_a_beta_that_cannot_be_converted(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        convert_beta(**{"beta": 1.0, "elements": 8, "source": "mean", "target": "sum"} | arguments)


def test_own_mask_for_the_loser():
    predictions, weight = make()
    other = torch.rand_like(weight)
    out = focus_dpo_loss(*predictions, focus=weight, focus_lose=other)
    lose = focus_dpo_loss(*predictions, focus=other)
    torch.testing.assert_close(out.policy_lose, lose.policy_lose)


def test_empty_batch_is_finite():
    predictions, _ = make()
    out, gradients = loss_and_gradients([x[:0] for x in predictions], None)
    assert out.loss.item() == 0 and gradients[0].shape == (0, 24, 8)


def test_autocast_and_output():
    predictions, weight = make(dtype=torch.bfloat16)
    outside = focus_dpo_loss(*predictions, focus=weight)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        out = focus_dpo_loss(*predictions, focus=weight)
    assert isinstance(out, FocusDPOOutput) and out[0] is out.loss
    assert out.loss.dtype == torch.float32 and torch.equal(out.loss, outside.loss)


def test_extreme_beta_is_finite():
    predictions, weight = make()
    predictions[0] = predictions[0] + 100
    for beta in (1e-6, 1e9):
        out, gradients = loss_and_gradients(predictions, None, focus=weight, beta=beta)
        assert out.loss.isfinite() and all(g.isfinite().all() for g in gradients)


def test_accuracy_of_a_pair():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        tiny = torch.finfo(dtype).smallest_normal
        found = pair_accuracy(torch.tensor([2.0, 0.0, -tiny, tiny / 4, math.inf, math.nan], dtype=dtype))
        assert found.dtype == dtype and found[:5].tolist() == [1.0, 0.5, 0.0, 1.0, 1.0] and found[5].isnan()


@pytest.mark.parametrize("name", ["timestep_weight", "sample_weight"])
def test_weights_of_pairs_are_refused_by_name(name):
    predictions, _ = make()
    weight = torch.ones(4, device=DEVICE)
    for value, message in (
        (weight[:, None], rf"{name}: expected a tensor \[B\], got float32 \[4, 1\]"),
        (weight[:3], rf"{name}: expected shape \[4\] \(B of the predictions\)"),
        (weight.clone().requires_grad_(), f"{name}: requires grad, but weights are constants of the loss; pass {name}.detach"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            focus_dpo_loss(*predictions, **{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"winner_anchor": -0.1}, "winner_anchor: got -0.1; expected a number >= 0"),
        ({"winner_anchor": math.inf}, "winner_anchor: got inf; expected a number >= 0"),
        ({"reference_anchor": math.nan}, "reference_anchor: got nan; expected a number >= 0"),
        ({"sdpo_mu": 1.1}, "sdpo_mu: got 1.1; expected a number from 0 to 1"),
        ({"beta": math.inf}, "beta: got inf; expected a positive number"),
        ({"beta": 0.0}, "beta: got 0.0; expected a positive number"),
    ],
)
def test_settings_are_refused_by_name(options, message):
    predictions, _ = make()
    with pytest.raises(ValueError, match=f"^{message}"):
        focus_dpo_loss(*predictions, **options)


def test_defaults():
    """beta 2000, and of the winner's descent nothing has to be kept."""
    predictions, _ = make()
    assert torch.equal(focus_dpo_loss(*predictions).logits, focus_dpo_loss(*predictions, beta=2000.0).logits)
    predictions[1], predictions[5] = 1.5 * predictions[0], 1.5 * predictions[4]
    gradients = [
        loss_and_gradients(predictions, None, loser_scale="sdpo", beta=1.0, **more)[1][1]
        for more in ({}, {"sdpo_mu": 0.0}, {"sdpo_mu": 1.0})
    ]
    assert torch.equal(gradients[0], gradients[1]) and gradients[0].any() and not gradients[2].any()


@pytest.mark.parametrize("loser_scale", ["sdpo", "sdpo_batch"])
def test_sdpo_never_enlarges_a_losers_gradient(loser_scale):
    """A loser whose error is along the winner's and smaller could be pushed further than it is."""
    predictions, _ = make()
    predictions[1], predictions[5] = 0.5 * predictions[0], 0.5 * predictions[4]
    (_, (_, plain)), (_, (_, scaled)) = (
        loss_and_gradients(predictions, None, beta=1.0, **more) for more in ({}, {"loser_scale": loser_scale})
    )
    torch.testing.assert_close(scaled, plain, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loser_scale": "sdpo"},
        {"loser_scale": "sdpo_batch"},
        {"loss_type": "ipo"},
        {"loss_type": "hinge"},
        {"loss_type": "sft"},
        {"winner_anchor": 0.1, "reference_anchor": 0.2},
        {"reduction": "masked_mean", "label_smoothing": 0.1},
    ],
    ids=str,
)
def test_a_pair_of_weight_zero_is_silent(backend, value, options):
    """Whatever its errors are: the loss and the other pairs' gradients are the same bits, its own are 0."""
    predictions, weight = make()
    poisoned = [x.clone() for x in predictions]
    poisoned[0][1, 2, 1] = poisoned[3][1] = poisoned[5][1, 1] = value
    pairs = torch.tensor([0.7, 0.0, 1.0, 2.0], device=DEVICE)
    options = {"focus": weight, "sample_weight": pairs, "beta": 3.0, **options}
    expected, expected_gradients = loss_and_gradients(predictions, backend, **options)
    found, gradients = loss_and_gradients(poisoned, backend, **options)
    assert found.loss.isfinite() and torch.equal(found.loss, expected.loss)
    for gradient, plain in zip(gradients, expected_gradients, strict=True):
        if plain is not None:  # supervised fine-tuning leaves the loser out
            assert plain.any() and (gradient[1] == 0).all() and torch.equal(gradient, plain)
    assert not found.margin[1].isfinite() and torch.equal(found.logits[2:], expected.logits[2:]), "what is told stays as it is"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "masked_mean"])
def test_a_pair_of_weight_zero_is_silent_under_a_mask_that_is_none(backend, create_graph, reduction):
    predictions, weight = make()
    weight[1, 0] = -1
    predictions[5][1, 1] = math.inf
    policy = [x.clone().requires_grad_() for x in predictions[:2]]
    pairs = torch.tensor([0.7, 0.0, 1.0, 2.0], device=DEVICE)
    out = focus_dpo_loss(
        *policy, *predictions[2:], focus=weight, sample_weight=pairs, beta=3.0, reduction=reduction, backend=backend
    )
    for gradient in torch.autograd.grad(out.loss, policy, create_graph=create_graph):
        assert gradient[0].any() and gradient.isfinite().all() and not gradient[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"loser_scale": "sdpo_batch", "sdpo_mu": 0.3}, {"reference_anchor": 0.2}], ids=str)
def test_a_silent_pair_is_one_fewer(backend, options):
    predictions, weight = make()
    times, pairs = torch.tensor([0.3, 0.7, 1.0, 0.5], device=DEVICE), torch.tensor([0.7, 0.0, 1.0, 2.0], device=DEVICE)
    found, gradients = loss_and_gradients(
        predictions, backend, focus=weight, beta=3.0, sample_weight=pairs, timestep_weight=times, **options
    )
    rest = pairs != 0
    fewer, others = loss_and_gradients(
        *([x[rest] for x in predictions], backend),
        **{"focus": weight[rest], "beta": 3.0, "sample_weight": pairs[rest], "timestep_weight": times[rest], **options},
    )
    torch.testing.assert_close(4 * found.loss, 3 * fewer.loss, rtol=1e-6, atol=0)
    for gradient, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(4 * gradient[rest], 3 * other, rtol=1e-5, atol=1e-9)
    told = focus_dpo_loss(*predictions, focus=weight, beta=3.0, timestep_weight=times, backend=backend).logits
    assert torch.equal(found.logits, told) and told[1] != 0


def test_the_anchor_to_the_reference_takes_the_same_backend(monkeypatch):
    calls = []
    operator = residual.preference_residual_op
    monkeypatch.setattr(residual, "preference_residual_op", lambda *args: calls.append(args) or operator(*args))
    for backend in BACKENDS:
        focus_dpo_loss(*make()[0], reference_anchor=0.2, backend=backend)
    assert len(calls) == 2


@pytest.mark.parametrize("options", [{}, {"reference_anchor": 0.2}], ids=str)
def test_a_silent_pair_in_float64(options):
    """The specification itself, which is not told of gradients of 0."""
    predictions, weight = make(dtype=torch.float64)
    predictions[0][1, 2, 1] = math.nan
    pairs = torch.tensor([0.7, 0.0, 1.0, 2.0], device=DEVICE)
    out, gradients = loss_and_gradients(predictions, "torch", focus=weight, sample_weight=pairs, **options)
    assert out.loss.isfinite() and all(g.isfinite().all() and (g[1] == 0).all() and g.any() for g in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_negative_focus_is_no_loss_of_ln_2(backend):
    predictions, weight = make()
    weight[1, 3] = -weight[1].sum()
    out = focus_dpo_loss(*predictions, focus=weight, reduction="masked_mean", backend=backend)
    assert out.loss.isnan() and out.margin.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_silent_pair_has_gradient_zero_in_a_penalty_too(backend):
    """With `create_graph=True` as well, and where its time's weight is not finite."""
    predictions, focus = make()
    batch = predictions[0].shape[0]
    predictions[0].view(-1)[0] = math.inf
    predictions[0].requires_grad_()
    weight, times = torch.ones(batch, device=DEVICE), torch.ones(batch, device=DEVICE)
    weight[0], times[0] = 0, math.nan
    out = focus_dpo_loss(*predictions, focus=focus, sample_weight=weight, timestep_weight=times, backend=backend)
    (gradient,) = torch.autograd.grad(out.loss, predictions[0], create_graph=True)
    assert out.loss.isfinite() and gradient.isfinite().all() and not gradient[0].any() and gradient[1].any()


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("options", [{}, {"loss_type": "sft"}, {"loser_scale": "sdpo", "reference_anchor": 0.1}], ids=str)
def test_all_but_the_policy_made_under_inference_mode(backend, options):
    predictions, focus = make()
    with torch.inference_mode():
        constants, mask = [x.clone() for x in predictions[2:]], focus.clone()
        weights = {"sample_weight": torch.rand(4, device=DEVICE), "timestep_weight": torch.rand(4, device=DEVICE)}
    usual = {name: weight.clone() for name, weight in weights.items()}
    out, gradients = loss_and_gradients([*predictions[:2], *constants], backend, focus=mask, **weights, **options)
    other, expected = loss_and_gradients(predictions, backend, focus=focus, **usual, **options)
    assert torch.equal(out.loss.detach(), other.loss.detach())
    assert all(a is e is None or torch.equal(a, e) for a, e in zip(gradients, expected, strict=True))


def subjects_of(weight):
    """Two priors [B, 2, P] that share some tokens and leave some out."""
    patches = weight.shape[1]
    shown = torch.zeros(len(weight), 2, patches, dtype=torch.bool, device=DEVICE)
    shown[:, 0, : patches // 2], shown[:, 1, patches // 3 : patches - 2] = True, True
    return shown


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sigmoid_for_each_subject(backend):
    """E1': the mean over subjects of the loss of each under its own part of the mask, in float64."""
    predictions, weight = make()
    shown = subjects_of(weight)
    settings = {"beta": 3.0, "timestep_weight": torch.tensor([0.3, 0.7, 1.0, 0.5], device=DEVICE)}
    policy = [x.clone().requires_grad_() for x in predictions[:2]]
    out = focus_dpo_loss(*policy, *predictions[2:], focus=weight, subjects=shown, **settings, backend=backend)
    exact = [x.double().requires_grad_(n < 2) for n, x in enumerate(x.clone() for x in predictions)]
    parts = [focus_dpo_loss(*exact, focus=weight * shown[:, r], **settings, backend="torch") for r in range(2)]
    total = (parts[0].loss + parts[1].loss) / 2
    torch.testing.assert_close(out.loss.double(), total.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(out.logits.double(), torch.stack([part.logits for part in parts], 1), rtol=1e-5, atol=1e-7)
    assert out.present.all() and out.by_pair(out.margin).shape == (4,)
    torch.testing.assert_close(out.by_pair(out.margin), out.margin.mean(1))
    out.loss.backward()
    total.backward()
    for ours, theirs in zip(policy, exact, strict=False):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_invariants_hold_for_each_subject(backend):
    predictions, weight = make()
    shown = subjects_of(weight)
    settings = {"focus": weight, "subjects": shown, "beta": 3.0, "backend": backend}
    equal = [x.clone() for x in (*predictions[2:4], *predictions[2:])]
    start, by_subject = loss_and_gradients(equal, **settings)
    assert (start.logits == 0).all() and float(start.loss) == pytest.approx(math.log(2), rel=1e-6)
    # Disjoint subjects: at the start it is half the gradient of one sigmoid for all of them.
    apart = shown.clone()
    apart[:, 1] &= ~apart[:, 0]
    _, by_subject = loss_and_gradients(equal, **{**settings, "subjects": apart})
    _, by_image = loss_and_gradients(equal, focus=weight * apart.any(1), beta=3.0, backend=backend)
    for one, other in zip(by_subject, by_image, strict=True):
        torch.testing.assert_close(2 * one, other, rtol=1e-5, atol=1e-9)
    nothing, none = loss_and_gradients(predictions, **{**settings, "focus": torch.zeros_like(weight)})
    assert float(nothing.loss) == pytest.approx(math.log(2), rel=1e-6) and not any(g.any() for g in none)
    exchanged = [predictions[i] for i in (1, 0, 3, 2, 5, 4)]
    torch.testing.assert_close(
        loss_and_gradients(exchanged, **settings)[0].logits, -loss_and_gradients(predictions, **settings)[0].logits
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_subject_that_is_told_apart_leaves_the_other_its_gradient(backend):
    """One sigmoid for both lets go of the pair; a sigmoid for each of the one subject alone."""
    predictions, _ = make()
    half = predictions[0].shape[1] // 2
    shown = torch.zeros(len(predictions[0]), 2, predictions[0].shape[1], dtype=torch.bool, device=DEVICE)
    shown[:, 0, :half], shown[:, 1, half:] = True, True
    reference_win, reference_lose, target_win, target_lose = predictions[2:]
    win, lose = reference_win.clone(), reference_lose.clone()
    win[:, :half] = target_win[:, :half]  # the first subject's winner has no error, and its loser a large one
    lose[:, :half] = target_lose[:, :half] + 30
    six = [win, lose, reference_win, reference_lose, target_win, target_lose]
    _, whole = loss_and_gradients(six, beta=3.0, backend=backend)
    out, apart = loss_and_gradients(six, beta=3.0, subjects=shown, backend=backend)
    assert (out.logits[:, 0] > 50).all() and (out.logits[:, 1] == 0).all()
    for one, each in zip(whole, apart, strict=True):
        assert one[:, half:].abs().max() < 1e-12 and each[:, half:].abs().max() > 1e-4 and each[:, :half].abs().max() < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_absent_subjects_take_no_part(backend):
    predictions, weight = make()
    shown = subjects_of(weight)
    shown[0, 1], shown[1] = False, False
    out, gradients = loss_and_gradients(predictions, focus=weight, subjects=shown, beta=3.0, backend=backend)
    alone, _ = loss_and_gradients([x[:1] for x in predictions], focus=weight[:1] * shown[:1, 0], beta=3.0, backend=backend)
    full, _ = loss_and_gradients([x[2:] for x in predictions], focus=weight[2:], subjects=shown[2:], beta=3.0, backend=backend)
    torch.testing.assert_close(out.loss, (alone.loss + math.log(2) + 2 * full.loss) / 4)
    assert not gradients[0][1].any() and out.present.tolist()[:2] == [[True, False], [True, True]]
    assert out.by_pair(out.logits)[0] == out.logits[0, 0]
    pairs = torch.tensor([1.0, 1.0, 0.0, 2.0], device=DEVICE)
    predictions[0][2, 0] = math.inf
    silent, gradients = loss_and_gradients(
        predictions, focus=weight, subjects=shown, sample_weight=pairs, beta=3.0, backend=backend
    )
    assert silent.loss.isfinite() and not gradients[0][2].any() and gradients[0][3].any()
