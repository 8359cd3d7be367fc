"""The microcosm's pictures as tensors: composed once, from seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from focusdpo.building.composing import on_white
from focusdpo.studies.microcosm.identities import Identity
from focusdpo.studies.microcosm.identity_scenes import LIGHT_RANGE, Scene, draw_scene, render

VIEWS = 6  # pictures of each identity as a reference, in different light


@dataclass(frozen=True)
class World:
    """Scenes and references as 8-bit pixels.

    scenes: [N, 3, H, W]. identities: [N, 2], who stands left and right. references: [identities * VIEWS, 3, h, w], the views
    of each identity together. described: the scenes themselves.
    """

    scenes: Tensor
    identities: Tensor
    references: Tensor
    described: list[Scene]


def pixels(image: Image.Image) -> Tensor:
    """uint8 [3, H, W]."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def compose(
    identities: Sequence[Identity], count: int, resolution: int, reference_resolution: int, seed: int, held_out: bool = False
) -> World:
    """Draws and renders scenes, and references of every identity.

    Args:
        identities: who may stand in them.
        count: of scenes.
        resolution, reference_resolution: sides in pixels.
        seed: of everything.
        held_out: show the subjects' held-out photographs.
    """
    described, pictures = [], torch.empty(count, 3, resolution, resolution, dtype=torch.uint8)
    for index in tqdm(range(count), desc="composing scenes", unit="scene", leave=False):
        rng = np.random.default_rng([seed, index])
        scene = draw_scene(identities, rng)
        cutouts = []
        for number in scene.identities:
            views = identities[number].held_out if held_out else identities[number].views
            cutouts.append(views[int(rng.integers(len(views)))])
        described.append(scene)
        pictures[index] = pixels(render(scene, cutouts, resolution)[0])
    references = []
    for number, identity in enumerate(identities):
        rng = np.random.default_rng([seed, number, 1])
        views = identity.held_out if held_out else identity.views
        for view in range(VIEWS):
            light = float(rng.uniform(*LIGHT_RANGE))
            references.append(pixels(on_white(views[view % len(views)], reference_resolution, light)[0]))
    who = torch.tensor([scene.identities for scene in described])
    return World(pictures, who, torch.stack(references), described)
