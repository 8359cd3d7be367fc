"""Samples and masks of held-out pairs over a run: a film for each pair, of steps chosen evenly."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from focusdpo.foundation.output_folder import step_folders
from focusdpo.pages.html import image_uri

logger = logging.getLogger(__name__)

FRAME = 192  # pixels of a thumbnail's longest side
KINDS = {"": "references, samples and winner", "_masks": "masks of the pair"}  # ends of the files' names


@dataclass(frozen=True)
class Shot:
    """What a film shows of one step: data: URIs by what they show, and the thumbnail of the sample."""

    step: int
    images: dict[str, str]
    frame: str | None


@dataclass
class Film:
    """One pair over the steps; `available` is how many steps have pictures of it."""

    pair: int
    available: int
    shots: list[Shot] = field(default_factory=list)


def read_films(folder: Path, max_images: int, size: int, progress: bool = True) -> list[Film]:
    """Reads the pictures of a run.

    Args:
        folder: its samples.
        max_images: sheets and pages of masks, at most; the pairs with the lowest numbers come first.
        size: pixels that the longest side of one has at most.
        progress: show a progress bar.
    """
    steps = step_folders(folder)
    pairs = sorted({int(file.stem) for _, path in steps for file in path.glob("*.png") if file.stem.isdecimal()})
    kinds = [kind for kind in KINDS if any((path / f"{pair}{kind}.png").is_file() for _, path in steps for pair in pairs)]
    if not kinds or max_images < len(kinds):
        return []
    pairs = pairs[: max_images // len(kinds)]
    each = max_images // (len(kinds) * len(pairs))
    films = []
    wanted: list[tuple[Film, int, Path]] = []
    for pair in pairs:
        having = {step: path for step, path in steps if any((path / f"{pair}{kind}.png").is_file() for kind in kinds)}
        films.append(Film(pair, len(having)))
        wanted += [(films[-1], step, having[step]) for step in evenly(list(having), each)]
    with ThreadPoolExecutor() as pool:  # Pillow releases the interpreter while it decodes, scales and encodes
        shots = pool.map(lambda one: _shot(one[0].pair, one[1], one[2], size), wanted)
        bar = tqdm(shots, total=len(wanted), desc="reading pictures", unit="step", disable=not progress, leave=False)
        for (film, _, _), shot in zip(wanted, bar, strict=True):
            if shot.images:
                film.shots.append(shot)
    return [film for film in films if film.shots]


def evenly(steps: Sequence[int], count: int) -> list[int]:
    """At most `count` of some ascending steps, the last and the first among them, the others evenly between in time."""
    if len(steps) <= count:
        return list(steps)
    if count == 1:
        return [steps[-1]]
    first, last = steps[0], steps[-1]
    places = [first + (last - first) * i / (count - 1) for i in range(count)]
    return sorted({min(steps, key=lambda step: abs(step - place)) for place in places})


def _shot(pair: int, step: int, folder: Path, size: int) -> Shot:
    images = {what: uri for kind, what in KINDS.items() if (uri := _read(folder / f"{pair}{kind}.png", size))}
    return Shot(step, images, _read(folder / f"{pair}_sample.png", FRAME))


def _read(file: Path, size: int) -> str | None:
    if not file.is_file():
        return None
    try:
        return image_uri(file, size)
    except OSError as error:
        logger.warning("%s: left out, it cannot be read: %s", file, error)
        return None
