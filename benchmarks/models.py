"""Randomly initialised transformers of real sizes, without text encoders and VAE, and a batch for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import FluxTransformer2DModel

from focusdpo.data import PairBatch
from focusdpo.data.images import PATCH_SIZE
from focusdpo.models import Backbone, Flux1, PromptEmbeddings, TokenLayout
from focusdpo.models.sizes import RELEASED, Architecture
from focusdpo.models.tiny_flux import transformer_config
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
        architecture: its sizes.
        text: tokens of a prompt.
        settings: what is measured.
    """

    architecture: Callable[[], Architecture]
    text: int
    settings: tuple[Setting, ...]


MODELS = {
    # References as UNO has them.
    "flux1": Model(lambda: RELEASED["FLUX.1 dev"], 512, (Setting(512, (320, 320)), Setting(1024, (320, 320)))),
    "flux2-klein-4b": Model(lambda: RELEASED["FLUX.2 klein 4B"], 512, (Setting(512, (512, 512)), Setting(1024, (1024, 1024)))),
    "tiny": Model(
        lambda: Architecture(Flux1, FluxTransformer2DModel, transformer_config(), companions=0), 16, (Setting(128, (64, 64)),)
    ),
}


def random_batch(backbone: Backbone, setting: Setting) -> tuple[Noised, PairBatch]:
    """One noised pair and its pixels."""
    layout, side = setting.layout, setting.target
    device, channels = backbone.device, backbone.transformer.config.in_channels

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device)

    clean = normal(2, layout.num_target, channels)
    noise = normal(1, layout.num_target, channels).repeat(2, 1, 1)
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
    prompts = {name: normal(1, *shape).to(backbone.dtype) for name, shape in backbone.prompt_shapes().items()}
    noised = Noised(
        tokens=0.5 * clean + 0.5 * noise,
        target=noise - clean,
        t=torch.full((2,), 0.5, device=device),
        clean=clean,
        draws=None,
        references=normal(1, layout.num_reference, channels).repeat(2, 1, 1),
        prompts=PromptEmbeddings(prompts).repeat(2),
        layout=layout,
    )
    return noised, batch
