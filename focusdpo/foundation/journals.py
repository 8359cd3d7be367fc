"""Files that grow by a line at a time: metrics, alarms, what a build has done. One JSON object a line.

A damaged line costs that line and no other, and is named; a last line that a kill cut short is left out without a word.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from tqdm.auto import tqdm

from focusdpo.foundation.files import writing

logger = logging.getLogger(__name__)

Row = dict[str, Any]
MAX_LINE = 2**24  # bytes; what is longer is no line that was written here
BATCH = 2**16  # bytes of lines that are parsed at once


@dataclass(frozen=True)
class Part:
    """The lines of a journal that begin at byte `start` or later, and before `end`; a line begins at `start`."""

    start: int
    end: int


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a journal, one after the other; none where there is no file."""
    for _, row in _lines(path):
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


def read_steps(path: Path, progress: bool = False, part: Part | None = None) -> Iterator[Row]:
    """The rows of a run's journal that have a step, one after the other; of a part of it only."""
    for _, row in _lines(path, progress, part, steps=True):
        yield row


def parts_of(path: Path, count: int) -> list[Part]:
    """Divides a journal into parts of about as many bytes each; fewer where its lines are too long for so many."""
    size = path.stat().st_size
    starts = [0]
    with path.open("rb") as stream:
        for i in range(1, count):
            place = max(size * i // count, starts[-1])
            stream.seek(max(place - 1, 0))  # where a line ends just before the place, the next begins there
            for _ in _bounded(stream, 0, 1):
                pass
            starts.append(min(stream.tell(), size))
    return [Part(start, end) for start, end in pairwise([*starts, size]) if start < end]


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


def _lines(path: Path, progress: bool = False, part: Part | None = None, steps: bool = False) -> Iterator[tuple[bytes, Row]]:
    """Each sound line and its row; those without a step are left out where `steps` are asked for."""
    if not path.is_file():
        return
    start, end = (0, math.inf) if part is None else (part.start, part.end)
    total = min(end, path.stat().st_size) - start
    bar = tqdm(total=total, desc=f"reading {path.name}", unit="B", unit_scale=True, disable=not progress, leave=False)
    before: int | None = None
    number = 0
    with path.open("rb") as stream, bar:
        stream.seek(start)
        for lines in _batches(_bounded(stream, start, end)):
            bar.update(sum(map(len, lines)))
            for line, row in zip(lines, _parse_rows(lines), strict=True):
                number += 1
                whole = line.endswith(b"\n")
                if row is not None and whole and not (steps and not has_step(row)):
                    yield line, row
                elif whole or len(line) == MAX_LINE:
                    before = _lines_before(path, start) if before is None else before  # counted for a damaged file alone
                    fault = "it is no JSON object" if row is None or not whole else "it has no step"
                    logger.warning("%s:%d: left out, %s", path, before + number, fault)


def _batches(lines: Iterator[bytes]) -> Iterator[list[bytes]]:
    """Lines, as many as `BATCH` bytes have, and one more."""
    batch: list[bytes] = []
    size = 0
    for line in lines:
        batch.append(line)
        size += len(line)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _parse_rows(lines: list[bytes]) -> Sequence[Row | None]:
    """What `parse_row` makes of each, faster where all are sound: as one array, whose rows share the texts of their keys."""
    joined = b",".join(lines)
    # A line that begins with its only { and ends with a } is one object, or the array is none: texts do not span lines.
    if joined.count(b"{") == len(lines) and all(line[:1] == b"{" and line[-2:] == b"}\n" for line in lines):
        with suppress(ValueError, RecursionError):
            rows: list[Row] = json.loads(b"[%b]" % joined)
            return rows
    return [parse_row(line) for line in lines]


def _bounded(stream: BinaryIO, place: int, end: float) -> Iterator[bytes]:
    """Lines from a place on that begin before the end; of one that is too long its beginning."""
    while place < end and (line := stream.readline(MAX_LINE)):
        place += len(line)
        yield line
        while not line.endswith(b"\n") and len(line) == MAX_LINE:
            line = stream.readline(MAX_LINE)
            place += len(line)


def _lines_before(path: Path, place: int) -> int:
    with path.open("rb") as stream:
        blocks = iter(lambda: stream.read(min(2**20, place - stream.tell())), b"")
        return sum(block.count(b"\n") for block in blocks)
