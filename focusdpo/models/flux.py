"""FLUX.1 with several reference images, in UNO's layout or in Kontext's own.

The image sequence is [target | reference 1 | reference 2 ...]; references share weights and timestep modulation with the
target. The layouts differ in the position ids alone, three numbers a token:

- UNO: (0, row, column); each reference is shifted diagonally past everything before it: row and column both start at the
  running sum of the rows and columns so far (bytedance/UNO).
- Kontext: (1, row, column) for a reference, whose rows and columns count from 0. The pipeline and the released weights know one
  reference; several are put side by side as if stitched to one image, each right of or below the ones before, whichever leaves
  the shorter side. That is ComfyUI's default, and asks nothing of the weights that they have not seen.

How references are brought to size differs as well, each like its own pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, FluxKontextPipeline, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from torch import Tensor

from focusdpo.data.images import PATCH_SIZE, Size
from focusdpo.data.references import ReferenceRule, UnoReferences
from focusdpo.models.base import Backbone, PromptEmbeddings, StretchedReferences, TokenLayout
from focusdpo.models.uno_lora import unos_layers


def position_ids(layout: TokenLayout) -> Tensor:
    """UNO's position ids of target and references, [P + Q, 3]."""
    rows, columns = layout.target
    grids = [_grid(rows, columns, 0, 0)]
    row_offset, column_offset = rows, columns
    for rows, columns in layout.references:
        grids.append(_grid(rows, columns, row_offset, column_offset))
        row_offset += rows
        column_offset += columns
    return torch.cat(grids)


def kontext_position_ids(layout: TokenLayout) -> Tensor:
    """Kontext's position ids of target and references, [P + Q, 3]."""
    grids = [_grid(*layout.target, 0, 0)]
    height, width = 0, 0  # of what the references cover so far
    for rows, columns in layout.references:
        below = height + rows <= width + columns
        row_offset, column_offset = (height, 0) if below else (0, width)
        grids.append(_grid(rows, columns, row_offset, column_offset, image=1))
        height, width = max(height, row_offset + rows), max(width, column_offset + columns)
    return torch.cat(grids)


def _grid(rows: int, columns: int, row_offset: int, column_offset: int, image: int = 0) -> Tensor:
    axes = torch.tensor([image]), torch.arange(rows) + row_offset, torch.arange(columns) + column_offset
    return torch.cartesian_prod(*axes).float()


@dataclass(frozen=True)
class KontextReferences(StretchedReferences):
    """As FluxKontextPipeline: stretched to the nearest of its own sizes, all of about a megapixel."""

    name: ClassVar[str] = "kontext"

    def fit(self, size: Size, count: int) -> tuple[Size, Size]:
        height, width = self.processor.get_default_height_width(None, size[1], size[0])
        if not height:  # the pipeline divides by it
            raise ValueError(f"{size[0]}x{size[1]} px; expected a height of at least {PATCH_SIZE} px, one token")
        best: Size = min(PREFERRED_KONTEXT_RESOLUTIONS, key=lambda known: abs(width / height - known[0] / known[1]))
        return best, best


class Flux1(Backbone):
    """FLUX.1 (dev, schnell, Kontext weights) with UNO's reference layout."""

    name = "flux"
    reference_rule: ClassVar[ReferenceRule] = UnoReferences()
    pipelines: ClassVar[tuple[type[DiffusionPipeline], ...]] = (FluxPipeline, FluxKontextPipeline)
    position_ids = staticmethod(position_ids)

    def _tokens(self, pixels: Tensor) -> Tensor:
        vae, config = self.vae, self.vae.config
        latents = (vae.encode(pixels).latent_dist.mode() - config.shift_factor) * config.scaling_factor
        return self.pipeline._pack_latents(latents, *latents.shape)

    def _latents(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        config = self.vae.config
        return super()._latents(tokens, grid) / config.scaling_factor + config.shift_factor

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], references: Sequence[Tensor] = ()) -> PromptEmbeddings:
        embeds, pooled, _ = self.pipeline.encode_prompt(
            prompt=list(prompts), prompt_2=None, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return PromptEmbeddings({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled})

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        pooled = self.pipeline.transformer.config.pooled_projection_dim
        return {**super().prompt_shapes(), "pooled_prompt_embeds": (pooled,)}

    def _inputs(self, prompts: dict[str, Tensor], layout: TokenLayout) -> dict[str, Any]:
        embeds = prompts["prompt_embeds"]
        return {
            "encoder_hidden_states": embeds,
            "pooled_projections": prompts["pooled_prompt_embeds"],
            "img_ids": self.position_ids(layout).to(embeds.device),
            "txt_ids": torch.zeros(embeds.shape[1], 3, device=embeds.device),
        }

    @property
    def _is_uno(self) -> bool:
        """Whether a LoRA of exactly UNO's layers is in the weights: what in UNO's own layout is UNO's, or came of it."""
        return self.name == Flux1.name and set(self.merged_layers) == unos_layers(self.tap_paths())

    def default_scales(self) -> tuple[float, float]:
        return 4.0 if self._is_uno else 3.5, 1.0

    def time_shift(self, tokens: int, steps: int) -> float:
        # UNO's pipeline reckons mu of (width / 8) (height / 8) / 256 tokens where there are four times 16 as many: 0.459 at
        # 512 px, where FLUX.1's is 0.63. Its training has FLUX.1's.
        return super().time_shift(tokens // 64 if self._is_uno else tokens, steps)


class Kontext(Flux1):
    """FLUX.1 Kontext with the position ids of its own pipeline."""

    name = "kontext"
    reference_rule = KontextReferences()
    pipelines = (FluxKontextPipeline,)
    position_ids = staticmethod(kontext_position_ids)
