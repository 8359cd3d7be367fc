"""Scenes for `focusdpo data build`: the winners of the demo alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from focusdpo.building.composing import compose, draw_background, draw_boxes, on_white
from focusdpo.building.photos import backgrounds
from focusdpo.building.scenes import FILE_NAME
from focusdpo.data.images import token_size
from focusdpo.data.writing import png_saver, write_lines
from focusdpo.demo import scenes


def write_scenes(folder: Path, count: int, resolution: int, seed: int) -> Path:
    """Composes winners alone, with what `focusdpo data build` needs to make pairs of them; returns their scenes.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    return write_lines(folder / FILE_NAME, [_write_scene(folder, index, resolution, seed) for index in range(count)])


def _write_scene(folder: Path, index: int, resolution: int, seed: int) -> dict[str, Any]:
    rng, save = np.random.default_rng([seed, index]), png_saver(folder, f"{index:04d}_")
    pair, photo = scenes._two_subjects(rng), backgrounds()[int(rng.integers(len(backgrounds())))]
    background = draw_background(photo, resolution, (0.6, 1.0), (0.7, 1.1), rng)
    boxes = draw_boxes(rng, scenes.WIDTHS, scenes.HEIGHTS, pixels=resolution)
    scene, masks = compose(background, [s.image for s in pair], boxes)
    described = []
    for i, (subject, mask) in enumerate(zip(pair, masks, strict=True)):
        image, reference_mask = on_white(subject.image, token_size(subject.image.size, resolution // 2))
        files = {"reference": image, "reference_mask": reference_mask, "mask": mask}
        named = {name: save(f"{name}{i}", picture) for name, picture in files.items()}
        described.append({"class_name": subject.class_name, "name": subject.name, **named})
    return {
        "prompt": f"a {pair[0].class_name} and a {pair[1].class_name}",
        "scene": save("scene", scene),
        "subjects": described,
    }
