"""Preference pairs of the microcosm, as a dataset on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from focusdpo.building.composing import on_white
from focusdpo.data.records import FILE_NAME
from focusdpo.foundation.files import write_whole
from focusdpo.studies.microcosm.identities import Identity
from focusdpo.studies.microcosm.identity_scenes import LIGHT_RANGE, draw_scene, other_instance, prompt_of, render

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
    """Writes disrupted-instance pairs: in the loser another instance of its class stands in one subject's place.

    `meta` has the numbers of both identities, which of them was changed, and the number of the instance in the loser.

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
    lines = []
    for index in tqdm(range(count), desc=f"composing {folder.name} pairs", unit="pair", leave=False):
        rng = np.random.default_rng([seed, index])
        scene = draw_scene(identities, rng)
        changed = int(rng.integers(2))
        other = other_instance(identities, scene.identities[changed], rng)

        def cutouts(number: int) -> tuple[Image.Image, ...]:
            return identities[number].held_out if held_out else identities[number].views

        shown, references = [], []
        for place, number in enumerate(scene.identities):
            views = cutouts(number)
            view = int(rng.integers(len(views)))
            shown.append(views[view])
            # Another photograph of the subject, where there is one.
            image, mask = on_white(views[(view + 1) % len(views)], reference_resolution, float(rng.uniform(*LIGHT_RANGE)))
            name = f"{REFERENCES}/{index:05d}_{place}"
            image.save(folder / f"{name}.png")
            mask.save(folder / f"{name}_mask.png")
            class_name = identities[number].class_name
            references.append({"image": f"{name}.png", "mask": f"{name}_mask.png", "class_name": class_name})
        swapped = list(shown)
        swapped[changed] = cutouts(other)[int(rng.integers(len(cutouts(other))))]
        winner, outlines = render(scene, shown, resolution)
        loser, disrupted = render(scene, swapped, resolution)
        prior = (np.asarray(outlines[changed]) > 0) | (np.asarray(disrupted[changed]) > 0)
        names = {part: f"{index:05d}_{part}.png" for part in ("winner", "loser", "prior")}
        winner.save(folder / names["winner"])
        loser.save(folder / names["loser"])
        Image.fromarray(prior.astype(np.uint8) * 255).save(folder / names["prior"])
        meta = {"identities": list(scene.identities), "changed": changed, "loser_identity": other}
        lines.append({"prompt": prompt_of(identities, scene), "references": references, **names, "meta": meta})
    file = folder / FILE_NAME
    write_whole(file, "".join(json.dumps(line) + "\n" for line in lines))
    return file
