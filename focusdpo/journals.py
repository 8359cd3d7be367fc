"""Files that grow by a line at a time: metrics, alarms, what a build has done. One JSON object a line.

A damaged line costs that line and no other, and is named; a last line that a kill cut short is left out without a word.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from tqdm.auto import tqdm

from focusdpo.files import writing

logger = logging.getLogger(__name__)

Row = dict[str, Any]
MAX_LINE = 2**24  # bytes; what is longer is no line that was written here


def read_rows(path: Path, progress: bool = False) -> Iterator[Row]:
    """The rows of a journal, one after the other; none where there is no file."""
    for _, row in _lines(path, progress):
        yield row


def parse_row(line: bytes) -> Row | None:
    """The row of a line; None where it is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def has_step(row: Row) -> bool:
    """Whether a row says which step of a run it is of, as those of metrics, alarms and evaluations do."""
    step = row.get("step")
    return isinstance(step, int | float) and not isinstance(step, bool) and math.isfinite(step)


def read_metrics(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl or validation.jsonl; none where there is no file. `read_steps` holds one at a time."""
    return list(read_steps(path))


def read_steps(path: Path, progress: bool = False) -> Iterator[Row]:
    """The rows of a run's journal that have a step, one after the other."""
    for number, (_, row) in enumerate(_lines(path, progress), 1):
        if has_step(row):
            yield row
        else:
            logger.warning("%s: row %d left out, it has no step", path, number)


class Journal:
    """Appends to a journal, one line at a time as things happen.

    Args:
        path: the file.
        keep: which of the rows that are there stay; by default all. Damaged ones go.
    """

    def __init__(self, path: Path, keep: Callable[[Row], bool] = lambda row: True) -> None:
        if path.exists():
            with writing(path) as partial, partial.open("wb") as kept:
                kept.writelines(line for line, row in _lines(path) if keep(row))
        self._stream = path.open("ab", buffering=0)

    def write(self, row: Mapping[str, object], to_disk: bool = False) -> None:
        """Adds a row; `to_disk` waits until a power cut would not lose it."""
        self._stream.write(json.dumps(row).encode() + b"\n")
        if to_disk:
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        self._stream.close()


def up_to(step: float) -> Callable[[Row], bool]:
    """What a run that goes on from a step keeps: the rows after it are about to be computed again."""
    return lambda row: has_step(row) and row["step"] <= step


def _lines(path: Path, progress: bool = False) -> Iterator[tuple[bytes, Row]]:
    """Each sound line and its row."""
    if not path.is_file():
        return
    bar = tqdm(
        total=path.stat().st_size, desc=f"reading {path.name}", unit="B", unit_scale=True, disable=not progress, leave=False
    )
    with path.open("rb") as stream, bar:
        for number, line in enumerate(_bounded(stream), 1):
            bar.update(len(line))
            row = parse_row(line)
            if row is not None and line.endswith(b"\n"):
                yield line, row
            elif line.endswith(b"\n") or len(line) == MAX_LINE:
                logger.warning("%s:%d: left out, it is no JSON object", path, number)


def _bounded(stream: BinaryIO) -> Iterator[bytes]:
    """Lines; of one that is too long its beginning."""
    while line := stream.readline(MAX_LINE):
        yield line
        while not line.endswith(b"\n") and len(line) == MAX_LINE:
            line = stream.readline(MAX_LINE)
