"""Folders of photos for tests: scikit-image's subjects before its backgrounds, each photo another place, size and light."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from focusdpo.building.composing import compose, draw_background
from focusdpo.building.photos import Subject, backgrounds, subjects

KNOWN = {subject.name: subject for subject in subjects()}


def write_photos(root: Path, shown: Mapping[str, Subject], count: int, side: int = 192, seed: int = 0) -> Path:
    """A folder per subject with `count` photos; returns the root."""
    for number, (name, subject) in enumerate(shown.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            rng = np.random.default_rng([seed, number, index])
            photo(subject, side, rng, index).save(root / name / f"{index:02d}.png")
    return root


def photo(subject: Subject, side: int, rng: np.random.Generator, index: int) -> Image.Image:
    behind = backgrounds()[(index + int(rng.integers(2)) * 3) % len(backgrounds())]
    background = draw_background(behind, side, (0.6, 1.0), (0.8, 1.1), rng)
    width = float(rng.uniform(0.45, 0.6))
    box = (float(rng.uniform(0.12, 0.85 - width)), float(rng.uniform(0.1, 0.2)), width, 0.65)
    cutout = subject.image.rotate(float(rng.uniform(-8, 8)), Image.Resampling.BICUBIC, expand=True)
    scene, _ = compose(background, [cutout], [box])
    return ImageEnhance.Brightness(scene).enhance(float(rng.uniform(0.9, 1.1)))
