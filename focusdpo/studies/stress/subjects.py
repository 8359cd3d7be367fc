"""The subjects and backgrounds of the stress test: cut-outs of real photos, and which of them share a scene."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from focusdpo.building.composing import on_white
from focusdpo.building.dreambench import read_classes
from focusdpo.data.images import PATCH_SIZE, read_image
from focusdpo.foundation.files import checksum, hash_of
from focusdpo.foundation.packages import require_package
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
# Photos whose cut-outs show the subject and little else, by eye; dog5/03 is dog5/02 mirrored.
VIEWS = {
    "dog": (1, 4), "dog6": (0, 1, 3, 4), "dog2": (0, 1, 2, 3, 4), "dog5": (2, 4), "duck_toy": (0, 1, 2, 3),
    "red_cartoon": (0, 1, 2, 3), "colorful_sneaker": (1, 2, 3, 4),
}  # fmt: skip
# Parts of photos that show no subject, by eye: left, top, right, bottom in hundredths of the photo's sides.
BACKGROUNDS = {
    ("can", 2): (62, 0, 100, 38),
    ("colorful_sneaker", 0): (50, 0, 98, 48),
    ("duck_toy", 3): (0, 0, 42, 42),
    ("poop_emoji", 3): (0, 0, 48, 48),
    ("rc_car", 4): (64, 20, 100, 56),
    ("wolf_plushie", 2): (57, 45, 100, 88),
}


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
    """DreamBench's dogs, cut out by GrabCut; a subject's reference is another photo of it, as it was taken."""
    require_package("cv2", "dreambench", "build")
    from focusdpo.building.cutting import Cutter

    classes = read_classes(root, "dreambench")
    files = {(name, number): root / name / f"{number:02d}.jpg" for name, numbers in VIEWS.items() for number in numbers}
    files |= {(name, number): root / name / f"{number:02d}.jpg" for name, number in BACKGROUNDS}
    absent = [str(file.relative_to(root)) for file in files.values() if not file.is_file()]
    if absent:
        raise FileNotFoundError(f"dreambench: {root} lacks {', '.join(absent)}; complete it, or leave dreambench out")
    cutter = Cutter()

    def draw(name: str, rng: np.random.Generator) -> DrawnSubject:
        shown, other = (int(number) for number in rng.permutation(VIEWS[name])[:2])
        about = {"scene_photo": f"{name}/{shown:02d}.jpg", "reference_photo": f"{name}/{other:02d}.jpg"}
        return DrawnSubject(*cutter.cut_out(files[name, shown]), *cutter.photo(files[name, other]), about)

    def background(rng: np.random.Generator) -> tuple[Image.Image, str]:
        name, number = list(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))]
        photo = read_image(files[name, number])
        box = [share * side / 100 for share, side in zip(BACKGROUNDS[name, number], photo.size * 2, strict=True)]
        return photo.crop((round(box[0]), round(box[1]), round(box[2]), round(box[3]))), f"{name}/{number:02d}.jpg"

    return SubjectSource(DREAMBENCH, classes, draw, background, hash_of(*(checksum(files[key]) for key in sorted(files))))
