"""The microcosm's pipeline: FLUX.1's classes, a few million weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from focusdpo.models import Flux1
from focusdpo.models.tiny_flux import build_flux
from focusdpo.studies.config import Size
from focusdpo.studies.microcosm.identities import Identity

HEAD = 32  # width of an attention head
TEXT_TOKENS = 12  # "a motorcycle and a space shuttle" takes 9


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
