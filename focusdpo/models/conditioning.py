"""What a model is given beside the target: prompts and references, encoded or as they were kept."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from focusdpo.data.dataset import PromptEncodings
from focusdpo.data.images import PATCH_SIZE, Size
from focusdpo.models.base import Backbone, PromptEmbeddings, TokenLayout

KEPT_PROMPTS = 256  # 4 MiB each for FLUX.1 in bf16


class Prompted(Protocol):
    """What is looked at of a batch of pairs or prompts; see `PairBatch` and `PromptBatch` of `focusdpo.data`."""

    @property
    def prompts(self) -> list[str]: ...
    @property
    def target(self) -> Size: ...
    @property
    def references(self) -> tuple[Tensor, ...]: ...
    @property
    def prompt_images(self) -> tuple[tuple[Tensor, ...], ...]: ...
    @property
    def encodings(self) -> Sequence[PromptEncodings]: ...


@dataclass(frozen=True)
class Conditioning:
    """What the model is given beside the target: reference tokens [B, Q, C], text, and the grids of all images."""

    references: Tensor
    prompts: PromptEmbeddings
    layout: TokenLayout


class Conditioner:
    """Encodes references and prompts of batches; remembers the prompts that it saw last.

    Args:
        backbone: whose VAE and text encoders are used where a batch does not bring its encodings.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._prompts: dict[tuple[str, ...], PromptEmbeddings] = {}

    @torch.no_grad()
    def condition(self, batch: Prompted) -> Conditioning:
        """References and prompts of a batch, on the model's device."""
        if not batch.references:
            channels = self.backbone.pipeline.transformer.config.in_channels
            references = torch.zeros(len(batch.prompts), 0, channels, device=self.backbone.device)
        elif batch.encodings:
            references = torch.stack([torch.cat(kept.references) for kept in batch.encodings]).to(self.backbone.device)
        else:
            references = torch.cat([self.encode(images) for images in batch.references], dim=1)
        grids = [batch.target[::-1], *(image.shape[-2:] for image in batch.references)]
        target, *others = [(height // PATCH_SIZE, width // PATCH_SIZE) for height, width in grids]
        return Conditioning(references, self.embed(batch), TokenLayout(target, tuple(others)))

    def encode(self, images: Tensor) -> Tensor:
        """Clean tokens of images, one by one as data.cache keeps them: convolutions sum in another order in a batch."""
        return torch.cat([self.backbone.encode_images(image[None]) for image in images])

    def embed(self, batch: Prompted) -> PromptEmbeddings:
        """Text conditioning; what was used last is kept on the CPU, by prompt and by what its encoder saw of the references."""
        if batch.encodings:
            kept = [PromptEmbeddings({name: x[None] for name, x in one.prompt.items()}) for one in batch.encodings]
            return PromptEmbeddings.stack(kept).to(self.backbone.device, self.backbone.dtype)
        images = batch.prompt_images if self.backbone.prompt_rule is not None else ((),) * len(batch.prompts)
        if len(images) != len(batch.prompts):
            expected = f"{len(batch.prompts)}, by a dataset with the backbone's prompt_rule"
            raise ValueError(f"batch.prompt_images: got those of {len(images)} pairs; expected {expected}")
        embeddings = []
        for prompt, of_pair in zip(batch.prompts, images, strict=True):
            seen = [image[None] for image in of_pair]
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
