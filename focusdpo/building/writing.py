"""The last stage: a pair's images, under their names only when all are written."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from focusdpo.building.candidate import IMAGES, Candidate
from focusdpo.building.gates import pair_hash
from focusdpo.data.writing import image_of, pair_line, png_saver


class Write:
    """Writes the images of a candidate, and notes its line of pairs.jsonl and its hash."""

    device = "cpu"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, candidate: Candidate) -> None:
        assert candidate.scene is not None and candidate.loser is not None
        target = self._folder / IMAGES / candidate.name
        partial = target.with_name(f".{candidate.name}.{os.getpid()}.partial")
        partial.mkdir(parents=True)
        candidate.pair = pair_line(
            png_saver(partial, listed=f"{IMAGES}/{candidate.name}/", compress_level=1),
            candidate.record.prompt,
            [(image_of(one.pixels), image_of(one.region), one.subject.class_name) for one in candidate.references],
            image_of(candidate.scene),
            image_of(candidate.loser),
            [image_of(prior) for prior in candidate.priors],
            {
                **candidate.record.meta,
                "scene_line": candidate.record.line,
                "variant": candidate.variant,
                "subjects": [photo.subject.name for photo in candidate.subjects],
                "captions": candidate.captions,
                **candidate.notes,
            },
        )
        # Of a build that was killed before it had noted the pair, or whose manifest was damaged, each file is replaced.
        target.mkdir(parents=True, exist_ok=True)
        for file in partial.iterdir():
            file.replace(target / file.name)
        partial.rmdir()
        candidate.hash = pair_hash(candidate.scene, candidate.loser, np.logical_or.reduce(candidate.priors))
