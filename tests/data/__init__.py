from __future__ import annotations

from pathlib import Path

from focusdpo.data import PairRecord, Problem
from focusdpo.data.formats import find_sources, items_of
from focusdpo.data.lines import split_problems


def parse_pairs(path: str | Path) -> tuple[list[PairRecord], list[Problem]]:
    """The records of a dataset that parse, and the problems of those that do not; no image is opened."""
    return split_problems(item for source in find_sources(path) for item in items_of(source))
