"""Subjects cut out of DreamBench's photos."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from focusdpo.building.blending import box_of, grow, matte
from focusdpo.building.candidate import Mask, Photo, Pixels, Rejected
from focusdpo.building.disruption import cut_edges
from focusdpo.building.dreambench_scenes import box_in
from focusdpo.building.loading import read_pixels
from focusdpo.building.scenes import SceneSubject, View
from focusdpo.building.segmentation import GrabCut
from focusdpo.data.writing import image_of

SIDE = 512  # of a photo when it is segmented, whatever the scene: which photos succeed depends on it
EDGE = 1.5  # pixels over which a cut-out's outline fades


class Cutter:
    """Segments photos by GrabCut and the boxes read by hand; each is segmented once."""

    def __init__(self) -> None:
        self._grabcut = GrabCut()

    def photo(self, file: Path) -> tuple[Image.Image, Image.Image]:
        """A photo, and its subject's mask (L, 0 and 255)."""
        pixels, mask = self._segment(file)
        return image_of(pixels), image_of(mask)

    def cut_out(self, file: Path) -> tuple[Image.Image, bool]:
        """A photo's subject as RGBA, and whether the photo cuts it off at the bottom."""
        pixels, mask = self._segment(file)
        inner = grow(mask, -1)  # the outermost pixels show the background as well
        rows, columns = box_of(inner)
        alpha = (matte(inner, EDGE) * 255).round().astype(np.uint8)
        image = Image.fromarray(np.dstack([pixels, alpha])[rows, columns])
        return image, "bottom" in cut_edges(mask)

    def _segment(self, file: Path) -> tuple[Pixels, Mask]:
        try:
            photo = self.segment(file, file.parent.name, SIDE)
        except Rejected as reason:
            raise ValueError(f"dreambench: {file}: {reason}; expected DreamBench's own photo") from reason
        return photo.pixels, photo.region

    def segment(self, file: Path, class_name: str, side: int) -> Photo:
        """A photo with its mask, its longest side of `side` pixels; Rejected where no subject is found."""
        view = View(file, None, box_in(file))
        photo = Photo(SceneSubject(class_name, file.parent.name, view, view), view, read_pixels(file, side))
        self._grabcut.complete(photo)
        return photo
