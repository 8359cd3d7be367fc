"""Where the subjects are in the generated images: a line per image, a box or a mask per reference, null where it is missing.

    {"image": "3_0.png", "boxes": [[40, 60, 300, 480], null]}
    {"image": "3_1.png", "masks": ["masks/3_1_dog.png", "masks/3_1_cup.png"]}

Images are named by their path in the folder of images, masks relative to the file. Boxes are left, top, right, bottom in
pixels.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from focusdpo.data.lines import DatasetError, LineParser, Problem, read_lines, split_problems
from focusdpo.foundation.text import counted
from focusdpo.metrics.images import Content, GeneratedImage, Picture


@dataclass(frozen=True)
class Region:
    """A subject's place in an image: `subject` is the index of its reference, `picture` None where it is missing."""

    image: GeneratedImage
    subject: int
    picture: Picture | None
    line: int  # of the file of regions


@dataclass(frozen=True)
class FoundRegions:
    """Regions in the file's order, and the images that it does not mention."""

    file: Path
    regions: tuple[Region, ...]
    unmentioned: tuple[str, ...]

    @property
    def masks(self) -> dict[Path, str]:
        """Masks, and where the file names them."""
        pictures = [(region, region.picture) for region in self.regions if region.picture is not None]
        return {
            picture.mask: f"{self.file}:{region.line}: masks[{region.subject}]"
            for region, picture in pictures
            if picture.mask is not None
        }


@dataclass
class _Lines:
    """What the lines are about: images by name, the number of their references by line of the manifest, and lines by image."""

    images: dict[str, GeneratedImage]
    subjects: Mapping[int, int]
    seen: dict[str, int] = field(default_factory=dict)


class _RegionParser(LineParser[list[Region]]):
    """Makes a region of each subject of a line's image."""

    DOCS = "docs/evaluation.md"

    def __init__(self, file: Path, line: int, lines: _Lines) -> None:
        super().__init__(file, line)
        self.lines = lines

    def make(self, value: dict[str, Any]) -> list[Region] | None:
        kinds = {"boxes", "masks"} & set(value)
        if len(kinds) != 1 or set(value) != {"image", *kinds}:
            message = f'expected "image" and either "boxes" or "masks", got {reprlib.repr(value)}'
            self.problem("line", message, f"{self.DOCS} has examples")
            return None
        (kind,) = kinds
        name, items = value["image"], value[kind]
        image = self.lines.images.get(name) if isinstance(name, str) else None
        if image is None:
            self.problem("image", f"{reprlib.repr(name)} is no evaluated image", "name it by its path in --images")
            return None
        if self.lines.seen.setdefault(name, self.line) != self.line:
            self.problem("image", f"{name} stands in line {self.lines.seen[name]} as well", "keep one of them")
            return None
        expected = self.lines.subjects[image.line]
        if not isinstance(items, list) or len(items) != expected:
            got = f"{len(items)}" if isinstance(items, list) else type(items).__name__
            message = f"expected a list of {expected}, as line {image.line} of the manifest has references; got {got}"
            self.problem(kind, message, "give each reference one, or null where the subject is missing")
            return None
        find = self.of_box if kind == "boxes" else self.of_mask
        found = enumerate(None if item is None else find(image, f"{kind}[{i}]", item) for i, item in enumerate(items))
        return [Region(image, index, picture, self.line) for index, picture in found]

    def of_box(self, image: GeneratedImage, field: str, item: object) -> Picture | None:
        box = self.box(field, item, (int, float))
        if box is None:
            return None
        left, top, right, bottom = map(float, box)  # as the names of kept embeddings have them
        return Picture(image.path, box=(left, top, right, bottom))

    def of_mask(self, image: GeneratedImage, field: str, item: object) -> Picture | None:
        name = self.text(field, item, 'write it like "masks/3_1_dog.png", or null', "the path of a mask")
        return None if name is None else Picture(image.path, mask=self.file.parent / name)


def read_regions(
    file: Path, images: Sequence[GeneratedImage], subjects: Mapping[int, int], allow_missing: bool
) -> FoundRegions:
    """Reads the file; opens no image.

    Args:
        file: JSON lines as above.
        images: those that are evaluated.
        subjects: number of references by line of the manifest.
        allow_missing: whether images may be left out.

    Raises:
        FileNotFoundError: there is no such file.
        DatasetError: lines that cannot be used, all at once.
        ValueError: images without a line, or no prompt with two references, of which one could leak into the other.
    """
    if not file.is_file():
        raise FileNotFoundError(f"regions: no such file: {file}")
    if not any(subjects[image.line] > 1 for image in images):
        raise ValueError("regions: no prompt has two references; leakage is between subjects, so leave regions out")
    lines = _Lines({image.name: image for image in images}, subjects)
    found = read_lines(file, lambda line: _RegionParser(file, line, lines))
    regions, problems = split_problems(found)
    if problems:
        raise DatasetError(problems, "regions cannot be used")
    left = tuple(image.name for image in images if image.name not in lines.seen)
    if left and not allow_missing:
        raise ValueError(
            f"regions: {file} has no line for {counted(len(left), 'image')}, as {left[0]}; add them, or go on "
            "with --allow_missing true"
        )
    return FoundRegions(file, tuple(chain.from_iterable(regions)), left)


def check_sizes(found: FoundRegions, contents: Mapping[Path, Content]) -> FoundRegions:
    """Refuses boxes outside of their images and masks of another size; a mask that marks nothing becomes a missing subject.

    Raises:
        DatasetError: boxes or masks that do not fit, all at once.
    """
    problems, regions = [], []
    for region in found.regions:
        picture = region.picture
        width, height = contents[region.image.path].size
        if picture is not None and picture.box is not None and (picture.box[2] > width or picture.box[3] > height):
            message = f"{list(picture.box)} reaches out of {region.image.name}, {width}x{height} pixels"
            field = f"boxes[{region.subject}]"
            problems.append(Problem(found.file, region.line, field, message, "give boxes in pixels of the image itself"))
        if picture is not None and picture.mask is not None:
            mask = contents[picture.mask]
            if mask.size != (width, height):
                message = f"is {mask.size[0]}x{mask.size[1]} pixels, but {region.image.name} is {width}x{height}"
                field = f"masks[{region.subject}]"
                problems.append(Problem(found.file, region.line, field, message, "bring both to one size"))
            if not mask.marks:
                region = Region(region.image, region.subject, None, region.line)
        regions.append(region)
    if problems:
        raise DatasetError(problems, "regions cannot be used")
    return FoundRegions(found.file, tuple(regions), found.unmentioned)
