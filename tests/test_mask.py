"""focus_mask: the switches, and the step from scores to M."""

from __future__ import annotations

import pytest
import torch

from focusdpo import focus_mask
from focusdpo.mask import match_counts
from focusdpo_kernels import patch_entropy, topk_mask
from tests.conftest import DEVICE


def make(per_subject=False):
    scores = torch.randn(3, 2, 24, device=DEVICE)
    prior = torch.rand(3, 2, 24, device=DEVICE) > 0.5
    reference_mask = torch.rand(3, 2, 12, device=DEVICE) > 0.4
    return scores, prior if per_subject else prior.any(1), torch.rand(3, 3, 64, 96, device=DEVICE), reference_mask


def test_composition_and_branches():
    scores, prior, images, reference_mask = make()
    focus = focus_mask(scores, prior, images, reference_mask=reference_mask)
    matched = topk_mask(scores, reference_mask.sum(-1)).any(1)
    structure = (prior & ~matched).float()
    detail = patch_entropy(images, normalize=True) * prior
    assert torch.equal(focus.structure, structure)
    torch.testing.assert_close(focus.detail, detail)
    torch.testing.assert_close(focus.coverage, structure.sum(1) / prior.sum(1))
    always = focus_mask(scores, prior, images, reference_mask=reference_mask, tau=1.0, gamma=0.25)
    assert always.uses_detail.all()
    torch.testing.assert_close(always.mask, 0.25 * structure + 0.75 * detail)
    never = focus_mask(scores, prior, images, reference_mask=reference_mask, tau=0.0)
    misaligned = structure.any(1)
    assert torch.equal(never.mask[misaligned], structure[misaligned])


def test_a_threshold_that_is_met_turns_to_detail():
    """E8: A <= tau."""
    scores = torch.arange(24.0, device=DEVICE).expand(1, 1, 24)
    prior = torch.ones(1, 24, dtype=torch.bool, device=DEVICE)
    images = torch.rand(1, 3, 64, 96, device=DEVICE)
    for tau, detail in ((0.25, True), (0.2499, False)):
        focus = focus_mask(scores, prior, images, match_count=18, tau=tau)
        assert focus.coverage.item() == 0.25 and focus.uses_detail.item() is detail
        assert torch.equal(focus.mask, focus.structure) is not detail
    assert focus.matched.tolist() == [[[False] * 6 + [True] * 18]]
    assert focus.structure.tolist() == [[1.0] * 6 + [0.0] * 18]


def test_match_counts():
    scores, prior, _, reference_mask = make(per_subject=True)
    assert torch.equal(match_counts("reference", scores, prior, reference_mask), reference_mask.sum(-1))
    assert torch.equal(match_counts("prior", scores, prior, None), prior.sum(-1))
    union = prior.any(1)
    assert torch.equal(match_counts("prior", scores, union, None), union.sum(-1, keepdim=True))
    assert match_counts(5, scores, prior, None) == 5
    assert match_counts(0.5, scores, prior, None) == 12
    assert match_counts(1.0, scores, prior, None) == 24
    assert match_counts(1, scores, prior, None) == 1


@pytest.mark.parametrize("count", [-1, 25, 0.0, 1.5, True, "K", None])
def test_match_counts_refused(count):
    scores, prior, _, _ = make()
    with pytest.raises(ValueError, match="match_count: got"):
        match_counts(count, scores, prior, None)


def test_coverage_floor():
    scores, _, images, _ = make()
    prior = torch.zeros(3, 24, dtype=torch.bool, device=DEVICE)
    prior[0, :10] = True
    prior[1, :4] = True
    scores[0, 1] = -torch.inf  # an absent subject finds nothing
    focus = focus_mask(scores, prior, images, match_count=3)
    assert focus.coverage_floor.tolist() == pytest.approx([0.7, 0.0, 0.0])
    assert (focus.coverage >= focus.coverage_floor - 1e-6).all()
    assert not focus.all_matched.any()
    assert focus_mask(scores, prior, images, match_count=24).all_matched.all()


def test_coverage_floor_per_subject():
    """One subject's surplus of matches does not help another."""
    scores = torch.randn(1, 2, 24, device=DEVICE)
    prior = torch.zeros(1, 2, 24, dtype=torch.bool, device=DEVICE)
    prior[0, 0, :10] = True
    prior[0, 1, 10:20] = True
    reference_mask = torch.zeros(1, 2, 21, device=DEVICE)
    reference_mask[0, 0, :20] = 1
    reference_mask[0, 1, 20:] = 1
    images = torch.rand(1, 3, 64, 96, device=DEVICE)
    focus = focus_mask(scores, prior, images, reference_mask=reference_mask, per_subject=True)
    assert focus.coverage_floor.tolist() == pytest.approx([0.45])
    assert (focus.coverage >= focus.coverage_floor - 1e-6).all()


def test_backends_agree():
    scores, prior, images, reference_mask = make(per_subject=True)
    for per_subject in (False, True):
        masks = [
            focus_mask(
                scores, prior, images, reference_mask=reference_mask, per_subject=per_subject, tau=0.6, backend=backend
            ).mask
            for backend in ("triton", "torch")
        ]
        torch.testing.assert_close(*masks, rtol=0, atol=1e-5)
