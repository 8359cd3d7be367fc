"""The dataset format: records of pairs.

`pairs.jsonl` has one preference pair a line, with paths relative to the file; `formats` knows where else records may lie.

    {"prompt": "a cat and a cup",
     "references": [{"image": "refs/cat.png", "mask": "refs/cat_mask.png", "class_name": "cat"}, {"image": "refs/cup.png"}],
     "winner": "0_winner.png", "loser": "0_loser.png",
     "prior": "0_prior.png",            # or a list with one mask per reference
     "meta": {"any": "thing"}}

A mask is an image whose bright part (above half of its maximum) is inside. A reference without a mask counts as subject
where it is opaque.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from focusdpo.data.lines import LineParser
from focusdpo.foundation.files import ReadableFile

FILE_NAME = "pairs.jsonl"
FIELDS = {"prompt": True, "references": True, "winner": True, "loser": True, "prior": True, "meta": False}
REFERENCE_FIELDS = {"image": True, "mask": False, "class_name": False}

T = TypeVar("T")


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


class ReferencesParser(LineParser[T]):
    """Reads the references of a line, and images that it names.

    Args:
        file, line: what the problems name.
        locate: the image that a text stands for, or LookupError that says why there is none.
    """

    def __init__(self, file: Path, line: int, locate: Callable[[str], ReadableFile]) -> None:
        super().__init__(file, line)
        self.locate = locate

    def image(self, field: str, value: object) -> ReadableFile | None:
        name = self.text(field, value, 'write it like "winner.png"', "the path of an image")
        try:
            return None if name is None else self.locate(name)
        except LookupError as error:
            self.problem(field, str(error.args[0]), "write the pair's shard again")
            return None

    def references(self, value: object) -> tuple[Reference, ...]:
        references = []
        remedy, example = "give each subject of the prompt one image", '{"image": "cat.png"}'
        for place, item in self.objects("references", value, REFERENCE_FIELDS, remedy, example):
            image = self.image(f"{place}image", item["image"]) if "image" in item else None
            mask = self.image(f"{place}mask", item["mask"]) if item.get("mask") is not None else None
            class_name = item.get("class_name")
            if class_name is not None:
                remedy = 'name the subject\'s class, like "cat", or leave it out'
                class_name = self.text(f"{place}class_name", class_name, remedy)
            if image is not None:
                references.append(Reference(image, mask, class_name))
        return tuple(references)


class RecordParser(ReferencesParser[PairRecord]):
    """Makes a record of a line, a shard's JSON or a table's row."""

    def make(self, value: dict[str, Any]) -> PairRecord | None:
        self.check_fields("", value, FIELDS)
        prompt = self.text("prompt", value["prompt"], "write what the winner shows") if "prompt" in value else None
        references = self.references(value["references"]) if "references" in value else ()
        winner = self.image("winner", value["winner"]) if "winner" in value else None
        loser = self.image("loser", value["loser"]) if "loser" in value else None
        prior = self.prior(value["prior"], len(references)) if "prior" in value else ()
        meta = self.meta(value)
        if self.problems:
            return None
        assert prompt is not None and winner is not None and loser is not None
        per_subject = isinstance(value["prior"], list)
        return PairRecord(self.file, self.line, prompt, references, winner, loser, prior, per_subject, meta)

    def prior(self, value: object, references: int) -> tuple[ReadableFile, ...]:
        if not isinstance(value, list):
            image = self.image("prior", value)
            return () if image is None else (image,)
        if references and len(value) != references:
            message = f"expected one mask, or one per reference ({references}), got {len(value)}"
            self.problem("prior", message, "order them as the references are, an empty mask where nothing differs")
        images = [self.image(f"prior[{index}]", item) for index, item in enumerate(value)]
        return tuple(image for image in images if image is not None)
