"""Cut-outs put into scenes before a photo, and alone on white: how demo, stress test and microcosm make their pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageEnhance

from focusdpo.data.images import Size
from focusdpo.data.writing import image_of

SHARE = 0.94  # of a reference's longest side that its subject fills
TIE = 1e-9  # pixels within which two places are as near: sums of shares are not exact
Box = tuple[float, float, float, float]  # left, top, width, height in shares of a scene's side
Range = tuple[float, float]


def draw_background(photo: Image.Image, side: int, shares: Range, brightness: Range, rng: np.random.Generator) -> Image.Image:
    """A square part of a photo in another light, RGB of `side` pixels.

    Args:
        photo: RGB.
        side: in pixels.
        shares: how much of the photo's shorter side the part may take.
        brightness: of the light.
        rng: draws both, and where the part lies.
    """
    extent = min(photo.size) * float(rng.uniform(*shares))
    left, top = (float(rng.uniform(0, length - extent)) for length in photo.size)
    part = photo.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + extent, top + extent))
    return ImageEnhance.Brightness(part).enhance(float(rng.uniform(*brightness)))


def draw_boxes(
    rng: np.random.Generator, widths: Range, heights: Range, gap: float = 0.0, top: float = 0.05, pixels: int | None = None
) -> list[Box]:
    """One box in the left half of a scene, and one in the right.

    Args:
        rng: draws sizes and places.
        widths, heights: of the boxes.
        gap: between a box and its half's edges.
        top: the highest place.
        pixels: round all down to whole ones of a scene's side.
    """

    def draw(low: float, high: float) -> float:
        value = float(rng.uniform(low, high))
        return value if pixels is None else math.floor(value * pixels) / pixels

    boxes = []
    for half in range(2):
        width, height = draw(*widths), draw(*heights)
        boxes.append((half / 2 + draw(gap, 0.5 - gap - width), draw(top, 0.95 - height), width, height))
    return boxes


def at_bottom(box: Box) -> Box:
    """The box at the bottom of the scene, for what a photo cuts off there and would end in the air elsewhere."""
    left, _, width, height = box
    return left, 1 - height, width, height


def compose(
    background: Image.Image, cutouts: Sequence[Image.Image], boxes: Sequence[Box], centred: bool = False
) -> tuple[Image.Image, list[Image.Image]]:
    """The scene of cut-outs in their boxes, each as large as its box allows, in the middle of it and at its bottom.

    Args:
        background: RGB, square.
        cutouts: RGBA.
        boxes: one of each.
        centred: in the middle from top to bottom as well, as `on_white` has it.

    Returns:
        the scene, and the opacity of each cut-out in it (L, 0 to 255).
    """
    scene, side, opacities = background.copy(), background.width, []
    for cutout, (left, top, width, height) in zip(cutouts, boxes, strict=True):
        image = _scaled(cutout, min(width * side / cutout.width, height * side / cutout.height))
        bottom = round((top + height) * side) - image.height
        row = _before((top + height / 2) * side, image.height) if centred else bottom
        corner = _before((left + width / 2) * side, image.width), row
        scene.paste(image, corner, image)
        opacity = Image.new("L", scene.size)
        opacity.paste(image.getchannel("A"), corner)
        opacities.append(opacity)
    return scene, opacities


def compose_pair(
    background: Image.Image,
    cutouts: Sequence[Image.Image],
    disrupted: Sequence[Image.Image],
    boxes: Sequence[Box],
    centred: bool = False,
) -> tuple[Image.Image, Image.Image, list[Image.Image]]:
    """Winner, loser with a disrupted cut-out in each one's place, and for each the region (L, 0 and 255) where they can
    differ.
    """
    (winner, own), (loser, swapped) = (compose(background, shown, boxes, centred) for shown in (cutouts, disrupted))
    pairs = zip(own, swapped, strict=True)
    return winner, loser, [image_of((np.asarray(one) > 0) | (np.asarray(other) > 0)) for one, other in pairs]


def on_white(cutout: Image.Image, size: Size, brightness: float = 1.0, share: float = SHARE) -> tuple[Image.Image, Image.Image]:
    """A cut-out alone on white in another light, and its mask (L, 0 and 255), both of `size`."""
    image = _scaled(cutout, share * max(size) / max(cutout.size))
    alpha = image.getchannel("A")
    lit = ImageEnhance.Brightness(image.convert("RGB")).enhance(brightness)
    canvas, mask = Image.new("RGB", size, "white"), Image.new("L", size)
    corner = (size[0] - image.width) // 2, (size[1] - image.height) // 2
    canvas.paste(lit, corner, alpha)
    mask.paste(alpha.point(lambda a: 255 if a >= 128 else 0), corner)
    return canvas, mask


def _before(middle: float, length: int) -> int:
    """Where what is as long begins around the middle; of two places as near to it, the first."""
    return math.ceil(middle - length / 2 - 0.5 - TIE)


def _scaled(cutout: Image.Image, scale: float) -> Image.Image:
    size = max(round(cutout.width * scale), 1), max(round(cutout.height * scale), 1)
    return cutout.resize(size, Image.Resampling.LANCZOS)
