"""focus_mask: the switches, and the step from scores to M."""

from __future__ import annotations

import pytest
import torch

from focusdpo import focus_mask
from focusdpo.mask import match_counts
from focusdpo_kernels import fuse_focus, patch_entropy, topk_mask
from focusdpo_kernels.reference import binary_prior, normalize_complexity
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


def test_counts_of_masks_that_are_no_booleans():
    """Any value but 0 is a reference token, and no match at all may be asked for."""
    scores, prior, images, _ = make()
    reference_mask = torch.tensor([0.0, 0.3, 1.0, 2.0, 0.0, -1.0], device=DEVICE).expand(3, 2, 6)
    assert match_counts("reference", scores, prior, reference_mask).tolist() == [[4, 4]] * 3
    focus = focus_mask(scores, prior, images, match_count=0)
    assert not focus.matched.any() and torch.equal(focus.structure, prior.float()) and (focus.coverage == 1).all()


def test_each_pair_has_its_own_floor():
    """Pairs of unlike priors in one batch: also one token alone, and one subject that matches all of the target."""
    scores = torch.randn(3, 2, 24, device=DEVICE)
    prior = torch.zeros(3, 2, 24, dtype=torch.bool, device=DEVICE)
    prior[0, 0, 3] = True  # one token
    prior[1, 0, :10] = prior[1, 1, 10:20] = True
    prior[2, :, :6] = True
    reference_mask = torch.zeros(3, 2, 30, device=DEVICE)
    reference_mask[1, 0, :4] = reference_mask[1, 1, 4:5] = 1
    reference_mask[2, 1, :24] = 1
    scores[0] = -scores[0].abs()
    scores[0, :, 3] = -9.0  # the last to be matched
    images = torch.rand(3, 3, 64, 96, device=DEVICE)
    for per_subject, floors in ((True, [1.0, 9 / 20, 1.0]), (False, [1.0, 15 / 20, 0.0])):
        focus = focus_mask(scores, prior, images, reference_mask=reference_mask, per_subject=per_subject)
        assert focus.coverage_floor.tolist() == pytest.approx(floors)
        assert focus.all_matched.tolist() == [False, False, True]
        assert focus.coverage[0] == 1 and (focus.coverage >= focus.coverage_floor - 1e-6).all()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_an_estimate_needs_no_matches(backend):
    """E10: what has come farther than kappa is aligned; each pair for itself, and NaN never."""
    _, prior, images, _ = make(per_subject=True)
    s = torch.randn(3, 24, device=DEVICE)
    s[0, 3], s[1, :] = torch.nan, 0.75
    for kappa in (0.75, 0.2):
        focus = focus_mask(s, prior, images, source="estimate", kappa=kappa, tau=0.5, backend=backend)
        aligned = s > kappa
        structure = prior.any(1) & ~aligned
        assert torch.equal(focus.matched[:, 0], aligned & prior.any(1)) and torch.equal(focus.structure, structure.float())
        assert torch.equal(focus.scores[:, 0].nan_to_num(9), s.nan_to_num(9)) and focus.source == "estimate"
        torch.testing.assert_close(focus.coverage, structure.sum(1) / prior.any(1).sum(1))
        assert (focus.coverage_floor == 0).all() and not focus.all_matched.any() and focus.coverage_chance.isnan().all()
        detail = patch_entropy(images, normalize=True) * prior.any(1)
        expected = torch.where((focus.coverage <= 0.5)[:, None], 0.3 * structure + 0.7 * detail, structure)
        torch.testing.assert_close(focus.mask, expected, rtol=0, atol=1e-5)
    union = focus_mask(s, prior.any(1), images, source="estimate", kappa=0.2, tau=0.5, backend=backend)
    assert torch.equal(focus.mask, union.mask)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("per_subject", [False, True])
def test_a_random_field_is_as_large_and_lies_in_the_prior(per_subject, backend):
    scores, prior, images, reference_mask = make(per_subject=True)
    settings = {"reference_mask": reference_mask, "per_subject": per_subject, "tau": 0.6, "backend": backend}
    features = focus_mask(scores, prior, images, **settings)
    draws = torch.rand(3, 24, device=DEVICE)
    focus = focus_mask(scores, prior, images, source="random", draws=draws, **settings)
    assert torch.equal(focus.coverage, features.coverage) and torch.equal(focus.coverage_chance, features.coverage_chance)
    assert torch.equal(focus.coverage_floor, features.coverage_floor) and torch.equal(focus.complexity, features.complexity)
    for i in range(3):
        size, inside = int(features.structure[i].sum()), prior[i].any(0)
        first = sorted(inside.nonzero()[:, 0].tolist(), key=lambda p: float(draws[i, p]))[:size]
        assert sorted(focus.structure[i].nonzero()[:, 0].tolist()) == sorted(first)
        assert torch.equal(focus.matched[i, 0], inside & (focus.structure[i] == 0))
    again = fuse_focus(focus.structure, focus.coverage, focus.complexity, prior, tau=0.6)
    torch.testing.assert_close(focus.mask, again, rtol=0, atol=1e-6)
    drawn = [focus_mask(scores, prior, images, source="random", **settings).structure for _ in range(2)]
    assert not torch.equal(*drawn), "anew each time"


@pytest.mark.parametrize("per_subject", [False, True])
def test_the_chance_level_is_what_random_scores_give(per_subject):
    """The mean A of scores that know nothing; an absent subject matches nothing, and pairs differ."""
    _, prior, images, reference_mask = make(per_subject=True)
    reference_mask[2, 1] = False
    draws, settings = [], {"reference_mask": reference_mask, "per_subject": per_subject, "backend": "torch"}
    for _ in range(400):
        scores = torch.randn(3, 2, 24, device=DEVICE)
        scores[2, 1] = -torch.inf
        focus = focus_mask(scores, prior, images, **settings)
        draws.append(focus.coverage)
    mean, spread = torch.stack(draws).mean(0), torch.stack(draws).std(0) / 20
    assert ((focus.coverage_chance - mean).abs() < 4 * spread).all(), (focus.coverage_chance, mean, spread)
    if not per_subject:
        share = 1 - reference_mask.sum(-1) / 24
        torch.testing.assert_close(focus.coverage_chance, share.prod(-1))
        by_number = focus_mask(scores[:1], prior[:1], images[:1], match_count=6)
        assert by_number.coverage_chance.item() == pytest.approx(0.75**2)


def test_settings_reach_the_kernels(monkeypatch):
    """The backend and the look at the pixels' range, beside the patches' size."""
    import focusdpo.mask as module

    seen = []
    original = module.focus_field_of_images
    monkeypatch.setattr(module, "focus_field_of_images", lambda *args, **more: seen.append(more) or original(*args, **more))
    scores, prior, images, _ = make()
    focus_mask(scores, prior, images, match_count=3, backend="torch", check_range=True)
    assert [(more["backend"], more["check_range"]) for more in seen] == [("torch", True)]
    small = focus_mask(scores, prior, images[..., :32, :48], match_count=3, patch_size=8)
    torch.testing.assert_close(small.complexity, patch_entropy(images[..., :32, :48], 8, normalize=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference_mask": None}, "reference_mask: needed for match_count='reference'; pass it, or another match_count$"),
        ({"reference_mask": torch.ones(3, 12)}, r"reference_mask: expected a tensor \[B, R, Q\], got float32 \[3, 12\]"),
        ({"reference_mask": torch.ones(3, 1, 12)}, r"reference_mask: expected shape \[3, 2, 12\] \(B and R of the scores\)"),
        ({"scores": torch.ones(3, 24)}, "scores: expected a tensor"),
        ({"prior": torch.ones(24)}, r"prior: expected a tensor \[B, P\] or \[B, R, P\], got float32 \[24\]"),
        (
            {"images": torch.rand(3, 3, 64, 64)},
            r"images: \[3, 3, 64, 64\] in patches of 16 give \[3, 16\] tokens, while scores \[3, 2, 24\] have \[3, 24\]; res",
        ),
        (
            {"match_count": 1.5},
            "match_count: got 1.5; expected 'reference', 'prior', an int from 0 to P = 24, or a fraction of P as a float in "
            r"\(0, 1\]$",
        ),
    ],
)
def test_refused_by_name(changes, message):
    scores, prior, images, reference_mask = make()
    arguments = {"scores": scores, "prior": prior, "images": images, "reference_mask": reference_mask}
    arguments |= {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in changes.items()}
    with pytest.raises(ValueError, match=f"^{message}"):
        focus_mask(**arguments)


def test_in_float64():
    """Nothing on the way is rounded to fp32."""
    scores, prior, images, reference_mask = make()
    scores, images = scores.double(), images.double()
    focus = focus_mask(scores, prior, images, reference_mask=reference_mask, tau=1.0, gamma=0.3)
    for name in ("mask", "structure", "complexity", "coverage"):
        assert getattr(focus, name).dtype == torch.float64, name
    expected = 0.3 * focus.structure + 0.7 * torch.where(focus.prior, focus.complexity, 0)
    torch.testing.assert_close(focus.mask, expected, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(focus.coverage, focus.structure.sum(1) / prior.sum(1), rtol=1e-15, atol=0)
    half = fuse_focus(focus.structure, focus.coverage.float(), focus.complexity.half(), prior, tau=1.0, gamma=0.3)
    assert half.dtype == torch.float64


def test_complexity_between_extremes_that_are_one_apart():
    entropy = torch.tensor([[2.0, 2.25, 3.0], [5.0, 5.0, 5.0]])
    assert normalize_complexity(entropy).tolist() == [[0.0, 0.25, 1.0], [0.0, 0.0, 0.0]]


def test_what_counts_as_inside_a_prior():
    for prior in ([-1, 0, 2], [0.6, 0.5, 1.0], [True, False, True]):
        assert binary_prior(torch.tensor(prior)).tolist() == [True, False, True]
