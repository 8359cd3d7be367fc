"""Scenes of DreamBench's photos: each photo as it is, and two subjects together before the background of one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from focusdpo.building.candidate import Mask, Photo, Pixels, Rejected
from focusdpo.building.scenes import Box
from focusdpo.data.images import read_size
from focusdpo.data.writing import image_of, png_saver

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
COMPOSED = "composed"  # folder of the composed scenes
# Where the subjects are in those photos that GrabCut alone gets wrong, read off by eye: left, top, right, bottom in hundredths
# of the photo's sides, by subject and number of the photo.
BOXES: dict[str, dict[int, tuple[int, int, int, int]]] = {
    "backpack_dog": {1: (12, 12, 60, 80)},
    "can": {3: (54, 22, 77, 63), 4: (34, 23, 70, 92), 5: (47, 44, 73, 90)},
    "cat": {2: (8, 10, 50, 97)},
    "clock": {0: (32, 38, 52, 62), 1: (36, 35, 54, 58), 4: (18, 3, 82, 92)},
    "colorful_sneaker": {3: (33, 44, 70, 78)},
    "dog": {1: (24, 5, 82, 100), 2: (23, 20, 100, 92), 3: (13, 17, 100, 94), 4: (16, 2, 96, 100)},
    "dog2": {1: (12, 12, 90, 92), 2: (12, 2, 92, 90), 3: (17, 22, 83, 86)},
    "dog3": {
        0: (3, 40, 100, 97), 3: (20, 18, 73, 75),
    },
    "dog5": {0: (24, 27, 88, 70), 1: (24, 52, 64, 76), 2: (30, 26, 82, 64), 3: (18, 26, 70, 64), 4: (22, 18, 70, 75)},
    "dog6": {0: (5, 22, 60, 90), 1: (15, 3, 80, 100), 3: (20, 10, 80, 93), 4: (8, 2, 92, 100)},
    "rc_car": {2: (32, 10, 82, 88), 3: (20, 8, 80, 90)},
    "teapot": {0: (35, 12, 85, 65), 1: (30, 42, 60, 68), 4: (18, 33, 56, 62)},
}  # fmt: skip

# Photos in which it fails even so, and see-through subjects: no training scenes.
LEFT_OUT: dict[str, set[int]] = {
    "backpack_dog": {2},
    "berry_bowl": {0, 1, 2, 3, 4, 5},
    "cat": {0},
    "clock": {2, 3},
    "dog": {0},
    "dog2": {5},
    "dog3": {1, 2, 4, 5},
    "dog6": {2},
    "pink_sunglasses": {0, 2, 3, 4, 5},
    "teapot": {2, 3},
}


def photos(root: Path, name: str) -> list[Path]:
    """A subject's photos that are fit to be cut out of, in order."""
    found = sorted(path for path in (root / name).glob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    return [photo for photo in found if number_of(photo) not in LEFT_OUT.get(name, ())]


def as_stored(photo: Path) -> Path:
    """A photo that UNO's lists name, as it is called in the folder: suffixes may be written otherwise."""
    if photo.is_file():
        return photo
    others = (path for path in sorted(photo.parent.glob("*")) if path.suffix.lower() in SUFFIXES and path.stem == photo.stem)
    return next(others, photo)


def photo_scenes(root: Path, out: Path, classes: dict[str, str]) -> list[dict[str, Any]]:
    """Each photo as a scene, with the next photo of the same subject as its reference."""
    lines = []
    for name, class_name in classes.items():
        own = photos(root, name)
        for index, photo in enumerate(own):
            reference = own[(index + 1) % len(own)]
            if reference != photo:
                subject = _described(name, class_name, reference, out)
                box = box_in(photo)
                subject |= {} if box is None else {"box": box}
                lines.append({"prompt": f"a {class_name}", "scene": relative(photo, out), "subjects": [subject]})
    return lines


def composed_scenes(
    root: Path, out: Path, classes: dict[str, str], pairs: Iterable[tuple[str, str]], resolution: int, seed: int
) -> Iterator[dict[str, Any] | None]:
    """For each pair of subjects a scene with both: cut out, side by side, before the background of the first one's photo.

    Yields:
        the scene's line, its images written to `out`; None where no two photos of the pair show whole subjects.
    """
    from focusdpo.building.cutting import Cutter
    from focusdpo.building.disruption import cut_edges

    cutter, save = Cutter(), png_saver(out, f"{COMPOSED}/")
    (out / COMPOSED).mkdir(parents=True, exist_ok=True)

    def whole(name: str, rng: np.random.Generator) -> Photo | None:
        own = photos(root, name)
        for index in rng.permutation(len(own)) if len(own) > 1 else ():  # one photo is the reference
            try:
                photo = cutter.segment(own[index], classes[name], resolution)
            except Rejected:
                continue
            if not cut_edges(photo.region) and photo.region.mean() > 0.03:
                return photo
        return None

    for number, names in enumerate(pairs):
        rng = np.random.default_rng([seed, number])
        first, second = [whole(name, rng) for name in names]
        if first is None or second is None:
            yield None
            continue
        scene, masks = _side_by_side((first, second), rng)
        subjects = []
        for photo, mask, part in zip((first, second), masks, "ab", strict=True):
            own = photos(root, photo.subject.name)
            reference = own[(own.index(photo.view.image) + 1) % len(own)]
            described = _described(photo.subject.name, photo.subject.class_name, reference, out)
            subjects.append({**described, "mask": save(f"{number:03d}_{part}", image_of(mask))})
        prompt = f"a {classes[names[0]]} and a {classes[names[1]]}"
        yield {"prompt": prompt, "scene": save(f"{number:03d}", image_of(scene)), "subjects": subjects}


def _side_by_side(pair: tuple[Photo, Photo], rng: np.random.Generator) -> tuple[Pixels, list[Mask]]:
    """Both subjects before the background of the first one's photo, in its light, their outlines blended; and their masks.

    Not as `composing` does it: these cut-outs come from segmentations and need blending, and fit the photo's own ground.
    """
    from focusdpo.building.blending import box_of, fill_background, grow, move_cutout, put
    from focusdpo.building.disruption import relight

    first = pair[0]
    height, width = first.region.shape
    shown = grow(first.region, 8)
    scene = fill_background(first.pixels, shown, shown)
    bottom = min(box_of(first.region)[0].stop, round(0.95 * height))
    masks = []
    for photo, middle in zip(pair, rng.permutation([0.26, 0.74]) * width, strict=True):
        rows, columns = box_of(photo.region)
        tall, wide = rows.stop - rows.start, columns.stop - columns.start
        scale = min(0.6 * height / tall, 0.46 * width / wide, 0.95 * bottom / tall)
        move = np.array([[scale, 0, middle - scale * wide / 2], [0, scale, bottom - scale * tall]], np.float32)
        pixels, inside = move_cutout(photo.pixels[rows, columns], photo.region[rows, columns], move, (width, height))
        scene = put(scene, relight(pixels, inside, first.pixels, first.region, photo), inside)
        masks.append(inside)
    return scene, masks


def _described(name: str, class_name: str, reference: Path, out: Path) -> dict[str, Any]:
    described: dict[str, Any] = {"class_name": class_name, "name": name, "reference": relative(reference, out)}
    box = box_in(reference)
    return described if box is None else {**described, "reference_box": box}


def relative(path: Path, folder: Path) -> str:
    """A path as a line of a file in `folder` names it."""
    return Path(os.path.relpath(path, folder)).as_posix()


def number_of(photo: Path) -> int:
    """By which the tables name a photo; -1 where it has none."""
    return int(photo.stem) if photo.stem.isdecimal() else -1


def box_in(photo: Path) -> Box | None:
    """Where the subject is, in pixels of the photo; None where nobody has read it off."""
    shares = BOXES.get(photo.parent.name, {}).get(number_of(photo))
    if shares is None:
        return None
    width, height = read_size(photo)
    left, top, right, bottom = (round(share * side / 100) for share, side in zip(shares, (width, height) * 2, strict=True))
    return left, top, right, bottom
