"""Other projects' lists of pairs, as pairs.jsonl: UNO's json and the columns of Diffusion-DPO's Pick-a-Pic."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image, ImageChops
from tqdm.auto import tqdm

from focusdpo.data.checks import changed_tokens
from focusdpo.data.images import ImageBytes, ImageError, attempt, inside, read_alpha, read_gray, read_image
from focusdpo.data.lines import MAX_REFERENCES, text_fault
from focusdpo.data.records import FILE_NAME
from focusdpo.data.shards import image_suffix
from focusdpo.data.writing import image_of, pair_line, write_lines
from focusdpo.foundation.files import ReadableFile
from focusdpo.foundation.packages import require_package
from focusdpo.foundation.text import counted

logger = logging.getLogger(__name__)

T = TypeVar("T")

IMAGES = "images"  # folder of what an import writes beside pairs.jsonl
UNO_SCORE = 4.0  # UNO-1M's own rating of a couple of images, of which UNO trains on the full marks
LOGGED = 3  # entries of each reason for dropping
Stored = Path | bytes  # an image that lies in a file, or is to be written to one
COLUMNS = ("caption", "jpg_0", "jpg_1", "label_0")


@dataclass(frozen=True)
class UnoRow:
    """An entry of UNO's json: references, and an image that shows them. `target` is as the file has it."""

    number: int
    prompt: str
    references: tuple[Path, ...]
    target: str


class UnfitError(Exception):
    """An entry that is left out: `reason` is counted, and `detail` says more of this one."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class Dropped(Counter[str]):
    """How many entries were left out, by reason; the first of each are logged."""

    def add(self, number: int, error: UnfitError) -> None:
        self[error.reason] += 1
        if self[error.reason] <= LOGGED:
            logger.warning("entry %d dropped: %s%s", number, error.reason, f": {error.detail}" if error.detail else "")


class Writer:
    """Writes pairs.jsonl last, under its name once it is whole; counts what was dropped, and why."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[dict[str, Any]] = []
        self.dropped = Dropped()
        (folder / IMAGES).mkdir(parents=True, exist_ok=True)

    def add(self, index: int, prompt: str, references: Sequence[Stored], winner: Stored, loser: Stored, prior: Stored) -> None:
        """A pair, whose images are stored unless they lie in files already."""

        def save(part: str, image: Stored) -> str:
            if isinstance(image, Path):
                return Path(os.path.relpath(image.resolve(), self.folder.resolve())).as_posix()
            path = self.folder / IMAGES / f"{index:07}_{part}.{image_suffix(image)}"
            path.write_bytes(image)
            return f"{IMAGES}/{path.name}"

        given = [(reference, None, None) for reference in references]
        self.lines.append(pair_line(save, prompt, given, winner, loser, prior))

    def mask(self, name: str, mask: Image.Image) -> Path:
        """Stores a mask that is made here."""
        path = self.folder / IMAGES / f"{name}.png"
        mask.save(path)
        return path

    def finish(self) -> None:
        if not self.lines:
            raise ValueError(f"nothing was imported: {self.summary()}")
        write_lines(self.folder / FILE_NAME, self.lines)

    def summary(self) -> str:
        reasons = [f"{count} dropped: {reason}" for reason, count in self.dropped.most_common()]
        return "; ".join([counted(len(self.lines), "pair"), *reasons])


def read_uno(file: Path, dropped: Dropped) -> list[UnoRow]:
    """The entries of UNO's json that have an image for their references.

    Both of UNO's formats: `prompt`, `image_paths` (or `image_path`) and `image_tgt_path`, as UNO trains on; and UNO-1M's labels
    with `img_path1`, `img_path2` and `caption`, of which those rated below 4 are dropped, as UNO does. Paths are relative to
    the file; UNO-1M's to `images` beside it. Entries whose values are of another type, or whose paths lead elsewhere, are
    dropped.

    Args:
        file: UNO's json.
        dropped: counts what is left out.

    Raises:
        ValueError: it is of another format; names the entry.
    """
    try:
        entries = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error})") from error
    if not isinstance(entries, list):
        raise ValueError(f"{file}: expected UNO's list of objects, got {type(entries).__name__}")
    rows = []
    for number, entry in enumerate(entries):
        try:
            if not isinstance(entry, dict):
                raise TypeError(f"got {type(entry).__name__}")
            prompt, images, target = _rated(entry) if "img_path1" in entry else _trained(entry)
            rows.append(UnoRow(number, prompt, tuple(file.parent / image for image in images), target))
        except UnfitError as error:
            dropped.add(number, error)
        except (KeyError, TypeError) as error:
            expected = "prompt, image_paths and image_tgt_path, or UNO-1M's img_path1, img_path2, caption and vlm_filter_cot"
            raise ValueError(f"{file}: entry {number}: {type(error).__name__} {error}; expected {expected}") from error
    return rows


def _trained(entry: dict[str, Any]) -> tuple[str, list[str], str]:
    """Prompt, references and target of an entry of the lists that UNO trains on. KeyError where a field is missing."""
    images = entry["image_path"] if "image_path" in entry else entry["image_paths"]
    prompt, target = _text(entry["prompt"], "the prompt"), entry.get("image_tgt_path")
    if target is None:
        raise UnfitError("no image_tgt_path")
    if isinstance(images, str):  # one path
        images = [images]
    if not isinstance(images, list):
        raise UnfitError("image_paths is no list of paths", f"got {images!r:.100}")
    if not 1 <= len(images) <= MAX_REFERENCES:
        raise UnfitError(f"more than {MAX_REFERENCES} references" if images else "no reference")
    return prompt, [_within(image) for image in images], _within(target)


def _rated(entry: dict[str, Any]) -> tuple[str, list[str], str]:
    """The same of an entry of UNO-1M's labels."""
    rating, captions = entry["vlm_filter_cot"], entry["caption"]
    score = rating.get("score_final") if isinstance(rating, dict) else None
    if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= UNO_SCORE:
        raise UnfitError(f"score_final is no number from 0 to {UNO_SCORE:g}", f"got {score!r:.100}")
    if score < UNO_SCORE:
        raise UnfitError(f"rated below {UNO_SCORE:g}")
    prompt = _text(captions["img_path2"] if isinstance(captions, dict) else captions, "the prompt")
    return prompt, [f"images/{_within(entry['img_path1'])}"], f"images/{_within(entry['img_path2'])}"


def _text(value: object, what: str) -> str:
    fault = text_fault(value)
    if fault is not None:
        raise UnfitError(f"{what} is no text", fault)
    return str(value)


def _within(value: object) -> str:
    """A path that stays in its folder: joined to the losers', an absolute one would name the winner itself."""
    path = _text(value, "a path")
    if os.path.isabs(path) or os.path.normpath(path).split(os.sep)[0] == os.pardir:
        raise UnfitError("a path leads out of its folder", repr(path))
    return path


def import_uno(file: Path, losers: Path, priors: Path | None, folder: Path, progress: bool = True) -> Writer:
    """Pairs of UNO's references and targets with losers of one's own. Images stay where they are.

    Args:
        file: UNO's json.
        losers: folder that has, for an `image_tgt_path`, the loser at the same path.
        priors: the same for priors; None marks the tokens in which winner and loser differ.
        folder: where pairs.jsonl goes.
        progress: show a progress bar.
    """
    writer = Writer(folder)
    rows = read_uno(file, writer.dropped)
    for index, row in enumerate(tqdm(rows, desc="importing", unit="pair", disable=not progress, leave=False)):
        winner, loser = file.parent / row.target, losers / row.target
        prior = None if priors is None else priors / row.target
        try:
            needed = [("winner", winner), ("loser", loser), ("prior", prior), *(("reference", path) for path in row.references)]
            for name, path in needed:
                if path is not None and not os.path.isfile(path):
                    raise UnfitError(f"no {name}", str(path))
            images = _check(winner, loser, row.references, prior)
            changed = changed_tokens(*images)
            if prior is None and not changed.any():
                raise UnfitError("winner and loser hardly differ", f"{winner} and {loser}")
        except UnfitError as error:
            writer.dropped.add(row.number, error)
            continue
        if prior is None:
            marked = image_of(changed).resize(images[0].size, Image.Resampling.NEAREST)
            prior = writer.mask(f"{index:07}_prior", marked)
        writer.add(index, row.prompt, row.references, winner, loser, prior)
    writer.finish()
    return writer


def _check(
    winner: ReadableFile, loser: ReadableFile, references: Sequence[ReadableFile], prior: ReadableFile | None
) -> tuple[Image.Image, Image.Image]:
    """Decodes a pair's images, and returns winner and loser.

    Raises:
        UnfitError: training could not use them.
    """
    for reference in references:
        _decoded(read_image, reference)
        alpha = _decoded(read_alpha, reference)
        if alpha is not None and alpha.getbbox() is None:
            raise UnfitError("a reference is transparent all over", str(reference))
    first, second = _decoded(read_image, winner), _decoded(read_image, loser)
    if first.size != second.size:
        raise UnfitError("winner and loser differ in size", f"{winner} and {loser}")
    if ImageChops.difference(first, second).getbbox() is None:
        raise UnfitError("winner and loser have the same pixels", f"{winner} and {loser}")
    if prior is not None:
        mask = inside(_decoded(read_gray, prior))
        if mask.shape[::-1] != first.size:
            raise UnfitError("prior and winner differ in size", str(prior))
        if not mask.any():
            raise UnfitError("the prior is empty", str(prior))
    return first, second


def _decoded(read: Callable[[ReadableFile], T], file: ReadableFile) -> T:
    try:
        return attempt(read, file)
    except ImageError as error:
        raise UnfitError("an image is missing or damaged", error.message) from error


def import_pickapic(
    files: Sequence[Path], references: Sequence[str], prior: str | None, folder: Path, progress: bool = True
) -> Writer:
    """Pairs of tables with Pick-a-Pic's columns: caption, jpg_0, jpg_1 and label_0, 1 where jpg_0 won. Ties are dropped.

    Args:
        files: parquet files.
        references: columns with reference images, each one image or a list of them.
        prior: column with the prior; None marks the whole image.
        folder: where pairs.jsonl and all images go.
        progress: show a progress bar.

    Raises:
        ValueError: a column is missing; names it.
    """
    writer = Writer(folder)
    rows = _rows(files, [*COLUMNS, *references, *([prior] if prior else [])])
    for index, values in enumerate(tqdm(rows, desc="importing", unit="row", disable=not progress, leave=False)):
        try:
            row = _python(values)
            label = row["label_0"]
            if label not in (0, 1) or row.get("has_label") is False:
                raise UnfitError("a tie" if label == 0.5 and row.get("has_label") is not False else "no label")
            prompt = _text(row["caption"], "the caption")
            winner, loser = (_bytes(row[name]) for name in (("jpg_0", "jpg_1") if label == 1 else ("jpg_1", "jpg_0")))
            cells = [row[column] for column in references]
            shown = [_bytes(image) for cell in cells for image in (cell if isinstance(cell, list) else [cell])]
            if not 1 <= len(shown) <= MAX_REFERENCES:
                raise UnfitError(f"not 1 to {MAX_REFERENCES} references")
            mask = None if prior is None else _bytes(row[prior])
            size = _check(winner, loser, shown, mask)[0].size
        except UnfitError as error:
            writer.dropped.add(index, error)
            continue
        marked = mask.data if mask is not None else writer.mask("whole_{}x{}".format(*size), Image.new("L", size, 255))
        writer.add(index, prompt, [image.data for image in shown], winner.data, loser.data, marked)
    writer.finish()
    return writer


def _rows(files: Sequence[Path], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of parquet files, their values as Arrow has them. ValueError names what cannot be read."""
    parquet = require_package("pyarrow.parquet", "a parquet file")
    arrow = require_package("pyarrow", "a parquet file")
    for file in files:
        try:
            with parquet.ParquetFile(file, buffer_size=2**20, pre_buffer=False) as table:
                names = set(table.schema_arrow.names)
                missing = [name for name in columns if name not in names]
                if missing:
                    raise ValueError(f"has no column {missing[0]}; it has {', '.join(sorted(names))}")
                for batch in table.iter_batches(batch_size=16, columns=[*columns, *({"has_label"} & names)], use_threads=False):
                    yield from ({name: batch.column(name)[i] for name in batch.schema.names} for i in range(len(batch)))
        except (OSError, ValueError, arrow.ArrowException) as error:
            raise ValueError(f"{file} {error}") from error


def _python(row: dict[str, Any]) -> dict[str, Any]:
    """A row's values as Python has them."""
    try:
        return {name: value.as_py() for name, value in row.items()}
    except (ValueError, OverflowError) as error:  # text that is no UTF-8, the year 20000
        raise UnfitError("a value cannot be read", str(error)) from error


def _bytes(value: Any) -> ImageBytes:
    """An image as `datasets` stores it, or as plain bytes."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise UnfitError("an image is missing or damaged", f"expected bytes, got {type(data).__name__}")
    return ImageBytes(data)
