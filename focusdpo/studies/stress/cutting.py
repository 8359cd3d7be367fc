"""Subjects cut out of DreamBench's photos."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from focusdpo.building.blending import box_of, grow, matte
from focusdpo.building.candidate import Mask, Photo, Pixels, Rejected
from focusdpo.building.disruption import cut_edges
from focusdpo.building.dreambench_boxes import BOXES
from focusdpo.building.loading import read_pixels
from focusdpo.building.scenes import Box, SceneSubject, View
from focusdpo.building.segmentation import GrabCut
from focusdpo.data.images import read_size

SIDE = 512  # of a photo when it is segmented, whatever the scene: which photos succeed depends on it
EDGE = 1.5  # pixels over which a cut-out's outline fades


class Cutter:
    """Segments photos by GrabCut and the boxes read by hand; each is segmented once."""

    def __init__(self) -> None:
        self._grabcut = GrabCut()

    def photo(self, file: Path) -> tuple[Image.Image, Image.Image]:
        """A photo, and its subject's mask (L, 0 and 255)."""
        pixels, mask = self._segment(file)
        return Image.fromarray(pixels), Image.fromarray(mask.astype(np.uint8) * 255)

    def cut_out(self, file: Path) -> tuple[Image.Image, bool]:
        """A photo's subject as RGBA, and whether the photo cuts it off at the bottom."""
        pixels, mask = self._segment(file)
        inner = grow(mask, -1)  # the outermost pixels show the background as well
        rows, columns = box_of(inner)
        alpha = (matte(inner, EDGE) * 255).round().astype(np.uint8)
        image = Image.fromarray(np.dstack([pixels, alpha])[rows, columns])
        return image, "bottom" in cut_edges(mask)

    def _segment(self, file: Path) -> tuple[Pixels, Mask]:
        name = file.parent.name
        view = View(file, None, _box(file))
        photo = Photo(SceneSubject(name, name, view, view), view, read_pixels(file, SIDE))
        try:
            self._grabcut.complete(photo)
        except Rejected as reason:
            raise ValueError(f"dreambench: {file}: {reason}; expected DreamBench's own photo") from reason
        assert photo.mask is not None
        return photo.pixels, photo.mask


def _box(file: Path) -> Box | None:
    """Where the subject is, in pixels of the photo."""
    shares = BOXES.get(file.parent.name, {}).get(int(file.stem))
    if shares is None:
        return None
    width, height = read_size(file)
    left, top, right, bottom = (round(share * side / 100) for share, side in zip(shares, (width, height) * 2, strict=True))
    return left, top, right, bottom
