"""The FocusDPO loss (docs/method.md, E1, E2, E9) and the loss family around it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from focusdpo.mask import FocusMask
from focusdpo_kernels.checks import REALS, check_choice, check_device, check_no_grad, check_number, check_shape, check_tensor
from focusdpo_kernels.reference import Predictions, PreferenceResidual, binary_prior
from focusdpo_kernels.residual import masked_residual

LOSS_TYPES = ("sigmoid", "ipo", "hinge", "sft")
LOSER_SCALES = (None, "sdpo", "sdpo_batch")


class FocusDPOOutput(NamedTuple):
    """What `focus_dpo_loss` returns. Only `loss` carries a gradient; the rest is for logging.

    loss: scalar. logits: [B], -(beta / 2) * w_t * margin. margin: [B]. The four errors: [B].
    accuracy: scalar, the share of pairs with a positive logit, ties counted as one half.
    present: None, or with `subjects` bool [B, R], those that a pair has; logits, margin and errors are [B, R] then, of each
    subject, and the accuracy is the mean over pairs of that over their subjects.
    """

    loss: Tensor
    logits: Tensor
    margin: Tensor
    policy_win: Tensor
    policy_lose: Tensor
    reference_win: Tensor
    reference_lose: Tensor
    accuracy: Tensor
    present: Tensor | None = None

    def by_pair(self, values: Tensor) -> Tensor:
        """Values of pairs [B] as they are, those of subjects [B, R] as the mean over a pair's subjects, [B]."""
        return values if self.present is None else _over_subjects(values, self.present)


def pair_accuracy(logits: Tensor) -> Tensor:
    """Whether each pair is told apart, of its logit: 1, 0, or one half for a tie; NaN of NaN. Same shape and dtype."""
    # The type's largest number, twice, makes even its smallest one large, and the sigmoid of that is 1 or 0; of 0 it is one
    # half. Comparisons would take two operations more.
    largest = torch.finfo(logits.dtype).max
    return torch.sigmoid(largest * (largest * logits))


def _over_subjects(values: Tensor, present: Tensor) -> Tensor:
    """The mean [B] over those subjects [B, R] that a pair has."""
    return values.masked_fill(~present, 0).sum(1) / present.sum(1).to(values.dtype)


def _mean(values: Tensor) -> Tensor:
    """The mean over pairs; an empty batch gives 0, not NaN."""
    return values.mean() if values.shape[0] else values.sum()


def _from_reference(policy_win: Tensor, policy_lose: Tensor, reference_win: Tensor, reference_lose: Tensor) -> Predictions:
    """What makes the kernel's errors of the policy its distance from the reference: whose predictions it should have made."""
    return Predictions(policy_win, policy_lose, reference_win, reference_lose, reference_win, reference_lose)


class Drift(NamedTuple):
    """How far the policy's predictions are from the reference model's: mean squares [B] over all elements of winner and loser,
    over those inside the prior, and those outside; 0 where there are none.
    """

    whole: Tensor
    inside: Tensor
    outside: Tensor


@torch.no_grad()
def prediction_drift(
    policy_win: Tensor,
    policy_lose: Tensor,
    reference_win: Tensor,
    reference_lose: Tensor,
    inside: Tensor,
    backend: str | None = None,
) -> Drift:
    """The drift |policy - reference|^2 of a pair's predictions.

    Args:
        policy_win, policy_lose, reference_win, reference_lose: as in `focus_dpo_loss`.
        inside: the tokens within the prior, bool [B, P].
        backend: "triton", "torch" or None; see `focusdpo_kernels.backend`.
    """
    values = _from_reference(policy_win, policy_lose, reference_win, reference_lose)
    regions = torch.stack([inside, ~inside, torch.ones_like(inside)], dim=1)
    found = masked_residual(values, {}, regions, reduction="masked_mean", backend=backend)
    inner, outer, whole = (0.5 * (found.policy_win + found.policy_lose)).unbind(1)
    return Drift(whole, inner, outer)


def convert_beta(beta: float, elements: int, *, source: str, target: str) -> float:
    """The beta of one `reduction` that gives the same loss as another's (docs/method.md, "Numerics").

    Args:
        beta: the beta used with reduction `source`.
        elements: P * C (or C * H * W), the elements of one sample's prediction; 65536 for FLUX.1 at 512 px.
        source, target: "mean" or "sum".

    Returns:
        The beta for reduction `target`: beta_mean 2000 is beta_sum 2000 / elements.

    Example:
        >>> convert_beta(2000.0, 65536, source="mean", target="sum")
        0.030517578125
    """
    check_choice("source", source, ("mean", "sum"))
    check_choice("target", target, ("mean", "sum"))
    if elements < 1:
        raise ValueError(f"elements: got {elements}; expected the number of elements of one prediction, at least 1")
    if source == target:
        return beta
    return beta / elements if target == "sum" else beta * elements


def _mask_of(focus: Tensor | FocusMask | None) -> Tensor | None:
    return focus.mask if isinstance(focus, FocusMask) else focus


def _per_sample(name: str, value: Tensor | None, policy: Tensor) -> Tensor | None:
    """A weight of pairs [B], checked; one made under inference_mode as a copy that autograd can keep."""
    if value is None:
        return None
    check_tensor(name, value, ndim=1, dtypes=REALS, layout="[B]")
    check_shape(name, value, (policy.shape[0],), "B of the predictions")
    check_device(name, value, policy.device, "policy_win")
    check_no_grad(name, value, "weights are constants of the loss")
    # A compiler cannot ask.
    return value.clone() if not torch.compiler.is_compiling() and value.is_inference() else value


def _weighted(values: Tensor, weight: Tensor | None) -> Tensor:
    """Values of pairs [B], or of their subjects [B, R], times a weight of pairs."""
    if weight is None:
        return values
    weight = weight.to(values.dtype)
    return values * (weight if values.ndim == 1 else weight[:, None])


def _logits(margin: Tensor, beta: float, timestep_weight: Tensor | None) -> Tensor:
    return -0.5 * beta * _weighted(margin, timestep_weight)


def focus_dpo_loss(
    policy_win: Tensor,
    policy_lose: Tensor,
    reference_win: Tensor,
    reference_lose: Tensor,
    target_win: Tensor,
    target_lose: Tensor,
    *,
    focus: Tensor | FocusMask | None = None,
    focus_lose: Tensor | FocusMask | None = None,
    subjects: Tensor | None = None,
    beta: float = 2000.0,
    timestep_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    mask_power: int = 1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    winner_anchor: float = 0.0,
    reference_anchor: float = 0.0,
    loser_scale: str | None = None,
    sdpo_mu: float = 0.0,
    backend: str | None = None,
) -> FocusDPOOutput:
    """Diffusion-DPO under a spatial focus mask: L = -mean_B log sigmoid(-(beta / 2) w_t margin) (E1, E9).

    With `focus=None` and the other defaults this is Diffusion-DPO as in the SDXL script of diffusers.

    Args:
        policy_win, policy_lose: the policy's predictions (noise or velocity), [B, P, C] tokens or [B, C, H, W] latents; fp16,
            bf16 or fp32 (float64 on the torch backend). Gradient reaches these two only.
        reference_win, reference_lose: the frozen reference model's predictions, same shape.
        target_win, target_lose: the true noise or velocity, same shape. Winner and loser share timestep and noise.
        focus: None (all ones), M [B, P] >= 0, or a FocusMask; latents take one value per 2x2 patch, or one per latent:
            M [B, H, W]. A negative entry gives NaN.
        focus_lose: the loser's own mask (`mask_from="each"`); None uses `focus` for both.
        subjects: None for one sigmoid for each pair. Where each subject is, as a prior per subject [B, R, P] (bool, integers
            that are not 0, floats above one half; of latents [B, R, H, W] where M is), gives each a margin and a sigmoid of its
            own, of M within it: one that is told apart leaves the other its gradient (E1'). A pair's loss is the mean over its
            subjects, and those whose prior is empty take no part; so are its anchor and its factors of "sdpo" each subject's.
        beta: strength of the preference, for the chosen reduction; see `convert_beta`.
        timestep_weight: w_t [B] inside the sigmoid; None is 1, (1 - t)^2 turns velocity errors into noise errors (E2).
        sample_weight: [B], multiplies each pair's loss before the mean over the batch. A pair of weight 0 takes no part, also
            where its errors are not finite: its gradient is exactly 0.
        reduction: "mean" over P*C, "sum", or "masked_mean"; see `focusdpo_kernels.preference_residual`.
        mask_power: 1, or 2 to put the mask inside the norm.
        loss_type: "sigmoid"; "hinge", max(0, 1 - logit); "ipo", (2 logit / beta - 1 / beta)^2; "sft", w_t e_pol(win),
            supervised fine-tuning on winners: without a reference_anchor no gradient is computed for policy_lose, its `grad`
            stays None.
        label_smoothing: cDPO, the assumed share of flipped pairs in [0, 0.5); with "sigmoid" only.
        winner_anchor: alpha >= 0, adds alpha * e_pol(win) to keep the winner's error from rising.
        reference_anchor: alpha >= 0, adds alpha / 2 times the sum over winner and loser of the mean squared difference between
            policy and reference, without mask and w_t, to keep the policy near (SimpleTuner's `anchor_alpha`).
        loser_scale: None, or "sdpo" (arXiv 2511.03317): scales the loser's gradient by
            min(1, (1 - sdpo_mu) |g_w|^2 / <g_w, g_l>) where the inner product is positive, so that to first order in output
            space the step does not raise the winner's error. The loss value stays the same. "sdpo_batch" takes both products
            over the whole batch, so that all its pairs share one factor, as the authors' code does.
        sdpo_mu: the share of the winner's descent to keep, 0 to 1.
        backend: "triton", "torch" or None; see `focusdpo_kernels.backend`.

    Returns:
        FocusDPOOutput; the loss is fp32 (float64 for float64 predictions), also under autocast. An empty batch or an
        all-zero mask gives a finite loss and zero gradient.

    Raises:
        TypeError, ValueError: arguments of wrong type, shape, dtype, device or range, or a reference, target, mask or weight
            that requires grad; each named.
    """
    check_choice("loss_type", loss_type, LOSS_TYPES)
    check_choice("loser_scale", loser_scale, LOSER_SCALES)
    numbers = {"beta": beta, "label_smoothing": label_smoothing, "winner_anchor": winner_anchor}
    for name, number in {**numbers, "reference_anchor": reference_anchor, "sdpo_mu": sdpo_mu}.items():
        check_number(name, number)
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta: got {beta!r}; expected a positive number (2000 for reduction='mean' is a usual start)")
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing: got {label_smoothing!r}; expected 0 <= label_smoothing < 0.5")
    if label_smoothing and loss_type != "sigmoid":
        raise ValueError(f"label_smoothing: {label_smoothing!r} works with loss_type='sigmoid' only, got {loss_type!r}")
    for name, anchor in (("winner_anchor", winner_anchor), ("reference_anchor", reference_anchor)):
        if not 0.0 <= anchor < float("inf"):
            raise ValueError(f"{name}: got {anchor!r}; expected a number >= 0")
    if not 0.0 <= sdpo_mu <= 1.0:
        raise ValueError(f"sdpo_mu: got {sdpo_mu!r}; expected a number from 0 to 1")
    if subjects is not None and loss_type == "sft":
        raise ValueError("subjects: given with loss_type='sft', which has no sigmoid; leave them out")
    if isinstance(policy_win, Tensor) and policy_win.ndim:  # else policy_win itself is refused below
        timestep_weight = _per_sample("timestep_weight", timestep_weight, policy_win)
        sample_weight = _per_sample("sample_weight", sample_weight, policy_win)
    silent = None if sample_weight is None else sample_weight == 0
    preferred_lose = policy_lose
    if loss_type == "sft" and isinstance(policy_lose, Tensor):
        # Both backends then leave the loser out of the backward pass; otherwise the kernel would send zeros through the model.
        preferred_lose = policy_lose.detach()
    measured = masked_residual(
        Predictions(policy_win, preferred_lose, reference_win, reference_lose, target_win, target_lose),
        {"focus": _mask_of(focus), "focus_lose": _mask_of(focus_lose)},
        subjects,
        silent=silent,
        reduction=reduction,
        mask_power=mask_power,
        backend=backend,
    )
    # Zeros, which carry no gradient, for the pairs that take no part.
    quiet = silent if silent is None or subjects is None else silent[:, None]
    residual = measured if quiet is None else PreferenceResidual(*(x.masked_fill(quiet, 0) for x in measured))
    present = None
    if subjects is not None:
        present = binary_prior(subjects).flatten(2).any(2)
        present = present | ~present.any(1, keepdim=True)  # a pair of empty priors has a loss of ln 2 as well

    margin = residual.margin
    if loser_scale is not None:
        norm, inner = residual.winner_norm, residual.inner
        if loser_scale == "sdpo_batch":
            norm, inner = norm.sum(), inner.sum()
        aligned = inner > 0
        scale = (1 - sdpo_mu) * norm / torch.where(aligned, inner, 1)
        scale = torch.where(aligned, scale.clamp(max=1), 1)
        # Adds exactly zero to the value and takes (1 - scale) of the loser's gradient back.
        margin = margin + (1 - scale) * (residual.policy_lose - residual.policy_lose.detach())
    logits = _logits(margin, beta, timestep_weight)
    if loss_type == "sigmoid":
        losses = (label_smoothing - 1) * F.logsigmoid(logits)
        if label_smoothing:
            losses = losses - label_smoothing * F.logsigmoid(-logits)
    elif loss_type == "hinge":
        losses = torch.relu(1 - logits)
    elif loss_type == "ipo":
        losses = (2 / beta * logits - 1 / beta) ** 2
    else:
        losses = _weighted(residual.policy_win, timestep_weight)
    if winner_anchor:
        losses = losses + winner_anchor * residual.policy_win
    if present is not None:
        losses = _over_subjects(losses, present)
    if reference_anchor:
        moved = _from_reference(policy_win, policy_lose, reference_win, reference_lose)
        drift = masked_residual(moved, {}, silent=silent, backend=backend)
        losses = losses + 0.5 * reference_anchor * (drift.policy_win + drift.policy_lose)
    if sample_weight is not None and silent is not None:
        losses = (losses * sample_weight.to(losses.dtype)).masked_fill(silent, 0)

    # A pair's logit and errors are reported whatever its weight.
    logits = logits.detach() if silent is None else _logits(measured.margin.detach(), beta, timestep_weight)
    accuracy = pair_accuracy(logits)
    return FocusDPOOutput(
        _mean(losses),
        logits,
        measured.margin.detach(),
        measured.policy_win.detach(),
        measured.policy_lose.detach(),
        measured.reference_win,
        measured.reference_lose,
        _mean(accuracy if present is None else _over_subjects(accuracy, present)),
        present,
    )
