"""Scenes of DreamBench's photos: each photo as it is, and two subjects together before the background of one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from focusdpo.building.dreambench_boxes import BOXES, LEFT_OUT
from focusdpo.building.scenes import SceneSubject, View
from focusdpo.data.images import read_size

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
COMPOSED = "composed"  # folder of the composed scenes


def photos(root: Path, name: str) -> list[Path]:
    """A subject's photos that are fit to be cut out of, in order."""
    found = sorted(path for path in (root / name).glob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    return [photo for photo in found if _number(photo) not in LEFT_OUT.get(name, ())]


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
                box = _box(photo)
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
    from focusdpo.building.blending import box_of, fill_background, grow, move_cutout, put
    from focusdpo.building.candidate import Photo, Rejected
    from focusdpo.building.disruption import cut_edges, relight
    from focusdpo.building.loading import read_pixels
    from focusdpo.building.segmentation import GrabCut

    grabcut = GrabCut()
    (out / COMPOSED).mkdir(parents=True, exist_ok=True)

    def whole(name: str, rng: np.random.Generator) -> Photo | None:
        own = photos(root, name)
        for index in rng.permutation(len(own)) if len(own) > 1 else ():  # one photo is the reference
            view = View(own[index], None, _as_box(_box(own[index])))
            photo = Photo(SceneSubject(classes[name], name, view, view), view, read_pixels(view.image, resolution))
            try:
                grabcut.complete(photo)
            except Rejected:
                continue
            if photo.mask is not None and not cut_edges(photo.mask) and photo.mask.mean() > 0.03:
                return photo
        return None

    for number, names in enumerate(pairs):
        rng = np.random.default_rng([seed, number])
        cutouts = [whole(name, rng) for name in names]
        first, second = cutouts
        if first is None or second is None or first.mask is None or second.mask is None:
            yield None
            continue
        height, width = first.mask.shape
        shown = grow(first.mask, 8)
        scene = fill_background(first.pixels, shown, shown)
        bottom = min(box_of(first.mask)[0].stop, round(0.95 * height))
        middles = rng.permutation([0.26, 0.74]) * width
        masks = []
        for photo, middle in zip((first, second), middles, strict=True):
            assert photo.mask is not None
            rows, columns = box_of(photo.mask)
            tall, wide = rows.stop - rows.start, columns.stop - columns.start
            scale = min(0.6 * height / tall, 0.46 * width / wide, 0.95 * bottom / tall)
            move = np.array([[scale, 0, middle - scale * wide / 2], [0, scale, bottom - scale * tall]], np.float32)
            pixels, inside = move_cutout(photo.pixels[rows, columns], photo.mask[rows, columns], move, (width, height))
            scene = put(scene, relight(pixels, inside, first.pixels, first.mask, photo), inside)
            masks.append(inside)
        subjects = []
        for photo, inside, part in zip((first, second), masks, "ab", strict=True):
            own = photos(root, photo.subject.name)
            reference = own[(own.index(photo.view.image) + 1) % len(own)]
            mask = out / COMPOSED / f"{number:03d}_{part}.png"
            Image.fromarray(inside.astype(np.uint8) * 255).save(mask)
            described = _described(photo.subject.name, photo.subject.class_name, reference, out)
            subjects.append({**described, "mask": relative(mask, out)})
        image = out / COMPOSED / f"{number:03d}.png"
        Image.fromarray(scene).save(image)
        prompt = f"a {classes[names[0]]} and a {classes[names[1]]}"
        yield {"prompt": prompt, "scene": relative(image, out), "subjects": subjects}


def _described(name: str, class_name: str, reference: Path, out: Path) -> dict[str, Any]:
    described: dict[str, Any] = {"class_name": class_name, "name": name, "reference": relative(reference, out)}
    box = _box(reference)
    return described if box is None else {**described, "reference_box": box}


def _number(photo: Path) -> int:
    return int(photo.stem) if photo.stem.isdecimal() else -1


def _box(photo: Path) -> list[int] | None:
    """Where the subject is, in pixels of the photo."""
    shares = BOXES.get(photo.parent.name, {}).get(_number(photo))
    if shares is None:
        return None
    width, height = read_size(photo)
    return [round(share * side / 100) for share, side in zip(shares, (width, height) * 2, strict=True)]


def _as_box(edges: list[int] | None) -> tuple[int, int, int, int] | None:
    return None if edges is None else (edges[0], edges[1], edges[2], edges[3])


def relative(path: Path, folder: Path) -> str:
    """A path as a line of a file in `folder` names it."""
    return Path(os.path.relpath(path, folder)).as_posix()
