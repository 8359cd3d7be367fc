"""Scenes of two subjects with exact masks, written as preference pairs.

The winner shows each subject in its place, the loser the two exchanged; the prior of a reference is the region of its subject
in the winner, exactly. Scene n of both kinds has the same places: kinds differ by their subjects, not by where they stand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance
from tqdm.auto import tqdm

from focusdpo.building.composing import Box, put
from focusdpo.data.records import FILE_NAME
from focusdpo.foundation.files import write_whole, writing_folder
from focusdpo.studies.config import KINDS, Kind, StressConfig
from focusdpo.studies.stress.subjects import Cast, CutOut

LINE = "line.json"  # in a scene's folder: its line of pairs.jsonl


def write_scenes(config: StressConfig, cast: Cast, folder: Path) -> Path:
    """Composes the scenes that are not there yet, and returns their pairs.jsonl: first all of one kind, then of the other."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [(kind, number) for kind in KINDS for number in range(config.scenes)]
    lines = []
    for kind, number in tqdm(wanted, desc="composing scenes", unit="scene", leave=False):
        scene = folder / f"{kind}-{number:04d}"
        if not (scene / LINE).is_file():
            with writing_folder(scene) as partial:
                line = _write_scene(config, cast, kind, number, partial, scene.name)
                (partial / LINE).write_text(json.dumps(line))
        lines.append((scene / LINE).read_text())
    file = folder / FILE_NAME
    write_whole(file, "\n".join(lines) + "\n")
    return file


def _write_scene(config: StressConfig, cast: Cast, kind: Kind, number: int, folder: Path, name: str) -> dict[str, Any]:
    """Writes a scene's images to `folder`, which will be called `name`; returns its line."""
    common = np.random.default_rng([config.seed, number])  # of both kinds
    places = _draw_places(common)
    background, origin = _draw_background(cast, config.resolution, common)
    own = np.random.default_rng([config.seed, number, KINDS.index(kind)])
    names = _draw_pair(cast.pairs[kind], config.seed, kind, number, own)
    views = [cast.view(each, own) for each in names]
    cutouts = [cutout for cutout, _, _ in views]

    images: dict[str, Image.Image] = {}
    images["winner"], regions = compose(background, cutouts, places)
    images["loser"], _ = compose(background, cutouts, places[::-1])
    for r, (_, reference, _) in enumerate(views):
        images |= {f"reference{r}": reference.image, f"reference{r}_mask": reference.mask}
        images[f"prior{r}"] = Image.fromarray(regions[r].astype(np.uint8) * 255)
    for part, image in images.items():
        image.save(folder / f"{part}.png", compress_level=1)
    files = {part: f"{name}/{part}.png" for part in images}
    classes = [cast.class_of[each] for each in names]
    return {
        "prompt": f"two {classes[0]}s" if classes[0] == classes[1] else f"a {classes[0]} and a {classes[1]}",
        "references": [
            {"image": files[f"reference{r}"], "mask": files[f"reference{r}_mask"], "class_name": each}
            for r, each in enumerate(classes)
        ],
        "winner": files["winner"],
        "loser": files["loser"],
        "prior": [files[f"prior{r}"] for r in range(len(views))],
        "meta": {
            "kind": kind,
            "scene": number,
            "subjects": names,
            "background": origin,
            "views": [about for *_, about in views],
        },
    }


def compose(
    background: Image.Image, cutouts: list[CutOut], places: list[Box]
) -> tuple[Image.Image, list[np.ndarray[Any, np.dtype[np.bool_]]]]:
    """The scene of cut-outs in their places, and the region of each, bool [H, W]: where it is more opaque than not.

    Args:
        background: RGB, square.
        cutouts: one per subject.
        places: one per subject; boxes that do not overlap.
    """
    scene, regions = background.copy(), []
    for cutout, place in zip(cutouts, places, strict=True):
        regions.append(np.asarray(put(scene, cutout.image, place, cutout.grounded)) >= 128)
    return scene, regions


def _draw_places(rng: np.random.Generator) -> list[Box]:
    """One box in each half, in random order, so that no side belongs to a reference."""
    places = []
    for half in range(2):
        width, height = float(rng.uniform(0.40, 0.46)), float(rng.uniform(0.5, 0.75))
        left = half / 2 + float(rng.uniform(0.01, 0.49 - width))
        places.append((left, float(rng.uniform(0.05, 0.95 - height)), width, height))
    return [places[i] for i in rng.permutation(2)]


def _draw_background(cast: Cast, resolution: int, rng: np.random.Generator) -> tuple[Image.Image, str]:
    photo, origin = cast.background(rng)
    side = min(photo.size) * float(rng.uniform(0.7, 1.0))
    left, top = (float(rng.uniform(0, length - side)) for length in photo.size)
    image = photo.resize((resolution, resolution), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return ImageEnhance.Brightness(image).enhance(float(rng.uniform(0.8, 1.1))), origin


def _draw_pair(pairs: list[tuple[str, str]], seed: int, kind: Kind, number: int, rng: np.random.Generator) -> list[str]:
    """Every pair as often as the others, in an order of the seed; which of the two is reference 1 is drawn."""
    round_, place = divmod(number, len(pairs))
    order = np.random.default_rng([seed, round_, *kind.encode()]).permutation(len(pairs))
    return [pairs[int(order[place])][i] for i in rng.permutation(2)]
