"""Reading JSON lines, an object each: everything wrong with them at once, with file, line, field and remedy."""

from __future__ import annotations

import abc
import codecs
import json
import math
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from focusdpo.foundation.text import counted, printable

MAX_REFERENCES = 6

T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a dataset: where, what, and what to do.

    `line` counts from 1: lines of pairs.jsonl, pairs of a shard, rows of a table. An error stops training, a warning does not.
    """

    file: Path
    line: int
    field: str
    message: str
    remedy: str = ""
    severity: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        warning = "warning: " if self.severity == "warning" else ""
        text = f"{self.file}:{self.line}: {self.field}: {warning}{self.message}" + (f"; {self.remedy}" if self.remedy else "")
        return printable(text)


class DatasetError(ValueError):
    """A dataset cannot be used; carries all problems at once.

    Args:
        problems: what is wrong.
        summary: the message's first line, by default their number.
    """

    def __init__(self, problems: list[Problem], summary: str | None = None) -> None:
        self.problems = sorted(problems, key=lambda p: (str(p.file), p.line))
        lines = "\n".join(str(p) for p in self.problems)
        count = counted(len(problems), "problem")
        super().__init__(f"{summary or f'the dataset has {count}'}:\n{lines}")


class LineParser(abc.ABC, Generic[T]):
    """Makes something of a line's object, and collects everything wrong with it.

    Args:
        file: what the problems name.
        line: where in it.
    """

    DOCS = "docs/data.md"  # describes every field

    def __init__(self, file: Path, line: int) -> None:
        self.file = file
        self.line = line
        self.problems: list[Problem] = []

    @abc.abstractmethod
    def make(self, value: dict[str, Any]) -> T | None:
        """What a line's object holds; None after a problem."""

    def parse(self, value: object) -> Sequence[T | Problem]:
        """What a line holds, or everything wrong with it."""
        found = None
        if isinstance(value, dict):
            found = self.make(value)
        else:
            self.problem("line", f"expected a JSON object, got {type(value).__name__}", "write one object a line")
        return self.problems if self.problems or found is None else [found]

    def parse_json(self, raw: bytes) -> Sequence[T | Problem]:
        """The same of JSON in UTF-8, with or without a mark of its encoding before it."""
        if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in raw:
            self.problem("line", "is not UTF-8 (but UTF-16, or holds zero bytes)", "save the file as UTF-8")
            return self.problems
        try:
            value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_distinct)
        except UnicodeDecodeError as error:
            self.problem("line", f"is not UTF-8 (byte {error.start})", "save the file as UTF-8")
        except _RepeatedFieldError as error:
            self.problem(str(error), "stands twice in one object", "keep one of them")
        except (ValueError, RecursionError) as error:
            self.problem("line", f"is not JSON ({error})", "write one object a line")
        else:
            return self.parse(value)
        return self.problems

    def problem(self, field: str, message: str, remedy: str) -> None:
        self.problems.append(Problem(self.file, self.line, field, message, remedy))

    def check_fields(self, prefix: str, value: Mapping[str, Any], fields: Mapping[str, bool]) -> None:
        """Known are `fields`, of which some are required; `prefix` says where they are."""
        for name, required in fields.items():
            if required and name not in value:
                self.problem(prefix + name, "is missing", f"add it; {self.DOCS} describes every field")
        for name in value:
            if name not in fields:
                message = f"is not a field; known are {', '.join(fields)}"
                self.problem(prefix + name, message, "rename it, or move it into meta")

    def text(self, field: str, value: object, remedy: str, expected: str = "a text that is not empty") -> str | None:
        fault = text_fault(value, expected)
        if fault is not None:
            self.problem(field, fault, remedy)
            return None
        return str(value)

    def meta(self, value: Mapping[str, Any]) -> dict[str, Any]:
        """The free values of a line."""
        meta = value.get("meta", {})
        if isinstance(meta, dict):
            return meta
        self.problem("meta", f"expected an object, got {type(meta).__name__}", 'write {"name": value, ...}')
        return {}

    def box(self, field: str, value: object, kinds: tuple[type, ...]) -> tuple[Any, Any, Any, Any] | None:
        """Left, top, right and bottom in pixels, numbers of these kinds."""
        if isinstance(value, list) and len(value) == 4 and all(type(edge) in kinds for edge in value):
            left, top, right, bottom = value
            if 0 <= left < right < math.inf and 0 <= top < bottom < math.inf:
                return left, top, right, bottom
        expected = f"expected [left, top, right, bottom] in {'pixels' if float in kinds else 'whole pixels'}"
        self.problem(field, f"{expected}, got {reprlib.repr(value)}", "left below right, top below bottom, none below 0")
        return None

    def objects(
        self, field: str, value: object, fields: Mapping[str, bool], remedy: str, example: str
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """The objects of a list, one for each of a prompt's subjects, and where each is, such as "references[0]."

        Args:
            field: the list.
            value: what it should be.
            fields: of each object, as `check_fields` takes them.
            remedy: where it is no list, or too long.
            example: an object.
        """
        if not isinstance(value, list) or not 1 <= len(value) <= MAX_REFERENCES:
            got = counted(len(value), "item") if isinstance(value, list) else type(value).__name__
            self.problem(field, f"expected a list of 1 to {MAX_REFERENCES} {field}, got {got}", remedy)
            return
        for index, item in enumerate(value):
            place = f"{field}[{index}]"
            if isinstance(item, dict):
                self.check_fields(f"{place}.", item, fields)
                yield f"{place}.", item
            else:
                self.problem(place, f"expected an object, got {reprlib.repr(item)}", f"write it like {example}")


def read_lines(file: Path, parser: Callable[[int], LineParser[T]]) -> Iterator[T | Problem]:
    """What the lines of a file hold, one after the other, or what is wrong with them; empty lines are left out.

    Args:
        file: JSON lines.
        parser: makes something of the line of a number.
    """
    with file.open("rb") as stream:
        for line, raw in enumerate(stream, start=1):
            if raw.strip():
                yield from parser(line).parse_json(raw)


def split_problems(items: Iterable[T | Problem]) -> tuple[list[T], list[Problem]]:
    """What lines hold, and what is wrong with them."""
    every = list(items)
    return [one for one in every if not isinstance(one, Problem)], [one for one in every if isinstance(one, Problem)]


def text_fault(value: object, expected: str = "a text that is not empty") -> str | None:
    """What is wrong with a value that should be a text; None where it is one."""
    if not (isinstance(value, str) and value.strip()) or "\0" in value:
        return f"expected {expected}, got {reprlib.repr(value)}"
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        return "holds half of a surrogate pair, which is no text"
    return None


class _RepeatedFieldError(ValueError):
    """A JSON object has a field twice; Python's parser would keep the last."""


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for name, item in pairs:
        if name in value:
            raise _RepeatedFieldError(name)
        value[name] = item
    return value
