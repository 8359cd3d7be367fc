"""FLUX.2 (dev and klein) with several reference images, laid out as its own pipelines do.

The image sequence is [target | reference 1 | reference 2 ...]; references share weights and timestep modulation with the
target. Position ids are (t, row, column, l): t is 0 for the target and 10, 20, ... for the references, each of which counts its
rows and columns from 0; text counts along l.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from focusdpo.data.images import PATCH_SIZE, Size
from focusdpo.data.references import ReferenceRule
from focusdpo.models.base import Backbone, PromptEmbeddings, TokenLayout

REFERENCE_SHIFT = 10  # along t, from one image to the next


def position_ids(layout: TokenLayout) -> Tensor:
    """Position ids of target and references, int64 [P + Q, 4]."""
    zero = torch.zeros(1, dtype=torch.int64)
    axes = [
        (zero + i * REFERENCE_SHIFT, torch.arange(rows), torch.arange(columns), zero)
        for i, (rows, columns) in enumerate((layout.target, *layout.references))
    ]
    return torch.cat([torch.cartesian_prod(*each) for each in axes])


@dataclass(frozen=True)
class Flux2References(ReferenceRule):
    """As Flux2Pipeline and Flux2KleinPipeline: scaled down to a megapixel where they have more, then cut to whole tokens.

    It becomes RGB last: transparent parts are black where the file is scaled, and else have whatever colour the file has under
    them.
    """

    name: ClassVar[str] = "flux2"
    processor: ClassVar[Flux2ImageProcessor] = Flux2ImageProcessor(vae_scale_factor=PATCH_SIZE, do_normalize=False)

    def fit(self, size: Size, count: int) -> tuple[Size, Size]:
        self.processor.check_image_input(Image.new("1", size, None))  # None: the memory is not touched
        # The pipelines' own arithmetic, on something that has a size and no pixels.
        photo = SimpleNamespace(size=size, resize=lambda scaled, _: SimpleNamespace(size=scaled))
        width, height = self.processor._resize_if_exceeds_area(photo).size
        return (width, height), (width - width % PATCH_SIZE, height - height % PATCH_SIZE)

    def resize(self, photo: Image.Image, scaled: Size, size: Size) -> Tensor:
        photo = self.processor._resize_if_exceeds_area(photo)
        return self.processor.preprocess(photo, size[1], size[0], resize_mode="crop")[0]


class Flux2(Backbone):
    """FLUX.2 dev or klein.

    Single blocks have one projection for query, key, value and MLP, `to_qkv_mlp_proj`, and one out of both, `to_out`, which by
    default stays as it is, as FLUX.1's `proj_out` does.
    """

    name = "flux2"
    reference_rule = Flux2References()
    pipelines = (Flux2Pipeline, Flux2KleinPipeline)
    adapted_layers = (*Backbone.adapted_layers, "to_qkv_mlp_proj")

    def _tokens(self, pixels: Tensor) -> Tensor:
        # In patches of 2 x 2 latents, normalised by the VAE's batch statistics.
        return self.pipeline._pack_latents(self.pipeline._encode_vae_image(pixels, generator=None))

    def _latents(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        vae = self.vae
        latents = tokens.transpose(1, 2).reshape(tokens.shape[0], -1, *grid)  # [B, C, rows, columns]
        mean, variance = (x.to(latents).view(1, -1, 1, 1) for x in (vae.bn.running_mean, vae.bn.running_var))
        latents = latents * torch.sqrt(variance + vae.config.batch_norm_eps) + mean
        return self.pipeline._unpatchify_latents(latents)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], references: Sequence[Tensor] = ()) -> PromptEmbeddings:
        # The position ids are left out: embeddings travel in bf16, which has no 257.
        embeds, _ = self.pipeline.encode_prompt(
            prompt=list(prompts), device=self.device, max_sequence_length=self.max_sequence_length
        )
        return PromptEmbeddings({"prompt_embeds": embeds})

    def _inputs(self, prompts: dict[str, Tensor], layout: TokenLayout) -> dict[str, Any]:
        embeds = prompts["prompt_embeds"]
        if embeds.shape[1] != self.max_sequence_length:
            expected = f"max_sequence_length={self.max_sequence_length}, to which encode_prompts pads them"
            raise ValueError(f"prompts: got {embeds.shape[1]} text tokens; expected {expected}")
        return {
            "encoder_hidden_states": embeds,
            "img_ids": position_ids(layout).to(embeds.device),
            "txt_ids": F.pad(torch.arange(embeds.shape[1], device=embeds.device)[:, None], (3, 0)),
        }

    def default_scales(self) -> tuple[float, float]:
        if self.pipeline.transformer.config.guidance_embeds:
            return 4.0, 1.0
        return 1.0, 1.0 if self.pipeline.config.is_distilled else 4.0

    def _mu(self, tokens: int, steps: int) -> float:
        return float(compute_empirical_mu(tokens, steps))

    def image_tokens(self, output: Any) -> Tensor:
        if isinstance(output, tuple):  # of a double block
            return super().image_tokens(output)
        # Of a single block: [text | target | references]. All prompts are of one length, so nothing has to be remembered of the
        # forward pass that runs; a block that is recomputed later, or compiled, gives the same.
        return output[:, self.max_sequence_length :]
