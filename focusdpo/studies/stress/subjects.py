"""The subjects and backgrounds of the stress test: cut-outs of real photos, and which of them share a scene."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from focusdpo.building.composing import on_white
from focusdpo.building.dreambench import read_classes
from focusdpo.building.photo_folder import read_photo_folder
from focusdpo.data.images import PATCH_SIZE
from focusdpo.data.writing import image_of
from focusdpo.foundation.files import checksum, hash_of
from focusdpo.foundation.packages import require_build, require_package
from focusdpo.studies.config import Kind, StressConfig

COINS = [f"coin {i}" for i in range(7)]
# Coins are of one class and colour by nature. In an easy scene one of them stands beside another class in other colours; the
# gray subjects, shuttle and photographer, are left out.
PHOTOGRAPHED: dict[Kind, list[tuple[str, str]]] = {
    "alike": [(one, other) for i, one in enumerate(COINS) for other in COINS[i + 1 :]],
    "easy": [(coin, other) for coin in COINS for other in ("astronaut", "chelsea", "espresso cup", "motorcycle")],
}
# Seen on the photos: dog and dog6 are corgis, both red and white; dog2 (chow chow) and dog5 (long-haired dachshund) are of two
# breeds, both in a long red coat. No other two of DreamBench's dogs share class and colour as closely. In an easy scene each of
# the four stands beside a subject of another class in another colour.
DREAMBENCH: dict[Kind, list[tuple[str, str]]] = {
    "alike": [("dog", "dog6"), ("dog2", "dog5")],
    "easy": [("dog", "duck_toy"), ("dog6", "red_cartoon"), ("dog2", "colorful_sneaker"), ("dog5", "duck_toy")],
}
# Whose photos show enough beside them to be a background.
BACKGROUNDS = ("can", "colorful_sneaker", "duck_toy", "poop_emoji", "rc_car", "wolf_plushie")


@dataclass(frozen=True)
class DrawnSubject:
    """A subject, once to be put into a scene and once as the model is shown it.

    cutout: RGBA, cut to its outline. grounded: whether its photo cuts it off at the bottom. reference: RGB.
    reference_mask: L, 0 and 255. about: what was drawn.
    """

    cutout: Image.Image
    grounded: bool
    reference: Image.Image
    reference_mask: Image.Image
    about: dict[str, Any]


@dataclass(frozen=True)
class SubjectSource:
    """Where the subjects of the scenes come from.

    pairs: names that share a scene, by kind. class_of: class of each name. draw: a subject by its name, of two photos where
    there are two. background: an RGB photo without subjects, and what it is called. photos: a hash of the photos of a folder,
    None for those of a package.
    """

    pairs: dict[Kind, list[tuple[str, str]]]
    class_of: dict[str, str]
    draw: Callable[[str, np.random.Generator], DrawnSubject]
    background: Callable[[np.random.Generator], tuple[Image.Image, str]]
    photos: str | None = None


def source_of(config: StressConfig) -> SubjectSource:
    """Where a test's subjects come from.

    Raises:
        FileNotFoundError: photos of DreamBench are missing.
        ModuleNotFoundError: scikit-image, or OpenCV for DreamBench, is not installed; says which extra has it.
    """
    return _photographed(config) if config.dreambench is None else _dreambench(Path(config.dreambench))


def _photographed(config: StressConfig) -> SubjectSource:
    """scikit-image's photos, one of each subject: its reference is the same cut-out, mirrored, turned and in other light."""
    require_package("skimage", "the stress test without --dreambench", "demo")
    from focusdpo.building.photos import backgrounds, subjects

    known = {subject.name: subject for subject in subjects()}

    def draw(name: str, rng: np.random.Generator) -> DrawnSubject:
        changes = {"turned": float(rng.uniform(-12, 12)), "brightness": float(rng.choice([0.8, 1.2])), "mirrored": True}
        image = ImageOps.mirror(known[name].image).rotate(changes["turned"], Image.Resampling.BICUBIC, expand=True)
        side = config.reference_resolution // PATCH_SIZE * PATCH_SIZE
        reference = on_white(image, (side, side), changes["brightness"], float(rng.uniform(0.75, 0.94)))
        return DrawnSubject(known[name].image, False, *reference, {"reference_is": "the scene's photo", **changes})

    def background(rng: np.random.Generator) -> tuple[Image.Image, str]:
        number = int(rng.integers(len(backgrounds())))
        return backgrounds()[number], f"background {number}"

    return SubjectSource(PHOTOGRAPHED, {name: subject.class_name for name, subject in known.items()}, draw, background)


def _dreambench(root: Path) -> SubjectSource:
    """DreamBench's dogs, cut out and judged; a subject's reference is another photo of it, as it was taken."""
    require_build("the stress test with --dreambench")
    from focusdpo.building.composed_scenes import free_part
    from focusdpo.building.cutting import CutOut, default_cutter

    classes = read_classes(root, "dreambench")
    shown = {name for pairs in DREAMBENCH.values() for pair in pairs for name in pair}
    known = {subject.name: subject for subject in read_photo_folder(root, classes, "dreambench")}
    absent = sorted({*shown, *BACKGROUNDS} - set(known))
    if absent:
        raise FileNotFoundError(f"dreambench: {root} lacks {', '.join(absent)}; complete it, or leave dreambench out")

    cutter = default_cutter()

    @cache
    def cut_outs(name: str) -> list[CutOut]:
        found = cutter.cut(name, classes[name], known[name].files)
        kept = [one for one in found if one.refused is None]
        if len(kept) < 2:
            raise ValueError(f"dreambench: {root / name}: expected two photos that can be cut out, got {len(kept)}")
        return kept

    @cache
    def backgrounds() -> list[tuple[Image.Image, str]]:
        parts = [(free_part(one), f"{name}/{one.file.name}") for name in BACKGROUNDS for one in cut_outs(name)]
        shown = [(part, origin) for part, origin in parts if part is not None]
        if not shown:
            raise ValueError(f"dreambench: no photo of {', '.join(BACKGROUNDS)} shows enough beside its subject")
        return shown

    def draw(name: str, rng: np.random.Generator) -> DrawnSubject:
        scene, other = (cut_outs(name)[int(number)] for number in rng.permutation(len(cut_outs(name)))[:2])
        about = {"scene_photo": f"{name}/{scene.file.name}", "reference_photo": f"{name}/{other.file.name}"}
        return DrawnSubject(scene.rgba(), scene.is_grounded, image_of(other.pixels), image_of(other.mask), about)

    def background(rng: np.random.Generator) -> tuple[Image.Image, str]:
        return backgrounds()[int(rng.integers(len(backgrounds())))]

    files = [file for name in sorted({*shown, *BACKGROUNDS}) for file in known[name].files]
    return SubjectSource(DREAMBENCH, classes, draw, background, hash_of(*(checksum(file) for file in files)))
