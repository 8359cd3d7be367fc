"""The last stage: a pair's images, under their names only when all are written."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from focusdpo.building.candidate import Draft, Mask, Pixels
from focusdpo.building.gates import pair_hash

IMAGES = "images"  # a folder per pair in it


class Write:
    """Writes the images of a draft, and notes its line of pairs.jsonl and its hash."""

    device = "cpu"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, draft: Draft) -> None:
        assert draft.scene is not None and draft.loser is not None
        target = self._folder / IMAGES / draft.name
        partial = target.with_name(f".{draft.name}.{os.getpid()}.partial")
        partial.mkdir(parents=True)

        def save(name: str, pixels: Pixels | Mask) -> str:
            values = pixels.astype(np.uint8) * 255 if pixels.dtype == np.bool_ else pixels
            Image.fromarray(values).save(partial / f"{name}.png", compress_level=1)
            return f"{IMAGES}/{draft.name}/{name}.png"

        references = []
        for number, photo in enumerate(draft.references):
            assert photo.mask is not None
            reference = {"image": save(f"reference{number}", photo.pixels), "mask": save(f"reference{number}_mask", photo.mask)}
            references.append({**reference, "class_name": photo.subject.class_name})
        line = {
            "prompt": draft.record.prompt,
            "references": references,
            "winner": save("winner", draft.scene),
            "loser": save("loser", draft.loser),
            "prior": [save(f"prior{number}", prior) for number, prior in enumerate(draft.priors)],
            "meta": {
                **draft.record.meta,
                "scene_line": draft.record.line,
                "variant": draft.variant,
                "subjects": [photo.subject.name for photo in draft.subjects],
                "captions": draft.captions,
                **draft.notes,
            },
        }
        # Of a build that was killed before it had noted the pair, or whose manifest was damaged, each file is replaced.
        target.mkdir(parents=True, exist_ok=True)
        for file in partial.iterdir():
            file.replace(target / file.name)
        partial.rmdir()
        draft.pair = line
        draft.hash = pair_hash(draft.scene, draft.loser, np.logical_or.reduce(draft.priors))
