"""The microcosm's scenes, of two identities on a photographed background, and its pictures as tensors: composed from seeds.

The first reference's subject stands in the left half, the second's in the right: which region shows whom is then known without
looking, and a region can be judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from tqdm.auto import tqdm

from focusdpo.building.composing import SHARE, Box, compose, draw_background, on_white
from focusdpo.building.photos import backgrounds
from focusdpo.studies.config import Size
from focusdpo.studies.microcosm.identities import Identity

BACKGROUNDS = backgrounds()[:5]  # grass and gravel would take most of what the autoencoder can learn
LIGHT_RANGE = (0.85, 1.15)  # of a reference's brightness, so that copying pixels is not all there is to do
BLUR = 16  # of a side is the radius that backgrounds are blurred by: what is in them would take most of what is learnt
ALIKE = 0.5  # share of the scenes with two instances of one class
# As large as in the references, which are half as wide as a scene, and always there: a small model learns in minutes to copy
# tokens from a known distance, and not to enlarge them or to choose a place.
BOXES: tuple[Box, ...] = tuple((left + (1 - SHARE) / 4, 0.25 + (1 - SHARE) / 4, SHARE / 2, SHARE / 2) for left in (0.0, 0.5))
EXCHANGED = 0.5  # share of a loser's regions that show the other reference's subject
VIEWS = 6  # pictures of each identity as a reference, in different light


@dataclass(frozen=True, eq=False)
class Scene:
    """What a scene is of: two identities by number, and before what they stand; all chosen by one seed."""

    identities: tuple[int, int]
    background: Image.Image
    prompt: str


def draw_scene(identities: Sequence[Identity], resolution: int, rng: np.random.Generator) -> Scene:
    """Two identities: in half of the scenes of one class, told apart by their references alone."""
    names = [one.class_name for one in identities]
    kind = rng.choice(sorted(set(names)))
    first = _chosen([i for i, name in enumerate(names) if name == kind], rng)
    is_alike = rng.random() < ALIKE
    second = _chosen([i for i, name in enumerate(names) if (name == names[first]) == is_alike and i != first], rng)
    background = _background(resolution, rng)
    prompt = " and ".join(f"a {identities[index].class_name}" for index in (first, second))
    return Scene((first, second), background, prompt)


def draw_disruption(identities: Sequence[Identity], scene: Scene, rng: np.random.Generator) -> tuple[int, int]:
    """Whom a loser shows in place of each subject: the other reference's, or another instance of its class, as often."""
    shown = []
    for index, other in (scene.identities, scene.identities[::-1]):
        same = [i for i, one in enumerate(identities) if one.class_name == identities[index].class_name]
        shown.append(other if rng.random() < EXCHANGED else _chosen([i for i in same if i not in scene.identities], rng))
    return shown[0], shown[1]


def empty_scenes(count: int, resolution: int, seed: int) -> Tensor:
    """Backgrounds alone, uint8 [count, 3, H, W]."""
    rng = np.random.default_rng([seed, 2])
    return torch.stack([pixels(_background(resolution, rng)) for _ in range(count)])


def _background(resolution: int, rng: np.random.Generator) -> Image.Image:
    photo = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
    background = draw_background(photo, resolution, (0.6, 1.0), (0.7, 1.1), rng)
    return background.filter(ImageFilter.GaussianBlur(resolution / BLUR))


def _chosen(numbers: Sequence[int], rng: np.random.Generator) -> int:
    return numbers[int(rng.integers(len(numbers)))]


@dataclass(frozen=True)
class World:
    """Scenes and references as 8-bit pixels.

    scenes: [N, 3, H, W]. identities: [N, 2], who stands left and right. references: [identities * VIEWS, 3, h, w], the views
    of each identity together. prompts: of the scenes. mismatched: [M, 3, H, W], the first scenes once more with somebody else
    in each place (`draw_disruption`).
    """

    scenes: Tensor
    identities: Tensor
    references: Tensor
    prompts: list[str]
    mismatched: Tensor


def pixels(image: Image.Image) -> Tensor:
    """uint8 [3, H, W]."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def compose_world(
    identities: Sequence[Identity], count: int, mismatched: int, size: Size, seed: int, held_out: bool = False
) -> World:
    """Draws and renders scenes, and references of every identity.

    Args:
        identities: who may stand in them.
        count: of scenes.
        mismatched: of scenes that are rendered once more, with others.
        size: sides in pixels.
        seed: of everything.
        held_out: show the subjects' held-out photographs.
    """
    sides = (3, size.resolution, size.resolution)
    scenes, others = (torch.empty(number, *sides, dtype=torch.uint8) for number in (count, mismatched))

    def render(scene: Scene, shown: Sequence[int], rng: np.random.Generator) -> Tensor:
        photos = [identities[number].photos(held_out) for number in shown]
        cutouts = [views[int(rng.integers(len(views)))] for views in photos]
        return pixels(compose(scene.background, cutouts, BOXES, centred=True)[0])

    def draw(index: int) -> tuple[tuple[int, int], str]:
        rng = np.random.default_rng([seed, index])
        scene = draw_scene(identities, size.resolution, rng)
        scenes[index] = render(scene, scene.identities, rng)
        if index < mismatched:
            others[index] = render(scene, draw_disruption(identities, scene, rng), rng)
        return scene.identities, scene.prompt

    with ThreadPoolExecutor() as pool:  # Pillow resizes beside itself
        try:
            drawn = [*tqdm(pool.map(draw, range(count)), total=count, desc="composing scenes", unit="scene", leave=False)]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # the others need not be composed first
            raise
    who, prompts = zip(*drawn, strict=True)
    references = []
    for number, identity in enumerate(identities):
        rng = np.random.default_rng([seed, number, 1])
        views = identity.photos(held_out)
        for view in range(VIEWS):
            canvas, light = (size.reference_resolution,) * 2, float(rng.uniform(*LIGHT_RANGE))
            references.append(pixels(on_white(views[view % len(views)], canvas, light)[0]))
    return World(scenes, torch.tensor(who), torch.stack(references), list(prompts), others)
