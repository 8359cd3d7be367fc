"""Who the subjects of a manifest's references are, and the photos that they are compared with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from focusdpo.data.lines import DatasetError, Problem
from focusdpo.data.prompts import IMAGE_SUFFIXES, Prompt
from focusdpo.foundation.choices import ReferencePhotos


@dataclass(frozen=True)
class Subjects:
    """Who the references show: the name of each prompt's subjects by line, and the photos of a reference by its image."""

    names: dict[int, tuple[str, ...]]
    photos: dict[Path, tuple[Path, ...]]


def find_subjects(manifest: Path, prompts: Sequence[Prompt], references: ReferencePhotos) -> Subjects:
    """Tells subjects apart by their reference's image, or with "all" by its folder, and finds the photos to compare with.

    A subject of a pair that was built has its name there. Another is called as its folder where that tells it from the others,
    as in DreamBench, else as its file.

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
    names = {p.line: p.subjects or tuple(called[Path(str(r.image))] for r in p.references) for p in prompts}
    return Subjects(names, photos)


def _photos(folder: Path, others: set[Path]) -> tuple[Path, ...]:
    """Every image of a folder but masks and what else the manifest names for another purpose."""
    if not folder.is_dir():
        return ()
    files = (file for file in sorted(folder.iterdir()) if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    return tuple(file for file in files if file.resolve() not in others)
