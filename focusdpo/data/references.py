"""How a photo is brought to whole tokens: to a number of pixels, or by the rule of a backbone's own pipeline.

A rule knows sizes before a file is decoded or a model loaded, and goes to the loader's processes. Photo and mask take the same
way: cut at the centre, scaled, cut at the centre again.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from PIL import Image
from torch import Tensor

from focusdpo.data.images import (
    PATCH_SIZE,
    Ratio,
    Size,
    bucket_size,
    centre_cut,
    fit_image,
    fit_mask,
    marked,
    on_white,
    share_cut,
    to_pixels,
    token_size,
)

CUTS = 16  # to a ratio, each a pixel smaller than the one before, of which a rule has its choice


@dataclass(frozen=True)
class Placement:
    """One photo's way to whole tokens.

    rule: whose way it is. cut: what is taken of the photo's centre. scaled: what that is scaled to. size: what is taken of the
    centre then, in whole tokens. All in pixels.
    """

    rule: ReferenceRule
    cut: Size
    scaled: Size
    size: Size

    def pixels(self, photo: Image.Image) -> Tensor:
        """A photo as `read_photo` gives it: float [3, H, W] in [0, 1]."""
        return self.rule.resize(centre_cut(photo, self.cut), self.scaled, self.size)

    def mask(self, mask: Image.Image) -> Tensor:
        """A mask of 0 and 255, of the photo's size, on the photo's way: bool [H, W]."""
        scaled = centre_cut(mask, self.cut).resize(self.scaled, Image.Resampling.BOX)
        return marked(centre_cut(scaled, self.size))

    def lost(self, photo: Size) -> Fraction:
        """Share of the area of a photo of this size that is cut away."""
        kept = Fraction(math.prod(self.cut), math.prod(photo))
        return 1 - kept * Fraction(math.prod(self.size), math.prod(self.scaled))


class CoveringPlacement(Placement):
    """Scaling and cutting are one operation here, to fractions of a pixel."""

    def pixels(self, photo: Image.Image) -> Tensor:
        return self.rule.resize(photo, self.scaled, self.size)

    def mask(self, mask: Image.Image) -> Tensor:
        return fit_mask(mask, self.size)

    def lost(self, photo: Size) -> Fraction:
        return share_cut(photo, self.size)


class ReferenceRule(abc.ABC):
    """How reference photos are brought to size. Frozen: equal rules do the same, and `name` and sizes say what they do."""

    name: ClassVar[str]

    @abc.abstractmethod
    def fit(self, size: Size, count: int) -> tuple[Size, Size]:
        """What a photo is scaled to, and what of its centre is left then, in whole tokens.

        Args:
            size: of the photo in pixels.
            count: references of the pair.

        Raises:
            ValueError: there is no way for a photo of this size; the message is about the photo.
        """

    @abc.abstractmethod
    def resize(self, photo: Image.Image, scaled: Size, size: Size) -> Tensor:
        """A photo on the way that `fit` found: float [3, H, W] in [0, 1].

        Args:
            photo: upright, in its file's own mode, of 8 bits.
            scaled, size: what `fit` found.
        """

    def place(self, size: Size, count: int, buckets: Sequence[Ratio] | None = None) -> Placement:
        """The way of a photo; with buckets, it is first cut at its centre to the nearest ratio.

        Raises:
            ValueError: as `fit`.
        """
        if buckets is None:
            return Placement(self, size, *self.fit(size, count))
        ratio = min(buckets, key=lambda ratio: share_cut(size, ratio))
        placements: list[Placement] = []
        for cut in _ratio_cuts(size, ratio):
            try:
                placements.append(Placement(self, cut, *self.fit(cut, count)))
            except ValueError:
                if not placements:
                    raise
        # A side that is a whole number of tokens may come out a token shorter, as pipelines truncate what they have rounded. Of
        # a few cuts, one that does not: photos of one ratio then have one size.
        return max(placements, key=lambda placement: math.prod(placement.size))


@dataclass(frozen=True)
class LongestSide(ReferenceRule):
    """The longest side becomes a number of pixels, both are cut to whole tokens; what is transparent becomes white."""

    longest: int
    name: ClassVar[str] = "longest side"

    def fit(self, size: Size, count: int) -> tuple[Size, Size]:
        target = token_size(size, self.longest)
        return target, target

    def place(self, size: Size, count: int, buckets: Sequence[Ratio] | None = None) -> Placement:
        if buckets is None:
            return CoveringPlacement(self, size, *self.fit(size, count))
        target = bucket_size(size, self.longest, buckets)
        return CoveringPlacement(self, next(_ratio_cuts(size, target)), target, target)

    def resize(self, photo: Image.Image, scaled: Size, size: Size) -> Tensor:
        return fit_image(on_white(photo), size)


def _ratio_cuts(size: Size, ratio: Ratio) -> Iterator[Size]:
    """What may be taken of a photo so that it has a ratio of width to height, to a pixel; the largest first."""
    for less in range(min(CUTS, *size)):
        width, height = size[0] - less, size[1] - less
        across, down = round(Fraction(height * ratio[0], ratio[1])), round(Fraction(width * ratio[1], ratio[0]))
        yield max(min(width, across), 1), max(min(height, down), 1)


@dataclass(frozen=True)
class UnoReferences(ReferenceRule):
    """As `preprocess_ref` of bytedance/UNO, uno/flux/pipeline.py.

    The longest side becomes 512 pixels, or 320 where there are several references; both sides are truncated, and cut to whole
    tokens without a second scaling. It becomes RGB last: transparent parts are black where the file is scaled, and else have
    whatever colour the file has under them.
    """

    name: ClassVar[str] = "flux"

    def fit(self, size: Size, count: int) -> tuple[Size, Size]:
        longest = 512 if count == 1 else 320
        scale = longest / max(size)  # times a side, it may be rounded to just below a whole number, also in a square
        width, height = (longest, int(scale * size[1])) if size[0] >= size[1] else (int(scale * size[0]), longest)
        if min(width, height) < PATCH_SIZE:
            message = f"{size[0]}x{size[1]} px would become {width}x{height} px"
            raise ValueError(f"{message}; expected sides of at least {PATCH_SIZE} px, one token")
        return (width, height), (width - width % PATCH_SIZE, height - height % PATCH_SIZE)

    def resize(self, photo: Image.Image, scaled: Size, size: Size) -> Tensor:
        return to_pixels(centre_cut(photo.resize(scaled, Image.Resampling.LANCZOS), size).convert("RGB"))
