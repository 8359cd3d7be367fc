"""The second stage: where the subjects are, in the scene, in their references, and in the donors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import torch
from PIL import Image

from focusdpo.building.blending import box_of, grow
from focusdpo.building.candidate import Candidate, Mask, Photo, Pixels, Rejected
from focusdpo.building.config import SegmentationConfig
from focusdpo.building.scenes import Box, View
from focusdpo.data.images import read_size
from focusdpo.foundation.packages import require_package
from focusdpo.foundation.settings import require

Area = tuple[float, float, float, float]  # left, top, right, bottom as shares of the image


class Segmentation:
    """Gives every photo of a candidate a mask. What is given is kept; the rest is found by `find`, once per photo."""

    device = "cpu"
    REMEMBERED = 512  # masks, a quarter of a megabyte each at 512 px

    def __init__(self) -> None:
        self._known: dict[tuple[View, tuple[int, ...], str], Mask] = {}

    def find(self, pixels: Pixels, class_name: str, area: Area | None) -> Mask:
        """The subject's mask [H, W].

        Args:
            pixels: uint8 [H, W, 3].
            class_name: what to look for.
            area: where, if that is known.

        Raises:
            Rejected: it finds none.
        """
        raise NotImplementedError

    def __call__(self, candidate: Candidate) -> None:
        for photo in [*candidate.subjects, *candidate.references]:
            self.complete(photo)
        for number, donors in candidate.donors.items():
            candidate.donors[number] = [donor for donor in donors if self._usable(donor)]
        for index, photo in enumerate(candidate.subjects):
            for other in candidate.subjects[:index]:
                overlap = (photo.region & other.region).sum() / max(min(photo.region.sum(), other.region.sum()), 1)
                if overlap > 0.5:
                    raise Rejected("two subjects have the same mask")

    def complete(self, photo: Photo) -> None:
        """Gives a photo its mask; Rejected where it has none."""
        if photo.mask is None:
            key = (photo.view, photo.pixels.shape, photo.subject.class_name)
            if key not in self._known:
                if len(self._known) >= self.REMEMBERED:
                    self._known.pop(next(iter(self._known)))
                area = None if photo.view.box is None else _area(photo.view.image, photo.view.box)
                self._known[key] = self.find(photo.pixels, photo.subject.class_name, area)
            photo.mask = self._known[key]
        if not photo.mask.any():
            raise Rejected("a mask is empty")

    def _usable(self, donor: Photo) -> bool:
        try:
            self.complete(donor)
        except Rejected:
            return False
        return True


def _area(image: Path, box: Box) -> Area:
    width, height = read_size(image)
    return box[0] / width, box[1] / height, box[2] / width, box[3] / height


def _in_pixels(area: Area, pixels: Pixels) -> list[int]:
    height, width = pixels.shape[:2]
    left, top, right, bottom = area
    return [round(left * width), round(top * height), max(round(right * width), 1), max(round(bottom * height), 1)]


def _agreement(mask: Mask, box: list[int]) -> float:
    """Intersection over union of a mask's bounding box with a box."""
    if not mask.any():
        return 0.0
    rows, columns = box_of(mask)
    own, given = np.zeros_like(mask), np.zeros_like(mask)
    own[rows, columns] = True
    given[box[1] : box[3], box[0] : box[2]] = True
    return float((own & given).sum() / (own | given).sum())


def _nearness(box: Sequence[int], shape: tuple[int, int]) -> Any:
    """How near each pixel [h, w] is to the middle of a box: 1 there, 1/e at 0.35 of its width or height."""
    left, top, right, bottom = box
    x = (np.arange(shape[1]) - (left + right) / 2) / (0.35 * (right - left))
    y = (np.arange(shape[0]) - (top + bottom) / 2) / (0.35 * (bottom - top))
    return np.exp(-(x[None] ** 2 + y[:, None] ** 2))


def _enlarged(mask: Any, pixels: Pixels) -> Mask:
    return cast(Mask, cv2.resize(mask, pixels.shape[1::-1], interpolation=cv2.INTER_CUBIC) > 0.5)


class GivenMasks(Segmentation):
    """Refuses what has no mask."""

    def find(self, pixels: Pixels, class_name: str, area: Area | None) -> Mask:
        raise Rejected("no mask given")


class GrabCut(Segmentation):
    """OpenCV's GrabCut, started from the box, or from what differs from the photo's border and is near its middle.

    It works on a small copy: colours and outline need no more, and its time grows with the pixels.
    """

    SIDE = 192  # longest side in pixels that it works at
    ITERATIONS = 3
    SURE = 0.2  # of what `trim` is told, from which a part is the subject for certain
    LEAST_AGREEMENT = 0.6  # intersection over union of the given box and the mask's own

    def find(self, pixels: Pixels, class_name: str, area: Area | None) -> Mask:
        small = self._reduced(pixels)
        trimap, nearness = self._start(small, area)
        filled = self._cut(small, trimap, nearness)
        if area is not None and _agreement(filled > 0, _in_pixels(area, small)) < self.LEAST_AGREEMENT:
            raise Rejected("GrabCut's mask does not fill its box")
        return _enlarged(filled, pixels)

    def find_likely(self, pixels: Pixels, likely: Any) -> Mask:
        """As `find`, started from how likely each part of the photo shows the subject.

        Args:
            pixels: uint8 [H, W, 3].
            likely: float [h, w] of any size and scale, higher where it is likelier.
        """
        small = self._reduced(pixels)
        height, width = small.shape[:2]
        likely = cv2.resize(likely.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
        span = max(float(likely.max() - likely.min()), 1e-6)
        salient = (likely - likely.min()) / span * np.sqrt(_nearness((0, 0, width, height), (height, width)))
        gray = np.round(255 * salient / max(salient.max(), 1e-6)).astype(np.uint8)
        threshold, _ = cv2.threshold(gray, 0, 255, cv2.THRESH_OTSU)
        trimap = np.where(gray > threshold, cv2.GC_PR_FGD, cv2.GC_PR_BGD)
        trimap[gray > threshold + 0.6 * (255 - threshold)] = cv2.GC_FGD
        trimap[gray < 0.3 * threshold] = cv2.GC_BGD
        return _enlarged(self._cut(small, trimap.astype(np.uint8), salient), pixels)

    def trim(self, pixels: Pixels, mask: Mask, likely: Any, gone: Any) -> Mask:
        """Cuts a mask once more, from what in it likelier shows the subject than its background.

        Args:
            pixels: uint8 [H, W, 3].
            mask: bool [H, W].
            likely: float [h, w] of any size, above 0 where the subject is likelier, and `SURE` where there is no doubt.
            gone: bool [h, w], where the background is for certain.
        """
        small = self._reduced(pixels)
        size = small.shape[1::-1]
        likely = cv2.resize(likely.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
        inside = cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_AREA) > 0.5
        trimap = np.where(grow(inside, 3), cv2.GC_PR_BGD, cv2.GC_BGD)
        trimap[inside & (likely >= 0)] = cv2.GC_PR_FGD
        trimap[inside & (likely > self.SURE)] = cv2.GC_FGD
        trimap[cv2.resize(gone.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0] = cv2.GC_BGD
        return _enlarged(self._cut(small, trimap.astype(np.uint8), (likely - likely.min()) * inside), pixels)

    def _reduced(self, pixels: Pixels) -> Pixels:
        cv2.setRNGSeed(0)  # clusters depend on draws from a global generator
        scale = min(self.SIDE / max(pixels.shape[:2]), 1.0)
        return cast(Pixels, cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA))

    def _cut(self, small: Pixels, trimap: Any, weight: Any) -> Any:
        """GrabCut from its first labels [h, w]: of what it finds the one piece with the most weight, without holes, 0 or 1."""
        if not (trimap == cv2.GC_PR_FGD).any() or not (trimap == cv2.GC_BGD).any():
            raise Rejected("GrabCut sees no subject")
        models = np.zeros((1, 65)), np.zeros((1, 65))
        cv2.grabCut(small, trimap, None, *models, self.ITERATIONS, cv2.GC_INIT_WITH_MASK)
        inside = np.isin(trimap, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(np.uint8)
        count, labels = cv2.connectedComponents(inside)
        if count < 2:
            raise Rejected("GrabCut sees no subject")
        weights = np.bincount(labels.ravel(), weight.ravel())
        weights[0] = 0
        inside = (labels == weights.argmax()).astype(np.uint8)
        disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
        inside = cv2.morphologyEx(cv2.morphologyEx(inside, cv2.MORPH_OPEN, disc), cv2.MORPH_CLOSE, disc)
        outlines, _ = cv2.findContours(inside, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        return cv2.drawContours(np.zeros(inside.shape, np.float32), outlines, -1, 1, cv2.FILLED)

    def _start(self, small: Pixels, area: Area | None) -> tuple[Any, Any]:
        """GrabCut's first labels [h, w], and how near each pixel is to where the subject should be."""
        height, width = small.shape[:2]
        left, top, right, bottom = (0, 0, width, height) if area is None else _in_pixels(area, small)
        nearness = _nearness((left, top, right, bottom), (height, width))
        outside = np.ones((height, width), bool)
        if area is not None:
            outside[top:bottom, left:right] = False
            inside = np.where(nearness > 0.2, cv2.GC_PR_FGD, cv2.GC_PR_BGD)
            inside[nearness > 0.85] = cv2.GC_FGD  # a box is drawn around its subject
            return np.where(outside, cv2.GC_BGD, inside).astype(np.uint8), nearness
        edge = max(2, round(0.04 * min(height, width)))
        outside[edge:-edge, edge:-edge] = False
        outside[-edge:, width // 5 : -width // 5] = False  # where subjects are cut off
        lab = cv2.cvtColor(small, cv2.COLOR_RGB2LAB).astype(np.float32)
        stop = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 20, 1.0)
        _, _, colours = cv2.kmeans(lab[outside], 6, None, stop, 2, cv2.KMEANS_PP_CENTERS)
        strange = np.linalg.norm(lab[:, :, None] - colours, axis=-1).min(axis=-1)
        salient = cv2.GaussianBlur(strange * nearness, (0, 0), height / 40)
        gray = np.round(255 * salient / max(salient.max(), 1e-6)).astype(np.uint8)
        threshold, _ = cv2.threshold(gray, 0, 255, cv2.THRESH_OTSU)
        trimap = np.where(outside, cv2.GC_BGD, np.where(gray > threshold, cv2.GC_PR_FGD, cv2.GC_PR_BGD))
        return trimap.astype(np.uint8), nearness


class Sam(Segmentation):
    """A mask-generation model of transformers, prompted by the given box, or by an open-vocabulary detector's."""

    def __init__(self, config: SegmentationConfig) -> None:
        from transformers import AutoModelForMaskGeneration, AutoModelForZeroShotObjectDetection, AutoProcessor

        super().__init__()
        self.device = config.device
        self._threshold = config.threshold
        self._processor = AutoProcessor.from_pretrained(config.path)
        self._model = AutoModelForMaskGeneration.from_pretrained(config.path).to(self.device).eval()
        self._detector = None
        if config.detector is not None:
            self._detector_processor = AutoProcessor.from_pretrained(config.detector)
            self._detector = AutoModelForZeroShotObjectDetection.from_pretrained(config.detector).to(self.device).eval()

    @torch.inference_mode()
    def find(self, pixels: Pixels, class_name: str, area: Area | None) -> Mask:
        image = Image.fromarray(pixels)
        if area is not None:
            box = [float(edge) for edge in _in_pixels(area, pixels)]
        elif self._detector is not None:
            box = self._detect(image, class_name)
        else:
            raise Rejected("no box given, and no detector")
        inputs = self._processor(image, input_boxes=[[box]], return_tensors="pt").to(self.device)
        outputs = self._model(**inputs, multimask_output=False)
        sizes = [inputs["original_sizes"].cpu()]
        if "reshaped_input_sizes" in inputs:  # SAM pads to a square, SAM 2 does not
            sizes.append(inputs["reshaped_input_sizes"].cpu())
        (masks,) = self._processor.post_process_masks(outputs.pred_masks.cpu(), *sizes)
        return cast(Mask, masks.reshape(-1, *pixels.shape[:2])[0].numpy().astype(bool))

    def _detect(self, image: Image.Image, class_name: str) -> list[float]:
        assert self._detector is not None
        # Grounding DINO wants lower case and a full stop.
        inputs = self._detector_processor(images=image, text=f"{class_name.lower()}.", return_tensors="pt").to(self.device)
        outputs = self._detector(**inputs)
        (found,) = self._detector_processor.post_process_grounded_object_detection(
            outputs, inputs["input_ids"], threshold=self._threshold, target_sizes=[image.size[::-1]]
        )
        if not len(found["scores"]):
            raise Rejected(f"the detector sees no {class_name}")
        return cast("list[float]", found["boxes"][found["scores"].argmax()].tolist())


def check_rembg(config: SegmentationConfig) -> None:
    """Refuses what rembg does not know, cannot do without prompts, or would send to somebody's server.

    Raises:
        ModuleNotFoundError: it is not installed; names the extra.
        FileNotFoundError, ValueError: no such model.
    """
    for package in ("rembg", "onnxruntime"):
        require_package(package, "segmentation.name=rembg", "rembg")
    from rembg.sessions import sessions_class

    local = {kind.name(): kind for kind in sessions_class if kind.is_local()}
    known = sorted(set(local) - {"sam", "u2net_cloth_seg"})  # of prompts, and of garments one by one
    require(config.model in known, "segmentation.model", config.model, f"one of {', '.join(known)}")
    if config.path is not None and not Path(config.path).is_file():
        raise FileNotFoundError(f"segmentation.path: no such file: {config.path}; expected the .onnx file of a {config.model}")
    if config.path is not None:
        local[config.model].validate_model_path(model_path=config.path)  # rembg reads models from its own folder alone


class Rembg(Segmentation):
    """What rembg removes the background with: U2Net, ISNet, BiRefNet and others. It knows no classes and no boxes."""

    def __init__(self, config: SegmentationConfig) -> None:
        import rembg

        super().__init__()
        self._session = rembg.new_session(config.model, **({} if config.path is None else {"model_path": config.path}))

    def find(self, pixels: Pixels, class_name: str, area: Area | None) -> Mask:
        if area is None:
            return self._opaque(pixels)
        left, top, right, bottom = _in_pixels(area, pixels)
        mask = np.zeros(pixels.shape[:2], bool)
        mask[top:bottom, left:right] = self._opaque(np.ascontiguousarray(pixels[top:bottom, left:right]))
        return mask

    def _opaque(self, pixels: Pixels) -> Mask:
        (opacity,) = self._session.predict(Image.fromarray(pixels))
        return np.asarray(opacity) >= 128
