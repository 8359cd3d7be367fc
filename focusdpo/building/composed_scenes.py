"""Scenes composed of cut-outs: one to four subjects side by side before a background that shows none of them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

from focusdpo.building.blending import grow, light_gain
from focusdpo.building.candidate import Mask
from focusdpo.building.composing import Box, at_bottom, compose, draw_background
from focusdpo.building.cutting import CutOut
from focusdpo.building.disruption import cut_edges
from focusdpo.building.photo_folder import SubjectPhotos
from focusdpo.data.writing import image_of, png_saver
from focusdpo.foundation.files import hash_of

logger = logging.getLogger(__name__)

SCENES = "scenes"  # a folder of the composed scenes
LEAST_FREE = 0.3  # side of a background, as a share of its photo's shorter side
LEAST_PIXELS = 32  # of that side
LEAST_PHOTOS = 2  # of a subject: one that the scene shows, and one as its reference
PLACES = {
    2: ("on the left", "on the right"),
    3: ("on the left", "in the middle", "on the right"),
    4: ("first from the left", "second from the left", "third from the left", "fourth from the left"),
}


@dataclass(frozen=True)
class Stock:
    """What the scenes of a split are made of.

    subjects: by name. cut_outs: those of each subject that may be used, and where each is stored, relative to the folder of the
    scenes: image and mask. backgrounds: RGB photos, or parts of them, without the subject, and what each photo is called.
    """

    subjects: Mapping[str, SubjectPhotos]
    cut_outs: Mapping[str, Sequence[tuple[CutOut, str, str]]]
    backgrounds: Sequence[tuple[Image.Image, str]]

    @property
    def placeable(self) -> dict[str, list[int]]:
        """For each subject that can be in a scene, those of its cut-outs that are whole, or cut off at the bottom alone."""
        found = {}
        for name, cut_outs in self.cut_outs.items():
            whole = [i for i, (one, _, _) in enumerate(cut_outs) if cut_edges(one.mask) <= {"bottom"}]
            if whole and len(cut_outs) >= LEAST_PHOTOS:
                found[name] = whole
        return found


def split_photos(names: Sequence[str], held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Which of a subject's photos are trained on, and which are held out: two at least of each, or none held out.

    The order in which they are held out follows from their names: one photo more or less moves no more than one other.

    Args:
        names: of the photos.
        held_out: share of them.
        seed: of the order.

    Returns:
        places in `names`, of both parts.
    """
    order = sorted(range(len(names)), key=lambda index: hash_of(seed, names[index]))
    kept = max(LEAST_PHOTOS, round(len(names) * held_out)) if held_out else 0
    if len(names) - kept < LEAST_PHOTOS:
        kept = 0
    return sorted(order[kept:]), sorted(order[:kept])


def free_part(cut_out: CutOut) -> Image.Image | None:
    """The largest square of a photo in which its subject is not; None where that is too small."""
    height, width = cut_out.mask.shape
    step = max(min(height, width) // 64, 1)
    blocked = grow(cut_out.mask, max(4, round(0.03 * max(height, width))))
    rows, columns = height // step, width // step
    cells = blocked[: rows * step, : columns * step].reshape(rows, step, columns, step)
    taken: Mask = np.asarray(cells.any(axis=(1, 3)))
    # The side of the largest free square that ends in each cell.
    sides = np.where(taken, 0, 1)
    for row in range(1, rows):
        for column in range(1, columns):
            if not taken[row, column]:
                sides[row, column] = 1 + min(sides[row - 1, column], sides[row, column - 1], sides[row - 1, column - 1])
    side = int(sides.max())
    if side * step < max(LEAST_FREE * min(height, width), LEAST_PIXELS):
        return None
    last = np.unravel_index(int(sides.argmax()), sides.shape)
    bottom, right = (int(cell + 1) * step for cell in last)
    return Image.fromarray(cut_out.pixels[bottom - side * step : bottom, right - side * step : right])


def compose_scenes(
    stock: Stock, count: int, numbers: Sequence[int], resolution: int, seed: Sequence[int], folder: Path
) -> Iterator[dict[str, Any]]:
    """Writes scenes, and yields their lines of scenes.jsonl.

    Args:
        stock: what they are made of.
        count: how many.
        numbers: of subjects that a scene may have; those above what the stock has are left out.
        resolution: side in pixels.
        seed: of the draws.
        folder: of the scenes.jsonl.
    """
    placeable = stock.placeable
    possible = [number for number in numbers if number <= len(placeable)] or [len(placeable)]
    if min(numbers) > len(placeable):
        logger.warning("subjects: got %s; only %d can be in a scene", list(numbers), len(placeable))
    (folder / SCENES).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        rng = np.random.default_rng([*seed, index])
        names = [str(name) for name in rng.choice(sorted(placeable), int(rng.choice(possible)), replace=False)]
        photo, origin = stock.backgrounds[int(rng.integers(len(stock.backgrounds)))]
        background = draw_background(photo, resolution, (0.7, 1.0), (0.8, 1.1), rng)
        drawn = [(name, *_draw(stock, name, placeable[name], rng)) for name in names]
        line = _write(index, stock, background, drawn, rng, folder)
        line["meta"]["background_photo"] = origin
        yield line


def _draw(stock: Stock, name: str, placeable: Sequence[int], rng: np.random.Generator) -> tuple[int, int]:
    """Which of a subject's cut-outs the scene shows, and which is its reference: another photo."""
    shown = int(rng.choice(placeable))
    others = [i for i in range(len(stock.cut_outs[name])) if i != shown]
    return shown, int(rng.choice(others))


def _write(
    index: int,
    stock: Stock,
    background: Image.Image,
    drawn: Sequence[tuple[str, int, int]],
    rng: np.random.Generator,
    folder: Path,
) -> dict[str, Any]:
    shown = [stock.cut_outs[name][number][0] for name, number, _ in drawn]
    boxes = _boxes(len(drawn), rng)
    boxes = [at_bottom(box) if one.is_grounded else box for one, box in zip(shown, boxes, strict=True)]
    scene, opacities = compose(background, [lit(one, background) for one in shown], boxes)
    save = png_saver(folder / SCENES, f"{index:05d}_", f"{SCENES}/", compress_level=1)
    subjects = []
    for place, ((name, _, other), opacity) in enumerate(zip(drawn, opacities, strict=True)):
        _, reference, mask = stock.cut_outs[name][other]
        subjects.append(
            {
                "class_name": stock.subjects[name].class_name,
                "name": name,
                "reference": reference,
                "reference_mask": mask,
                "mask": save(f"mask{place}", image_of(np.asarray(opacity) >= 128)),
            }
        )
    photos = [f"{one.name}/{one.file.name}" for one in shown]
    references = [f"{name}/{stock.cut_outs[name][other][0].file.name}" for name, _, other in drawn]
    return {
        "prompt": prompt_of([stock.subjects[name] for name, _, _ in drawn]),
        "scene": save("scene", scene),
        "background": save("background", background),
        "subjects": subjects,
        "meta": {"photos": photos, "reference_photos": references},
    }


def prompt_of(subjects: Sequence[SubjectPhotos]) -> str:
    """What a scene shows from left to right; two that are called the same are told apart by their places."""
    called = [one.caption or f"{'an' if one.class_name[0].lower() in 'aeiou' else 'a'} {one.class_name}" for one in subjects]
    counts = Counter(called)
    placed = [f"{name} {PLACES[len(called)][place]}" if counts[name] > 1 else name for place, name in enumerate(called)]
    return placed[0] if len(placed) == 1 else f"{', '.join(placed[:-1])} and {placed[-1]}"


def lit(cut_out: CutOut, background: Image.Image) -> Image.Image:
    """The cut-out, RGBA, in the background's light."""
    outside = cut_out.pixels[~cut_out.mask]
    image = cut_out.rgba()
    if not len(outside):
        return image
    alpha = image.getchannel("A")
    image = ImageEnhance.Brightness(image.convert("RGB")).enhance(light_gain(outside[None], np.asarray(background)))
    image.putalpha(alpha)
    return image


def _boxes(count: int, rng: np.random.Generator) -> list[Box]:
    """A box for each subject, from left to right, which stand on about one line."""
    column = 1 / count
    baseline = float(rng.uniform(0.86, 0.97))
    boxes = []
    for place in range(count):
        width = column * float(rng.uniform(0.8, 0.96)) if count > 1 else float(rng.uniform(0.6, 0.85))
        height = min(float(rng.uniform(0.6, 0.8)), 1.6 * width + 0.2)
        bottom = min(baseline + float(rng.uniform(-0.02, 0.02)), 0.99)
        left = place * column + float(rng.uniform(0, column - width))
        boxes.append((left, bottom - height, width, height))
    return boxes
