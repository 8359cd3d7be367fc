"""One preference step: from a batch of pairs to the loss, the same for training and for evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

from focusdpo.data import PairBatch
from focusdpo.data.images import PATCH_SIZE
from focusdpo.features import SimilarityTap, covered_share, pool_mask, reference_token_mask
from focusdpo.loss import Drift, FocusDPOOutput, focus_dpo_loss, prediction_drift
from focusdpo.mask import FocusMask, focus_mask
from focusdpo.models import Backbone
from focusdpo.models.conditioning import Conditioner, Conditioning, Prompted
from focusdpo.training.adapter import reference_model
from focusdpo.training.config import FocusConfig, LossConfig
from focusdpo.training.times import at_times, draw_times
from focusdpo_kernels import estimate_alignment

Which = Literal["policy", "reference"]


@dataclass(frozen=True)
class StepResult:
    """Of one batch: loss and logged quantities, masks (None unless `focus.mask` is "focus"), times t [B], and how far the
    policy is from the reference model.
    """

    output: FocusDPOOutput
    focus: FocusMask | None
    t: Tensor
    drift: Drift


@dataclass(frozen=True)
class Noised(Conditioning):
    """A batch at its times: everything the two models see, winner and loser as one batch [2B, ...].

    clean: what `tokens` are the noised of. draws: a number for each token of a pair [B, P], where a mask takes some at random.
    """

    tokens: Tensor
    target: Tensor
    t: Tensor
    clean: Tensor
    draws: Tensor | None


@dataclass(frozen=True)
class ModelOutput:
    """What the policy or the reference model makes of a noised batch.

    prediction: [2B, P, C]. scores: S [B, R, P] of its features, or [2B, R, P] for a mask from each image; None where the mask
    is not made of this model's.
    """

    prediction: Tensor
    scores: Tensor | None

    def to(self, device: torch.device | str) -> ModelOutput:
        return ModelOutput(self.prediction.to(device), None if self.scores is None else self.scores.to(device))


class PreferenceStep:
    """Computes the FocusDPO loss of a batch.

    All that looks at a model goes one way: `noise` brings pairs to their times, `predict` runs the policy or the reference
    model on them, taps that `tap` makes listen meanwhile, and `compare` takes the loss. `__call__` is all of it.

    Args:
        backbone: whose transformer carries the adapter.
        focus, loss: settings.
        backend: of the kernels.
    """

    def __init__(self, backbone: Backbone, focus: FocusConfig, loss: LossConfig, backend: str | None = None) -> None:
        self.backbone = backbone
        self.focus = focus
        self.loss = loss
        self.beta = loss.beta  # may be changed between steps
        self.backend = backend
        self.paths = tapped_paths(backbone, focus)
        # The tap and the switch of the adapter need the module itself; `backbone.transformer` may get wrapped later.
        self._module: Any = backbone.transformer
        self._conditioner = Conditioner(backbone)

    def __call__(
        self,
        batch: PairBatch,
        generator: torch.Generator | Sequence[torch.Generator],
        t: Tensor | None = None,
        reference: ModelOutput | None = None,
        round_robin: Sequence[int] | None = None,
    ) -> StepResult:
        """The loss of a batch.

        Args:
            batch: pairs, on the model's device.
            generator, t, round_robin: of times and noise, see `noise`.
            reference: what `reference_output` gave for the same pairs, times and noise; None computes it.
        """
        return self.compare(self.noise(batch, generator, t, round_robin), batch, reference)

    @torch.no_grad()
    def noise(
        self,
        batch: PairBatch,
        generator: torch.Generator | Sequence[torch.Generator],
        t: Tensor | None = None,
        round_robin: Sequence[int] | None = None,
    ) -> Noised:
        """Encodes a batch and brings winner and loser to the same times with the same noise (E2).

        Args:
            batch: pairs, on the model's device.
            generator: CPU generator of times and noise, which are then the same on every device; or one for each pair.
            t: times [B]; None draws them as `loss.times` says.
            round_robin: places of the pairs in the round robin, where listed times go in turn; None counts from 0.
        """
        pairs = len(batch.prompts)
        draws = [(generator, pairs)] if isinstance(generator, torch.Generator) else [(own, 1) for own in generator]
        clean, given = self._clean(batch), self.condition(batch)  # [2B, P, C]
        if t is None:
            numbers = iter(range(pairs) if round_robin is None else round_robin)
            shift = self.backbone.training_shift(given.layout.num_target) if self.loss.shift == "auto" else self.loss.shift
            t = torch.cat([draw_times(self.loss, own, list(islice(numbers, count)), shift) for own, count in draws])
        noise = torch.cat([torch.randn(count, *clean.shape[1:], generator=own) for own, count in draws])
        scattered = _draws_of(noise).to(clean.device) if self.focus.source == "random" else None
        noise = noise.to(clean.device).repeat(2, 1, 1)
        t = t.to(clean.device).repeat(2)
        tokens, target = at_times(clean, noise, t)
        return Noised(
            tokens=tokens,
            target=target,
            t=t,
            clean=clean,
            draws=scattered,
            references=given.references.repeat(2, 1, 1),
            prompts=given.prompts.repeat(2),
            layout=given.layout,
        )

    def predict(self, noised: Noised, taps: Iterable[SimilarityTap] = (), which: Which = "policy") -> Tensor:
        """The model's prediction [2B, P, C] of a noised batch, while taps listen; of the reference model without gradient."""
        with ExitStack() as stack:
            if which == "reference":
                stack.enter_context(torch.no_grad())
                stack.enter_context(reference_model(self._module))
            for tap in taps:
                stack.enter_context(tap)
            return self.backbone.predict(noised.tokens, noised.t, noised.prompts, noised.references, noised.layout)

    def tap(
        self,
        noised: Noised,
        batch: PairBatch,
        paths: Sequence[str] | None = None,
        pooling: str | None = None,
        each: bool = False,
    ) -> SimilarityTap:
        """What listens to one forward pass and gives S.

        Args:
            noised, batch: what the pass is of.
            paths: of the blocks whose similarities are averaged; None takes the run's own.
            pooling: "reference" (E4) or "max" (E4'); None takes the run's own.
            each: S of winners and losers [2B, R, P] instead of the winners' alone [B, R, P].
        """
        reference_mask = reference_token_mask(batch.reference_masks)
        return SimilarityTap(
            self._module,
            self.paths if paths is None else paths,
            image_tokens=self.backbone.image_tokens,
            num_target=noised.layout.num_target,
            reference_mask=reference_mask.repeat(2, 1, 1) if each else reference_mask,
            rows=slice(None) if each else slice(0, reference_mask.shape[0]),
            pooling=self.focus.pooling if pooling is None else pooling,
            backend=self.backend,
        )

    def reference_output(self, noised: Noised, batch: PairBatch) -> ModelOutput:
        """Runs the reference model on a noised batch."""
        taps = self._taps_of_mask(noised, batch, "reference")
        prediction = self.predict(noised, taps, "reference")
        return ModelOutput(prediction, taps[0].scores() if taps else None)

    @torch.no_grad()
    def predictions(
        self, noised: Noised, batch: PairBatch, reference: ModelOutput | None = None
    ) -> tuple[Tensor, ModelOutput, FocusMask]:
        """Policy's and reference model's predictions [2B, P, C] of a noised batch, and the winners' focus mask.

        The mask is that of the run's settings, also where its loss has another or none.

        Args:
            noised, batch: the pairs.
            reference: what an earlier call gave for the same pairs, times and noise; None computes it.
        """
        listens = [self.focus.feature_source] if self.focus.reads_features else []

        def look(which: Which) -> ModelOutput:
            taps = [self.tap(noised, batch) for source in listens if source == which]
            prediction = self.predict(noised, taps, which)
            return ModelOutput(prediction, taps[0].scores() if taps else None)

        reference = look("reference") if reference is None else reference
        policy = look("policy")
        seen = policy if self.focus.feature_source == "policy" else reference
        return policy.prediction, reference, self._winners_mask(noised, batch, seen.scores, seen.prediction)

    @torch.no_grad()
    def masks(
        self, batch: PairBatch, t: float, seed: int, groups: Mapping[str, Sequence[str]] | None = None
    ) -> dict[str, FocusMask]:
        """The winners' focus masks at one time by group of blocks, of one forward pass of the model that they look at.

        Args:
            batch: the pairs.
            t: the time of all of them.
            seed: of the noise, which is the same at each time.
            groups: paths of the blocks whose similarities are averaged, by any name; None takes the run's own, as "all". Where
                the mask is not made of hidden states, it is the same for all.
        """
        noised = self.noise(batch, torch.Generator().manual_seed(seed), torch.full((len(batch.prompts),), t))
        groups = groups or {"all": self.paths}
        taps = {}
        if self.focus.reads_features:
            taps = {name: self.tap(noised, batch, paths) for name, paths in groups.items()}
        prediction = self.predict(noised, taps.values(), self.focus.feature_source)
        found = {name: tap.scores() for name, tap in taps.items()}
        return {name: self._winners_mask(noised, batch, found.get(name), prediction) for name in groups}

    def _winners_mask(self, noised: Noised, batch: PairBatch, scores: Tensor | None, prediction: Tensor) -> FocusMask:
        scores = self._scores(noised, batch, prediction) if scores is None else scores
        return self.mask_of(scores[: noised.tokens.shape[0] // 2], batch, draws=noised.draws)

    def _scores(self, noised: Noised, batch: PairBatch, prediction: Tensor) -> Tensor:
        """What the mask is made of beside hidden states: of winners s [B, P] of an estimate (E10), or of winners, then losers
        the share of each token that a subject's own prior covers [2B, R, P].
        """
        if self.focus.source == "truth":
            covered = covered_share(batch.prior)
            return covered.masked_fill(covered == 0, -math.inf).repeat(2, 1, 1)
        pairs = noised.tokens.shape[0] // 2
        seen, tokens, t = (x[:pairs].detach() for x in (prediction, noised.tokens, noised.t))
        winner, loser = noised.clean.chunk(2)
        return estimate_alignment(seen, tokens, winner, loser, -t, backend=self.backend)

    def mask_of(self, scores: Tensor, batch: PairBatch, loser: bool = False, draws: Tensor | None = None) -> FocusMask:
        """The focus mask of similarity S [B, R, P], whichever blocks it is of, or of an estimate's s [B, P].

        Args:
            scores: of the winners, or of the losers.
            batch: the pairs.
            loser: whether the mask is for the losers.
            draws: see `focusdpo.focus_mask`.
        """
        focus = self.focus
        found = focus_mask(
            scores,
            pool_mask(batch.prior),
            batch.loser if loser else batch.winner,
            source="features" if focus.source == "truth" else focus.source,
            reference_mask=reference_token_mask(batch.reference_masks),
            match_count=focus.match_count,
            per_subject=focus.per_subject,
            kappa=focus.kappa,
            draws=draws,
            tau=focus.tau,
            gamma=focus.gamma,
            patch_size=PATCH_SIZE,
            entropy_method=focus.entropy_method,
            entropy_bins=focus.entropy_bins,
            entropy_sigma=focus.entropy_sigma,
            check_range=False,  # pixels come from 8-bit files
            backend=self.backend,
        )
        return replace(found, source=focus.source)

    def compare(self, noised: Noised, batch: PairBatch, reference: ModelOutput | None = None) -> StepResult:
        """Runs reference and policy on a noised batch, forms the mask and takes the loss.

        Args:
            noised: tokens and conditioning of the batch.
            batch: the pairs themselves: the mask looks at their pixels, priors and reference masks.
            reference: what `reference_output` gave for it; None computes it.
        """
        if reference is None:
            reference = self.reference_output(noised, batch)
        taps = self._taps_of_mask(noised, batch, "policy")
        policy = self.predict(noised, taps)
        pairs = noised.tokens.shape[0] // 2
        prior = pool_mask(batch.prior)
        inside = prior if prior.ndim == 2 else prior.any(1)
        focus, mask, mask_lose = None, None, None
        if self.focus.mask == "prior":
            mask = inside
        elif self.focus.mask == "focus":
            scores = taps[0].scores() if taps else reference.scores
            if scores is None:
                seen = policy if self.focus.feature_source == "policy" else reference.prediction
                scores = self._scores(noised, batch, seen)
            focus = self.mask_of(scores[:pairs], batch, draws=noised.draws)
            mask = focus.mask
            if self.focus.mask_from == "each":
                mask_lose = self.mask_of(scores[pairs:], batch, loser=True, draws=noised.draws).mask

        loss = self.loss
        times = noised.t[:pairs]
        win, lose = policy.chunk(2)
        reference_win, reference_lose = reference.prediction.chunk(2)
        output = focus_dpo_loss(
            win,
            lose,
            reference_win,
            reference_lose,
            noised.target[:pairs],
            noised.target[pairs:],
            focus=mask,
            focus_lose=mask_lose,
            subjects=prior if loss.granularity == "subject" else None,
            beta=self.beta,
            timestep_weight=(1 - times) ** 2 if loss.timestep_weight == "noise" else None,
            reduction=loss.reduction,
            mask_power=loss.mask_power,
            loss_type=loss.loss_type,
            label_smoothing=loss.label_smoothing,
            winner_anchor=loss.winner_anchor,
            reference_anchor=loss.reference_anchor,
            loser_scale=loss.loser_scale,
            sdpo_mu=loss.sdpo_mu,
            backend=self.backend,
        )
        drift = prediction_drift(win, lose, reference_win, reference_lose, inside, self.backend)
        return StepResult(output, focus, times, drift)

    def _taps_of_mask(self, noised: Noised, batch: PairBatch, which: Which) -> list[SimilarityTap]:
        """The tap of the loss's own mask, if it has one and this model gives the features."""
        if not self.focus.taps_features or self.focus.feature_source != which:
            return []
        return [self.tap(noised, batch, each=self.focus.mask_from == "each")]

    def condition(self, batch: Prompted) -> Conditioning:
        """References and prompts of a batch, encoded or as they were kept, on the model's device."""
        return self._conditioner.condition(batch)

    def _clean(self, batch: PairBatch) -> Tensor:
        """Clean tokens of winners and losers, fp32 [2B, P, C]."""
        if batch.encodings:
            clean = torch.stack([kept.winner for kept in batch.encodings] + [kept.loser for kept in batch.encodings])
            return clean.to(self.backbone.device).float()
        return self._conditioner.encode(torch.cat([batch.winner, batch.loser])).float()


def _draws_of(noise: Tensor) -> Tensor:
    """Random numbers for the tokens of each pair, [B, P], seeded by its noise [B, P, C] on the CPU: what draws times and noise
    goes on as without them, so that a run with another mask sees the same.
    """
    seeds = noise[:, 0, 0].contiguous().view(torch.int32).tolist()
    return torch.stack([torch.rand(noise.shape[1], generator=torch.Generator().manual_seed(seed % 2**32)) for seed in seeds])


def tapped_paths(backbone: Backbone, focus: FocusConfig) -> list[str]:
    """Paths of the tapped blocks; ValueError for a number that the model does not have."""
    paths = backbone.tap_paths()
    if focus.layers == "all":
        return paths
    for layer in focus.layers:
        if not 0 <= layer < len(paths):
            raise ValueError(f"focus.layers: the model has blocks 0 to {len(paths) - 1}, got {layer}")
    return [paths[layer] for layer in focus.layers]
