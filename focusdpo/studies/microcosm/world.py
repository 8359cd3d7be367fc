"""The microcosm's pictures as tensors: composed once, from seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from focusdpo.building.composing import compose, on_white
from focusdpo.studies.config import Size
from focusdpo.studies.microcosm.identities import Identity
from focusdpo.studies.microcosm.identity_scenes import LIGHT_RANGE, draw_scene

VIEWS = 6  # pictures of each identity as a reference, in different light


@dataclass(frozen=True)
class World:
    """Scenes and references as 8-bit pixels.

    scenes: [N, 3, H, W]. identities: [N, 2], who stands left and right. references: [identities * VIEWS, 3, h, w], the views
    of each identity together. prompts: of the scenes.
    """

    scenes: Tensor
    identities: Tensor
    references: Tensor
    prompts: list[str]


def pixels(image: Image.Image) -> Tensor:
    """uint8 [3, H, W]."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def compose_world(identities: Sequence[Identity], count: int, size: Size, seed: int, held_out: bool = False) -> World:
    """Draws and renders scenes, and references of every identity.

    Args:
        identities: who may stand in them.
        count: of scenes.
        size: sides in pixels.
        seed: of everything.
        held_out: show the subjects' held-out photographs.
    """
    scenes, who, prompts = torch.empty(count, 3, size.resolution, size.resolution, dtype=torch.uint8), [], []
    for index in tqdm(range(count), desc="composing scenes", unit="scene", leave=False):
        rng = np.random.default_rng([seed, index])
        scene = draw_scene(identities, size.resolution, rng)
        photos = [identities[number].photos(held_out) for number in scene.identities]
        cutouts = [views[int(rng.integers(len(views)))] for views in photos]
        scenes[index] = pixels(compose(scene.background, cutouts, scene.boxes)[0])
        who.append(scene.identities)
        prompts.append(scene.prompt)
    references = []
    for number, identity in enumerate(identities):
        rng = np.random.default_rng([seed, number, 1])
        views = identity.photos(held_out)
        for view in range(VIEWS):
            sides, light = (size.reference_resolution,) * 2, float(rng.uniform(*LIGHT_RANGE))
            references.append(pixels(on_white(views[view % len(views)], sides, light)[0]))
    return World(scenes, torch.tensor(who), torch.stack(references), prompts)
