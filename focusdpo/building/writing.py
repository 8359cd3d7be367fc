"""The last stage: a pair's images, under their names only when all are written."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from focusdpo.building.candidate import IMAGES, Draft
from focusdpo.building.gates import pair_hash
from focusdpo.data.writing import image_of, pair_line, png_saver


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
        draft.pair = pair_line(
            png_saver(partial, listed=f"{IMAGES}/{draft.name}/", compress_level=1),
            draft.record.prompt,
            [(image_of(one.pixels), image_of(one.region), one.subject.class_name) for one in draft.references],
            image_of(draft.scene),
            image_of(draft.loser),
            [image_of(prior) for prior in draft.priors],
            {
                **draft.record.meta,
                "scene_line": draft.record.line,
                "variant": draft.variant,
                "subjects": [photo.subject.name for photo in draft.subjects],
                "captions": draft.captions,
                **draft.notes,
            },
        )
        # Of a build that was killed before it had noted the pair, or whose manifest was damaged, each file is replaced.
        target.mkdir(parents=True, exist_ok=True)
        for file in partial.iterdir():
            file.replace(target / file.name)
        partial.rmdir()
        draft.hash = pair_hash(draft.scene, draft.loser, np.logical_or.reduce(draft.priors))
