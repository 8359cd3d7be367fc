"""The dataset format: records, and what is wrong with them.

`pairs.jsonl` has one preference pair a line, with paths relative to the file; `sources` knows where else records may lie.

    {"prompt": "a cat and a cup",
     "references": [{"image": "refs/cat.png", "mask": "refs/cat_mask.png", "class_name": "cat"}, {"image": "refs/cup.png"}],
     "winner": "0_winner.png", "loser": "0_loser.png",
     "prior": "0_prior.png",            # or a list with one mask per reference
     "meta": {"any": "thing"}}

A mask is an image whose bright part (above half of its maximum) is inside. A reference without a mask counts as subject
where it is opaque.
"""

from __future__ import annotations

import codecs
import gc
import json
import reprlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from focusdpo.foundation.files import ReadableFile
from focusdpo.foundation.text import printable

FILE_NAME = "pairs.jsonl"
MAX_REFERENCES = 6
FIELDS = {"prompt": True, "references": True, "winner": True, "loser": True, "prior": True, "meta": False}
REFERENCE_FIELDS = {"image": True, "mask": False, "class_name": False}


@contextmanager
def collector_paused(wanted: bool = True) -> Iterator[None]:
    """Python looks for cycles each time that there are some more objects: where all are kept, it does little else.

    Args:
        wanted: whether to pause it; decoded images may well hang in cycles.
    """
    paused = wanted and gc.isenabled()
    if paused:
        gc.disable()
    try:
        yield
    finally:
        if paused:
            gc.enable()


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
        count = f"{len(problems)} problem" + ("s" if len(problems) > 1 else "")
        super().__init__(f"{summary or f'the dataset has {count}'}:\n{lines}")


@dataclass(frozen=True)
class Reference:
    """A reference image of one subject."""

    image: ReadableFile
    mask: ReadableFile | None = None
    class_name: str | None = None


@dataclass(frozen=True)
class PairRecord:
    """One preference pair. `prior` holds one mask for all subjects, or one per reference where `per_subject`."""

    file: Path
    line: int
    prompt: str
    references: tuple[Reference, ...]
    winner: ReadableFile
    loser: ReadableFile
    prior: tuple[ReadableFile, ...]
    per_subject: bool
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def prior_fields(self) -> dict[str, ReadableFile]:
        """The prior's masks by their names in the file."""
        return {f"prior[{i}]" if self.per_subject else "prior": file for i, file in enumerate(self.prior)}

    @property
    def image_fields(self) -> dict[str, ReadableFile]:
        """Winner, loser and references by their names in the file."""
        references = {f"references[{i}].image": reference.image for i, reference in enumerate(self.references)}
        return {"winner": self.winner, "loser": self.loser, **references}

    @property
    def mask_fields(self) -> dict[str, ReadableFile]:
        """References' masks and priors by their names in the file."""
        masks = {f"references[{i}].mask": r.mask for i, r in enumerate(self.references) if r.mask is not None}
        return {**masks, **self.prior_fields}


class RecordParser:
    """Makes one record of a line, a shard's JSON or a table's row, and collects everything wrong with it.

    Args:
        file: what the problems name.
        line: where in it.
        locate: the image that a text stands for, or LookupError that says why there is none.
    """

    def __init__(self, file: Path, line: int, locate: Callable[[str], ReadableFile]) -> None:
        self.file = file
        self.line = line
        self.locate = locate
        self.problems: list[Problem] = []

    def problem(self, field: str, message: str, remedy: str) -> None:
        self.problems.append(Problem(self.file, self.line, field, message, remedy))

    def parse_json(self, raw: bytes) -> PairRecord | None:
        try:
            value = parse_line(raw)
        except LineError as error:
            self.problem(error.field, error.message, error.remedy)
            return None
        return self.parse(value)

    def parse(self, value: object) -> PairRecord | None:
        if not isinstance(value, dict):
            self.problem("line", f"expected a JSON object, got {type(value).__name__}", "write one object a line")
            return None
        self.check_fields("", value, FIELDS)
        prompt = self.text("prompt", value["prompt"], "write what the winner shows") if "prompt" in value else None
        references = self.references(value["references"]) if "references" in value else ()
        winner = self.image("winner", value["winner"]) if "winner" in value else None
        loser = self.image("loser", value["loser"]) if "loser" in value else None
        prior = self.prior(value["prior"], len(references)) if "prior" in value else ()
        meta = value.get("meta", {})
        if not isinstance(meta, dict):
            self.problem("meta", f"expected an object, got {type(meta).__name__}", 'write {"name": value, ...}')
        if self.problems:
            return None
        assert prompt is not None and winner is not None and loser is not None
        per_subject = isinstance(value["prior"], list)
        return PairRecord(self.file, self.line, prompt, references, winner, loser, prior, per_subject, meta)

    def check_fields(self, prefix: str, value: dict[str, Any], fields: dict[str, bool]) -> None:
        for name, required in fields.items():
            if required and name not in value:
                self.problem(prefix + name, "is missing", "add it; docs/data.md describes every field")
        for name in value:
            if name not in fields:
                message = f"is not a field; known are {', '.join(fields)}"
                self.problem(prefix + name, message, "rename it, or move it into meta")

    def text(self, field: str, value: object, remedy: str) -> str | None:
        fault = text_fault(value)
        if fault is not None:
            self.problem(field, fault, remedy)
            return None
        return str(value)

    def image(self, field: str, value: object) -> ReadableFile | None:
        fault = text_fault(value, "the path of an image")
        if fault is not None:
            self.problem(field, fault, 'write it like "winner.png"')
            return None
        try:
            assert isinstance(value, str)
            return self.locate(value)
        except LookupError as error:
            self.problem(field, str(error.args[0]), "write the pair's shard again")
            return None

    def references(self, value: object) -> tuple[Reference, ...]:
        if not isinstance(value, list) or not 1 <= len(value) <= MAX_REFERENCES:
            got = f"{len(value)} items" if isinstance(value, list) else type(value).__name__
            expected = f"expected a list of 1 to {MAX_REFERENCES} references, got {got}"
            self.problem("references", expected, "give each subject of the prompt one image")
            return ()
        references = []
        for index, item in enumerate(value):
            prefix = f"references[{index}]"
            if not isinstance(item, dict):
                self.problem(prefix, f"expected an object, got {reprlib.repr(item)}", 'write it like {"image": "cat.png"}')
                continue
            self.check_fields(f"{prefix}.", item, REFERENCE_FIELDS)
            image = self.image(f"{prefix}.image", item["image"]) if "image" in item else None
            mask = self.image(f"{prefix}.mask", item["mask"]) if item.get("mask") is not None else None
            class_name = item.get("class_name")
            if class_name is not None:
                class_name = self.text(
                    f"{prefix}.class_name", class_name, 'name the subject\'s class, like "cat", or leave it out'
                )
            if image is not None:
                references.append(Reference(image, mask, class_name))
        return tuple(references)

    def prior(self, value: object, references: int) -> tuple[ReadableFile, ...]:
        if not isinstance(value, list):
            image = self.image("prior", value)
            return () if image is None else (image,)
        if references and len(value) != references:
            message = f"expected one mask, or one per reference ({references}), got {len(value)}"
            self.problem("prior", message, "order them as the references are, an empty mask where nothing differs")
        images = [self.image(f"prior[{index}]", item) for index, item in enumerate(value)]
        return tuple(image for image in images if image is not None)


def text_fault(value: object, expected: str = "a text that is not empty") -> str | None:
    """What is wrong with a value that should be a text; None where it is one."""
    if not (isinstance(value, str) and value.strip()) or "\0" in value:
        return f"expected {expected}, got {reprlib.repr(value)}"
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        return "holds half of a surrogate pair, which is no text"
    return None


class LineError(ValueError):
    """A line that is no JSON."""

    def __init__(self, field: str, message: str, remedy: str) -> None:
        super().__init__(field, message, remedy)
        self.field, self.message, self.remedy = field, message, remedy


def parse_line(raw: bytes) -> Any:
    """The value of a line of JSON in UTF-8, with or without a mark of its encoding before it. LineError says what is wrong."""
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in raw:
        raise LineError("line", "is not UTF-8 (but UTF-16, or holds zero bytes)", "save the file as UTF-8")
    try:
        return json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_distinct)
    except UnicodeDecodeError as error:
        raise LineError("line", f"is not UTF-8 (byte {error.start})", "save the file as UTF-8") from error
    except _RepeatedFieldError as error:
        raise LineError(str(error), "stands twice in one object", "keep one of them") from error
    except (ValueError, RecursionError) as error:
        raise LineError("line", f"is not JSON ({error})", "write one object a line") from error


class _RepeatedFieldError(ValueError):
    """A JSON object has a field twice; Python's parser would keep the last."""


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for name, item in pairs:
        if name in value:
            raise _RepeatedFieldError(name)
        value[name] = item
    return value
