"""Randomly initialised transformers of real sizes, without text encoders and VAE, and a batch for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel, FluxPipeline, FluxTransformer2DModel

from focusdpo.data import PairBatch
from focusdpo.data.images import PATCH_SIZE
from focusdpo.models import Backbone, Flux1, Flux2, PromptEmbeddings, TokenLayout
from focusdpo.training.step import Noised


@dataclass(frozen=True)
class Setting:
    """Pixels along the side of the (square) target and of each reference."""

    target: int
    references: tuple[int, ...]

    @property
    def label(self) -> str:
        sides = ", ".join(map(str, self.references))
        return f"one pair at {self.target} px, {len(self.references)} references of {sides} px"

    @property
    def layout(self) -> TokenLayout:
        grid = self.target // PATCH_SIZE
        return TokenLayout((grid, grid), tuple((side // PATCH_SIZE,) * 2 for side in self.references))


@dataclass(frozen=True)
class Model:
    """A backbone to measure.

    Args:
        make: builds the backbone around a random transformer.
        channels: of a token.
        prompt: sizes of the prompt's tensors, without the batch axis.
        settings: what is measured.
    """

    make: Callable[[], Backbone]
    channels: int
    prompt: dict[str, tuple[int, ...]]
    settings: tuple[Setting, ...]


def _flux1(text: int, **sizes: object) -> Backbone:
    transformer = FluxTransformer2DModel(guidance_embeds=True, **sizes)
    names = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler")
    return Flux1(FluxPipeline(transformer=transformer, **dict.fromkeys(names)), guidance=1.0, max_sequence_length=text)


def _flux2_klein(text: int, **sizes: object) -> Backbone:
    transformer = Flux2Transformer2DModel(guidance_embeds=False, **sizes)
    names = ("vae", "text_encoder", "tokenizer", "scheduler")
    return Flux2(Flux2KleinPipeline(transformer=transformer, **dict.fromkeys(names)), guidance=1.0, max_sequence_length=text)


TINY = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 4, 8),
}
KLEIN_4B = {
    "in_channels": 128,
    "num_layers": 5,
    "num_single_layers": 20,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
}

MODELS = {
    # The defaults of diffusers' class are the sizes of FLUX.1-dev; references as UNO has them.
    "flux1": Model(
        lambda: _flux1(512),
        64,
        {"prompt_embeds": (512, 4096), "pooled_prompt_embeds": (768,)},
        (Setting(512, (320, 320)), Setting(1024, (320, 320))),
    ),
    "flux2-klein-4b": Model(
        lambda: _flux2_klein(512, **KLEIN_4B),
        128,
        {"prompt_embeds": (512, 7680)},
        (Setting(512, (512, 512)), Setting(1024, (1024, 1024))),
    ),
    "tiny": Model(
        lambda: _flux1(16, **TINY),
        16,
        {"prompt_embeds": (16, 32), "pooled_prompt_embeds": (32,)},
        (Setting(128, (64, 64)),),
    ),
}


def build(model: Model, device: torch.device, dtype: torch.dtype) -> Backbone:
    """The backbone with random weights, made where they are needed: a full size does not fit twice."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return model.make()
    finally:
        torch.set_default_dtype(before)


def random_batch(model: Model, setting: Setting, device: torch.device, dtype: torch.dtype) -> tuple[Noised, PairBatch]:
    """One noised pair and its pixels."""
    layout, side = setting.layout, setting.target

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device)

    clean = normal(2, layout.num_target, model.channels)
    noise = normal(1, layout.num_target, model.channels).repeat(2, 1, 1)
    prior = torch.zeros(1, side, side, device=device)
    prior[:, side // 4 : 3 * side // 4, : side // 2] = 1
    batch = PairBatch(
        indices=[0],
        prompts=["two subjects"],
        winner=torch.rand(1, 3, side, side, device=device),
        loser=torch.rand(1, 3, side, side, device=device),
        references=tuple(torch.rand(1, 3, s, s, device=device) for s in setting.references),
        reference_masks=tuple(torch.ones(1, s, s, device=device) for s in setting.references),
        prior=prior,
    )
    prompts = {name: normal(1, *shape).to(dtype) for name, shape in model.prompt.items()}
    noised = Noised(
        tokens=0.5 * clean + 0.5 * noise,
        target=noise - clean,
        t=torch.full((2,), 0.5, device=device),
        references=normal(1, layout.num_reference, model.channels).repeat(2, 1, 1),
        prompts=PromptEmbeddings(prompts).repeat(2),
        layout=layout,
    )
    return noised, batch
