"""Scenes of two identities on a photographed background.

The first reference's subject stands in the left half, the second's in the right: which region shows whom is then known without
looking, and a region can be judged by a classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from focusdpo.building.composing import Box, draw_background, draw_boxes
from focusdpo.building.photos import backgrounds
from focusdpo.studies.microcosm.identities import Identity

BACKGROUNDS = backgrounds()[:5]  # grass and gravel would take most of what the autoencoder can learn
LIGHT_RANGE = (0.85, 1.15)  # of a reference's brightness, so that copying pixels is not all there is to do


@dataclass(frozen=True, eq=False)
class Scene:
    """What a scene is of: two identities by number, where each stands, and before what; all chosen by one seed."""

    identities: tuple[int, int]
    boxes: list[Box]
    background: Image.Image
    prompt: str


def draw_scene(identities: Sequence[Identity], resolution: int, rng: np.random.Generator) -> Scene:
    """Two identities of different classes in new places."""
    classes = sorted({one.class_name for one in identities})
    chosen = []
    for name in rng.choice(classes, size=2, replace=False):
        members = [i for i, one in enumerate(identities) if one.class_name == name]
        chosen.append(members[int(rng.integers(len(members)))])
    boxes = draw_boxes(rng, (0.42, 0.48), (0.55, 0.75), top=0.1)
    photo = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
    background = draw_background(photo, resolution, (0.6, 1.0), (0.7, 1.1), rng)
    prompt = " and ".join(f"a {identities[index].class_name}" for index in chosen)
    return Scene((chosen[0], chosen[1]), boxes, background, prompt)


def other_instance(identities: Sequence[Identity], index: int, rng: np.random.Generator) -> int:
    """Another identity of the same class."""
    others = [i for i, one in enumerate(identities) if one.class_name == identities[index].class_name and i != index]
    return others[int(rng.integers(len(others)))]
