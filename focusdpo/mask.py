"""The focus mask: similarity or estimate, prior and pixels to M (docs/method.md, E5 to E8, E10)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from focusdpo_kernels import focus_field_of_images, fuse_focus, structure_field, topk_mask
from focusdpo_kernels.checks import (
    FLOATS,
    REALS,
    check_choice,
    check_device,
    check_number,
    check_prior,
    check_scores,
    check_shape,
    check_tensor,
)
from focusdpo_kernels.choices import FocusSource
from focusdpo_kernels.reference import binary_prior

SOURCES: tuple[str, ...] = get_args(FocusSource)


@dataclass(frozen=True)
class FocusMask:
    """A batch's focus mask and what it was made of; nothing here carries a gradient.

    Args:
        mask: M [B, P] in [0, 1], E8.
        structure: M_s [B, P] of 0 and 1, E6.
        complexity: M_d [B, P] in [0, 1] before it is multiplied by the prior, E7.
        coverage: A [B] = |M_s| / |prior|, E8.
        prior: [B, P] bool, the union over subjects.
        coverage_floor: [B], the lowest A that so many matches can reach: where it is above tau, M_d never switches on.
        all_matched: bool [B], one subject alone may match every target token: no structure can be left.
        tau: the threshold on A that was used.
        scores: S [B, R, P], E4; of an estimate its s [B, 1, P], E10.
        counts: K_r, E5, an int or a tensor that broadcasts to [B, R]; of an estimate the tokens above kappa.
        source: what M_s is made of: "features", "estimate", "random" for the features' M_s, put anywhere in the prior, or
            "truth" where S is the priors' own.
        priors: the prior as it was given, [B, P] or [B, R, P]; None is `prior`.
        per_subject: whether each subject's matches were compared with its own prior.
    """

    mask: Tensor
    structure: Tensor
    complexity: Tensor
    coverage: Tensor
    prior: Tensor
    coverage_floor: Tensor
    all_matched: Tensor
    tau: float
    scores: Tensor
    counts: int | Tensor
    source: str = "features"
    priors: Tensor | None = None
    per_subject: bool = False

    @property
    def matched(self) -> Tensor:
        """M' bool [B, R, P]: each subject's matches, E5; [B, 1, P] where there are none of a subject's own: the prior's tokens
        that an estimate calls aligned, or that M_s was not given at random.
        """
        if self.source in ("estimate", "random"):
            return (self.prior & (self.structure == 0))[:, None]
        return topk_mask(self.scores, self.counts)

    @property
    def coverage_chance(self) -> Tensor:
        """[B]: the mean A of an S that knows nothing, whose K_r matches lie anywhere: (1 - K/P)^R for the union of priors.

        An A near it says that S tells subjects from background no better than a coin would; one near `coverage_floor`, that
        every match lies within the prior. NaN of an estimate, which has no number of matches.
        """
        if self.source == "estimate":
            return torch.full_like(self.coverage, math.nan)
        patches = self.scores.shape[-1]
        counts = torch.as_tensor(self.counts, device=self.scores.device).expand(self.scores.shape[:2])
        present = (self.scores > -math.inf).sum(-1)  # an absent subject matches nothing
        matched = torch.minimum(counts, present).to(self.coverage.dtype) / max(patches, 1)  # [B, R], a token's chance
        if not self.per_subject or self.priors is None:
            return (1 - matched).prod(-1) * (self.prior.any(-1))
        inside = binary_prior(self.priors)
        covered = torch.where(inside, matched[:, :, None], 1).prod(1)  # matched by all whose prior it lies in
        return torch.where(self.prior, 1 - covered, 0).sum(-1) / self.prior.sum(-1).clamp_min(1)

    @property
    def detail(self) -> Tensor:
        """M_d * prior, [B, P]."""
        return torch.where(self.prior, self.complexity, 0)

    @property
    def uses_detail(self) -> Tensor:
        """Bool [B]: A <= tau, the branch in which details get weight."""
        return self.coverage <= self.tau


def match_counts(match_count: str | int | float, scores: Tensor, prior: Tensor, reference_mask: Tensor | None) -> int | Tensor:
    """K_r of E5.

    Args:
        match_count: "reference", the subject's reference tokens; "prior", the tokens of its prior (of the union where priors
            are not per subject); an int; or a fraction of P in (0, 1].
        scores: S [B, R, P].
        prior: [B, P] or [B, R, P].
        reference_mask: [B, R, Q], needed for "reference".

    Returns:
        An int for all subjects, or an int64 tensor that broadcasts to [B, R].
    """
    patches = scores.shape[-1]
    if match_count == "reference":
        if reference_mask is None:
            raise ValueError("reference_mask: needed for match_count='reference'; pass it, or another match_count")
        check_tensor("reference_mask", reference_mask, ndim=3, dtypes=REALS, layout="[B, R, Q]")
        check_shape("reference_mask", reference_mask, (*scores.shape[:2], reference_mask.shape[2]), "B and R of the scores")
        return (reference_mask if reference_mask.dtype == torch.bool else reference_mask != 0).sum(-1)
    if match_count == "prior":
        inside = binary_prior(prior)
        return inside.sum(-1) if inside.ndim == 3 else inside.sum(-1, keepdim=True)
    if isinstance(match_count, float) and 0 < match_count <= 1:
        return round(match_count * patches)
    if isinstance(match_count, int) and not isinstance(match_count, bool) and 0 <= match_count <= patches:
        return match_count
    raise ValueError(
        f"match_count: got {match_count!r}; expected 'reference', 'prior', an int from 0 to P = {patches}, "
        "or a fraction of P as a float in (0, 1]"
    )


@torch.no_grad()
def focus_mask(
    scores: Tensor,
    prior: Tensor,
    images: Tensor,
    *,
    source: str = "features",
    reference_mask: Tensor | None = None,
    match_count: str | int | float = "reference",
    per_subject: bool = False,
    kappa: float = 0.75,
    draws: Tensor | None = None,
    tau: float = 0.1,
    gamma: float = 0.3,
    patch_size: int = 16,
    entropy_method: str = "kde",
    entropy_bins: int = 32,
    entropy_sigma: float = 0.01,
    check_range: bool | None = None,
    backend: str | None = None,
) -> FocusMask:
    """Builds M from similarity or estimate, prior and pixels (E5 to E8, E10).

    Args:
        scores: S [B, R, P] from `cross_layer_similarity` or `SimilarityAccumulator.result()`, -inf for absent subjects; with
            source="estimate" s [B, P] from `focusdpo_kernels.estimate_alignment`.
        prior: where winner and loser differ in subject, [B, P] or one per subject [B, R, P].
        images: the winner's pixels [B, 1 or 3, H, W] in [0, 1] (or uint8), with H/patch_size * W/patch_size = P.
        source: what M_s is made of. "features": E5 and E6. "estimate": E10, the tokens whose s is not above kappa; it needs no
            hidden states, no K and no reference masks. "random": as many tokens as the features' M_s has, anywhere in the
            prior; a control for where the features look.
        reference_mask: [B, R, Q], not zero where token q shows subject r; needed for match_count="reference".
        match_count: K_r: "reference", "prior", an int, or a fraction of P; see `match_counts`.
        per_subject: take each subject's own matches from its own prior, instead of the unions; needs a prior [B, R, P].
        kappa: how far from loser (0) to winner (1) an estimate has come that counts as aligned.
        draws: of "random", a number for each token [B, P]: the largest ones are left out of M_s. None draws them.
        tau: coverage above which structure alone counts.
        gamma: weight of structure against detail at or below tau.
        patch_size: pixels along the side of a target token.
        entropy_method, entropy_bins, entropy_sigma, check_range: see `focusdpo_kernels.patch_entropy`.
        backend: "triton", "torch" or None; see `focusdpo_kernels.backend`.

    Returns:
        FocusMask.

    Raises:
        TypeError, ValueError: arguments of wrong type, shape, dtype, device or range, each named.
    """
    check_choice("source", source, SOURCES)
    is_estimate = source == "estimate"
    if is_estimate:
        layout = "[B, P], as estimate_alignment gives them for source='estimate'"
        scores = check_tensor("scores", scores, ndim=2, dtypes=FLOATS, layout=layout)[:, None]
        check_number("kappa", kappa)
        if per_subject:
            raise ValueError("per_subject: True with source='estimate', which compares a token with no subject; leave it out")
        prior = check_prior(prior, scores.shape[0], None, scores.shape[-1])
        counts: int | Tensor = (scores > kappa).sum(-1)  # which are then the matches
    else:
        scores = check_scores(scores)
        prior = check_prior(prior, *scores.shape)
        counts = match_counts(match_count, scores, prior, reference_mask)
    inside = binary_prior(prior)
    field = focus_field_of_images(
        scores,
        counts,
        inside.any(1) if is_estimate and inside.ndim == 3 else inside,
        images,
        patch_size,
        per_subject=per_subject,
        tau=tau,
        gamma=gamma,
        bins=entropy_bins,
        sigma=entropy_sigma,
        method=entropy_method,
        check_range=check_range,
        backend=backend,
    )
    if is_estimate:  # no number of matches limits it
        nothing = torch.zeros_like(field.coverage)
        field = field._replace(coverage_floor=nothing, all_matched=nothing.bool())
    focus = FocusMask(
        **field._asdict(), tau=tau, scores=scores, counts=counts, source=source, priors=inside, per_subject=per_subject
    )
    return _scattered(focus, gamma, draws, backend) if source == "random" else focus


def _scattered(focus: FocusMask, gamma: float, draws: Tensor | None, backend: str | None) -> FocusMask:
    """The mask with as many tokens of structure, anywhere in the prior."""
    prior = focus.prior
    if draws is None:
        draws = torch.rand(prior.shape, device=prior.device)
    check_tensor("draws", draws, ndim=2, dtypes=FLOATS, layout="[B, P]")
    check_shape("draws", draws, prior.shape, "B and P of the scores")
    check_device("draws", draws, prior.device, "scores")
    left_out = prior.sum(-1) - focus.structure.sum(-1).long()
    ranked = draws.to(focus.structure.dtype).masked_fill(~prior, -math.inf)[:, None]
    structure, coverage = structure_field(ranked, left_out[:, None], prior, backend=backend)
    mask = fuse_focus(structure, coverage, focus.complexity, prior, tau=focus.tau, gamma=gamma, backend=backend)
    return replace(focus, mask=mask, structure=structure, coverage=coverage)
