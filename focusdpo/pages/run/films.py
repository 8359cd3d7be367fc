"""Samples and masks of held-out pairs over a run, and samples of prompts: a film for each, of steps chosen evenly."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from focusdpo.foundation.output_folder import step_folders
from focusdpo.pages.html import image_uri
from focusdpo.training.run_files import samples_in

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
    """One pair or prompt over the steps, as its files are called; `available` is how many steps have pictures of it."""

    name: str
    available: int
    shots: list[Shot] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"Held-out pair {self.name}" if self.name.isdecimal() else f"{self.name.replace('-', ' ')} of samples.manifest"


def read_films(folder: Path, max_images: int, size: int, progress: bool = True) -> list[Film]:
    """Reads the pictures of a run.

    Args:
        folder: its samples.
        max_images: sheets and pages of masks, at most; the pairs with the lowest numbers come first, then the prompts.
        size: pixels that the longest side of one has at most.
        progress: show a progress bar.
    """
    steps = step_folders(folder)
    names = samples_in(*(path for _, path in steps))
    kinds = [kind for kind in KINDS if any((path / f"{name}{kind}.png").is_file() for _, path in steps for name in names)]
    if not kinds or max_images < len(kinds):
        return []
    names = names[: max_images // len(kinds)]
    each = max_images // (len(kinds) * len(names))
    films = []
    wanted: list[tuple[Film, int, Path]] = []
    for name in names:
        having = {step: path for step, path in steps if any((path / f"{name}{kind}.png").is_file() for kind in kinds)}
        films.append(Film(name, len(having)))
        wanted += [(films[-1], step, having[step]) for step in evenly(list(having), each)]
    with ThreadPoolExecutor() as pool:  # Pillow releases the interpreter while it decodes, scales and encodes
        shots = pool.map(lambda one: _shot(one[0].name, one[1], one[2], size), wanted)
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


def _shot(name: str, step: int, folder: Path, size: int) -> Shot:
    images = {what: uri for kind, what in KINDS.items() if (uri := _read(folder / f"{name}{kind}.png", size))}
    return Shot(step, images, _read(folder / f"{name}_sample.png", FRAME))


def _read(file: Path, size: int) -> str | None:
    if not file.is_file():
        return None
    try:
        return image_uri(file, size)
    except OSError as error:
        logger.warning("%s: left out, it cannot be read: %s", file, error)
        return None
