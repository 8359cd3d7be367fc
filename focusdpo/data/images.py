"""Reading images and masks, and bringing them to whole tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from focusdpo.files import ReadableFile

PATCH_SIZE = 16  # pixels along a token's side: 8 by the VAE, 2 by packing, in every supported backbone

Size = tuple[int, int]  # width, height in pixels, as PIL has it
Ratio = tuple[int, int]  # width to height


@dataclass(frozen=True)
class Header:
    """What an image's header says: width and height as displayed, Pillow's mode, frames, and whether parts may be clear."""

    size: Size
    mode: str
    frames: int
    transparent: bool


def read_header(file: ReadableFile) -> Header:
    """Reads no pixels, but of a turned TIFF. ValueError for floating-point images."""
    with file.open("rb") as stream, Image.open(stream) as image:
        width, height = image.size
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # orientation by a quarter turn
        if turned and image.format == "TIFF":  # whose size has been turned by then, or not: that is Pillow's version's affair
            (width, height), turned = ImageOps.exif_transpose(image).size, False
        # A phone's MPO has a photo and its preview.
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        _check_depth(image.mode)
        return Header((height, width) if turned else (width, height), image.mode, frames, image.has_transparency_data)


def read_size(file: ReadableFile) -> Size:
    """Width and height as displayed, from the header alone."""
    return read_header(file).size


def read_photo(file: ReadableFile) -> Image.Image:
    """An image in its file's own mode, upright, of 8 bits. ValueError for floating-point images."""
    with file.open("rb") as stream, Image.open(stream) as image:
        return _eight_bits(ImageOps.exif_transpose(image))


def on_white(photo: Image.Image) -> Image.Image:
    """An RGB image; what is transparent becomes white."""
    if not photo.has_transparency_data:
        return photo.convert("RGB")
    white = Image.new("RGBA", photo.size, "white")
    return Image.alpha_composite(white, photo.convert("RGBA")).convert("RGB")


def read_image(file: ReadableFile) -> Image.Image:
    """An RGB image, upright; what is transparent becomes white. ValueError for floating-point images."""
    return on_white(read_photo(file))


def read_alpha(file: ReadableFile) -> Image.Image | None:
    """The opaque part of an image with transparency as 0 and 255, else None: a cut-out is its own mask."""
    with file.open("rb") as stream, Image.open(stream) as image:
        upright = ImageOps.exif_transpose(image)
        if not upright.has_transparency_data:
            return None
        return upright.convert("RGBA").getchannel("A").point(lambda a: 255 if a >= 128 else 0)


def read_gray(file: ReadableFile) -> np.ndarray:
    """The gray values of a mask, uint8 [H, W].

    A file of one colour whose shape is in its transparency has its opacity as gray values.
    """
    with file.open("rb") as stream, Image.open(stream) as image:
        upright = _eight_bits(ImageOps.exif_transpose(image))
        if upright.has_transparency_data:
            rgba = np.asarray(upright.convert("RGBA"))
            if (rgba[..., :3] == rgba[0, 0, :3]).all():
                return rgba[..., 3]
        return np.asarray(upright.convert("L"))


def inside(gray: np.ndarray) -> np.ndarray:
    """What a mask marks, bool [H, W]: what is brighter than half of the brightest pixel, so 0/1 and 0/255 files both work."""
    return (gray > gray.max() / 2) & (gray > 0)


def read_mask(file: ReadableFile) -> Image.Image:
    """A mask as 0 and 255."""
    return Image.fromarray(inside(read_gray(file)).astype(np.uint8) * 255)


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit gray scaled to 8 bits (Pillow would clip it); floating-point and 32-bit images are refused."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.float32) / 257).round().astype(np.uint8))
    _check_depth(image.mode)
    return image


def _check_depth(mode: str) -> None:
    if mode in ("F", "I"):
        raise ValueError(f"mode {mode}, more than 8 bits of unknown range")


def token_size(size: Size, longest: int) -> Size:
    """The size in whole tokens that an image of `size` is brought to when its longest side becomes `longest` pixels."""
    scale = longest / max(size)
    width, height = (max(int(side * scale + 0.5) // PATCH_SIZE, 1) * PATCH_SIZE for side in size)
    return width, height


def share_cut(size: Size, target: Size) -> Fraction:
    """Share of an image's area that is lost when it is scaled to cover `target` and cut at the centre."""
    shape = Fraction(size[0] * target[1], size[1] * target[0])
    return 1 - min(shape, 1 / shape)


def bucket_size(size: Size, longest: int, buckets: Sequence[Ratio]) -> Size:
    """The size in whole tokens, its longest side `longest` pixels, of the aspect ratio nearest to an image of `size`.

    Nearest in the ratio's logarithm, which is where least is cut away; of two as near, the one that `buckets` has first.
    """
    return min((token_size(ratio, longest) for ratio in buckets), key=lambda target: share_cut(size, target))


def fit_image(image: Image.Image, size: Size) -> Tensor:
    """Scaled to cover `size` and cut at the centre: float [3, H, W] in [0, 1]."""
    return to_pixels(ImageOps.fit(image, size, method=Image.Resampling.LANCZOS))


def fit_mask(mask: Image.Image, size: Size) -> Tensor:
    """A mask under the same scaling and cut: bool [H, W]."""
    return marked(ImageOps.fit(mask, size, method=Image.Resampling.BOX))


def centre_cut(image: Image.Image, size: Size) -> Image.Image:
    """The centre of an image, `size` pixels of it; where a half is left over, up and to the left."""
    left, top = (image.width - size[0]) // 2, (image.height - size[1]) // 2
    return image.crop((left, top, left + size[0], top + size[1]))


def marked(mask: Image.Image) -> Tensor:
    """What a mask marks that was scaled from 0 and 255: bool [H, W]."""
    fitted = torch.from_numpy(np.asarray(mask).copy())
    # A region thinner than a pixel of the target stays where it covers most.
    return (fitted >= min(128, int(fitted.max()))) & (fitted > 0)


def to_pixels(image: Image.Image) -> Tensor:
    """An RGB image to float [3, H, W] in [0, 1]."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


def to_pil(image: Tensor) -> Image.Image:
    """float [3, H, W] in [0, 1] to an RGB image."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())
