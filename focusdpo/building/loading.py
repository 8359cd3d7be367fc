"""The first stage: draws which subjects change, and reads a scene's photos and those of other instances."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from focusdpo.building.candidate import Candidate, Mask, Photo, Pixels
from focusdpo.building.config import ALWAYS_APPLY, BuildConfig
from focusdpo.building.scenes import Scene, SceneSubject, View
from focusdpo.data.images import Size, read_image, read_mask, read_size, token_size


@lru_cache(maxsize=128)
def read_pixels(path: Path, longest: int) -> Pixels:
    """An RGB image scaled and cut to whole tokens as training does it; `longest` is its longest side. Not to be written to."""
    size = token_size(read_size(path), longest)
    return np.asarray(ImageOps.fit(read_image(path), size, method=Image.Resampling.LANCZOS))


@lru_cache(maxsize=128)
def read_region(path: Path, size: Size) -> Mask:
    """A mask brought to the size of its image."""
    return np.asarray(ImageOps.fit(read_mask(path), size, method=Image.Resampling.BOX)) >= 128


class Load:
    """Draws what changes and how, and reads the scene, its references, and the donors that a swap needs.

    Args:
        scenes: all scenes; the references of other instances of a class are its donors.
        config: longest sides in pixels; which subjects change, the embedded kinds, and how many donors to draw.
    """

    device = "cpu"

    def __init__(self, scenes: Sequence[Scene], config: BuildConfig) -> None:
        self._resolution = config.resolution
        self._reference_resolution = config.reference_resolution
        self._disruption = config.disruption
        self._compared = config.encoder.name != "none"
        by_class: dict[str, dict[View, SceneSubject]] = defaultdict(dict)
        for scene in scenes:
            for subject in scene.subjects:
                by_class[subject.class_name].setdefault(subject.reference, subject)
        self._by_class = {name: list(views.values()) for name, views in by_class.items()}

    def __call__(self, candidate: Candidate) -> None:
        candidate.scene = read_pixels(candidate.record.image, self._resolution)
        if candidate.record.background is not None:
            candidate.background = read_pixels(candidate.record.background, self._resolution)
        candidate.subjects = [self._photo(s, s.scene, self._resolution) for s in candidate.record.subjects]
        candidate.references = [self._photo(s, s.reference, self._reference_resolution) for s in candidate.record.subjects]
        count = len(candidate.subjects)
        candidate.changing = (
            range(count) if self._disruption.changed == "all" else [int(candidate.rng("changing").integers(count))]
        )
        for number in candidate.changing:
            kinds = [str(kind) for kind in candidate.rng(f"kinds {number}").permutation(self._disruption.kinds)]
            candidate.kinds[number] = kinds
            reached = kinds[: kinds.index("swap") + 1] if "swap" in kinds else []
            # Cutting donors out takes most of the time: not where another kind comes first, which the encoder may refuse.
            needed = reached and (self._compared or not ALWAYS_APPLY & set(reached))
            if self._disruption.name == "embedded" and needed:
                candidate.donors[number] = self._draw(candidate, number)

    def _draw(self, candidate: Candidate, number: int) -> list[Photo]:
        subject, present = candidate.record.subjects[number], {one.name for one in candidate.record.subjects}
        others = [s for s in self._by_class[subject.class_name] if s.name not in present]
        drawn = candidate.rng(f"donors {number}").permutation(len(others))[: self._disruption.donors]
        return [self._photo(others[int(i)], others[int(i)].reference, self._reference_resolution) for i in drawn]

    def _photo(self, subject: SceneSubject, view: View, longest: int) -> Photo:
        pixels = read_pixels(view.image, longest)
        height, width = pixels.shape[:2]
        return Photo(subject, view, pixels, None if view.mask is None else read_region(view.mask, (width, height)))
