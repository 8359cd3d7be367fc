"""The manifest: a prompt and its references a line, to be sampled or measured. A file of pairs serves as one."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from focusdpo.data.images import ROOM, ImageError, attempt, read_photo, read_size
from focusdpo.data.lines import DatasetError, Problem, read_lines, split_problems, text_fault
from focusdpo.data.records import FIELDS, FILE_NAME, Reference, ReferencesParser
from focusdpo.foundation.files import ReadableFile

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Prompt:
    """A line of the manifest.

    `others` are files that it names beside its references: masks, winner, loser, prior. `subjects` are the names of the
    references' subjects, where the line is of a pair that was built, whose meta has them.
    """

    file: Path
    line: int
    text: str
    references: tuple[Reference, ...]
    others: tuple[Path, ...] = ()
    subjects: tuple[str, ...] = ()


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
        return Prompt(self.file, self.line, text, references, (*masks, *others), _subjects(value, len(references)))


def _subjects(value: dict[str, Any], count: int) -> tuple[str, ...]:
    """What the meta of a pair calls its subjects, one for each reference; none where it does not."""
    meta = value.get("meta")
    listed = meta.get("subjects") if isinstance(meta, dict) else None
    named = isinstance(listed, list) and len(listed) == count and all(text_fault(name) is None for name in listed)
    return tuple(listed) if named and listed is not None else ()


def check_references(prompts: Sequence[Prompt], fewest: int = 1, progress: bool = True) -> None:
    """Decodes every reference, each file once, in threads.

    Args:
        prompts: by line.
        fewest: references that a prompt must have.
        progress: show a progress bar.

    Raises:
        DatasetError: with all that cannot be read, and prompts with too few.
    """
    message, remedy = f"expected {fewest} or more, got", "name the images of its subjects"
    few = [prompt for prompt in prompts if len(prompt.references) < fewest]
    problems = [Problem(p.file, p.line, "references", f"{message} {len(p.references)}", remedy) for p in few]
    files = list(dict.fromkeys(reference.image for prompt in prompts for reference in prompt.references))
    with ThreadPoolExecutor() as pool:  # Pillow's decoders run beside each other
        found = pool.map(_fault, files)
        bar = tqdm(found, total=len(files), desc="checking references", unit="image", disable=not progress, leave=False)
        faults = dict(zip(files, bar, strict=True))
    for prompt in prompts:
        for number, reference in enumerate(prompt.references):
            fault = faults[reference.image]
            if fault is not None:
                field = f"references[{number}].image"
                problems.append(Problem(prompt.file, prompt.line, field, fault.message, fault.remedy))
    if problems:
        raise DatasetError(problems, "the prompts cannot be used")


def _fault(file: ReadableFile) -> ImageError | None:
    """What is wrong with an image."""
    try:
        width, height = attempt(read_size, file)
        with ROOM.hold(width * height):
            attempt(read_photo, file)
        return None
    except ImageError as error:
        return error


def find_manifest(path: str) -> Path:
    """The file that a setting names: of a folder of pairs its pairs.jsonl."""
    manifest = Path(path)
    return manifest / FILE_NAME if manifest.is_dir() else manifest


def read_prompts(manifest: Path, setting: str = "manifest") -> list[Prompt]:
    """The prompts of a manifest, by line. No image is opened.

    Args:
        manifest: the file; paths in it are relative to it.
        setting: that names it, for messages.

    Raises:
        FileNotFoundError: there is no such file.
        DatasetError: lines that are no prompts, all at once.
    """
    if not manifest.is_file():
        raise FileNotFoundError(
            f"{setting}: no such file: {manifest}; focusdpo data dreambench writes single.jsonl, multi.jsonl"
        )
    lines = read_lines(manifest, lambda line: _PromptParser(manifest, line, manifest.parent.joinpath))
    prompts, problems = split_problems(lines)
    if not prompts and not problems:
        problems.append(Problem(manifest, 1, "line", "the file is empty", "write a prompt a line"))
    if problems:
        raise DatasetError(problems, f"the {setting.rpartition('.')[2]} cannot be used")
    return prompts
