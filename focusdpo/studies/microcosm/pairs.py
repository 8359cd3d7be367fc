"""Preference pairs of the microcosm, as a dataset on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from focusdpo.building.composing import compose_pair, on_white
from focusdpo.data.records import FILE_NAME
from focusdpo.data.writing import pair_line, png_saver, write_lines
from focusdpo.studies.microcosm.identities import Identity
from focusdpo.studies.microcosm.world import BOXES, LIGHT_RANGE, draw_disruption, draw_scene

REFERENCES = "references"


def write_pairs(
    folder: Path,
    identities: Sequence[Identity],
    count: int,
    resolution: int,
    reference_resolution: int,
    seed: int,
    held_out: bool = False,
) -> Path:
    """Writes disrupted-instance pairs: in the loser somebody else stands in each subject's place (`draw_disruption`).

    `meta` has the numbers of the identities in winner and loser.

    Args:
        folder: where to; made.
        identities: who may stand in the scenes.
        count: of pairs.
        resolution, reference_resolution: sides in pixels.
        seed: of all choices.
        held_out: show the subjects' held-out photographs, in scenes and references.

    Returns:
        pairs.jsonl, which is written last.
    """
    (folder / REFERENCES).mkdir(parents=True, exist_ok=True)
    size, lines = (reference_resolution, reference_resolution), []
    for index in tqdm(range(count), desc=f"composing {folder.name} pairs", unit="pair", leave=False):
        rng = np.random.default_rng([seed, index])
        scene = draw_scene(identities, resolution, rng)
        others = draw_disruption(identities, scene, rng)
        shown, references = [], []
        for number in scene.identities:
            photos = identities[number].photos(held_out)
            view = int(rng.integers(len(photos)))
            shown.append(photos[view])
            # Another photograph of the subject, where there is one.
            reference = on_white(photos[(view + 1) % len(photos)], size, float(rng.uniform(*LIGHT_RANGE)))
            references.append((*reference, identities[number].class_name))
        stocks = [identities[number].photos(held_out) for number in others]
        disrupted = [photos[int(rng.integers(len(photos)))] for photos in stocks]
        winner, loser, priors = compose_pair(scene.background, shown, disrupted, BOXES, centred=True)
        meta = {"identities": list(scene.identities), "loser_identities": list(others)}
        lines.append(pair_line(_saver(folder, index), scene.prompt, references, winner, loser, priors, meta))
    return write_lines(folder / FILE_NAME, lines)


def _saver(folder: Path, index: int) -> Callable[[str, Image.Image], str]:
    """References lie in a folder of their own."""
    save = png_saver(folder)

    def save_part(part: str, image: Image.Image) -> str:
        place = f"{REFERENCES}/" if part.startswith("reference") else ""
        return save(f"{place}{index:05d}_{part.removeprefix('reference')}", image)

    return save_part
