"""Where the subjects are in the generated images: a line per image, a box or a mask per reference, null where it is missing.

    {"image": "3_0.png", "boxes": [[40, 60, 300, 480], null]}
    {"image": "3_1.png", "masks": ["masks/3_1_dog.png", "masks/3_1_cup.png"]}

Images are named by their path in the folder of images, masks relative to the file. Boxes are left, top, right, bottom in
pixels.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from focusdpo.data.records import DatasetError, Problem
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


class _Lines:
    """Reads the lines, and collects what is wrong with them."""

    def __init__(self, file: Path, images: Sequence[GeneratedImage], subjects: Mapping[int, int]) -> None:
        self.file = file
        self.images = {image.name: image for image in images}
        self.subjects = subjects
        self.line = 0
        self.seen: dict[str, int] = {}
        self.regions: list[Region] = []
        self.problems: list[Problem] = []

    def problem(self, field: str, message: str, remedy: str) -> None:
        self.problems.append(Problem(self.file, self.line, field, message, remedy))

    def read(self, raw: bytes) -> None:
        try:
            value = json.loads(raw.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            return self.problem("line", f"is not JSON ({error})", "write one object a line")
        kinds = {"boxes", "masks"} & set(value) if isinstance(value, dict) else set()
        if len(kinds) != 1 or set(value) != {"image", *kinds}:
            got = f"got {reprlib.repr(value)}"
            return self.problem(
                "line", f'expected "image" and either "boxes" or "masks", {got}', "docs/evaluation.md has examples"
            )
        (kind,) = kinds
        name, items = value["image"], value[kind]
        image = self.images.get(name) if isinstance(name, str) else None
        if image is None:
            return self.problem("image", f"{reprlib.repr(name)} is no evaluated image", "name it by its path in --images")
        if self.seen.setdefault(image.name, self.line) != self.line:
            return self.problem("image", f"{name} stands in line {self.seen[image.name]} as well", "keep one of them")
        expected = self.subjects[image.line]
        if not isinstance(items, list) or len(items) != expected:
            got = f"{len(items)}" if isinstance(items, list) else type(items).__name__
            message = f"expected a list of {expected}, as line {image.line} of the manifest has references; got {got}"
            return self.problem(kind, message, "give each reference one, or null where the subject is missing")
        for index, item in enumerate(items):
            picture = None
            if item is not None:
                picture = self.box(image, index, item) if kind == "boxes" else self.mask(image, index, item)
            self.regions.append(Region(image, index, picture, self.line))

    def box(self, image: GeneratedImage, index: int, item: object) -> Picture | None:
        edges = [float(edge) for edge in item if type(edge) in (int, float)] if isinstance(item, list) else []
        if isinstance(item, list) and len(item) == len(edges) == 4:
            left, top, right, bottom = edges
            if 0 <= left < right < math.inf and 0 <= top < bottom < math.inf:
                return Picture(image.path, box=(left, top, right, bottom))
        expected = f"expected [left, top, right, bottom] in pixels, got {reprlib.repr(item)}"
        self.problem(f"boxes[{index}]", expected, "left below right, top below bottom, none below 0")
        return None

    def mask(self, image: GeneratedImage, index: int, item: object) -> Picture | None:
        if not isinstance(item, str) or not item.strip() or "\0" in item:
            expected = f"expected the path of a mask, got {reprlib.repr(item)}"
            self.problem(f"masks[{index}]", expected, 'write it like "masks/3_1_dog.png", or null')
            return None
        return Picture(image.path, mask=self.file.parent / item)


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
    lines = _Lines(file, images, subjects)
    with file.open("rb") as stream:
        for lines.line, raw in enumerate(stream, start=1):
            if raw.strip():
                lines.read(raw)
    if lines.problems:
        raise DatasetError(lines.problems, "regions cannot be used")
    left = tuple(image.name for image in images if image.name not in lines.seen)
    if left and not allow_missing:
        raise ValueError(
            f"regions: {file} has no line for {len(left)} images, as {left[0]}; add them, or go on with --allow_missing true"
        )
    return FoundRegions(file, tuple(lines.regions), left)


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
