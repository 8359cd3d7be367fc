"""The focus mask: similarity, prior and pixels to M (docs/method.md, E5 to E8)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from focusdpo_kernels import focus_field_of_images, topk_mask
from focusdpo_kernels.checks import REALS, check_prior, check_scores, check_shape, check_tensor
from focusdpo_kernels.reference import binary_prior


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
        scores: S [B, R, P], E4.
        counts: K_r, E5, an int or a tensor that broadcasts to [B, R].
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

    @property
    def matched(self) -> Tensor:
        """M' bool [B, R, P]: each subject's matches, E5."""
        return topk_mask(self.scores, self.counts)

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
    reference_mask: Tensor | None = None,
    match_count: str | int | float = "reference",
    per_subject: bool = False,
    tau: float = 0.1,
    gamma: float = 0.3,
    patch_size: int = 16,
    entropy_method: str = "kde",
    entropy_bins: int = 32,
    entropy_sigma: float = 0.01,
    check_range: bool | None = None,
    backend: str | None = None,
) -> FocusMask:
    """Builds M from similarity, prior and pixels (E5 to E8).

    Args:
        scores: S [B, R, P] from `cross_layer_similarity` or `SimilarityAccumulator.result()`; -inf for absent subjects.
        prior: where winner and loser differ in subject, [B, P] or one per subject [B, R, P].
        images: the winner's pixels [B, 1 or 3, H, W] in [0, 1] (or uint8), with H/patch_size * W/patch_size = P.
        reference_mask: [B, R, Q], not zero where token q shows subject r; needed for match_count="reference".
        match_count: K_r: "reference", "prior", an int, or a fraction of P; see `match_counts`.
        per_subject: take each subject's own matches from its own prior, instead of the unions; needs a prior [B, R, P].
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
    scores = check_scores(scores)
    prior = check_prior(prior, *scores.shape)
    counts = match_counts(match_count, scores, prior, reference_mask)
    field = focus_field_of_images(
        scores,
        counts,
        prior,
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
    return FocusMask(**field._asdict(), tau=tau, scores=scores, counts=counts)
