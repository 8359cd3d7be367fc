"""Cut-outs put into scenes, and alone on white: how stress test and microcosm make their pictures."""

from __future__ import annotations

from PIL import Image, ImageEnhance

SHARE = 0.94  # of a reference's side that its subject fills
Box = tuple[float, float, float, float]  # left, top, width, height in shares of a scene's side


def put(scene: Image.Image, cutout: Image.Image, box: Box, grounded: bool = False) -> Image.Image:
    """Pastes a cut-out into a scene, as large as its box allows, at the bottom of the box, in the middle.

    Args:
        scene: RGB, square; changed.
        cutout: RGBA.
        box: where.
        grounded: stand at the bottom of the scene instead, as what a photo cuts off there would end in the air.

    Returns:
        Its opacity (L, 0 to 255) in the scene.
    """
    side = scene.width
    left, top, width, height = box
    scale = min(width * side / cutout.width, height * side / cutout.height)
    size = max(round(cutout.width * scale), 1), max(round(cutout.height * scale), 1)
    image = cutout.resize(size, Image.Resampling.LANCZOS)
    bottom = side if grounded else round((top + height) * side)
    corner = round((left + width / 2) * side - size[0] / 2), bottom - size[1]
    scene.paste(image, corner, image)
    opacity = Image.new("L", scene.size)
    opacity.paste(image.getchannel("A"), corner)
    return opacity


def on_white(cutout: Image.Image, side: int, brightness: float, share: float = SHARE) -> tuple[Image.Image, Image.Image]:
    """A cut-out alone on white in another light, and its mask (L, 0 and 255); both square, of `side` pixels."""
    scale = share * side / max(cutout.size)
    size = max(round(cutout.width * scale), 1), max(round(cutout.height * scale), 1)
    image = cutout.resize(size, Image.Resampling.LANCZOS)
    alpha = image.getchannel("A")
    lit = ImageEnhance.Brightness(image.convert("RGB")).enhance(brightness)
    canvas, mask = Image.new("RGB", (side, side), "white"), Image.new("L", (side, side))
    corner = (side - size[0]) // 2, (side - size[1]) // 2
    canvas.paste(lit, corner, alpha)
    mask.paste(alpha.point(lambda a: 255 if a >= 128 else 0), corner)
    return canvas, mask
