"""The formats a dataset may have: `pairs.jsonl`, WebDataset shards, parquet tables, or image folders.

All become records whose images open at random: batches, exact resume, cache and the split over processes know no format.
"""

from __future__ import annotations

import abc
import bisect
import csv
import datetime
import decimal
import functools
import glob
import hashlib
import itertools
import json
import os
import re
import threading
import uuid
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal

from tqdm.auto import tqdm

from focusdpo.data.lines import Problem, read_lines
from focusdpo.data.records import FIELDS, FILE_NAME, PairRecord, RecordParser
from focusdpo.data.shards import TarMember, list_samples
from focusdpo.foundation.files import ReadableFile, checksum
from focusdpo.foundation.packages import require_package
from focusdpo.foundation.text import counted, first_line, printable

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # what makes a folder of images a dataset
BLOCK = 16 * 2**20  # bytes of a parquet column that are decoded at once
KEPT = 128 * 2**20  # bytes of what was decoded last, of all tables together
HELD = 512 * 2**20  # bytes of row groups' columns that are read on from where they are
CURSORS = 16  # of them, as each has its file open
SERIES = re.compile(r"(.+)-(\d+)-of-(\d+)\.\w+")
# Words that name a split. Others of their words are told by their first three letters.
SPLIT = re.compile(
    r"(?<![a-z])(?:train(?:ing)?|test(?:ing)?|val(?:id(?:ation)?)?|dev|eval(?:uation)?|held[ _-]?out)(?![a-z])", re.IGNORECASE
)
EXPECTED = (
    f"expected a {FILE_NAME} file, or a folder that holds one; shards (*.tar), parquet files or an image folder with "
    f"{METADATA[0]}; or a pattern of shards or parquet files"
)


@dataclass(frozen=True)
class Source(abc.ABC):
    """One file of records."""

    file: Path

    @abc.abstractmethod
    def items(self) -> Iterator[PairRecord | Problem]:
        """One after the other the records that parse, without opening an image, and the problems of those that do not."""

    def count(self) -> int | None:
        """About how many records there are, where that is known without reading them."""
        return None

    def digest(self) -> str:
        """Changes where records change. All of the file is read through once, images included."""
        return checksum(self.file)


class JsonLines(Source):
    """pairs.jsonl, or an image folder's metadata.jsonl; paths are relative to it."""

    def items(self) -> Iterator[PairRecord | Problem]:
        in_folder, parent = self.file.name in METADATA, self.file.parent

        def parser(line: int) -> RecordParser:
            return _RowParser(self.file, line) if in_folder else RecordParser(self.file, line, parent.joinpath)

        return read_lines(self.file, parser)

    def count(self) -> int | None:
        with self.file.open("rb") as stream:
            return sum(block.count(b"\n") for block in iter(lambda: stream.read(2**20), b""))


class Shard(Source):
    """A tar in WebDataset's layout: a pair's members share their name up to the first dot, and its .json names the others."""

    def items(self) -> Iterator[PairRecord | Problem]:
        samples, problems = list_samples(self.file)
        for line, (key, members) in enumerate(samples.items(), start=1):
            if "json" not in members:
                message, remedy = f"{key} has no {key}.json, which names its images", "write the shard again"
                yield Problem(self.file, line, "json", message, remedy)
                continue
            parser = RecordParser(self.file, line, functools.partial(self._locate, key, members))
            with members["json"].open("rb") as stream:
                yield from parser.parse_json(stream.read())
        yield from problems

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


class _RowParser(RecordParser):
    """Makes a record of a table's row, or of a line of an image folder's metadata.

    Fields without a value are as if they were not there. Of a struct of `bytes` and `path`, as `datasets` stores an image, one
    is taken; `meta`, `references` and `prior` may be JSON text. In an image folder, `winner_file_name` is `winner`.

    Args:
        file, line: what the problems name.
        table: whose bytes become images; None where there are none.
    """

    def __init__(self, file: Path, line: int, table: Table | None = None) -> None:
        super().__init__(file, line, file.parent.joinpath)
        self.table = table

    def parse(self, value: object) -> Sequence[PairRecord | Problem]:
        if isinstance(value, dict):
            given = {name: item for name, item in value.items() if item is not None}
            if self.file.name in METADATA:
                given = self.renamed("", given)
            for name in given.keys() & {"meta", "references", "prior"}:
                given[name] = _parsed(given[name])
            value = {name: item if name in ("prompt", "meta") else self.plain(name, item) for name, item in given.items()}
            value = {name: item for name, item in value.items() if item is not None}
            if isinstance(value.get("meta"), dict):
                value["meta"] = self.json_values(value["meta"])
        return super().parse(value)

    def renamed(self, prefix: str, value: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, item in value.items():
            field = re.sub(r"(?<=.)_file_names?$", "", name)
            if field in found:
                self.problem(prefix + field, f"stands twice, with {name}", "keep one of them")
            found[field] = item
        return found

    def plain(self, place: str, value: Any) -> Any:
        if isinstance(value, list):
            return [self.plain(f"{place}[{number}]", item) for number, item in enumerate(value)]
        if not isinstance(value, dict):
            return value
        if value.keys() == {"bytes", "path"}:
            return value["path"] if value["bytes"] is None else value["bytes"]
        if self.file.name in METADATA:
            value = self.renamed(f"{place}.", value)
        return {name: self.plain(f"{place}.{name}", item) for name, item in value.items()}

    def image(self, field: str, value: object) -> ReadableFile | None:
        if isinstance(value, bytes) and self.table is not None:
            return Cell(self.table, self.line - 1, field)
        return super().image(field, value)

    def json_values(self, meta: dict[str, Any]) -> dict[str, Any]:
        """Free values as JSON has them: it has no times, for one, and shards are to hold them, too."""
        try:
            return json.loads(json.dumps(meta, default=_json_value))
        except (TypeError, ValueError, RecursionError) as error:
            self.problem("meta", f"holds what JSON does not have ({error})", "write it as text")
            return {}


def _json_value(value: object) -> str:
    if isinstance(value, datetime.date | datetime.time):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, datetime.timedelta | decimal.Decimal | uuid.UUID):
        return str(value)
    raise TypeError(type(value).__name__)


def _parsed(value: Any) -> Any:
    """JSON text as its value; anything else as it is. Rows of a table share one type, which free values do not."""
    if not (isinstance(value, str) and value.lstrip()[:1] in ("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


@dataclass(frozen=True)
class Cell:
    """An image that stands in a table itself; `field` is what the record calls it, like `references[0].image`."""

    table: Table = field(repr=False)
    row: int
    field: str

    def open(self, mode: Literal["rb"] = "rb") -> BinaryIO:
        column, *parts = re.findall(r"\w+", self.field)
        value = _CELLS.value(self.table, self.row, column)
        for part in parts:
            value = value[int(part) if part.isdecimal() else part]
        return BytesIO(value["bytes"] if isinstance(value, dict) else value)

    def __str__(self) -> str:
        return f"{self.table.file}, row {self.row + 1}, {self.field}"


class Table(Source):
    """A parquet file whose columns are the fields of a record, or an image folder's metadata.parquet.

    Its values are read when they are asked for, see `_Cells`. What goes to a loader's processes is the file's name.
    """

    def __reduce__(self) -> tuple[type[Table], tuple[Path]]:
        return Table, (self.file,)

    @functools.cached_property
    def _opened(self) -> _Opened:
        with self._parquet() as table:
            return _Opened(table.metadata, table.schema_arrow, _identity(self.file))

    def _parquet(self, metadata: Any = None) -> Any:
        parquet = require_package("pyarrow.parquet", "a parquet file")
        # Buffered, or all of a column's part of a row group would be read before its first value.
        return parquet.ParquetFile(self.file, metadata=metadata, buffer_size=2**20, pre_buffer=False)

    def batches(self, group: int, column: str) -> Iterator[Any]:
        """Arrow's values of a row group's column, `rows_at_once` of them. OSError where the file is another than at first."""
        if _identity(self.file) != self._opened.identity:
            raise OSError(f"{self.file} was replaced while it was read; start again")
        with self._parquet(self._opened.metadata) as table:
            rows = self.rows_at_once(group, column)
            for batch in table.iter_batches(rows, row_groups=[group], columns=[column], use_threads=False):
                yield batch.column(0)

    def size(self, group: int, column: str) -> int:
        """Bytes of a row group's column, decompressed."""
        found = self._opened.metadata.row_group(group)
        parts = (found.column(number) for number in range(found.num_columns))
        return sum(part.total_uncompressed_size for part in parts if part.path_in_schema.split(".")[0] == column)

    def rows_at_once(self, group: int, column: str) -> int:
        """How many rows of a row group's column take BLOCK bytes."""
        rows = self._opened.metadata.row_group(group).num_rows
        return max(min(rows, BLOCK * rows // max(self.size(group, column), 1)), 1)

    def items(self) -> Iterator[PairRecord | Problem]:
        """All values are looked at once, a few at a time: bytes are told from missing ones by reading them."""
        import pyarrow as pa

        row = 0
        try:
            names = self._opened.schema.names
            columns = [name for name in names if self._field(name) in FIELDS]
            for name in names:
                if name not in columns:
                    message, remedy = f"is not a column; known are {', '.join(FIELDS)}", "rename it, or take it out"
                    yield Problem(self.file, 1, name, message, remedy)
            if len(set(columns)) < len(columns):
                raise ValueError("two columns have one name")
            total = self._opened.metadata.num_rows
            with tqdm(total=total, desc=printable(self.file.name), unit="row", leave=False, disable=total < 10_000) as bar:
                for group, (row, after) in enumerate(itertools.pairwise(self._opened.starts)):
                    yield from self._large(group, row + 1, columns)
                    table = None if self.file.name in METADATA else self
                    parsers = [_RowParser(self.file, number + 1, table) for number in range(row, after)]
                    values: list[dict[str, Any]] = [{} for _ in parsers]
                    for name in columns:  # one after the other: a column may be one page, which is decoded as a whole
                        found = itertools.chain.from_iterable(self.batches(group, name))
                        for parser, value, item in zip(parsers, values, found, strict=True):
                            value[name] = _python(item, name, parser)
                    for parser, value in zip(parsers, values, strict=True):
                        yield from parser.parse(value)
                    bar.update(len(parsers))
        except (OSError, ValueError, pa.ArrowException) as error:
            yield Problem(self.file, row + 1, "file", f"cannot be read as a table ({first_line(error)})", "write it again")

    def count(self) -> int | None:
        import pyarrow as pa

        try:
            return int(self._opened.metadata.num_rows)
        except (OSError, ValueError, pa.ArrowException):
            return None

    def _large(self, group: int, line: int, columns: Sequence[str]) -> Iterator[Problem]:
        size, column = max(((self.size(group, name), name) for name in columns), default=(0, ""))
        if size > HELD // 4:  # a pair takes four columns or so
            message = (
                f"has a row group of {size // 2**20} MB from this row on; reading one image may take as much memory, and long"
            )
            yield Problem(self.file, line, column, message, "write it again with row_group_size=100", "warning")

    def _field(self, column: str) -> str:
        return re.sub(r"(?<=.)_file_names?$", "", column) if self.file.name in METADATA else column


@dataclass(frozen=True, eq=False)
class _Opened:
    """What is known of a parquet file before its values; what `_Cells` knows it by."""

    metadata: Any
    schema: Any
    identity: tuple[int, ...]

    @functools.cached_property
    def starts(self) -> list[int]:
        """The first row of each row group, and the number of rows."""
        sizes = [self.metadata.row_group(group).num_rows for group in range(self.metadata.num_row_groups)]
        return [0, *itertools.accumulate(sizes)]


def _identity(file: Path) -> tuple[int, ...]:
    found = file.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _python(value: Any, field: str, parser: RecordParser) -> Any:
    """An Arrow value as Python has it, of bytes the first; what Python does not have, such as the year 20000, is a problem."""
    try:
        return _shortened(value.as_py())
    except (ValueError, OverflowError) as error:
        parser.problem(field, f"is of type {value.type} and cannot be read ({first_line(error)})", "write it as text")
        return None


def _shortened(value: Any) -> Any:
    if isinstance(value, list):
        return [_shortened(item) for item in value]
    if isinstance(value, dict):
        return {name: _shortened(item) for name, item in value.items()}
    return value[:40] if isinstance(value, bytes) else value


class _Cursor:
    """A column of a row group, read on from where it is. `row` comes next, `size` is what it may have in memory."""

    def __init__(self, table: Table, group: int, column: str) -> None:
        self.group, self.row, self.size = group, table._opened.starts[group], table.size(group, column)
        self.batches = table.batches(group, column)


class _Cells:
    """Values of parquet columns at random, for threads.

    Parquet is decoded from a row group's start. A column's reader therefore goes on from where it is, and what was decoded last
    is kept: rows in order cost one pass where a row group's columns fit into HELD, others up to a row group each.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[_Opened, str, int], Any] = OrderedDict()  # by file, column and first row
        self._cursors: OrderedDict[tuple[_Opened, str], _Cursor] = OrderedDict()

    def value(self, table: Table, row: int, column: str) -> Any:
        """A value as Python has it. Rows count from 0."""
        opened = table._opened
        group = bisect.bisect_right(opened.starts, row) - 1
        start, rows = opened.starts[group], table.rows_at_once(group, column)
        first = start + (row - start) // rows * rows
        with self._lock:
            values = self._kept.get((opened, column, first))
            if values is None:
                values = self._read(table, column, group, first)
            else:
                self._kept.move_to_end((opened, column, first))
        return values[row - first].as_py()

    def _read(self, table: Table, column: str, group: int, first: int) -> Any:
        opened = table._opened
        cursor = self._cursors.pop((opened, column), None)
        if cursor is None or cursor.group != group or cursor.row > first:
            cursor = _Cursor(table, group, column)
        while self._cursors and sum(other.size for other in self._cursors.values()) + cursor.size > HELD:
            self._cursors.popitem(last=False)
        while cursor.row <= first:
            self._kept[opened, column, cursor.row] = values = next(cursor.batches)
            cursor.row += len(values)
            while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > KEPT:
                self._kept.popitem(last=False)
        self._cursors[opened, column] = cursor
        if len(self._cursors) > CURSORS:
            self._cursors.popitem(last=False)
        return values


_CELLS = _Cells()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_CELLS.__init__)  # type: ignore[misc]  # a process of its own has its own files and lock


class Csv(Source):
    """An image folder's metadata.csv; paths are relative to it, lists and objects are JSON text."""

    def items(self) -> Iterator[PairRecord | Problem]:
        row = 0
        try:
            with self.file.open(encoding="utf-8-sig", newline="") as stream:
                rows = csv.reader(stream, strict=True)
                names = next(rows, [])
                if len(set(names)) < len(names):
                    raise csv.Error("two columns have one name")
                for row, cells in enumerate((cells for cells in rows if cells), start=1):
                    parser = _RowParser(self.file, row)
                    if len(cells) != len(names):
                        parser.problem(
                            "line",
                            f"has {counted(len(cells), 'cell')}, but there are {counted(len(names), 'column')}",
                            "write it again",
                        )
                    value = {name: cell for name, cell in zip(names, cells, strict=False) if cell}
                    yield from parser.parse(value)
        except UnicodeDecodeError as error:
            yield Problem(self.file, row + 1, "file", f"is not UTF-8 ({error.reason})", "save the file as UTF-8")
        except csv.Error as error:
            yield Problem(self.file, row + 1, "file", f"cannot be read as CSV ({error})", "write it again")


def items_of(source: Source) -> Iterator[PairRecord | Problem]:
    """What a source has; a problem where it has nothing."""
    nothing = True
    for item in source.items():
        nothing = False
        yield item
    if nothing:
        yield Problem(source.file, 1, "file", "has no pair", "look whether it is the right file")


def find_sources(path: str | Path) -> list[Source]:
    """The files of a dataset, in order.

    Args:
        path: pairs.jsonl or its folder; a folder of shards or parquet files, or an image folder; one shard or parquet file, or
            a pattern of several, like `shards/pairs-*.tar` or `shards/{000..007}.tar`.

    Raises:
        FileNotFoundError: there is none, or one of a numbered series is missing.
        ValueError: a folder or a pattern holds several splits.
        ModuleNotFoundError: reading it needs a package of the extra `data`.
    """
    return [_source(file) for file in _find_files(path)]


def _source(file: Path) -> Source:
    if file.suffix == ".tar":
        return Shard(file)
    if file.suffix == ".parquet":
        require_package("pyarrow", "a parquet file")
        return Table(file)
    return Csv(file) if file.name in METADATA and file.suffix == ".csv" else JsonLines(file)


def _find_files(path: str | Path) -> Iterator[Path]:
    found = Path(path)
    if found.is_file():
        yield found
    elif found.is_dir():
        for name in (FILE_NAME, "*.tar", *METADATA, "**/*.parquet"):
            files = _visible(found.glob(name))
            if files:
                break
        else:
            raise FileNotFoundError(f"no such dataset: {found / FILE_NAME}; {EXPECTED}")
        _check_splits(found, files, [match[1] if (match := SERIES.fullmatch(file.name)) else "" for file in files])
        _check_series(files)
        yield from files
    elif re.search(r"[*?\[{]", str(path)):
        folder, parts = Path(found.anchor), list(found.parts[1:] if found.anchor else found.parts)
        while (folder / parts[0]).is_dir():  # what is there is meant as it is called, such as set[1]
            folder /= parts.pop(0)
        patterns = ["/".join(parts)]
        if "{" in patterns[0]:
            patterns = list(require_package("braceexpand", "a pattern with braces").braceexpand(patterns[0]))
        for pattern in patterns:
            files = _visible(folder / name for name in glob.glob(pattern, root_dir=folder, recursive=True))
            if not files:
                raise FileNotFoundError(f"no such dataset: nothing matches {folder / pattern}; {EXPECTED}")
            _check_splits(folder, files, [""] * len(files))
            yield from files
    else:
        raise FileNotFoundError(f"no such dataset: {found}; {EXPECTED}")


def _visible(files: Iterable[Path]) -> list[Path]:
    return sorted(file for file in files if file.is_file() and not file.name.startswith("."))


def _check_splits(folder: Path, files: Sequence[Path], series: Sequence[str]) -> None:
    """Training and test data are not read as one: ValueError names both.

    Args:
        folder: what the user named, whose own name says nothing.
        files: those that would be read.
        series: what the files of a numbered series have in common, "" for others.
    """
    splits: dict[tuple[Any, str], list[Path]] = defaultdict(list)
    names: dict[tuple[Any, str], str] = {}
    numbered = len({name for name in series if name}) > 1
    for file, name in zip(files, series, strict=True):
        path = file.relative_to(folder) if file.is_relative_to(folder) else Path(file.name)
        words = [word.lower() for word in SPLIT.findall(path.with_suffix("").as_posix())]
        split = frozenset(word[:3] for word in words), name if numbered else ""
        splits[split].append(file)
        names.setdefault(split, name or " ".join(words) or path.as_posix())
    if len(splits) > 1:
        choices = sorted(_named(folder, own, [file for file in files if file not in own]) for own in splits.values())
        raise ValueError(
            f"{folder} holds several splits ({', '.join(sorted(names.values()))}); name one: {', '.join(map(str, choices))}"
        )


def _named(folder: Path, files: Sequence[Path], others: Sequence[Path]) -> str:
    """How a user names these files and no others."""
    common = Path(os.path.commonpath([file.parent for file in files]))
    if common != folder and not any(file.is_relative_to(common) for file in others):
        return str(common)
    prefix = os.path.commonprefix([file.name for file in files])  # noqa: RUF071, of letters, not of folders
    pattern = str(common / f"{prefix}*{files[0].suffix}")
    matched = {Path(name) for name in glob.glob(pattern)}
    return pattern if len(files) > 1 and matched == set(files) else str(files[0])


def _check_series(files: Sequence[Path]) -> None:
    """Files named NAME-00003-of-00012 come as a whole, or something is lost: FileNotFoundError."""
    series: dict[tuple[Path, str, str, str], set[int]] = defaultdict(set)
    for file in files:
        if match := SERIES.fullmatch(file.name):
            series[file.parent, match[1], match[3], file.suffix].add(int(match[2]))
    for (folder, stem, total, suffix), numbers in series.items():
        missing = next((number for number in range(int(total)) if number not in numbers), None)
        if missing is not None:
            name = f"{stem}-{missing:0{len(total)}}-of-{total}{suffix}"
            raise FileNotFoundError(f"{folder} lacks {name} of {int(total)} files; copy it there")


def content_checksum(path: str | Path) -> str:
    """What a run's checkpoint keeps of its pairs, in hexadecimal: the same wherever they lie."""
    digests = [source.digest() for source in find_sources(path)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
