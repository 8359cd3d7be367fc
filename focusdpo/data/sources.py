"""Where a dataset's records and images lie: `pairs.jsonl`, WebDataset shards, or tables as Hugging Face's `datasets` has them.

All become records whose images open at random: batches, exact resume, cache and the split over processes know no format.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

from tqdm.auto import tqdm

from focusdpo.data.records import FIELDS, FILE_NAME, PairRecord, Problem, RecordParser
from focusdpo.data.shards import TarMember, list_samples
from focusdpo.extras import require_package
from focusdpo.files import ReadableFile, checksum

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # what makes an image folder a dataset of `datasets`
EXPECTED = (
    f"expected a {FILE_NAME} file, or a folder that holds one; shards (*.tar), parquet files or an image folder with "
    f"{METADATA[0]}; or a pattern of shards or parquet files"
)


class Source(Protocol):
    """One file of records."""

    @property
    def file(self) -> Path: ...

    def read(self) -> tuple[list[PairRecord], list[Problem]]:
        """The records that parse, without opening an image, and the problems of those that do not."""

    def digest(self) -> str:
        """Changes where records change."""


@dataclass
class JsonLines:
    """pairs.jsonl; paths are relative to it."""

    file: Path

    def read(self) -> tuple[list[PairRecord], list[Problem]]:
        records: list[PairRecord] = []
        problems: list[Problem] = []
        with self.file.open("rb") as stream:
            for line, raw in enumerate(stream, start=1):
                if not raw.strip():
                    continue
                parser = RecordParser(self.file, line, lambda text: self.file.parent / text)
                _collect(parser, parser.parse_json(raw), records, problems)
        return _or_empty(self.file, records, problems)

    def digest(self) -> str:
        return checksum(self.file)


@dataclass
class Shard:
    """A tar in WebDataset's layout: a pair's members share their name up to the first dot, and its .json names the others."""

    file: Path

    def read(self) -> tuple[list[PairRecord], list[Problem]]:
        records: list[PairRecord] = []
        problems: list[Problem] = []
        samples, found = list_samples(self.file)
        for line, (key, members) in enumerate(samples.items(), start=1):
            if "json" not in members:
                message, remedy = f"{key} has no {key}.json, which names its images", "write the shard again"
                problems.append(Problem(self.file, line, "json", message, remedy))
                continue
            parser = RecordParser(self.file, line, functools.partial(self._locate, key, members))
            with members["json"].open("rb") as stream:
                _collect(parser, parser.parse_json(stream.read()), records, problems)
        lines = {key: line for line, key in enumerate(samples, start=1)}
        for p in found:
            problems.append(Problem(self.file, lines.get(p.key, 1), p.name, p.message, p.remedy, p.severity))
        return _or_empty(self.file, records, problems)

    @staticmethod
    def _locate(key: str, members: dict[str, TarMember], name: str) -> ReadableFile:
        if name not in members:
            raise LookupError(f"the shard has no member {key}.{name}")
        return members[name]

    def digest(self) -> str:
        """Of names, places and sizes of all members, and of the records: image data are left out, they may be terabytes."""
        samples, _ = list_samples(self.file)
        digest = hashlib.sha256(str([(m.name, m.offset, m.size) for ms in samples.values() for m in ms.values()]).encode())
        for members in samples.values():
            if "json" in members:
                with members["json"].open("rb") as stream:
                    digest.update(stream.read())
        return digest.hexdigest()


@dataclass(frozen=True)
class Cell:
    """An image that stands in a table itself."""

    table: Table = field(repr=False)
    row: int
    place: tuple[str | int, ...]  # column, and what leads into it

    def open(self, mode: Literal["rb"] = "rb") -> BinaryIO:
        value = self.table.rows.data.column(self.place[0])[self.row]
        for part in self.place[1:]:
            value = value[part]
        value = value.as_py()
        return BytesIO(value["bytes"] if isinstance(value, dict) else value)

    def __str__(self) -> str:
        return f"{self.table.file}, row {self.row + 1}, {_name(self.place)}"


@dataclass(frozen=True)
class Table:
    """A table whose columns are the fields of a record: a parquet file, or the metadata of an image folder.

    `datasets` keeps it as a memory-mapped file in its own cache.
    """

    file: Path

    @functools.cached_property
    def rows(self) -> Any:
        import datasets

        if self.file.name in METADATA:
            found = datasets.load_dataset("imagefolder", data_dir=str(self.file.parent))
        else:
            found = datasets.load_dataset("parquet", data_files=str(self.file))
        (split,) = found  # of one file
        return found[split]

    def read(self) -> tuple[list[PairRecord], list[Problem]]:
        try:
            rows = self.rows
        except (ValueError, OSError, RuntimeError) as error:  # what `datasets` and Arrow raise
            cause = error.__cause__ or error
            message = f"cannot be read as a table ({str(cause).splitlines()[0] if str(cause) else type(cause).__name__})"
            return [], [Problem(self.file, 1, "file", message, "write it again")]
        problems = [
            Problem(self.file, 1, name, f"is not a column; known are {', '.join(FIELDS)}", "rename it, or take it out")
            for name in rows.column_names
            if name not in FIELDS
        ]
        columns = {name: rows.data.column(name) for name in rows.column_names if name in FIELDS}
        records: list[PairRecord] = []
        for row in tqdm(range(len(rows)), desc=self.file.name, unit="row", leave=False, disable=len(rows) < 10_000):
            cells: dict[str, Cell] = {}
            value = {name: self._plain(column[row], row, (name,), cells) for name, column in columns.items()}
            value = {name: item for name, item in value.items() if item is not None}
            if isinstance(value.get("meta"), str):  # rows of a table share one type, which free values do not
                value["meta"] = _parsed(value["meta"])
            parser = RecordParser(self.file, row + 1, functools.partial(self._locate, cells))
            _collect(parser, parser.parse(value), records, problems)
        return _or_empty(self.file, records, problems)

    def _plain(self, value: Any, row: int, place: tuple[str | int, ...], cells: dict[str, Cell]) -> Any:
        """An Arrow value as Python has it; an image becomes its path, or a name by which `cells` has it."""
        import pyarrow as pa

        kind = value.type
        if not value.is_valid:
            return None
        is_struct = pa.types.is_struct(kind)
        names = {kind.field(i).name for i in range(kind.num_fields)} if is_struct else set()
        if names == {"bytes", "path"} or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            if is_struct and not value["bytes"].is_valid:
                return value["path"].as_py()
            cells[_name(place)] = Cell(self, row, place)
            return _name(place)
        if is_struct:
            return {name: self._plain(value[name], row, (*place, name), cells) for name in names}
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            return [self._plain(value[i], row, (*place, i), cells) for i in range(len(value))]
        return value.as_py()

    def _locate(self, cells: dict[str, Cell], text: str) -> ReadableFile:
        return cells[text] if text in cells else self.file.parent / text

    def digest(self) -> str:
        if self.file.suffix != ".parquet":
            return checksum(self.file)
        with self.file.open("rb") as stream:  # the footer has sizes, offsets and statistics of all that is stored
            stream.seek(-8, 2)
            length = int.from_bytes(stream.read(4), "little")
            stream.seek(-min(8 + length, self.file.stat().st_size), 2)
            return hashlib.sha256(stream.read()).hexdigest()


def _name(place: Sequence[str | int]) -> str:
    return str(place[0]) + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place[1:])


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text  # which is refused


def _collect(parser: RecordParser, record: PairRecord | None, records: list[PairRecord], problems: list[Problem]) -> None:
    problems.extend(parser.problems)
    if record is not None:
        records.append(record)


def _or_empty(file: Path, records: list[PairRecord], problems: list[Problem]) -> tuple[list[PairRecord], list[Problem]]:
    if not records and not problems:
        problems.append(Problem(file, 1, "file", "has no pair", "look whether it is the right file"))
    return records, problems


def find_sources(path: str | Path) -> list[Source]:
    """The files of a dataset, in order.

    Args:
        path: pairs.jsonl or its folder; a folder of shards or parquet files, or an image folder; one shard or parquet file, or
            a pattern of several, like `shards/pairs-*.tar` or `shards/{000..007}.tar`.

    Raises:
        FileNotFoundError: there is none, or one of a numbered series is missing.
        ValueError: a folder holds several splits.
        ModuleNotFoundError: reading it needs a package of the extra `data`.
    """
    return [_source(file) for file in _find_files(path)]


def _source(file: Path) -> Source:
    if file.suffix == ".tar":
        return Shard(file)
    if file.suffix == ".parquet" or file.name in METADATA:
        require_package("datasets", "a parquet file or an image folder")
        return Table(file)
    return JsonLines(file)


def _find_files(path: str | Path) -> Iterator[Path]:
    found = Path(path)
    if found.is_file():
        yield found
    elif found.is_dir():
        for name in (FILE_NAME, "*.tar", *METADATA, "**/*.parquet"):
            files = sorted(found.glob(name))
            if files:
                break
        else:
            raise FileNotFoundError(f"no such dataset: {found / FILE_NAME}; {EXPECTED}")
        splits = {match[1] for file in files if (match := re.fullmatch(r"(.+)-\d+-of-\d+", file.stem))}
        if len(splits) > 1:
            first = files[0].relative_to(found).parent / f"{min(splits)}-*{files[0].suffix}"
            raise ValueError(f"{found} holds several splits ({', '.join(sorted(splits))}); name one, like {found / first}")
        _check_series(files)
        yield from files
    elif re.search(r"[*?\[{]", str(path)):
        patterns = [str(path)]
        if "{" in str(path):
            patterns = require_package("braceexpand", "a pattern with braces").braceexpand(str(path))
        for pattern in patterns:
            files = sorted(Path(found.anchor).glob(str(Path(pattern).relative_to(found.anchor))))
            if not files:
                raise FileNotFoundError(f"no such dataset: nothing matches {pattern}; {EXPECTED}")
            yield from files
    else:
        raise FileNotFoundError(f"no such dataset: {found}; {EXPECTED}")


def _check_series(files: Sequence[Path]) -> None:
    """Files named NAME-00003-of-00012 come as a whole, or something is lost: FileNotFoundError."""
    names = {file.name for file in files}
    for match in filter(None, map(re.compile(r"(.+)-(\d+)-of-(\d+)(\..+)").fullmatch, sorted(names))):
        stem, number, total, suffix = match.groups()
        missing = {f"{stem}-{i:0{len(number)}}-of-{total}{suffix}" for i in range(int(total))} - names
        if missing:
            raise FileNotFoundError(f"{files[0].parent} lacks {min(missing)} of {int(total)} files; copy it there")


def parse_pairs(path: str | Path, progress: bool = False) -> tuple[list[PairRecord], list[Problem]]:
    """Reads all records of a dataset without opening an image: those that parse, and the problems of those that do not."""
    records: list[PairRecord] = []
    problems: list[Problem] = []
    sources = find_sources(path)
    for source in tqdm(sources, desc="reading records", unit="file", leave=False, disable=not progress or len(sources) < 2):
        more, found = source.read()
        records += more
        problems += found
    return records, problems


def content_checksum(path: str | Path) -> str:
    """What a run's checkpoint keeps of its pairs, in hexadecimal: the same wherever they lie."""
    digests = [source.digest() for source in find_sources(path)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
