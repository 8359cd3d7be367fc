"""Other people's preference losses, written down from what they published, and the settings that give the same numbers.

docs/method.md has the table. The formulas run in float64: in fp32 the differences of errors cancel.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from focusdpo import focus_dpo_loss
from tests.conftest import DEVICE

BACKENDS = ["triton", "torch"]
TOKENS, LATENTS = (4, 24, 8), (4, 3, 8, 6)


def predictions_of(shape=LATENTS, drift=1e-2, seed=0):
    """Policy's, reference's and target's for winner and loser; the policy is near the reference, as in training."""
    generator = torch.Generator().manual_seed(seed)
    six = [torch.randn(shape, generator=generator) for _ in range(6)]
    for side in (0, 1):
        six[side] = six[side + 2] + drift * six[side]
    return [x.to(DEVICE) for x in six]


def ours(predictions, backend, **options):
    policy = [x.clone().requires_grad_() for x in predictions[:2]]
    out = focus_dpo_loss(*policy, *predictions[2:], backend=backend, **options)
    out.loss.backward()
    return out.loss.detach(), [x.grad for x in policy]


def theirs(predictions, formula):
    exact = [x.double() for x in predictions]
    policy = [x.requires_grad_() for x in exact[:2]]
    loss = formula(*exact)
    loss.backward()
    return loss.detach(), [x.grad for x in policy]


def check(predictions, formula, backend, **options):
    """Value and gradients of the loss with these settings are the formula's."""
    loss, gradients = ours(predictions, backend, **options)
    expected, expected_gradients = theirs(predictions, formula)
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient.double(), other, rtol=2e-5, atol=2e-6 * float(other.abs().max()))


def by_sample(x):
    return x.flatten(1)


def differences(win, lose, reference_win, reference_lose, target_win, target_lose):
    """Mean squared errors per sample: policy's of winner less loser, and the reference's."""
    errors = [
        by_sample((x - t) ** 2).mean(1)
        for x, t in ((win, target_win), (lose, target_lose), (reference_win, target_win), (reference_lose, target_lose))
    ]
    return errors[0] - errors[1], errors[2] - errors[3]


# --- diffusers, train_diffusion_dpo_sdxl.py: half of beta_dpo (5000), log sigmoid, mean over the batch.


def sdxl(beta):
    def formula(*six):
        policy, reference = differences(*six)
        return -F.logsigmoid(-0.5 * beta * (policy - reference)).mean()

    return formula


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [TOKENS, LATENTS])
def test_diffusers_sdxl(shape, backend):
    predictions = predictions_of(shape, drift=1e-3)
    for focus in (None, torch.ones(shape[0], 24 if len(shape) == 3 else 12, device=DEVICE)):
        check(predictions, sdxl(5000.0), backend, beta=5000.0, focus=focus)


@pytest.mark.parametrize("backend", BACKENDS)
def test_diffusers_sdxl_in_its_own_fp32(backend):
    """Within 1e-6 of the script's own arithmetic where that does not cancel."""
    predictions = predictions_of(TOKENS, drift=1.0)
    loss, gradients = ours(predictions, backend, beta=1.0)
    policy = [x.clone().requires_grad_() for x in predictions[:2]]
    expected = sdxl(1.0)(*policy, *predictions[2:])
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for gradient, reference in zip(gradients, policy, strict=True):
        torch.testing.assert_close(gradient, reference.grad, rtol=1e-6, atol=1e-6 * float(reference.grad.abs().max()))


# --- diffusers, train_diffusion_dpo.py (SD1.5): beta_dpo (2500) without the half. Its ipo names a setting that does not exist,
# args.beta; beta_dpo is what is meant.


def sd15(kind, beta):
    def formula(*six):
        policy, reference = differences(*six)
        logits = reference - policy
        return {
            "sigmoid": lambda: -F.logsigmoid(beta * logits),
            "hinge": lambda: torch.relu(1 - beta * logits),
            "ipo": lambda: (logits - 1 / (2 * beta)) ** 2,
        }[kind]().mean()

    return formula


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo"])
def test_diffusers_sd15(kind, backend):
    """The same at twice its beta, whatever the loss; ipo at a beta whose target is within reach."""
    for beta in (2500.0, 50.0):
        check(predictions_of(drift=3e-3), sd15(kind, beta), backend, beta=2 * beta, loss_type=kind)


# --- Diffusion-SDPO (arXiv 2511.03317, AIDC-AI/Diffusion-SDPO): one factor of the loser's gradient for the pairs on a device.


def diffusion_sdpo(beta, mu):
    def formula(win, lose, reference_win, reference_lose, target_win, target_lose):
        g_win = 2 * (win.detach() - target_win) / win.numel()  # of the mean squared error over the batch
        g_lose = 2 * (lose.detach() - target_lose) / lose.numel()
        squared, inner = (g_win**2).sum(), (g_win * g_lose).sum()
        scale = ((1 - mu) * squared / inner).clamp(0, 1) if inner > 0 else 1.0
        errors = [by_sample((x - t) ** 2).mean(1) for x, t in ((win, target_win), (lose, target_lose))]
        loser = errors[1].detach() + scale * (errors[1] - errors[1].detach())
        _, reference = differences(win, lose, reference_win, reference_lose, target_win, target_lose)
        return -F.logsigmoid(-0.5 * beta * (errors[0] - loser - reference)).mean()

    return formula


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mu", [0.0, 0.6])
def test_diffusion_sdpo(mu, backend):
    predictions = predictions_of()
    # Losers whose errors are the winners', larger: without the factor their ascent would raise the winner's error.
    larger = torch.tensor([1.1, 1.3, 1.5, 1.7], device=DEVICE)[:, None, None, None]
    for side in (1, 3, 5):
        predictions[side] = larger * predictions[side - 1] + 0.1 * predictions[side]
    options = {"beta": 300.0, "sdpo_mu": mu}
    check(predictions, diffusion_sdpo(300.0, mu), backend, loser_scale="sdpo_batch", **options)
    _, (_, batch) = ours(predictions, backend, loser_scale="sdpo_batch", **options)
    _, (_, pairs) = ours(predictions, backend, loser_scale="sdpo", **options)
    _, (_, plain) = ours(predictions, backend, **options)
    factors = [[float(a.norm() / b.norm()) for a, b in zip(x, plain, strict=True)] for x in (batch, pairs)]
    assert max(factors[0]) < 0.95 and max(factors[0]) - min(factors[0]) < 1e-5, "one factor for all pairs"
    assert max(factors[1]) - min(factors[1]) > 0.01, "one for each"
    # A batch of one pair knows no difference.
    alone = [x[:1] for x in predictions]
    check(alone, diffusion_sdpo(300.0, mu), backend, loser_scale="sdpo", **options)


# --- SimpleTuner, Flow-DPO (helpers/distillation/flow_dpo): norm_type, and anchor_alpha times the mean squared difference to
# the reference's predictions, half of it from each side, without the mask.


def simpletuner(beta, norm_type, mask, anchor_alpha=0.0):
    def formula(win, lose, reference_win, reference_lose, target_win, target_lose):
        def error(prediction, target):
            squared = mask * (prediction - target) ** 2
            total = by_sample(squared).sum(1)
            if norm_type == "sum":
                return total
            if norm_type == "mean":
                return total / squared[0].numel()
            return total / by_sample(mask.expand_as(squared)).sum(1).clamp_min(1)

        advantage = error(reference_win, target_win) - error(win, target_win)
        advantage = advantage + error(lose, target_lose) - error(reference_lose, target_lose)
        anchor = ((win - reference_win) ** 2).mean() + ((lose - reference_lose) ** 2).mean()
        return -F.logsigmoid(0.5 * beta * advantage).mean() + 0.5 * anchor_alpha * anchor

    return formula


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("norm_type", "beta"), [("sum", 1.0), ("mean", 300.0), ("masked_mean", 80.0)])
def test_simpletuner(norm_type, beta, backend):
    """With a mask of pixels brought to the latents by area, and one sample whose mask is empty."""
    pixels = torch.zeros(4, 1, 64, 48, device=DEVICE)
    pixels[0, :, 4:40, 3:30] = 1
    pixels[1, :, :, 20:] = 0.6
    pixels[2] = 1
    mask = F.interpolate(pixels, size=LATENTS[2:], mode="area")
    assert 0 < (mask[0] > 0).sum() < mask[0].numel() and ((mask > 0) & (mask < 1)).any()
    formula = simpletuner(beta, norm_type, mask.double(), anchor_alpha=0.4)
    options = {"beta": beta, "reduction": norm_type, "reference_anchor": 0.4}
    check(predictions_of(), formula, backend, focus=mask, **options)
    check(predictions_of(), formula, backend, focus=mask[:, 0], **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_of_latents_and_of_tokens_agree(backend):
    """One value for each 2x2 latents is the same mask as its four values; odd latents need one for each."""
    predictions = predictions_of()
    coarse = torch.rand(4, 12, device=DEVICE)
    fine = coarse.reshape(4, 4, 3).repeat_interleave(2, 1).repeat_interleave(2, 2)
    lose = torch.rand(4, 12, device=DEVICE)
    fine_lose = lose.reshape(4, 4, 3).repeat_interleave(2, 1).repeat_interleave(2, 2)
    for options in ({}, {"mask_power": 2, "reduction": "masked_mean", "beta": 30.0}):
        first, gradients = ours(predictions, backend, focus=coarse, focus_lose=lose, **options)
        second, others = ours(predictions, backend, focus=fine, focus_lose=fine_lose, **options)
        assert torch.equal(first, second) and all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))
    odd = predictions_of((2, 3, 5, 7))
    weight = torch.rand(2, 5, 7, device=DEVICE)
    check(odd, simpletuner(1.0, "sum", weight.double()[:, None]), backend, beta=1.0, reduction="sum", focus=weight)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        (LATENTS, {"focus": (4, 4, 3)}, r"^focus: expected shape \[4, 8, 6\] \(B, H and W of the predictions\)"),
        (LATENTS, {"focus": (4, 3, 8, 6)}, r"^focus: expected shape \[4, 8, 6\]"),
        (LATENTS, {"focus": (4, 48)}, r"^focus: expected shape \[4, 12\] \(.*one value per 2x2 latents; or \[B, H, W\]\)"),
        (LATENTS, {"focus": (4, 8, 6), "focus_lose": (4, 12)}, r"^focus_lose: expected shape \[4, 8, 6\] \(as focus\)"),
        (TOKENS, {"focus": (4, 24, 1)}, r"^focus: expected a tensor \[B, P\]"),
        ((4, 3, 5, 6), {"focus": (4, 6)}, r"latents of 5x6 have no whole 2x2 patches; .* or give one value per latent"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_that_do_not_fit_are_refused(backend, shape, options, message):
    with pytest.raises(ValueError, match=message):
        ours(predictions_of(shape), backend, **{name: torch.rand(size, device=DEVICE) for name, size in options.items()})
