"""Scenes for `focusdpo data build`: the winners of the demo alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from focusdpo.building.composing import compose, draw_boxes
from focusdpo.building.scenes import FILE_NAME
from focusdpo.data.writing import png_saver, write_lines
from focusdpo.demo import scenes


def write_scenes(folder: Path, count: int, resolution: int, seed: int) -> Path:
    """Composes winners alone, with what `focusdpo data build` needs to make pairs of them; returns their scenes.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    return write_lines(folder / FILE_NAME, [_write_scene(folder, index, resolution, seed) for index in range(count)])


def _write_scene(folder: Path, index: int, resolution: int, seed: int) -> dict[str, Any]:
    rng, save = np.random.default_rng([seed, index]), png_saver(folder, f"{index:04d}_")
    pair, background = scenes._two_subjects(rng), scenes._background(resolution, rng)
    boxes = draw_boxes(rng, scenes.WIDTHS, scenes.HEIGHTS, pixels=resolution)
    scene, masks = compose(background, [s.image for s in pair], boxes)
    described = []
    for i, (subject, mask) in enumerate(zip(pair, masks, strict=True)):
        image, reference_mask = scenes._reference(subject, resolution)
        files = {"reference": image, "reference_mask": reference_mask, "mask": mask}
        named = {name: save(f"{name}{i}", picture) for name, picture in files.items()}
        described.append({"class_name": subject.class_name, "name": subject.name, **named})
    return {"prompt": scenes._prompt(pair), "scene": save("scene", scene), "subjects": described}
