"""Scenes of two subjects with exact masks, written as preference pairs.

The winner shows each subject in its place, the loser the two exchanged; the prior of a reference is the region of its subject
in the winner, exactly. Scene n of both kinds has the same places: kinds differ by their subjects, not by where they stand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from focusdpo.building.composing import Box, at_bottom, compose, draw_background, draw_boxes
from focusdpo.data.records import FILE_NAME
from focusdpo.data.writing import image_of, pair_line, png_saver
from focusdpo.foundation.files import write_whole, writing_folder
from focusdpo.studies.config import KINDS, Kind, StressConfig
from focusdpo.studies.stress.subjects import SubjectSource

LINE = "line.json"  # in a scene's folder: its line of pairs.jsonl


def write_scenes(config: StressConfig, source: SubjectSource, folder: Path) -> Path:
    """Composes the scenes that are not there yet, and returns their pairs.jsonl: first all of one kind, then of the other."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [(kind, number) for kind in KINDS for number in range(config.scenes)]
    lines = []
    for kind, number in tqdm(wanted, desc="composing scenes", unit="scene", leave=False):
        scene = folder / f"{kind}-{number:04d}"
        if not (scene / LINE).is_file():
            with writing_folder(scene) as partial:
                line = _write_scene(config, source, kind, number, partial, scene.name)
                (partial / LINE).write_text(json.dumps(line))
        lines.append((scene / LINE).read_text())
    file = folder / FILE_NAME
    write_whole(file, "".join(f"{line}\n" for line in lines))
    return file


def _write_scene(
    config: StressConfig, source: SubjectSource, kind: Kind, number: int, folder: Path, name: str
) -> dict[str, Any]:
    """Writes a scene's images to `folder`, which will be called `name`; returns its line."""
    common = np.random.default_rng([config.seed, number])  # of both kinds
    boxes = draw_boxes(common, (0.40, 0.46), (0.5, 0.75), gap=0.01)
    boxes = [boxes[i] for i in common.permutation(2)]  # so that no side belongs to a reference
    photo, origin = source.background(common)
    background = draw_background(photo, config.resolution, (0.7, 1.0), (0.8, 1.1), common)
    own = np.random.default_rng([config.seed, number, KINDS.index(kind)])
    names = _draw_pair(source.pairs[kind], config.seed, kind, number, own)
    subjects = [source.draw(each, own) for each in names]

    def scene(places: list[Box]) -> tuple[Image.Image, list[Image.Image]]:
        standing = [at_bottom(box) if one.grounded else box for one, box in zip(subjects, places, strict=True)]
        return compose(background, [one.cutout for one in subjects], standing)

    winner, opacities = scene(boxes)
    classes = [source.class_of[each] for each in names]
    return pair_line(
        png_saver(folder, listed=f"{name}/", compress_level=1),
        f"two {classes[0]}s" if classes[0] == classes[1] else f"a {classes[0]} and a {classes[1]}",
        [(one.reference, one.reference_mask, class_name) for one, class_name in zip(subjects, classes, strict=True)],
        winner,
        scene(boxes[::-1])[0],
        [image_of(np.asarray(opacity) >= 128) for opacity in opacities],
        {
            "kind": kind,
            "scene": number,
            "subjects": names,
            "background": origin,
            "views": [one.about for one in subjects],
        },
    )


def _draw_pair(pairs: list[tuple[str, str]], seed: int, kind: Kind, number: int, rng: np.random.Generator) -> list[str]:
    """Every pair as often as the others, in an order of the seed; which of the two is reference 1 is drawn."""
    round_, place = divmod(number, len(pairs))
    order = np.random.default_rng([seed, round_, *kind.encode()]).permutation(len(pairs))
    return [pairs[int(order[place])][i] for i in rng.permutation(2)]
