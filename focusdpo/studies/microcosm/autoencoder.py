"""The microcosm's autoencoder, learnt from its photographs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from focusdpo.studies.microcosm.learning import learn
from focusdpo.studies.microcosm.world import World

CROP = 64  # pixels: convolutions need no more to learn from
EDGES = 0.25  # weight of neighbouring pixels' differences: without it all is blurred first
CELL = 8  # pixels along the side of a latent, whose mean colours count by themselves: they would be learnt last
KL = 1e-6
AT_ONCE = 4  # images that are encoded or decoded: more do not fit a processor's cache
LR = 2e-4  # higher ones end lower in quality, up to 1e-3 by far


def unit(pixels: Tensor) -> Tensor:
    """8 bits to [-1, 1]."""
    return pixels.float() / 127.5 - 1


def train_autoencoder(vae: AutoencoderKL, world: World, steps: int, batch: int, seed: int, state_file: Path) -> list[float]:
    """Learns to give scenes and references back, a quarter of a batch of the latter; then its latents are brought to unit size.

    Args:
        vae: on its device.
        world: pictures to learn from.
        steps, batch: of the training; a batch is of crops.
        seed: of the draws.
        state_file: as in `learn`.
    """
    device = vae.device
    side = min(CROP, world.references.shape[-1])
    vae.to(memory_format=torch.channels_last).requires_grad_(True)

    def loss(generator: torch.Generator) -> Tensor:
        crops = [
            _crops(world.scenes, side, batch - batch // 4, generator),
            _crops(world.references, side, batch // 4, generator),
        ]
        images = unit(torch.cat(crops).to(device)).contiguous(memory_format=torch.channels_last)
        latents = vae.encode(images).latent_dist
        restored = vae.decode(latents.sample()).sample
        error = restored - images
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        colours = F.avg_pool2d(error, CELL).abs().mean()
        return error.abs().mean() + error.square().mean() + EDGES * edges + colours + KL * latents.kl().mean()

    for name, parameter in vae.named_parameters():
        if ".conv2." in name:  # residual branches start at nothing: the rest learns in a third of the steps
            nn.init.zeros_(parameter)
    losses = learn("autoencoder", vae, loss, steps=steps, lr=LR, seed=seed, state_file=state_file)
    vae.requires_grad_(False)
    with torch.no_grad():
        parts = [vae.encode(unit(part.to(device))).latent_dist.mode() for part in torch.split(world.scenes[:256], AT_ONCE)]
    latents = torch.cat(parts)
    vae.register_to_config(shift_factor=float(latents.mean()), scaling_factor=1 / float(latents.std()))
    return losses


def _crops(images: Tensor, side: int, count: int, generator: torch.Generator) -> Tensor:
    picked = torch.randint(len(images), (count,), generator=generator).tolist()
    crops = []
    for index in picked:
        top, left = (int(torch.randint(length - side + 1, (1,), generator=generator)) for length in images.shape[-2:])
        crops.append(images[index, :, top : top + side, left : left + side])
    return torch.stack(crops)


@torch.no_grad()
def restore(vae: Any, pixels: Tensor) -> Tensor:
    """What the autoencoder makes of 8-bit pixels [N, 3, H, W], in [0, 1]."""
    restored = [
        vae.decode(vae.encode(unit(part.to(vae.device))).latent_dist.mode()).sample for part in torch.split(pixels, AT_ONCE)
    ]
    return ((torch.cat(restored) + 1) / 2).clamp(0, 1)


def psnr(vae: Any, pixels: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of what the autoencoder gives back."""
    error = restore(vae, pixels) - pixels.to(vae.device) / 255
    return -10 * math.log10(float(error.square().mean()))
