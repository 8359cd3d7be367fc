"""What is measured of similarity S and matches M', where it is known which token shows whom.

Regions are bool [R, P], disjoint: region r holds the tokens that show subject r; what is in none is background. Leading
dimensions "..." of scores and matches are any.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_regions(regions: Tensor) -> None:
    """ValueError where a region is empty, or two share a token: whose match that is would be undefined."""
    if not regions.any(-1).all():
        raise ValueError(f"regions: region {int((~regions.any(-1)).nonzero()[0, 0])} has no token; use a larger resolution")
    if (regions.sum(-2) > 1).any():
        raise ValueError("regions: two subjects share a token; expected disjoint regions")


def confusion(matched: Tensor, regions: Tensor) -> Tensor:
    """Where each reference's matches lie, [..., R, R + 1]: shares by region, the last of the background; rows sum to 1.

    The diagonal is the precision. A row is NaN where nothing is matched.

    Args:
        matched: M', bool [..., R, P].
        regions: [R, P].
    """
    areas = torch.cat([regions, ~regions.any(0, keepdim=True)])  # [R + 1, P]
    counts = matched.double() @ areas.double().T
    return counts / counts.sum(-1, keepdim=True)


def recall(matched: Tensor, regions: Tensor) -> Tensor:
    """Share of each subject's own region that its reference matches, [..., R]."""
    return (matched & regions).sum(-1).double() / regions.sum(-1)


def union_precision_recall(matched: Tensor, regions: Tensor) -> tuple[Tensor, Tensor]:
    """Precision and recall of all matches against all regions, [...] each: the union forgets whose they are."""
    found, wanted = matched.any(-2), regions.any(-2)
    hits = (found & wanted).sum(-1).double()
    return hits / found.sum(-1), hits / wanted.sum(-1)


def auc(scores: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Probability that a positive token scores higher than a negative one, a tie counting half, [...]; NaN without either.

    Args:
        scores: [..., P].
        positive, negative: bool [P].
    """
    chosen = scores[..., positive].contiguous(), scores[..., negative].contiguous()
    if 0 in (chosen[0].shape[-1], chosen[1].shape[-1]):
        return scores.new_full(scores.shape[:-1], torch.nan, dtype=torch.float64)
    ordered = chosen[1].sort(-1).values
    below = torch.searchsorted(ordered, chosen[0]) + torch.searchsorted(ordered, chosen[0], right=True)
    return below.double().mean(-1) / (2 * ordered.shape[-1])


def auc_by_subject(scores: Tensor, regions: Tensor) -> tuple[Tensor, Tensor]:
    """AUC of S_r on its own region, against the other subjects' regions and against all other tokens, [..., R] each.

    Args:
        scores: S [..., R, P].
        regions: [R, P].
    """
    others, rest = [], []
    for r, own in enumerate(regions):
        others.append(auc(scores[..., r, :], own, regions.any(0) & ~own))
        rest.append(auc(scores[..., r, :], own, ~own))
    return torch.stack(others, -1), torch.stack(rest, -1)
