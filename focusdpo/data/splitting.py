"""Pairs in two parts that share no photo, whatever the photo is called."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from focusdpo.data.records import PairRecord
from focusdpo.foundation.files import ReadableFile, checksum

SPLITS = ("train", "held_out")  # folders of the two parts
COMPOSED_OF = ("photos", "reference_photos", "background_photo")  # in the meta of pairs that were composed of photos


def groups_of(records: Sequence[PairRecord]) -> list[list[int]]:
    """Pairs that share a reference, a winner or a loser, directly or over others, as lists of their places."""
    leader = list(range(len(records)))

    def find(index: int) -> int:
        while leader[index] != index:
            leader[index] = leader[leader[index]]
            index = leader[index]
        return index

    first: dict[str, int] = {}
    for index, record in enumerate(records):
        for content in _contents(record):
            other = find(first.setdefault(content, index))
            leader[find(index)] = other
    groups: dict[int, list[int]] = defaultdict(list)
    for index in range(len(records)):
        groups[find(index)].append(index)
    return list(groups.values())


def _contents(record: PairRecord) -> Iterable[str]:
    """What tells a pair's photos: the files' checksums, and the photos' names where the pairs were composed of them."""
    yield from (checksum(file) for file in record.image_fields.values())
    for name in COMPOSED_OF:
        listed = record.meta.get(name)
        yield from (f"photo {photo}" for photo in (listed if isinstance(listed, list) else [listed]) if photo is not None)
    notes = record.meta.get("disruption")
    for note in notes if isinstance(notes, list) else ():
        if isinstance(note, dict) and "donor_photo" in note:
            yield f"photo {note['donor_photo']}"


def split(records: Sequence[PairRecord], held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Places of the pairs to train on, and of the held-out ones, about a share `held_out` of all, in their order.

    Raises:
        ValueError: all pairs share photos, so that none can be held out.
    """
    groups = groups_of(records)
    if len(groups) < 2:
        raise ValueError(
            f"source: all {len(records)} pairs share photos with each other, directly or over others, so that none can be held "
            "out; compose them anew with focusdpo data compose, which splits the photos first"
        )
    wanted = min(max(round(held_out * len(records)), 1), len(records) - 1)
    kept: list[int] = []
    # Large groups would take more than is wanted: they come last.
    order = np.random.default_rng(seed).permutation(len(groups))
    for group in sorted((groups[int(i)] for i in order), key=len):
        if (kept and len(kept) + len(group) > wanted) or len(kept) + len(group) == len(records):
            break
        kept += group
    held = set(kept)
    return [i for i in range(len(records)) if i not in held], sorted(held)


def line_in(folder: Path, record: PairRecord) -> dict[str, Any]:
    """A pair's line of pairs.jsonl in another folder; its images stay where they are.

    Raises:
        ValueError: its images are within a shard or a table.
    """

    def place(file: ReadableFile) -> str:
        if not isinstance(file, Path):
            raise ValueError(f"source: {record.file}: images within shards and tables cannot be named; expected a pairs.jsonl")
        return Path(os.path.relpath(file.resolve(), folder.resolve())).as_posix()

    references = []
    for one in record.references:
        kept = {"image": place(one.image)}
        kept |= {} if one.mask is None else {"mask": place(one.mask)}
        references.append(kept | ({} if one.class_name is None else {"class_name": one.class_name}))
    priors = [place(file) for file in record.prior]
    return {
        "prompt": record.prompt,
        "references": references,
        "winner": place(record.winner),
        "loser": place(record.loser),
        "prior": priors if record.per_subject else priors[0],
        **({"meta": record.meta} if record.meta else {}),
    }
