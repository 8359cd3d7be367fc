"""One preference step: from a batch of pairs to the loss, the same for training and for evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Tensor

from focusdpo.data import PairBatch
from focusdpo.data.images import PATCH_SIZE
from focusdpo.features import SimilarityTap, pool_mask, reference_token_mask
from focusdpo.loss import FocusDPOOutput, focus_dpo_loss
from focusdpo.mask import FocusMask, focus_mask
from focusdpo.models import Backbone, PromptEmbeddings, TokenLayout
from focusdpo.training.adapter import reference_model
from focusdpo.training.config import FocusConfig, LossConfig

KEPT_PROMPTS = 256  # 4 MiB each for FLUX.1 in bf16


@dataclass(frozen=True)
class StepResult:
    """Loss and logged quantities of one batch, the masks (None unless `focus.mask` is "focus"), and the times t [B]."""

    output: FocusDPOOutput
    focus: FocusMask | None
    t: Tensor


@dataclass(frozen=True)
class Conditioning:
    """What the model is given beside the target: reference tokens [B, Q, C], text, and the grids of all images."""

    references: Tensor
    prompts: PromptEmbeddings
    layout: TokenLayout


@dataclass(frozen=True)
class Noised:
    """A batch at its times: everything the two models see, winner and loser as one batch [2B, ...]."""

    tokens: Tensor
    target: Tensor
    t: Tensor
    references: Tensor
    prompts: PromptEmbeddings
    layout: TokenLayout


@dataclass(frozen=True)
class Reference:
    """What the reference model makes of a noised batch.

    prediction: [2B, P, C]. scores: S [B, R, P] of its features, or [2B, R, P] for a mask from each image; None where the mask
    is made of the policy's.
    """

    prediction: Tensor
    scores: Tensor | None


class PreferenceStep:
    """Computes the FocusDPO loss of a batch.

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
        self._prompts: dict[tuple[str, ...], PromptEmbeddings] = {}

    def sample_times(self, batch: int, generator: torch.Generator) -> Tensor:
        """Logit-normal t in (0, 1), [B]."""
        return compute_density_for_timestep_sampling(
            "logit_normal", batch, logit_mean=self.loss.logit_mean, logit_std=self.loss.logit_std, generator=generator
        )

    def __call__(
        self,
        batch: PairBatch,
        generator: torch.Generator | Sequence[torch.Generator],
        t: Tensor | None = None,
        reference: Reference | None = None,
    ) -> StepResult:
        """The loss of a batch.

        Args:
            batch: pairs, on the model's device.
            generator: CPU generator of times and noise, which are then the same on every device; or one for each pair.
            t: times [B]; None draws them.
            reference: what `reference` gave for the same pairs, times and noise; None computes it.
        """
        return self.compare(self.noise(batch, generator, t), batch, reference)

    @torch.no_grad()
    def reference(self, noised: Noised, batch: PairBatch) -> Reference:
        """Runs the reference model on a noised batch."""
        tapped = self.focus.mask == "focus" and self.focus.feature_source == "reference"
        tap = self._tap(noised.layout, reference_token_mask(batch.reference_masks)) if tapped else None
        with reference_model(self._module), nullcontext() if tap is None else tap:
            prediction = self._predict(noised)
        return Reference(prediction, None if tap is None else tap.scores())

    @torch.no_grad()
    def tapped_scores(
        self, noised: Noised, batch: PairBatch, groups: Mapping[str, Sequence[str]], pooling: str = "reference"
    ) -> dict[str, Tensor]:
        """S [B, R, P] of the winners by group of blocks, of one forward pass of the model that `focus.feature_source` names.

        Args:
            noised: tokens and conditioning of the batch.
            batch: the pairs themselves.
            groups: paths of the blocks whose similarities are averaged, by any name.
            pooling: "reference" (E4) or "max" (E4').
        """
        reference_mask = reference_token_mask(batch.reference_masks)
        from_reference = self.focus.feature_source == "reference"
        with ExitStack() as stack:
            if from_reference:
                stack.enter_context(reference_model(self._module))
            taps = {
                name: stack.enter_context(self._tap(noised.layout, reference_mask, paths, pooling, each=False))
                for name, paths in groups.items()
            }
            self._predict(noised)
        return {name: tap.scores() for name, tap in taps.items()}

    @torch.no_grad()
    def predictions(self, noised: Noised, batch: PairBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Policy's and reference model's predictions [2B, P, C] of a noised batch, and S [B, R, P] of the winners.

        S is of the run's blocks and of the model that `focus.feature_source` names, whatever mask the run has.
        """
        tap = self._tap(noised.layout, reference_token_mask(batch.reference_masks), each=False)
        from_reference = self.focus.feature_source == "reference"
        with reference_model(self._module), tap if from_reference else nullcontext():
            reference = self._predict(noised)
        with nullcontext() if from_reference else tap:
            policy = self._predict(noised)
        return policy, reference, tap.scores()

    def mask_of(self, scores: Tensor, batch: PairBatch) -> FocusMask:
        """The winners' focus mask of similarity S [B, R, P], whichever blocks it is of."""
        return self._mask(scores, pool_mask(batch.prior), batch.winner, reference_token_mask(batch.reference_masks))

    def compare(self, noised: Noised, batch: PairBatch, reference: Reference | None = None) -> StepResult:
        """Runs reference and policy on a noised batch, forms the mask and takes the loss.

        Args:
            noised: tokens and conditioning of the batch.
            batch: the pairs themselves: the mask looks at their pixels, priors and reference masks.
            reference: as above.
        """
        if reference is None:
            reference = self.reference(noised, batch)
        pairs = noised.tokens.shape[0] // 2
        reference_mask = reference_token_mask(batch.reference_masks)
        prior = pool_mask(batch.prior)
        tapped = self.focus.mask == "focus" and self.focus.feature_source == "policy"
        tap = self._tap(noised.layout, reference_mask) if tapped else None
        with nullcontext() if tap is None else tap:
            policy = self._predict(noised)
        scores = reference.scores if tap is None else tap.scores()

        focus, focus_lose = None, None
        masks: tuple[Tensor | FocusMask | None, Tensor | FocusMask | None] = (None, None)
        if scores is not None:
            focus = self._mask(scores[:pairs], prior, batch.winner, reference_mask)
            if self.focus.mask_from == "each":
                focus_lose = self._mask(scores[pairs:], prior, batch.loser, reference_mask)
            masks = (focus, focus_lose)
        elif self.focus.mask == "prior":
            masks = ((prior if prior.ndim == 2 else prior.any(1)).float(), None)

        loss = self.loss
        times = noised.t[:pairs]
        output = focus_dpo_loss(
            policy[:pairs],
            policy[pairs:],
            reference.prediction[:pairs],
            reference.prediction[pairs:],
            noised.target[:pairs],
            noised.target[pairs:],
            focus=masks[0],
            focus_lose=masks[1],
            beta=self.beta,
            timestep_weight=(1 - times) ** 2 if loss.timestep_weight == "noise" else None,
            reduction=loss.reduction,
            mask_power=loss.mask_power,
            loss_type=loss.loss_type,
            label_smoothing=loss.label_smoothing,
            winner_anchor=loss.winner_anchor,
            loser_scale=loss.loser_scale,
            sdpo_mu=loss.sdpo_mu,
            backend=self.backend,
        )
        return StepResult(output, focus, times)

    @torch.no_grad()
    def noise(
        self, batch: PairBatch, generator: torch.Generator | Sequence[torch.Generator], t: Tensor | None = None
    ) -> Noised:
        """Encodes a batch and brings winner and loser to the same times with the same noise (E2)."""
        pairs = len(batch.prompts)
        draws = [(generator, pairs)] if isinstance(generator, torch.Generator) else [(own, 1) for own in generator]
        if t is None:
            t = torch.cat([self.sample_times(count, own) for own, count in draws])
        clean, given = self._clean(batch), self.condition(batch)  # [2B, P, C]
        noise = torch.cat([torch.randn(count, *clean.shape[1:], generator=own) for own, count in draws])
        noise = noise.to(clean.device).repeat(2, 1, 1)
        t = t.to(clean.device).repeat(2)
        tokens = (1 - t[:, None, None]) * clean + t[:, None, None] * noise
        return Noised(
            tokens=tokens,
            target=noise - clean,
            t=t,
            references=given.references.repeat(2, 1, 1),
            prompts=given.prompts.repeat(2),
            layout=given.layout,
        )

    @torch.no_grad()
    def condition(self, batch: PairBatch) -> Conditioning:
        """References and prompts of a batch, encoded or as they were kept, on the model's device."""
        if batch.encodings:
            references = torch.stack([torch.cat(kept.references) for kept in batch.encodings]).to(self.backbone.device)
        else:
            references = torch.cat([self._encode(images) for images in batch.references], dim=1)
        grids = [image.shape[-2:] for image in (batch.winner, *batch.references)]
        target, *others = [(height // PATCH_SIZE, width // PATCH_SIZE) for height, width in grids]
        return Conditioning(references, self._embed(batch), TokenLayout(target, tuple(others)))

    def _clean(self, batch: PairBatch) -> Tensor:
        """Clean tokens of winners and losers, fp32 [2B, P, C]."""
        if batch.encodings:
            clean = torch.stack([kept.winner for kept in batch.encodings] + [kept.loser for kept in batch.encodings])
            return clean.to(self.backbone.device).float()
        return self._encode(torch.cat([batch.winner, batch.loser])).float()

    def _encode(self, images: Tensor) -> Tensor:
        """One by one, as data.cache keeps them: convolutions sum in another order in a batch of another size."""
        return torch.cat([self.backbone.encode_images(image[None]) for image in images])

    def _predict(self, noised: Noised) -> Tensor:
        return self.backbone.predict(noised.tokens, noised.t, noised.prompts, noised.references, noised.layout)

    def _tap(
        self,
        layout: TokenLayout,
        reference_mask: Tensor,
        paths: Sequence[str] | None = None,
        pooling: str = "reference",
        each: bool | None = None,
    ) -> SimilarityTap:
        """A tap of the run's own blocks, or of others; of the winners alone, or of winners and losers (`each`)."""
        each = self.focus.mask_from == "each" if each is None else each
        return SimilarityTap(
            self._module,
            self.paths if paths is None else paths,
            image_tokens=self.backbone.image_tokens,
            num_target=layout.num_target,
            reference_mask=reference_mask.repeat(2, 1, 1) if each else reference_mask,
            rows=slice(None) if each else slice(0, reference_mask.shape[0]),
            pooling=pooling,
            backend=self.backend,
        )

    def _mask(self, scores: Tensor, prior: Tensor, images: Tensor, reference_mask: Tensor) -> FocusMask:
        focus = self.focus
        return focus_mask(
            scores,
            prior,
            images,
            reference_mask=reference_mask,
            match_count=focus.match_count,
            per_subject=focus.per_subject,
            tau=focus.tau,
            gamma=focus.gamma,
            patch_size=PATCH_SIZE,
            entropy_method=focus.entropy_method,
            entropy_bins=focus.entropy_bins,
            entropy_sigma=focus.entropy_sigma,
            check_range=False,  # pixels come from 8-bit files
            backend=self.backend,
        )

    def _embed(self, batch: PairBatch) -> PromptEmbeddings:
        """Text conditioning; what was used last is kept on the CPU, by prompt and by what its encoder saw of the references."""
        if batch.encodings:
            kept = [PromptEmbeddings({name: x[None] for name, x in one.prompt.items()}) for one in batch.encodings]
            return PromptEmbeddings.stack(kept).to(self.backbone.device, self.backbone.dtype)
        references = batch.references if self.backbone.prompts_see_references else ()
        embeddings = []
        for i, prompt in enumerate(batch.prompts):
            seen = [images[i : i + 1] for images in references]
            key = (prompt, *map(_fingerprint, seen))
            known = self._prompts.pop(key, None)
            if known is None:
                known = self.backbone.encode_prompts([prompt], seen).to(torch.device("cpu"), self.backbone.dtype)
            self._prompts[key] = known  # last: the order is that of use
            embeddings.append(known)
        while len(self._prompts) > KEPT_PROMPTS:
            del self._prompts[next(iter(self._prompts))]
        return PromptEmbeddings.stack(embeddings).to(self.backbone.device, self.backbone.dtype)


def _fingerprint(image: Tensor) -> str:
    return hashlib.sha256(str(tuple(image.shape)).encode() + image.cpu().numpy().tobytes()).hexdigest()


def tapped_paths(backbone: Backbone, focus: FocusConfig) -> list[str]:
    """Paths of the tapped blocks; ValueError for a number that the model does not have."""
    paths = backbone.tap_paths()
    if focus.layers == "all":
        return paths
    for layer in focus.layers:
        if not 0 <= layer < len(paths):
            raise ValueError(f"focus.layers: the model has blocks 0 to {len(paths) - 1}, got {layer}")
    return [paths[layer] for layer in focus.layers]
