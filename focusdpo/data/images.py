"""Reading images and masks, and bringing them to whole tokens."""

from __future__ import annotations

import ctypes
import os
import stat
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TiffImageFile
from torch import Tensor

from focusdpo.data.writing import image_of
from focusdpo.foundation.files import ReadableFile

PATCH_SIZE = 16  # pixels along a token's side: 8 by the VAE, 2 by packing, in every supported backbone
MAX_PIXELS = 64_000_000  # of an image, as 8000 x 8000: decoded it takes 256 MB, and Pillow warns of larger ones only
AT_ONCE = 2 * MAX_PIXELS  # of the images that a process's threads hold: about a gigabyte, with what is made of them
LARGE = 4_000_000  # pixels of images whose memory is given back at once: the C library would keep it for each thread
STRIP = 256  # rows
SMALL = 2**16  # bytes of a file that is read at once: Pillow looks into a header a dozen times
ORIENTATION = 0x0112  # EXIF's tag; 5 to 8 turn by a quarter

# Its images are refused here by name, and a lower limit.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

Size = tuple[int, int]  # width, height in pixels, as PIL has it
Ratio = tuple[int, int]  # width to height
T = TypeVar("T")


class ImageError(ValueError):
    """A file that is no image, or none that can be used: `message` says why, `remedy` what to do."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message, remedy)
        self.message, self.remedy = message, remedy

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy}"


@dataclass(frozen=True)
class ImageBytes:
    """An image in memory."""

    data: bytes

    def open(self, mode: Literal["rb"] = "rb") -> BinaryIO:
        return BytesIO(self.data)

    def __str__(self) -> str:
        return "the image"


@dataclass(frozen=True)
class Header:
    """What an image's header says: width and height as displayed, Pillow's mode, and whether it may move or be clear."""

    size: Size
    mode: str
    animated: bool
    transparent: bool


@contextmanager
def open_file(file: ReadableFile) -> Iterator[BinaryIO]:
    """The bytes of a regular file: a pipe or a device would be waited for, or never end.

    Raises:
        ImageError: it is something else.
        OSError: it cannot be opened.
    """
    if isinstance(file, Path):
        state = os.stat(file)
        if not stat.S_ISREG(state.st_mode):
            raise ImageError("it is no file", "name an image")
        if state.st_size <= SMALL:
            with open(file, "rb", buffering=0) as raw:
                yield BytesIO(raw.read())
            return
    with file.open("rb") as stream:
        yield stream


@contextmanager
def open_image(file: ReadableFile) -> Iterator[Image.Image]:
    """An image of which the header is read, and not its pixels. Everything that opens a user's image does it here.

    Raises:
        ImageError: it is no regular file, or has more than MAX_PIXELS.
        PIL.UnidentifiedImageError: it is of no format that Pillow knows.
        OSError: it cannot be opened. Of damaged files Pillow raises anything: see `attempt`.
    """
    with open_file(file) as stream:
        try:
            with Image.open(stream) as image:
                _check_pixels(image.size)
                yield image
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise _too_large() from error


def attempt(read: Callable[[ReadableFile], T], file: ReadableFile) -> T:
    """What `read` makes of an image. ImageError names the file and what is wrong with it, whatever that is."""
    again = "write it again as PNG or JPEG"
    try:
        return read(file)
    except ImageError as error:
        raise ImageError(f"{file} cannot be read as an image ({error.message})", error.remedy) from error
    except FileNotFoundError as error:
        raise ImageError(f"no such file: {file}", "copy it there, or correct the path") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{file} cannot be read as an image (of no known format)", again) from error
    except Exception as error:  # Pillow's decoders raise anything on damaged files
        raise ImageError(f"{file} cannot be read as an image ({error or type(error).__name__})", again) from error


# Of glibc; others give memory back themselves.
_give_back = None if sys.platform == "win32" else getattr(ctypes.CDLL(None), "malloc_trim", None)


class _Room:
    """Lets threads hold images of so many pixels at once. What is larger than all of it is held alone."""

    def __init__(self, pixels: int) -> None:
        self._pixels = self._free = pixels
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, pixels: int) -> Iterator[None]:
        share = min(pixels, self._pixels)
        with self._changed:
            self._changed.wait_for(lambda: share <= self._free)
            self._free -= share
        try:
            yield
        finally:
            if share > LARGE and _give_back is not None:
                _give_back(0)
            with self._changed:
                self._free += share
                self._changed.notify_all()


# Memory is bounded by this, not by the number of threads. One that holds room must not ask for more: two would wait forever.
ROOM = _Room(AT_ONCE)


def read_header(file: ReadableFile, mask: bool = False) -> Header:
    """Decodes no pixels, but of a PNG whose texts come after them.

    Args:
        file: the image.
        mask: it is read by `read_mask`, which takes 32-bit integers, too.

    Raises:
        ImageError, and what `open_image` raises: floating-point images, and of 32 bits.
    """
    with open_image(file) as image:
        check_depth(image.mode, mask)
        width, height = image.size
        if isinstance(image, TiffImageFile):  # whose `size` has been turned by then, or not: that is Pillow's version's affair
            width, height = int(image.tag_v2[IMAGEWIDTH]), int(image.tag_v2[IMAGELENGTH])
        if _orientation(image) in (5, 6, 7, 8):
            width, height = height, width
        # A phone's MPO has a photo and its preview. Counting frames would read all of the file.
        animated = image.format != "MPO" and bool(getattr(image, "is_animated", False))
        return Header((width, height), image.mode, animated, image.has_transparency_data)


def read_size(file: ReadableFile, mask: bool = False) -> Size:
    """Width and height as displayed, from the header alone."""
    return read_header(file, mask).size


def read_photo(file: ReadableFile) -> Image.Image:
    """An image in its file's own mode, upright, of 8 bits. ImageError for floating-point images."""
    with open_image(file) as image:
        check_depth(image.mode)
        photo = _upright(image)
        if photo.mode.startswith("I;16"):  # gray, which Pillow would clip to 8 bits
            values = np.asarray(photo).astype(np.uint32)
            values += 128  # to the nearest
            values //= 257
            photo = Image.fromarray(values.astype(np.uint8))
        return photo


def on_white(photo: Image.Image) -> Image.Image:
    """An RGB image; what is transparent becomes white."""
    if not photo.has_transparency_data:
        return photo if photo.mode == "RGB" else photo.convert("RGB")
    shown = Image.new("RGB", photo.size)
    for top in range(0, photo.height, STRIP):  # all at once would take five times the image's memory
        part = photo.crop((0, top, photo.width, min(top + STRIP, photo.height))).convert("RGBA")
        white = Image.new("RGBA", part.size, "white")
        shown.paste(Image.alpha_composite(white, part).convert("RGB"), (0, top))
    return shown


def read_image(file: ReadableFile) -> Image.Image:
    """An RGB image, upright; what is transparent becomes white. ImageError for floating-point images."""
    return on_white(read_photo(file))


def read_alpha(file: ReadableFile) -> Image.Image | None:
    """The opaque part of an image with transparency as 0 and 255, else None: a cut-out is its own mask."""
    with open_image(file) as image:
        alpha = _alpha(_upright(image))
        return None if alpha is None else alpha.point(lambda a: 255 if a >= 128 else 0)


def read_gray(file: ReadableFile) -> np.ndarray:
    """The gray values of a mask, integers [H, W] in the file's own depth: scaled to 8 bits, 0 and 1 of 16 would be one value.

    A cut-out has its opacity as gray values, whatever its colours are; where all of it is as opaque, its colours are looked at.
    """
    with open_image(file) as image:
        check_depth(image.mode, mask=True)
        upright = _upright(image)
        alpha = _alpha(upright)
        if alpha is not None:
            low, high = alpha.getextrema()
            if low != high or high == 0:
                return np.asarray(alpha)
        return np.asarray(upright if upright.mode.startswith("I") else upright.convert("L"))


def inside(gray: np.ndarray) -> np.ndarray:
    """What a mask marks, bool [H, W]: what is brighter than half of the brightest pixel, so 0/1 and 0/255 files both work."""
    return (gray > gray.max() / 2) & (gray > 0)


def read_mask(file: ReadableFile) -> Image.Image:
    """A mask as 0 and 255."""
    return image_of(inside(read_gray(file)))


def _too_large(size: Size | None = None) -> ImageError:
    pixels = "more" if size is None else f"{size[0]}x{size[1]} pixels, more"
    return ImageError(f"{pixels} than {MAX_PIXELS // 1_000_000} million pixels", "scale it down")


def _check_pixels(size: Size) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise _too_large(size)


def check_depth(mode: str, mask: bool = False) -> None:
    """ImageError for floating-point images, and those of 32 bits that are no masks."""
    if mode == "F" or (mode == "I" and not mask):
        raise ImageError(f"mode {mode}, more than 8 bits of unknown range", "save it with 8 or 16 bits a channel")


def _upright(image: Image.Image) -> Image.Image:
    """Decodes an opened image and turns it as its EXIF says: the same object, as a copy would take as much again."""
    image.load()
    _check_pixels(image.size)  # some formats hold a picture of another size than their header says
    ImageOps.exif_transpose(image, in_place=True)
    return image


def _orientation(image: Image.Image) -> object:
    """EXIF's orientation, by which `_upright` turns."""
    if isinstance(image, PngImageFile) and not _texts_at_the_end(image):
        return Image.Image.getexif(image).get(ORIENTATION)  # PNG's own method decodes the pixels to see what comes after them
    return image.getexif().get(ORIENTATION)


def _texts_at_the_end(image: PngImageFile) -> bool:
    """Whether a PNG has EXIF, or texts that may hold it, after its pixels; where Pillow stopped reading is left as it was."""
    stream = image.fp
    assert stream is not None
    start = stream.tell()
    try:
        stream.seek(8)
        pixels = False
        while len(head := stream.read(8)) == 8:
            kind = head[4:]
            if pixels and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            pixels |= kind == b"IDAT"
            stream.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
        return False
    finally:
        stream.seek(start)


def _alpha(image: Image.Image) -> Image.Image | None:
    """How opaque an image is, mode L; None where nothing of it can be clear."""
    if not image.has_transparency_data:
        return None
    if image.mode.startswith("I"):  # of 16 bits one gray is clear, which Pillow does not convert
        return image_of(np.asarray(image) != image.info["transparency"])
    return (image if "A" in image.getbands() else image.convert("RGBA")).getchannel("A")


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
