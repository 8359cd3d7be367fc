"""The specification: every public function in plain PyTorch, float64-capable.

Equation numbers are those of docs/method.md. The maths is defined here once; the Triton kernels are tested against it.
The arguments are taken as already checked (checks.py); see the public functions for shapes and meaning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-8  # lower bound of a norm in a cosine, as in torch.nn.functional.cosine_similarity
LUMA = (0.2989, 0.587, 0.114)  # E7: R, G, B to gray
RANGE_TOLERANCE = 1e-3  # gray values further outside [0, 1] give NaN


class Predictions(NamedTuple):
    """What `preference_residual` compares: [B, P, C] tokens or [B, C, H, W] latents, of one shape."""

    policy_win: Tensor
    policy_lose: Tensor
    reference_win: Tensor
    reference_lose: Tensor
    target_win: Tensor
    target_lose: Tensor


class PreferenceResidual(NamedTuple):
    """What `preference_residual` returns: fp32 tensors [B] (float64 for float64 input).

    The four errors e = reduce(M * (target - prediction)^2) and the margin
    (policy_win - reference_win) - (policy_lose - reference_lose), computed from factored differences.
    `winner_norm` = |g_w|^2 and `inner` = <g_w, g_l> are the output-space products of SDPO with
    g = M * (prediction - target), reduced like the errors; they carry no gradient.
    """

    policy_win: Tensor
    policy_lose: Tensor
    reference_win: Tensor
    reference_lose: Tensor
    margin: Tensor
    winner_norm: Tensor
    inner: Tensor


class FocusField(NamedTuple):
    """What `focus_field` returns; no gradient.

    mask: M [B, P]. structure: M_s [B, P] of 0 and 1. complexity: M_d [B, P] before the prior. coverage: A [B].
    prior: bool [B, P], the union over subjects. coverage_floor: [B], the lowest A that so many matches can reach.
    all_matched: bool [B], one subject alone may match every target token.
    """

    mask: Tensor
    structure: Tensor
    complexity: Tensor
    coverage: Tensor
    prior: Tensor
    coverage_floor: Tensor
    all_matched: Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def layer_similarity(target: Tensor, reference: Tensor, reference_mask: Tensor, pooling: str = "reference") -> Tensor:
    """One term of E4, [B, R, P]: cosine of every target token with the pooled reference token (E3), or with the best one.

    Absent subjects get 0 ("reference") or -inf ("max"); `finish_similarity` makes both -inf.
    """
    dtype = accumulation_dtype(target.dtype)
    target, reference = target.to(dtype), reference.to(dtype)  # [B, P, D], [B, Q, D]
    inside = reference_mask != 0  # [B, R, Q]
    # Hooks run inside the model's autocast, which would round the products to bf16.
    with torch.autocast(device_type=target.device.type, enabled=False):
        if pooling == "reference":
            mask = inside.to(dtype)
            pooled = mask @ reference / mask.sum(-1, keepdim=True).clamp_min(1)  # [B, R, D]
            return _cosine(pooled, target)
        cosine = _cosine(reference, target)  # [B, Q, P]
        cosine = cosine.masked_fill(cosine.isnan(), -math.inf)  # a NaN token is never the best match
        best = [cosine.masked_fill(~inside[:, r, :, None], -math.inf) for r in range(inside.shape[1])]
        absent = cosine.new_full((cosine.shape[0], 1, cosine.shape[2]), -math.inf)
        best = [torch.cat([one, absent], dim=1).amax(1) for one in best]
        return torch.stack(best, dim=1) if best else cosine[:, :0]


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of [B, I, D] with [B, J, D]: [B, I, J]."""
    norm_a = torch.linalg.vector_norm(a, dim=-1).clamp_min(EPS)
    norm_b = torch.linalg.vector_norm(b, dim=-1).clamp_min(EPS)
    return a @ b.mT / (norm_a[:, :, None] * norm_b[:, None, :])


def finish_similarity(total: Tensor, layers: int, reference_mask: Tensor) -> Tensor:
    """E4's average over layers; a subject without a reference token gets -inf."""
    absent = (reference_mask == 0).all(-1, keepdim=True)  # [B, R, 1]
    return (total / layers).masked_fill_(absent, -math.inf)  # in place: the quotient is nobody else's


def cross_layer_similarity(
    target: Sequence[Tensor], reference: Sequence[Tensor], reference_mask: Tensor, pooling: str = "reference"
) -> Tensor:
    """E4: S[b, r, p], the mean over layers of `layer_similarity`."""
    total = torch.zeros((), device=target[0].device)
    for target_n, reference_n in zip(target, reference, strict=True):
        total = total + layer_similarity(target_n, reference_n, reference_mask, pooling)
    return finish_similarity(total, len(target), reference_mask)


def topk_mask(scores: Tensor, k: int | Tensor) -> Tensor:
    """E5: bool [..., P], true for the k largest of each row; ties to the lower index; NaN and -inf never."""
    finite = ~scores.isnan() & (scores != -math.inf)
    # A stable descending sort keeps equal scores in index order, which is the tie rule.
    order = scores.masked_fill(~finite, -math.inf).sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(scores.shape[-1], device=scores.device).expand_as(order))
    limit = k.unsqueeze(-1) if isinstance(k, Tensor) else k
    return (rank < limit) & finite


def binary_prior(prior: Tensor) -> Tensor:
    """A prior as bool: booleans as they are, integers where not 0, floats where above one half."""
    if prior.dtype == torch.bool:
        return prior
    return prior > 0.5 if prior.is_floating_point() else prior != 0


def structure_field(scores: Tensor, k: int | Tensor, prior: Tensor, per_subject: bool) -> tuple[Tensor, Tensor]:
    """E5, E6 and E8's coverage: (M_s [B, P], A [B])."""
    return uncovered(topk_mask(scores, k), prior, per_subject, accumulation_dtype(scores.dtype))


def uncovered(matched: Tensor, prior: Tensor, per_subject: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """E6 and the coverage of E8 from M' [B, R, P]: (M_s [B, P], A [B])."""
    inside = binary_prior(prior)
    union = inside if inside.ndim == 2 else inside.any(1)  # [B, P]
    structure = (inside & ~matched).any(1) if per_subject else union & ~matched.any(1)
    size = union.sum(-1)
    return structure.to(dtype), structure.sum(-1).to(dtype) / size.clamp_min(1)


def gray_patches(images: Tensor, patch_size: int) -> Tensor:
    """Gray values of each patch, [B, P, pixels]; NaN where they are out of range."""
    dtype = accumulation_dtype(images.dtype)
    pixels = images.to(dtype) / 255 if images.dtype == torch.uint8 else images.to(dtype)
    gray = pixels[:, 0]  # [B, H, W]
    if images.shape[1] == 3:
        gray = LUMA[0] * gray + LUMA[1] * pixels[:, 1] + LUMA[2] * pixels[:, 2]
    return in_patches(only_in_range(gray), patch_size)


def only_in_range(gray: Tensor) -> Tensor:
    return gray.masked_fill(~((gray >= -RANGE_TOLERANCE) & (gray <= 1 + RANGE_TOLERANCE)), math.nan)


def in_patches(gray: Tensor, patch_size: int) -> Tensor:
    """[B, H, W] as [B, P, pixels]."""
    batch, height, width = gray.shape
    rows, columns = height // patch_size, width // patch_size
    patches = gray.reshape(batch, rows, patch_size, columns, patch_size).transpose(2, 3)
    return patches.reshape(batch, rows * columns, patch_size * patch_size)


def entropy_of(weight: Tensor) -> Tensor:
    """Shannon entropy (nats) of distributions [..., bins] that are not normalised."""
    q = weight / weight.sum(-1, keepdim=True)
    return -torch.special.xlogy(q, q).sum(-1)


def patch_entropy(images: Tensor, patch_size: int, bins: int, sigma: float, method: str, normalize: bool) -> Tensor:
    """E7: Shannon entropy (nats) of each patch, [B, H/p * W/p]; `normalize` gives M_d before the prior."""
    patches = gray_patches(images, patch_size)
    if method == "kde":
        mu = torch.arange(bins, dtype=patches.dtype, device=images.device) / (bins - 1)
        # One bin at a time: all at once would hold pixels x bins values.
        weight = torch.stack([torch.exp(-0.5 * ((patches - mu[b]) / sigma) ** 2).sum(-1) for b in range(bins)], -1)
    else:
        index = (patches * bins).floor().clamp(0, bins - 1)
        weight = torch.stack([(index == b).sum(-1) for b in range(bins)], -1).to(patches.dtype)
        weight = weight.masked_fill(patches.isnan().any(-1, keepdim=True), math.nan)
    entropy = entropy_of(weight)  # of [B, P, bins]
    return normalize_complexity(entropy) if normalize else entropy


def normalize_complexity(entropy: Tensor) -> Tensor:
    """E7's min-max over an image's patches; all zeros where they are equal, NaN where one is NaN."""
    if entropy.shape[-1] == 0:
        return entropy
    low, high = entropy.aminmax(dim=-1, keepdim=True)
    span = high - low
    return torch.where(span == 0, 0, (entropy - low) / torch.where(span == 0, 1, span))


def fuse_focus(structure: Tensor, coverage: Tensor, complexity: Tensor, prior: Tensor, tau: float, gamma: float) -> Tensor:
    """E8: M_s where A > tau, else gamma * M_s + (1 - gamma) * M_d with M_d = complexity * prior."""
    dtype = accumulation_dtype(structure.dtype)
    structure, coverage, complexity = structure.to(dtype), coverage.to(dtype), complexity.to(dtype)
    inside = binary_prior(prior)
    union = inside if inside.ndim == 2 else inside.any(1)
    detail = torch.where(union, complexity, 0)
    return torch.where(coverage[:, None] > tau, structure, gamma * structure + (1 - gamma) * detail)


def focus_field(
    matched: Tensor,
    scores: Tensor,
    k: int | Tensor,
    prior: Tensor,
    entropy: Tensor,
    per_subject: bool,
    tau: float,
    gamma: float,
) -> FocusField:
    """E6 to E8 from M' [B, R, P] = `topk_mask(scores, k)` and H [B, P]."""
    dtype = accumulation_dtype(scores.dtype)
    structure, coverage = uncovered(matched, prior, per_subject, dtype)
    complexity = normalize_complexity(entropy.to(dtype))
    inside = binary_prior(prior)
    union = inside if inside.ndim == 2 else inside.any(1)
    size = union.sum(-1)
    patches = scores.shape[-1]
    wanted = k.long().clamp(0, patches) if isinstance(k, Tensor) else k  # P does not fit an int8
    wanted = wanted * (scores > -math.inf).any(-1)  # [B, R], an absent subject matches nothing
    # Per subject another's matches do not help: at least the neediest subject's rest remains.
    rest = (inside.sum(-1) - wanted).amax(-1) if per_subject and wanted.shape[1] else size - wanted.sum(-1)
    return FocusField(
        mask=fuse_focus(structure, coverage, complexity, prior, tau, gamma),
        structure=structure,
        complexity=complexity,
        coverage=coverage,
        prior=union,
        coverage_floor=rest.clamp_min(0).to(dtype) / size.clamp_min(1),
        all_matched=(wanted >= patches).any(-1),
    )


def estimate_alignment(
    prediction: Tensor, noised: Tensor, winner: Tensor, loser: Tensor, prediction_scale: Tensor, noised_scale: Tensor | None
) -> Tensor:
    """E10's s [B, P]: where the estimate of the clean winner stands between loser (0) and winner (1)."""
    dtype = accumulation_dtype(prediction.dtype)
    prediction, noised, winner, loser = (x.to(dtype) for x in (prediction, noised, winner, loser))
    rows = (-1, *[1] * (prediction.ndim - 1))
    if noised_scale is not None:
        noised = noised_scale.to(dtype).reshape(rows) * noised
    estimate = noised + prediction_scale.to(dtype).reshape(rows) * prediction
    direction = winner - loser
    inner, norm = (_token_sums(x) for x in ((estimate - loser) * direction, direction**2))
    return torch.where(norm == 0, 0.5, inner / torch.where(norm == 0, 1, norm))


def _token_sums(values: Tensor) -> Tensor:
    """[B, P] of [B, P, C], or of [B, C, H, W], whose tokens are 2x2 latents."""
    if values.ndim == 3:
        return values.sum(2)
    batch, _, height, width = values.shape
    return values.sum(1).reshape(batch, height // 2, 2, width // 2, 2).sum((2, 4)).flatten(1)


def position_weight(weight: Tensor, prediction: Tensor, mask_power: int) -> Tensor:
    """M^mask_power by position: [B, P] of tokens; of latents [B, H, W], also for M of 2x2 patches [B, P]. NaN where M < 0."""
    weight = without_negatives(weight, prediction)
    weight = weight if mask_power == 1 else weight**mask_power
    return _by_position(weight, prediction)


def without_negatives(weight: Tensor, prediction: Tensor) -> Tensor:
    """M in the dtype that a prediction's errors are added up in; NaN where it is negative."""
    weight = weight.to(accumulation_dtype(prediction.dtype))
    return weight.masked_fill(weight < 0, math.nan)


def _by_position(values: Tensor, prediction: Tensor) -> Tensor:
    """[B, P] of tokens, or [B, H, W] of latents, as they are; [B, P] of latents' 2x2 patches as [B, H, W]."""
    if prediction.ndim == 3 or values.ndim == 3:
        return values
    batch, _, height, width = prediction.shape
    return values.reshape(batch, height // 2, width // 2).repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)


def by_element(positions: Tensor, prediction: Tensor) -> Tensor:
    """Values by position shaped to broadcast over a prediction: [B, P, 1] for tokens, [B, 1, H, W] for latents."""
    return positions.unsqueeze(2 if prediction.ndim == 3 else 1)


def reduction_scale(mass: Tensor, elements: int, reduction: str) -> Tensor:
    """What a sample's sum of weighted errors is multiplied by, where its weights add up to `mass` over `elements`."""
    if reduction == "mean":
        return torch.full_like(mass, 1 / max(elements, 1))
    if reduction == "sum":
        return torch.ones_like(mass)
    return torch.where(mass == 0, 0, 1 / torch.where(mass == 0, 1, mass))


def preference_residual(
    predictions: Sequence[Tensor], weights: Sequence[Tensor], subjects: Tensor | None, reduction: str, mask_power: int
) -> PreferenceResidual:
    """E9's errors and the margin of E1, per sample, or per subject of a sample.

    predictions: as `Predictions`.
    weights: M of both sides, or of winner and loser; or none.
    subjects: where each is, bool [B, R, P] or [B, R, H, W], or None.
    """
    if subjects is not None:
        parts = []
        for shows in subjects.unbind(1):
            within = [without_negatives(weight, predictions[0]) * shows for weight in weights] or [shows]
            parts.append(preference_residual(predictions, within, None, reduction, mask_power))
        return PreferenceResidual(*(torch.stack(results, dim=1) for results in zip(*parts, strict=True)))
    policy = predictions[0]
    dtype = accumulation_dtype(policy.dtype)
    axes = tuple(range(1, policy.ndim))

    def side(predictions: Sequence[Tensor], weight: Tensor | None) -> tuple[Tensor, ...]:
        a, b, t = (x.to(dtype) for x in predictions)
        m = torch.ones_like(t) if weight is None else by_element(position_weight(weight, t, mask_power), t).expand_as(t)
        scale = reduction_scale(m.sum(axes), math.prod(t.shape[1:]), reduction)
        gradient = (m * (a - t)).detach()
        policy_error = (m * (a - t) ** 2).sum(axes) * scale
        reference_error = (m * (b - t) ** 2).sum(axes) * scale
        # (a - t)^2 - (b - t)^2, factored: no cancellation, and exactly 0 where policy and reference agree. Its gradient is
        # the policy error's; that of the factors would cancel. NaN where an error is infinite.
        factored = (m * (a - b) * (a + b - 2 * t)).sum(axes).detach() * scale
        difference = factored + (policy_error - policy_error.detach()) + (reference_error - reference_error)
        return policy_error, reference_error, difference, gradient, scale

    win, lose = (weights[0], weights[-1]) if weights else (None, None)
    win_policy, win_reference, win_difference, win_gradient, win_scale = side(predictions[::2], win)
    lose_policy, lose_reference, lose_difference, lose_gradient, lose_scale = side(predictions[1::2], lose)
    return PreferenceResidual(
        win_policy,
        lose_policy,
        win_reference,
        lose_reference,
        win_difference - lose_difference,
        (win_gradient**2).sum(axes) * win_scale**2,
        (win_gradient * lose_gradient).sum(axes) * win_scale * lose_scale,
    )


def error_gradients(
    policy_win: Tensor | None, policy_lose: Tensor | None, margin: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Incoming gradients [B] of the two policy errors, to which the margin's is added: it falls with the loser's error."""
    if margin is None:
        return policy_win, policy_lose
    return margin if policy_win is None else policy_win + margin, -margin if policy_lose is None else policy_lose - margin


def policy_gradients(
    grads: Sequence[Tensor | None],
    predictions: Sequence[Tensor],
    weights: Sequence[Tensor],
    subjects: Tensor | None,
    scales: Sequence[Tensor | float],
    mask_power: int,
) -> list[Tensor | None]:
    """Gradients with respect to policy_win and policy_lose; None where the error has none.

    grads: of the results policy_win, policy_lose and margin, [B] (with subjects [B, R]) or None.
    predictions: the policy's of winner and loser, then their targets.
    weights: M of both sides, or of winner and loser; or none.
    subjects: where each is, bytes or bool [B, R, P] or [B, R, H, W], or None.
    scales: of winner and loser, what the reduction multiplies by: as the grads, or a number.

    They are 0 where the incoming gradient is, also where an error is not finite.
    """
    results: list[Tensor | None] = [None, None]
    for side, incoming in enumerate(error_gradients(*grads)):
        if incoming is None:
            continue
        policy, target = predictions[side::2]
        dtype = accumulation_dtype(policy.dtype)
        scale = torch.as_tensor(scales[side], dtype=dtype, device=policy.device).expand_as(incoming)
        scale = scale.masked_fill((incoming == 0) & ~scale.isfinite(), 0)  # of a mask that is not a number
        factor = position_factor(incoming.to(dtype) * scale, subjects, policy)
        weight = None
        if weights:
            weight = by_element(position_weight(weights[side % len(weights)], policy, mask_power), policy)
        results[side] = side_gradient(factor, policy, target, weight)
    return results


def side_gradient(factor: Tensor, policy: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """2 factor M (policy - target), and 0 where the factor is, also where an error is not finite."""
    dtype = accumulation_dtype(policy.dtype)
    derivative = 2 * (policy.to(dtype) - target.to(dtype))
    if weight is not None:
        derivative = derivative * weight
    # What is finite stays: a factor of 0 has a derivative too.
    silent = (factor == 0) & ~derivative.isfinite()
    return (factor * derivative.masked_fill(silent, 0)).to(policy.dtype)


def position_factor(factors: Tensor, subjects: Tensor | None, prediction: Tensor) -> Tensor:
    """Factors of samples [B], or of their subjects [B, R] where these are, shaped to broadcast over a prediction."""
    if subjects is None:
        return factors.reshape(-1, *[1] * (prediction.ndim - 1))
    shown = (factors.reshape(*factors.shape, *[1] * (subjects.ndim - 2)) * subjects).sum(1)
    return by_element(_by_position(shown, prediction), prediction)
