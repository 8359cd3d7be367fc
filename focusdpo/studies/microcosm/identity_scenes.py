"""Scenes of two identities on a photographed background, and the pairs made of them.

The first reference's subject stands in the left half, the second's in the right: which region shows whom is then known without
looking, and a region can be judged by a classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance

from focusdpo.building.composing import Box, put
from focusdpo.building.photos import backgrounds
from focusdpo.studies.microcosm.identities import Identity

BACKGROUNDS = backgrounds()[:5]  # grass and gravel would take most of what the autoencoder can learn
BACKGROUND_RANGE = (0.7, 1.1)  # of brightness
LIGHT_RANGE = (0.85, 1.15)  # of a reference's brightness, so that copying pixels is not all there is to do


@dataclass(frozen=True)
class Scene:
    """What a scene is of: two identities by number, where they stand, and the background; all chosen by one seed.

    boxes: of each.
    """

    identities: tuple[int, int]
    boxes: tuple[Box, Box]
    background: int
    crop: tuple[float, float, float]
    brightness: float


def draw_scene(identities: Sequence[Identity], rng: np.random.Generator) -> Scene:
    """Two identities of different classes in new places."""
    classes = sorted({one.class_name for one in identities})
    chosen = []
    for name in rng.choice(classes, size=2, replace=False):
        members = [i for i, one in enumerate(identities) if one.class_name == name]
        chosen.append(members[int(rng.integers(len(members)))])
    boxes = []
    for half in range(2):
        width, height = float(rng.uniform(0.42, 0.48)), float(rng.uniform(0.55, 0.75))
        boxes.append((half / 2 + float(rng.uniform(0, 0.5 - width)), float(rng.uniform(0.1, 0.95 - height)), width, height))
    return Scene(
        (chosen[0], chosen[1]),
        (boxes[0], boxes[1]),
        int(rng.integers(len(BACKGROUNDS))),
        (float(rng.uniform(0.6, 1.0)), float(rng.random()), float(rng.random())),
        float(rng.uniform(*BACKGROUND_RANGE)),
    )


def other_instance(identities: Sequence[Identity], index: int, rng: np.random.Generator) -> int:
    """Another identity of the same class."""
    others = [i for i, one in enumerate(identities) if one.class_name == identities[index].class_name and i != index]
    return others[int(rng.integers(len(others)))]


def render(
    scene: Scene, subjects: Sequence[Image.Image], resolution: int
) -> tuple[Image.Image, tuple[Image.Image, Image.Image]]:
    """The picture of a scene with given cut-outs in its places, and the outline of each (L, 0 to 255)."""
    photo = BACKGROUNDS[scene.background]
    share, left, top = scene.crop
    side = min(photo.size) * share
    corner = left * (photo.width - side), top * (photo.height - side)
    box = (*corner, corner[0] + side, corner[1] + side)
    picture = photo.resize((resolution, resolution), Image.Resampling.BICUBIC, box=box)
    picture = ImageEnhance.Brightness(picture).enhance(scene.brightness)
    first, second = (put(picture, cutout, box) for cutout, box in zip(subjects, scene.boxes, strict=True))
    return picture, (first, second)


def prompt_of(identities: Sequence[Identity], scene: Scene) -> str:
    return " and ".join(f"a {identities[index].class_name}" for index in scene.identities)
