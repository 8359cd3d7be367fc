"""The generated images by line of the manifest, and the check of every file before any is encoded."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image, ImageOps
from tqdm.auto import tqdm

from focusdpo.data.images import ROOM, ImageError, Size, attempt, inside, read_gray, read_image, read_size
from focusdpo.data.prompts import IMAGE_SUFFIXES, Prompt
from focusdpo.foundation.files import checksum, hash_of
from focusdpo.foundation.text import first_of

LISTED = 10  # names that a message quotes
NAMED = re.compile(r"(\d+)(?:[_/](\d+))?")  # the line, and which of its images

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


@dataclass(frozen=True)
class GeneratedImage:
    """An image of a prompt. `name` is its path in the folder."""

    path: Path
    name: str
    line: int


def find_images(
    folder: Path, prompts: Sequence[Prompt], per_prompt: int | None, allow_missing: bool
) -> tuple[tuple[GeneratedImage, ...], tuple[int, ...]]:
    """Matches files to the manifest's lines by name: N.png, N_K.png or N/K.png, leading zeros or not. Opens none.

    Returns:
        Images ordered by line and number, and the lines that have too few or none, which only allow_missing lets pass.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: files of no prompt, two files of one number, prompts without images or with another number of them.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"images: no such folder: {folder}")
    files = [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()]
    lines = {prompt.line for prompt in prompts}
    found: dict[int, dict[int | None, Path]] = defaultdict(dict)
    strange, double = [], []
    for file in files:
        name = file.relative_to(folder)
        match = NAMED.fullmatch(name.with_suffix("").as_posix())
        if match is None or int(match[1]) not in lines:
            strange.append(name.as_posix())
            continue
        of_line = found[int(match[1])]
        number = None if match[2] is None else int(match[2])
        clash = of_line.get(number)
        if clash is None and of_line and (number is None or None in of_line):  # N.png beside N_0.png
            clash = next(iter(of_line.values()))
        if clash is not None:
            double.append(f"{name.as_posix()} and {clash.relative_to(folder).as_posix()}")
        of_line.setdefault(number, file)
    expected = "at least 1" if per_prompt is None else str(per_prompt)
    counts = {line: len(found.get(line, {})) for line in sorted(lines)}
    few = [line for line, count in counts.items() if count < (per_prompt or 1)]
    many = [line for line, count in counts.items() if per_prompt is not None and count > per_prompt]
    problems = []
    if strange:
        remedy = "name the images of line N N.png, N_K.png or N/K.png, and move others away"
        problems.append(f"images of no prompt: {first_of(strange, LISTED)}; {remedy}")
    if double:
        problems.append(f"two images of one number: {first_of(double, LISTED)}; keep one, or give each a number N_K")
    if many or (few and not allow_missing):
        wrong = [f"line {line} has {counts[line]}" for line in sorted(many if allow_missing else many + few)]
        remedy = "generate them, or go on with --allow_missing true" if not many else "correct --images_per_prompt"
        problems.append(f"{first_of(wrong, LISTED)}; expected {expected}; {remedy}")
    if not files:
        problems = [f"no image in it; expected {', '.join(IMAGE_SUFFIXES)}"]
    if problems:
        raise ValueError(f"images: {folder}:\n  " + "\n  ".join(problems))
    ordered = [(line, by[number]) for line, by in sorted(found.items()) for number in sorted(by, key=lambda n: n or 0)]
    return tuple(GeneratedImage(path, path.relative_to(folder).as_posix(), line) for line, path in ordered), tuple(few)


@dataclass(frozen=True)
class Content:
    """What is in an image file: SHA-256, size as displayed, and for a mask whether it marks anything."""

    checksum: str
    size: Size
    marks: bool = True


def read_contents(files: Mapping[Path, str], masks: Mapping[Path, str]) -> dict[Path, Content]:
    """Decodes every file, in threads.

    Args:
        files: images, and how messages name each: setting and name, or file, line and field.
        masks: likewise.

    Raises:
        ValueError: what cannot be decoded, all at once.
    """
    found: dict[Path, Content] = {}
    problems: list[str] = []
    work = [(path, place, False) for path, place in files.items()] + [(path, place, True) for path, place in masks.items()]
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:  # Pillow's decoders run beside each other
        contents = pool.map(lambda item: _read(item[0], item[2]), work)
        for (path, place, _), content in zip(
            work, tqdm(contents, total=len(work), desc="checking images", unit="image", leave=False), strict=True
        ):
            if isinstance(content, str):
                problems.append(f"{place}: {content}")
            else:
                found[path] = content
    if problems:
        raise ValueError("images cannot be read:\n  " + "\n  ".join(problems))
    return found


def _read(path: Path, is_mask: bool) -> Content | str:
    """The content, or what is wrong."""
    try:
        width, height = attempt(partial(read_size, mask=is_mask), path)
        with ROOM.hold(width * height):
            if not is_mask:
                return Content(checksum(path), attempt(read_image, path).size)
            gray = attempt(read_gray, path)
            return Content(checksum(path), (gray.shape[1], gray.shape[0]), bool(inside(gray).any()))
    except ImageError as error:
        return str(error)


@dataclass(frozen=True)
class Picture:
    """What an encoder gets: an image, or a part of it by a box, or by a mask, outside of which it is white.

    A part is put in the middle of a white square: encoders crop what is longer than wide, and would not see a long subject's
    ends.
    """

    image: Path
    box: Box | None = None
    mask: Path | None = None

    def key(self, contents: Mapping[Path, Content]) -> str:
        """A hash of all that its pixels follow from."""
        mask = "" if self.mask is None else contents[self.mask].checksum
        part = "square" if self.box or self.mask else ""
        return hash_of(contents[self.image].checksum, str(self.box or ""), mask, part)

    def read(self) -> Image.Image:
        image = read_image(self.image)
        if self.mask is not None:
            marked = Image.fromarray(inside(read_gray(self.mask)))
            image = Image.composite(image, Image.new("RGB", image.size, "white"), marked).crop(marked.getbbox())
        if self.box is not None:
            left, top, right, bottom = self.box
            # Whole pixels that the box touches, so that the thinnest box has one.
            image = image.crop((int(left), int(top), -int(-right // 1), -int(-bottom // 1)))
        if self.mask is None and self.box is None:
            return image
        return ImageOps.pad(image, (max(image.size),) * 2, color="white")
