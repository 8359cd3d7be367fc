"""Two-subject scenes of real photographs, with disrupted-instance losers, in the dataset format of focusdpo.data.

The winner shows both references' subjects; in the loser both are another instance: another subject of their class, recoloured,
or retextured. The prior is the region where the two images can differ.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import ImageChops
from tqdm.auto import tqdm

from focusdpo.building.composing import compose_pair, draw_background, draw_boxes, on_white
from focusdpo.building.photos import Subject, backgrounds, subjects
from focusdpo.data.images import token_size
from focusdpo.data.records import FILE_NAME
from focusdpo.data.writing import pair_line, png_saver, write_lines

DISRUPTIONS = ("instance", "recolour", "retexture")
WIDTHS, HEIGHTS = (0.40, 0.46), (0.50, 0.80)  # of a subject's box, in shares of the scene's side


def write_dataset(folder: Path, pairs: int, resolution: int, seed: int, per_subject: bool = False) -> Path:
    """Composes pairs and writes them with their pairs.jsonl, with one prior for both subjects or one for each; returns that
    file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    progress = tqdm(range(pairs), desc=f"composing {folder.name}", unit="pair", leave=False)
    return write_lines(folder / FILE_NAME, [_write_pair(folder, index, resolution, seed, per_subject) for index in progress])


def _write_pair(folder: Path, index: int, resolution: int, seed: int, per_subject: bool) -> dict[str, Any]:
    rng = np.random.default_rng([seed, index])
    pair = _two_subjects(rng)
    kinds, others = zip(*(_disrupt(subject, rng) for subject in pair), strict=True)
    photo = backgrounds()[int(rng.integers(len(backgrounds())))]
    background = draw_background(photo, resolution, (0.6, 1.0), (0.7, 1.1), rng)
    boxes = draw_boxes(rng, WIDTHS, HEIGHTS, pixels=resolution)
    winner, loser, priors = compose_pair(background, [s.image for s in pair], [s.image for s in others], boxes)
    alone = [on_white(subject.image, token_size(subject.image.size, resolution // 2)) for subject in pair]
    references = [(*image_and_mask, subject.class_name) for image_and_mask, subject in zip(alone, pair, strict=True)]
    prompt = f"a {pair[0].class_name} and a {pair[1].class_name}"
    meta = {"disruptions": kinds, "subjects": [s.name for s in pair], "loser_subjects": [s.name for s in others]}
    prior = priors if per_subject else ImageChops.lighter(*priors)
    return pair_line(png_saver(folder, f"{index:04d}_"), prompt, references, winner, loser, prior, meta)


def _two_subjects(rng: np.random.Generator) -> list[Subject]:
    """Two subjects of different classes, each in its own or another colour: what makes an identity here."""
    classes = sorted({s.class_name for s in subjects()})
    chosen = []
    for name in rng.choice(classes, size=2, replace=False):
        members = [s for s in subjects() if s.class_name == name]
        subject = members[int(rng.integers(len(members)))]
        chosen.append(subject.recoloured(float(rng.uniform(0.1, 0.9))) if rng.random() < 0.5 else subject)
    return chosen


def _disrupt(subject: Subject, rng: np.random.Generator) -> tuple[str, Subject]:
    """Another instance of the subject's class."""
    # A recoloured subject is named after its original: that one is no other instance.
    others = [s for s in subjects() if s.class_name == subject.class_name and not subject.name.startswith(s.name)]
    kinds = DISRUPTIONS if others else DISRUPTIONS[1:]
    kind = str(rng.choice(kinds))
    if kind == "instance":
        return kind, others[int(rng.integers(len(others)))]
    if kind == "recolour":
        return kind, subject.recoloured(float(rng.uniform(0.25, 0.75)))
    return kind, subject.retextured(str(rng.choice(["brick", "grass", "gravel"])), float(rng.random()))
