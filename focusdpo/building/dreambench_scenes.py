"""Scenes of DreamBench's photos: each photo as it is, and two subjects together before the background of one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from focusdpo.building.candidate import Mask, Photo, Pixels, Rejected
from focusdpo.building.dreambench_boxes import LEFT_OUT, box_in, number_of
from focusdpo.data.writing import image_of, png_saver

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
COMPOSED = "composed"  # folder of the composed scenes


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
