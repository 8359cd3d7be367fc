"""What is wrong with one pair's files. Errors make it unfit for training; a warning says what the run would learn from it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from typing import TypeVar

import numpy as np
from PIL import Image, ImageChops

from focusdpo.data.headers import INDEX
from focusdpo.data.images import (
    PATCH_SIZE,
    ROOM,
    Header,
    ImageError,
    Size,
    attempt,
    inside,
    read_alpha,
    read_gray,
    read_image,
    token_size,
)
from focusdpo.data.lines import Problem
from focusdpo.data.records import PairRecord
from focusdpo.data.writing import image_of
from focusdpo.foundation.choices import Check
from focusdpo.foundation.files import ReadableFile, checksum

T = TypeVar("T")

COMPARED_AT = 512  # pixels of the longest side at which winner, loser and prior are compared, token by token
CHANGED = 4.0  # mean difference of a token's pixels, of 255, that compression alone does not make
FEWEST_TOKENS = 4  # that the mask of a reference marks
MIN_SHARE_CHANGED = 0.25  # of the prior's tokens
MAX_SHARE_OUTSIDE = 0.25  # of the changed tokens
MAX_SHARE_GRAY = 0.1  # of a mask's pixels: edges are gray, the inside is not
GRAY_MODES = {"1", "L", "LA", "La", "I;16", "I;16B", "I;16L"}


@dataclass
class CheckedPair:
    """A pair and what was found. `sizes` are those of the images that could be read, by field; `contents` their checksums."""

    record: PairRecord
    problems: list[Problem] = dataclasses.field(default_factory=list)
    sizes: dict[str, Size] = dataclasses.field(default_factory=dict)
    contents: dict[str, str] = dataclasses.field(default_factory=dict)


def check_pair(record: PairRecord, check: Check) -> CheckedPair:
    """Looks at the files of a pair: "full" decodes them, "headers" reads sizes only."""
    checker = _PairChecker(record)
    checker.headers()
    if check == "full":
        with ROOM.hold(checker.held()):
            checker.pixels()
    return checker.found


def changed_tokens(winner: Image.Image, loser: Image.Image) -> np.ndarray:
    """Where two RGB images of one size differ by more than compression, bool [rows, columns] of tokens at 512 px."""
    red, green, blue = ImageChops.difference(winner, loser).split()
    return _pooled(ImageChops.lighter(ImageChops.lighter(red, green), blue)) > CHANGED


def _pooled(values: Image.Image) -> np.ndarray:
    """Means over tokens of an image of mode L, float32 [rows, columns]."""
    columns, rows = (side // PATCH_SIZE for side in token_size(values.size, COMPARED_AT))
    return np.asarray(values.convert("F").resize((columns, rows), Image.Resampling.BOX))


class _PairChecker:
    def __init__(self, record: PairRecord) -> None:
        self.record = record
        self.found = CheckedPair(record)
        self.headers_by_field: dict[str, Header] = {}

    def error(self, field: str, message: str, remedy: str) -> None:
        self.found.problems.append(Problem(self.record.file, self.record.line, field, message, remedy))

    def warn(self, field: str, message: str, remedy: str) -> None:
        self.found.problems.append(Problem(self.record.file, self.record.line, field, message, remedy, "warning"))

    def headers(self) -> None:
        record, masks = self.record, self.record.mask_fields
        for field, file in {**record.image_fields, **masks}.items():
            header = self.attempt(field, file, partial(INDEX.header, mask=field in masks))
            if header is not None:
                self.headers_by_field[field] = header
                self.found.sizes[field] = header.size
                if header.animated:
                    self.warn(field, f"{file} has several frames, and only the first is used", "save one as PNG")
        self.same_size("loser", "winner")
        for field in masks:
            self.same_size(field, "winner" if field.startswith("prior") else field.replace(".mask", ".image"))
        if "winner" in self.headers_by_field and "loser" in self.headers_by_field:
            modes = {name: self.headers_by_field[name].mode for name in ("winner", "loser")}
            if len({mode in GRAY_MODES for mode in modes.values()}) > 1:
                message = f"has mode {modes['loser']}, the winner {modes['winner']}: one is gray, which alone tells them apart"
                self.warn("loser", message, "save both in colour, or both in gray")
        for field in record.image_fields:
            if field in self.headers_by_field and self.headers_by_field[field].mode in ("CMYK", "LAB", "YCbCr", "HSV"):
                message = f"has mode {self.headers_by_field[field].mode}, which becomes RGB without its colour profile"
                self.warn(field, message, "convert it to RGB")

    def same_size(self, field: str, other: str) -> None:
        sizes = self.found.sizes
        if field in sizes and other in sizes and sizes[field] != sizes[other]:
            (w, h), (ow, oh) = sizes[field], sizes[other]
            self.error(field, f"is {w}x{h} pixels, but {other} is {ow}x{oh}", "bring both to one size")

    def attempt(self, field: str, file: ReadableFile, read: Callable[[ReadableFile], T]) -> T | None:
        """What `read` makes of a file, or None after saying what is wrong with it."""
        try:
            return attempt(read, file)
        except ImageError as error:
            self.error(field, error.message, error.remedy)
            self.found.sizes.pop(field, None)
            return None

    def held(self) -> int:
        """How many pixels `pixels` holds at most: winner, loser, priors of a quarter of their bytes each, and a file more."""
        areas = {field: width * height for field, (width, height) in self.found.sizes.items()}
        priors = sum(areas.get(field, 0) for field in self.record.prior_fields) // 4
        return areas.get("winner", 0) + areas.get("loser", 0) + priors + max(areas.values(), default=0)

    def pixels(self) -> None:
        record = self.record
        winner, loser = self.image("winner"), self.image("loser")
        for number in range(len(record.references)):
            self.image(f"references[{number}].image")
        for field in record.mask_fields:
            if field not in record.prior_fields:
                self.read_mask(field)
        masks = {field: mask for field in record.prior_fields if (mask := self.read_mask(field)) is not None}
        self.copies()
        self.priors(masks)
        if winner is not None and loser is not None and winner.size == loser.size:
            if ImageChops.difference(winner, loser).getbbox() is None:
                self.error("loser", f"{record.loser} has the same pixels as the winner; nothing to prefer", "disrupt a subject")
            else:
                self.differences(changed_tokens(winner, loser), masks)

    def image(self, field: str) -> Image.Image | None:
        """An image whose header was read, after looking at it; None where it cannot be decoded."""
        file = self.record.image_fields[field]
        image = self.attempt(field, file, read_image) if field in self.found.sizes else None
        if image is not None:
            self.found.contents[field] = checksum(file)
            self.picture(field, file, image)
        return image

    def picture(self, field: str, file: ReadableFile, image: Image.Image) -> None:
        if image.getcolors(1) is not None:
            self.warn(field, f"{file} is of one colour", "name an image that shows something")
        alpha = read_alpha(file) if self.headers_by_field[field].transparent else None
        if alpha is None:
            return
        opaque = np.asarray(alpha) > 0
        if field in ("winner", "loser") and not opaque.all():
            self.warn(field, f"{file} has transparent parts, which become white", "save it without transparency")
        masked = f"{field.removesuffix('.image')}.mask" in self.record.mask_fields
        if field.startswith("references") and not masked and not opaque.any():
            self.error(field, f"{file} is transparent all over and shows no subject", "cut it out again, or give a mask")

    def read_mask(self, field: str) -> np.ndarray | None:
        """What a mask marks, as `image` has images."""
        file = self.record.mask_fields[field]
        gray = self.attempt(field, file, read_gray) if field in self.found.sizes else None
        if gray is None:
            return None
        marked = inside(gray)
        if not marked.any():
            # One of several priors may be empty: that subject is the same in winner and loser.
            if not (field.startswith("prior[") and len(self.record.prior) > 1):
                self.error(field, f"{file} is empty", "expected bright pixels inside the subject")
            return marked
        if field.startswith("prior") and marked.all():
            self.warn(field, f"{file} marks every pixel, so that nothing tells the subject", "mark what differs in subject")
        elif not field.startswith("prior") and (tokens := _pooled(image_of(marked)).sum() / 255) < FEWEST_TOKENS:
            message = (
                f"{file} marks {int(marked.sum())} pixels, {tokens:.1f} tokens at {COMPARED_AT} px: no subject is so small"
            )
            self.error(field, message, "mend the mask, which has to cover the subject")
        elif _pooled(image_of(marked)).sum() < 255:
            message = f"{file} marks {int(marked.sum())} pixels, less than one token at {COMPARED_AT} px"
            self.warn(field, message, "look whether it is the right mask")
        brightest = float(gray.max())
        share = float(((gray > 0.1 * brightest) & (gray < 0.9 * brightest)).mean())
        if share > MAX_SHARE_GRAY:
            message = f"{file} is neither dark nor bright in {share:.0%} of its pixels, as a photo is"
            self.warn(field, message, "save the mask as black and white")
        return marked

    def copies(self) -> None:
        contents = self.found.contents
        seen: dict[str, str] = {}
        for field, content in contents.items():
            other = seen.setdefault(content, field)
            if other != field and {other, field} != {"winner", "loser"}:
                self.warn(field, f"is the same file as {other}", "give each its own image")

    def priors(self, priors: Mapping[str, np.ndarray]) -> None:
        if not self.record.per_subject or len(priors) < max(len(self.record.prior), 2):
            return
        if not any(prior.any() for prior in priors.values()):
            self.error("prior", "every subject's mask is empty", "mark at least one changed region")
        known: list[str] = []
        for field, prior in priors.items():
            other = next((name for name in known if np.array_equal(priors[name], prior)), None)
            if other is not None and prior.any():
                self.warn(field, f"marks the same pixels as {other}", "give each subject its own region")
            known.append(field)

    def differences(self, changed: np.ndarray, priors: Mapping[str, np.ndarray]) -> None:
        """Compares where winner and loser differ with where the priors say so."""
        sizes = {mask.shape[::-1] for mask in priors.values()} | {self.found.sizes["winner"]}
        if len(priors) < len(self.record.prior) or len(sizes) > 1:
            return
        pooled = _pooled(image_of(reduce(np.logical_or, priors.values())))
        touched, mostly = pooled > 0, pooled >= 128
        if not touched.any():
            return
        within, outside = changed & touched, changed & ~touched
        if not within.any():
            message = "winner and loser hardly differ where it marks"
            self.warn("prior", message, "mark the region where the subject was changed")
        elif mostly.any() and (share := float(changed[mostly].mean())) < MIN_SHARE_CHANGED:
            message = f"is larger than the difference: winner and loser differ in {share:.0%} of what it marks"
            self.warn("prior", message, "mark only what differs in subject")
        if within.any() and (share := float(outside.sum() / changed.sum())) > MAX_SHARE_OUTSIDE:
            message = f"is smaller than the difference: {share:.0%} of what differs lies outside"
            self.warn("prior", message, "mark all that differs in subject, or paste the rest of the winner into the loser")


class Comparison:
    """Finds what is wrong with pairs beside each other, one after the other: of each it keeps a hash."""

    def __init__(self) -> None:
        self._seen: dict[bytes, tuple[str, int]] = {}

    def problems(self, pair: CheckedPair) -> Iterator[Problem]:
        """Of a pair beside those before it."""
        record = pair.record
        winner = pair.contents.get("winner", str(record.winner))
        loser = pair.contents.get("loser", str(record.loser))
        place = (str(record.file), record.line)
        first = self._seen.setdefault(_digest(record.prompt, winner, loser), place)
        opposite = self._seen.get(_digest(record.prompt, loser, winner))
        if first != place:
            message, remedy = f"is the same pair as {first[0]}:{first[1]}, and counts twice", "take one out"
            yield Problem(record.file, record.line, "line", message, remedy, "warning")
        if opposite is not None and winner != loser:
            message = f"prefers what {opposite[0]}:{opposite[1]} rejects"
            yield Problem(record.file, record.line, "line", message, "decide for one of them", "warning")


def _digest(*texts: str) -> bytes:
    return hashlib.blake2b("\0".join(texts).encode("utf-8", "surrogatepass"), digest_size=16).digest()
