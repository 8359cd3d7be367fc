"""The microcosm's model before any preference: flow matching on scenes, given their references."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Tensor

from focusdpo.data.images import PATCH_SIZE
from focusdpo.models import Backbone, PromptEmbeddings, TokenLayout
from focusdpo.studies.microcosm.learning import learn
from focusdpo.studies.microcosm.world import VIEWS, World
from focusdpo.training.times import at_times

EMA_DECAY = 0.995


def train_flow(
    backbone: Backbone,
    world: World,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    state_file: Path,
) -> list[float]:
    """Trains the whole transformer to predict velocities of scenes (E2), every scene with other pictures of its subjects.

    Args:
        backbone: with its autoencoder; its transformer learns.
        world: scenes and references.
        steps, batch, lr: of the training.
        seed: of the draws.
        state_file: as in `learn`.
    """
    scenes, references = _encode(backbone, world.scenes), _encode(backbone, world.references)
    known = sorted(set(world.prompts))
    embedded = backbone.encode_prompts(known)
    texts = torch.tensor([known.index(prompt) for prompt in world.prompts])
    side, reference_side = (pictures.shape[-1] // PATCH_SIZE for pictures in (world.scenes, world.references))
    layout = TokenLayout((side, side), ((reference_side, reference_side),) * 2)

    def loss(generator: torch.Generator) -> Tensor:
        picked = torch.randint(len(scenes), (batch,), generator=generator)
        views = torch.randint(VIEWS, (batch, 2), generator=generator)
        given = references[world.identities[picked] * VIEWS + views].flatten(1, 2)  # [B, 2 * Q, C]
        noise = torch.randn(batch, *scenes.shape[1:], generator=generator).to(scenes.device)
        t = compute_density_for_timestep_sampling("logit_normal", batch, logit_mean=0.0, logit_std=1.0, generator=generator)
        t = t.to(scenes.device)
        noisy, velocity = at_times(scenes[picked], noise, t)
        text = PromptEmbeddings({name: value[texts[picked]] for name, value in embedded.tensors.items()})
        return (backbone.predict(noisy, t, text, given, layout).float() - velocity).square().mean()

    backbone.transformer.requires_grad_(True)
    losses = learn(
        "flow", backbone.transformer, loss, steps=steps, lr=lr, seed=seed, state_file=state_file, ema_decay=EMA_DECAY
    )
    backbone.transformer.requires_grad_(False)
    return losses


def _encode(backbone: Backbone, pixels: Tensor) -> Tensor:
    """Clean tokens of 8-bit pixels [N, 3, H, W]."""
    return torch.cat([backbone.encode_images(part.to(backbone.device) / 255).float() for part in torch.split(pixels, 64)])
