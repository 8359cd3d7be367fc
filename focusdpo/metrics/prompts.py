"""The manifest: prompts and their references, and who the subjects are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from focusdpo.data.lines import DatasetError, Problem, read_lines, split_problems, text_fault
from focusdpo.data.records import FIELDS, Reference, ReferencesParser
from focusdpo.foundation.choices import ReferencePhotos

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Prompt:
    """A line of the manifest. `others` are files that it names beside its references: masks, winner, loser, prior."""

    line: int
    text: str
    references: tuple[Reference, ...]
    others: tuple[Path, ...] = ()


class _PromptParser(ReferencesParser[Prompt]):
    """Makes a prompt of a line; of a pair's line, winner, loser and prior are not looked at."""

    def make(self, value: dict[str, Any]) -> Prompt | None:
        self.check_fields("", value, {name: name in ("prompt", "references") for name in FIELDS})
        text = self.text("prompt", value["prompt"], "write what the image shows") if "prompt" in value else None
        references = self.references(value["references"]) if "references" in value else ()
        if text is None:
            return None
        named = [value.get("winner"), value.get("loser"), value.get("prior")]
        flat = [name for item in named for name in (item if isinstance(item, list) else [item])]
        masks = [Path(str(reference.mask)) for reference in references if reference.mask is not None]
        others = [self.file.parent / str(name) for name in flat if text_fault(name) is None]  # others name no file
        return Prompt(self.line, text, references, (*masks, *others))


def read_prompts(manifest: Path) -> list[Prompt]:
    """The prompts of a manifest, by line. No image is opened.

    Raises:
        FileNotFoundError: there is no such file.
        DatasetError: lines that are no prompts, all at once.
    """
    if not manifest.is_file():
        raise FileNotFoundError(
            f"manifest: no such file: {manifest}; focusdpo data dreambench writes single.jsonl, multi.jsonl"
        )
    lines = read_lines(manifest, lambda line: _PromptParser(manifest, line, manifest.parent.joinpath))
    prompts, problems = split_problems(lines)
    if not prompts and not problems:
        problems.append(Problem(manifest, 1, "line", "the file is empty", "write a prompt a line"))
    if problems:
        raise DatasetError(problems, "the manifest cannot be used")
    return prompts


@dataclass(frozen=True)
class Subjects:
    """Who the references show: the name of each prompt's subjects by line, and the photos of a reference by its image."""

    names: dict[int, tuple[str, ...]]
    photos: dict[Path, tuple[Path, ...]]


def find_subjects(manifest: Path, prompts: Sequence[Prompt], references: ReferencePhotos) -> Subjects:
    """Tells subjects apart by their reference's image, or with "all" by its folder, and finds the photos to compare with.

    A subject is called as its folder where that tells it from the others, as in DreamBench, else as its file.

    Raises:
        DatasetError: with "all", a folder that two subjects of one prompt share: its photos show both.
    """
    images = {Path(str(reference.image)) for prompt in prompts for reference in prompt.references}
    if references == "all":
        problems = [
            Problem(
                manifest,
                prompt.line,
                "references",
                f"two subjects have their photos in {folder}",
                "give each a folder of its own, or use --references listed",
            )
            for prompt in prompts
            for folder, count in Counter(Path(str(r.image)).parent for r in prompt.references).items()
            if count > 1
        ]
        if problems:
            raise DatasetError(problems, "--references all takes each subject's photos from the folder of its reference")
    keys = {image: image.parent if references == "all" else image for image in images}
    folders = Counter(key if references == "all" else key.parent for key in set(keys.values()))
    shared = Counter(folder.name for folder in folders)
    called: dict[Path, str] = {}
    for image in images:
        folder = image.parent
        tells = folder.name and folder != manifest.parent and folders[folder] == 1 and shared[folder.name] == 1
        name = keys[image].relative_to(manifest.parent) if keys[image].is_relative_to(manifest.parent) else keys[image]
        called[image] = folder.name if tells else name.as_posix()
    others = {file.resolve() for prompt in prompts for file in prompt.others}
    photos = {image: (image,) if references == "listed" else _photos(image.parent, others) or (image,) for image in images}
    names = {p.line: tuple(called[Path(str(r.image))] for r in p.references) for p in prompts}
    return Subjects(names, photos)


def _photos(folder: Path, others: set[Path]) -> tuple[Path, ...]:
    """Every image of a folder but masks and what else the manifest names for another purpose."""
    if not folder.is_dir():
        return ()
    files = (file for file in sorted(folder.iterdir()) if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    return tuple(file for file in files if file.resolve() not in others)
