"""Qwen-Image-Edit-Plus (2509, 2511) with several reference images, laid out as its own pipeline does.

The image sequence is [target | reference 1 | reference 2 ...]. The transformer makes the position ids itself, from the images'
sizes: the first axis counts the images, rows and columns count from each image's centre. The references enter twice: as the
VAE's tokens, and through the text encoder, a vision-language model that reads them in front of the prompt. Both are made of the
photo itself, in two sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import (
    CONDITION_IMAGE_SIZE,
    VAE_IMAGE_SIZE,
    calculate_dimensions,
)
from torch import Tensor
from transformers import Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from focusdpo.data.images import Size, to_pil
from focusdpo.models.base import Backbone, PromptEmbeddings, StretchedReferences, TokenLayout


class ImageTextProcessor(Qwen2VLProcessor):  # type: ignore[misc]  # a lazily imported class is Any to mypy
    """The pipeline's processor without its part for videos, which asks for torchvision and has nothing to do here."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)


@dataclass(frozen=True)
class QwenReferences(StretchedReferences):
    """As QwenImageEditPlusPipeline: stretched to about an area in pixels, one for the VAE and one for the text encoder."""

    area: int
    name: ClassVar[str] = "qwen-edit-plus"

    def fit(self, size: Size, count: int) -> tuple[Size, Size]:
        width, height = calculate_dimensions(self.area, size[0] / size[1])
        if not width or not height:
            raise ValueError(f"{size[0]}x{size[1]} px is too narrow: a side would be of no pixels")
        smart_resize(height, width)  # has its own limit, and the text encoder's part of the pipeline asks it
        return (width, height), (width, height)


class QwenEditPlus(Backbone):
    """Qwen-Image-Edit-Plus, trained without classifier-free guidance; sampling needs it, and keeps each token's norm."""

    name = "qwen-edit-plus"
    tapped = ("transformer_blocks",)
    pipelines = (QwenImageEditPlusPipeline,)
    reference_rule = QwenReferences(VAE_IMAGE_SIZE)
    prompt_rule = QwenReferences(CONDITION_IMAGE_SIZE)
    fewest_references = 1
    negative_prompt = " "

    @classmethod
    def _parts(cls, path: str, revision: str | None) -> dict[str, Any]:
        return {"processor": ImageTextProcessor.from_pretrained(path, subfolder="processor", revision=revision)}

    def _tokens(self, pixels: Tensor) -> Tensor:
        frames = pixels.unsqueeze(2)  # [B, 3, 1, H, W]: a video VAE
        # Normalised channel by channel.
        latents = self.pipeline._encode_vae_image(frames, generator=None)  # [B, C/4, 1, H/8, W/8]
        return self.pipeline._pack_latents(latents, *latents.squeeze(2).shape)

    def _latents(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        latents, config = super()._latents(tokens, grid), self.vae.config
        mean, std = (latents.new_tensor(x).view(1, -1, 1, 1, 1) for x in (config.latents_mean, config.latents_std))
        return latents * std + mean

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], references: Sequence[Tensor] = ()) -> PromptEmbeddings:
        single = []
        for i, prompt in enumerate(prompts):  # the pipeline shows all images to all prompts it is given
            images = [to_pil(pixels[i]) for pixels in references]
            embeds, _ = self.pipeline.encode_prompt(prompt=prompt, image=images or None, device=self.device)
            # Ones and zeros come through any dtype that the embeddings are brought to.
            single.append(PromptEmbeddings({"prompt_embeds": embeds, "prompt_embeds_mask": torch.ones_like(embeds[..., 0])}))
        return PromptEmbeddings.stack(single)

    def _inputs(self, prompts: dict[str, Tensor], layout: TokenLayout) -> dict[str, Any]:
        embeds, mask = prompts["prompt_embeds"], prompts.get("prompt_embeds_mask")
        return {
            "encoder_hidden_states": embeds,
            # As the pipeline does: with no padding there is no mask, and attention has its faster kernels.
            "encoder_hidden_states_mask": None if mask is None or mask.all() else mask.bool(),
            "img_shapes": [[(1, *grid) for grid in (layout.target, *layout.references)]] * len(embeds),
        }

    def default_scales(self) -> tuple[float, float]:
        return 1.0, 4.0

    def guide(self, velocity: Tensor, negative: Tensor, scale: float) -> Tensor:
        guided = super().guide(velocity, negative, scale)
        return guided * (velocity.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
