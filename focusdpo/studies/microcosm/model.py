"""The microcosm's model before any preference: FLUX.1's classes, a million weights or more, flow matching on scenes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Tensor

from focusdpo.data.images import PATCH_SIZE
from focusdpo.models import Backbone, Flux1, PromptEmbeddings, TokenLayout
from focusdpo.models.tiny_flux import build_flux
from focusdpo.studies.config import Size
from focusdpo.studies.microcosm.autoencoder import AT_ONCE
from focusdpo.studies.microcosm.identities import Identity
from focusdpo.studies.microcosm.learning import learn
from focusdpo.studies.microcosm.world import VIEWS, World
from focusdpo.training.times import at_times

HEAD = 32  # width of an attention head
TEXT_TOKENS = 12  # "a motorcycle and a space shuttle" takes 9
EMA_DECAY = 0.995
# The models, each of which goes on from the one before, and the share of the scenes it learns from that show others than the
# references. Scenes that match teach copying fastest; a model that then learns from mismatched ones can draw a subject and yet
# draws the wrong one, as large models do: a preference can mend that, and cannot teach a model to draw.
MISMATCHED = {"pretrained": 0.0, "early": 0.6, "middle": 0.3, "late": 0.1}


def build_model(size: Size, identities: Sequence[Identity], seed: int) -> Flux1:
    """A random pipeline; class names are one token each, so that the frozen random text encoders tell them apart."""
    words = sorted({word for identity in identities for word in identity.class_name.split()} | {"and"})
    transformer: dict[str, Any] = {
        "patch_size": 1,
        "in_channels": 4 * size.latent_channels,
        "num_layers": size.layers[0],
        "num_single_layers": size.layers[1],
        "attention_head_dim": HEAD,
        "num_attention_heads": size.heads,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (8, 12, 12),
        "guidance_embeds": False,
    }
    vae = {
        "block_out_channels": size.vae_channels,
        "latent_channels": size.latent_channels,
        "norm_num_groups": 2,
        "mid_block_add_attention": False,
    }
    return Flux1(build_flux(seed, transformer, vae, words), max_sequence_length=TEXT_TOKENS)


@dataclass(frozen=True)
class Latents:
    """Clean tokens of a world's scenes [N, P, C], references [M, Q, C] and mismatched scenes [K, P, C]."""

    scenes: Tensor
    references: Tensor
    mismatched: Tensor


def encode_world(backbone: Backbone, world: World) -> Latents:
    """By the autoencoder alone, so that they serve all models of a world."""
    return Latents(*(_encode(backbone, pictures) for pictures in (world.scenes, world.references, world.mismatched)))


def train_flow(
    backbone: Backbone, world: World, latents: Latents, size: Size, steps: int, mismatched: float, seed: int, state_file: Path
) -> list[float]:
    """Trains the whole transformer to predict velocities of scenes (E2), every scene with other pictures of its subjects.

    Args:
        backbone: whose transformer learns.
        world: prompts, and who stands where.
        latents: of its pictures, on the backbone's device.
        size: batch and learning rate of the training.
        steps: of it.
        mismatched: share of what it sees that shows others than the references.
        seed: of the draws.
        state_file: as in `learn`.
    """
    scenes, references = latents.scenes, latents.references
    known = sorted(set(world.prompts))
    embedded = backbone.encode_prompts(known)
    texts = torch.tensor([known.index(prompt) for prompt in world.prompts])
    side, reference_side = (pictures.shape[-1] // PATCH_SIZE for pictures in (world.scenes, world.references))
    layout = TokenLayout((side, side), ((reference_side, reference_side),) * 2)

    batch = size.flow_batch

    def loss(generator: torch.Generator) -> Tensor:
        picked = torch.randint(len(scenes), (batch,), generator=generator)
        wrong = torch.rand(batch, generator=generator) < mismatched
        picked = torch.where(wrong, picked % len(latents.mismatched), picked)
        clean = scenes[picked]
        clean[wrong] = latents.mismatched[picked[wrong]]
        views = torch.randint(VIEWS, (batch, 2), generator=generator)
        given = references[world.identities[picked] * VIEWS + views].flatten(1, 2)  # [B, 2 * Q, C]
        noise = torch.randn(batch, *scenes.shape[1:], generator=generator).to(scenes.device)
        t = compute_density_for_timestep_sampling("logit_normal", batch, logit_mean=0.0, logit_std=1.0, generator=generator)
        t = t.to(scenes.device)
        noisy, velocity = at_times(clean, noise, t)
        text = PromptEmbeddings({name: value[texts[picked]] for name, value in embedded.tensors.items()})
        return (backbone.predict(noisy, t, text, given, layout).float() - velocity).square().mean()

    model = backbone.transformer.requires_grad_(True)
    losses = learn("flow", model, loss, steps=steps, lr=size.flow_lr, seed=seed, state_file=state_file, ema_decay=EMA_DECAY)
    model.requires_grad_(False)
    return losses


def _encode(backbone: Backbone, pixels: Tensor) -> Tensor:
    """Clean tokens of 8-bit pixels [N, 3, H, W]."""
    return torch.cat([backbone.encode_images(part.to(backbone.device) / 255).float() for part in torch.split(pixels, AT_ONCE)])
