"""Other projects' lists of pairs, as pairs.jsonl: UNO's json and the columns of Diffusion-DPO's Pick-a-Pic."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from focusdpo.data.checks import changed_tokens
from focusdpo.data.images import read_image, read_size
from focusdpo.data.records import FILE_NAME, MAX_REFERENCES
from focusdpo.data.shards import image_suffix
from focusdpo.extras import require_package

IMAGES = "images"  # folder of what an import writes beside pairs.jsonl
UNO_SCORE = 4.0  # UNO-1M's own rating of a couple of images, of which UNO trains on the full marks
COLUMNS = ("caption", "jpg_0", "jpg_1", "label_0")


@dataclass(frozen=True)
class UnoRow:
    """An entry of UNO's json: references, and an image that shows them. `target` is as the file has it."""

    prompt: str
    references: tuple[Path, ...]
    target: str


class Writer:
    """Writes pairs.jsonl last, under its name once it is whole; counts what was dropped, and why."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[str] = []
        self.dropped: Counter[str] = Counter()
        (folder / IMAGES).mkdir(parents=True, exist_ok=True)

    def add(self, **record: Any) -> None:
        self.lines.append(json.dumps(record))

    def save(self, name: str, image: Image.Image | bytes) -> str:
        """Stores an image, and returns its path for the record."""
        suffix = image_suffix(image) if isinstance(image, bytes) else "png"
        path = self.folder / IMAGES / f"{name}.{suffix}"
        if isinstance(image, bytes):
            path.write_bytes(image)
        else:
            image.save(path)
        return f"{IMAGES}/{path.name}"

    def finish(self) -> None:
        if not self.lines:
            raise ValueError(f"nothing was imported: {self.summary()}")
        partial = self.folder / f".{FILE_NAME}.partial"
        partial.write_text("\n".join(self.lines) + "\n")
        partial.replace(self.folder / FILE_NAME)

    def summary(self) -> str:
        reasons = [f"{count} dropped: {reason}" for reason, count in self.dropped.most_common()]
        return "; ".join([f"{len(self.lines)} pairs", *reasons])


def read_uno(file: Path, dropped: Counter[str]) -> list[UnoRow]:
    """The entries of UNO's json that have an image for their references.

    Both of UNO's formats: `prompt`, `image_paths` (or `image_path`) and `image_tgt_path`, as UNO trains on; and UNO-1M's labels
    with `img_path1`, `img_path2` and `caption`, of which those rated below 4 are dropped, as UNO does. Paths are relative to
    the file; UNO-1M's to `images` beside it.

    Args:
        file: UNO's json.
        dropped: counts what is left out.

    Raises:
        ValueError: it is of another format; names the entry.
    """
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error})") from error
    if not isinstance(entries, list):
        raise ValueError(f"{file}: expected UNO's list of objects, got {type(entries).__name__}")
    rows = []
    for number, entry in enumerate(entries):
        try:
            if "img_path1" in entry:
                if not entry["vlm_filter_cot"].get("score_final", 0) >= UNO_SCORE:
                    dropped[f"rated below {UNO_SCORE:g}"] += 1
                    continue
                prompt, images, target = entry["caption"]["img_path2"], [entry["img_path1"]], entry["img_path2"]
                images, target = [f"images/{image}" for image in images], f"images/{target}"
            else:
                images = [entry["image_path"]] if "image_path" in entry else entry["image_paths"]
                prompt, target = entry["prompt"], entry.get("image_tgt_path")
            if target is None:
                dropped["no image_tgt_path"] += 1
            elif len(images) > MAX_REFERENCES:
                dropped[f"more than {MAX_REFERENCES} references"] += 1
            else:
                rows.append(UnoRow(str(prompt), tuple(file.parent / image for image in images), str(target)))
        except (KeyError, TypeError, AttributeError) as error:
            expected = "prompt, image_paths and image_tgt_path, or UNO-1M's img_path1, img_path2, caption and vlm_filter_cot"
            raise ValueError(f"{file}: entry {number}: {type(error).__name__} {error}; expected {expected}") from error
    return rows


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
        paths = {"winner": winner, "loser": loser} | ({} if prior is None else {"prior": prior})
        lost = next((name for name, path in paths.items() if not path.is_file()), None)
        if lost is not None:
            writer.dropped[f"no {lost}"] += 1
            continue
        if prior is None:
            if read_size(winner) != read_size(loser):
                writer.dropped["winner and loser differ in size"] += 1
                continue
            marked = _difference(winner, loser)
        writer.add(
            prompt=row.prompt,
            references=[{"image": _relative(path, folder)} for path in row.references],
            winner=_relative(winner, folder),
            loser=_relative(loser, folder),
            prior=writer.save(f"{index:07}_prior", marked) if prior is None else _relative(prior, folder),
        )
    writer.finish()
    return writer


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
    for index, row in enumerate(tqdm(rows, desc="importing", unit="row", disable=not progress, leave=False)):
        label = row["label_0"]
        if label not in (0, 1) or row.get("has_label") is False:
            writer.dropped["a tie" if label == 0.5 and row.get("has_label") is not False else "no label"] += 1
            continue
        try:
            images = {name: _bytes(row[name]) for name in ("jpg_0", "jpg_1")}
            shown = [_bytes(image) for name in references for image in _listed(row[name])]
            sizes = [_size(image) for image in images.values()]
            mask = Image.new("L", sizes[0], 255) if prior is None else _bytes(row[prior])
            for image in (*shown, *([mask] if isinstance(mask, bytes) else [])):
                _size(image)
        except (OSError, ValueError, TypeError):
            writer.dropped["an image is missing or damaged"] += 1
            continue
        if sizes[0] != sizes[1]:
            writer.dropped["winner and loser differ in size"] += 1
            continue
        if not 1 <= len(shown) <= MAX_REFERENCES:
            writer.dropped[f"not 1 to {MAX_REFERENCES} references"] += 1
            continue
        name = f"{index:07}"
        winner, loser = ("jpg_0", "jpg_1") if label == 1 else ("jpg_1", "jpg_0")
        writer.add(
            prompt=row["caption"],
            references=[{"image": writer.save(f"{name}_reference{i}", image)} for i, image in enumerate(shown)],
            winner=writer.save(f"{name}_winner", images[winner]),
            loser=writer.save(f"{name}_loser", images[loser]),
            prior=writer.save("whole_{}x{}".format(*sizes[0]) if prior is None else f"{name}_prior", mask),
        )
    writer.finish()
    return writer


def _rows(files: Sequence[Path], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    parquet = require_package("pyarrow.parquet", "a parquet file")
    for file in files:
        table = parquet.ParquetFile(file)
        names = set(table.schema_arrow.names)
        missing = [name for name in columns if name not in names]
        if missing:
            raise ValueError(f"{file} has no column {missing[0]}; it has {', '.join(sorted(names))}")
        for batch in table.iter_batches(batch_size=16, columns=[*columns, *({"has_label"} & names)]):
            yield from batch.to_pylist()


def _bytes(value: Any) -> bytes:
    """Of an image as `datasets` stores it, or as plain bytes."""
    data = value["bytes"] if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise ValueError(f"expected bytes, got {type(data).__name__}")
    return data


def _size(data: bytes) -> tuple[int, int]:
    with Image.open(BytesIO(data)) as image:
        image.load()
        return image.size


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _difference(winner: Path, loser: Path) -> Image.Image:
    images = read_image(winner), read_image(loser)
    changed = changed_tokens(*images).astype(np.uint8) * 255
    return Image.fromarray(changed).resize(images[0].size, Image.Resampling.NEAREST)


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
