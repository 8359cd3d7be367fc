"""Subjects cut out of photos: a mask for each photo of a subject, and whether that mask can be trusted.

What the photos of a subject have in common is the subject: cell by cell an encoder tells where a photo looks like its other
photos, which is where GrabCut starts, and whether what a mask marks looks like the others' cut-outs, or like a background.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from focusdpo.building.blending import box_of, grow, matte
from focusdpo.building.candidate import Mask, Pixels, Rejected
from focusdpo.building.config import CutOutsConfig
from focusdpo.building.disruption import cut_edges
from focusdpo.building.encoder import GRID, EfficientNetLite0, Encoder, Float, on_gray, shares
from focusdpo.building.segmentation import GrabCut, Segmentation
from focusdpo.data.images import read_image

SIDE = 512  # of a photo, where nothing else is asked for
EDGE = 1.5  # pixels over which a cut-out's outline fades
BARS = 6.0  # levels by which the pixels of a letterbox's bar differ at most, as a photo's noise and JPEG make them
BLURRED = 2  # lines at most in which JPEG mixes a bar and what is beside it
LEAST_PICTURE = 0.25  # share of a letterboxed photo that is between its bars
INSIDE, OUTSIDE = 0.6, 0.1  # shares of a cell from which it belongs to a subject, and up to which to the background
AROUND = 4  # cells from a mask within which a part of its subject may have been left out
NEAREST = 3  # cells of another photo that a cell is compared with
WHOLE = 0.99  # share of a cell from which a mask covers it wholly
UNLIKE = -0.05  # how much more such a cell looks like background than like the subject where it is taken out
ROUNDS = 2  # of guided segmentation, each with what the last has found
SAME = 8  # bits of 64 by which two perceptual hashes of one photo differ at most


@dataclass
class CutOut:
    """A subject's photo without its bars, and what is known of its mask.

    Attributes:
        name, class_name, file: of the subject, and of its photo.
        pixels: uint8 [H, W, 3]. mask: bool [H, W].
        scores: by the names of the settings that have the thresholds.
        refused: why it is not to be used; None where nothing speaks against it.
    """

    name: str
    class_name: str
    file: Path
    pixels: Pixels
    mask: Mask
    scores: dict[str, float] = field(default_factory=dict)
    refused: str | None = None

    def rgba(self) -> Image.Image:
        """The subject alone, cut to its outline."""
        inner = grow(self.mask, -1)  # the outermost pixels show the background as well
        rows, columns = box_of(inner if inner.any() else self.mask)
        alpha = (matte(inner, EDGE) * 255).round().astype(np.uint8)
        return Image.fromarray(np.dstack([self.pixels, alpha])[rows, columns])

    @property
    def is_grounded(self) -> bool:
        """Whether the photo cuts the subject off at the bottom."""
        return "bottom" in cut_edges(self.mask)


def read_photo(file: Path, longest: int) -> Pixels:
    """A photo without the bars of a letterbox, its longest side of `longest` pixels at most."""
    image = read_image(file)
    rows, columns = without_bars(np.asarray(image))
    image = image.crop((columns.start, rows.start, columns.stop, rows.stop))
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return np.asarray(image)


def without_bars(pixels: Pixels) -> tuple[slice, slice]:
    """Rows and columns within the bars of one colour that lie along two opposite edges; all where there are none."""
    kept = []
    for axis in (0, 1):
        lines = np.moveaxis(pixels.astype(np.int16), axis, 0)
        plain = (lines.max(axis=1) - lines.min(axis=1)).max(axis=-1) <= BARS
        size, first, after = len(plain), int(np.argmin(plain)), int(np.argmin(plain[::-1]))
        start = stop = 0
        if min(first, after) >= max(2, 0.02 * size):  # a bar has its like on the other side
            start, stop = _end(lines, first), _end(lines[::-1], after)
        is_picture = start and stop and size - start - stop >= LEAST_PICTURE * size
        kept.append(slice(start, size - stop) if is_picture else slice(0, size))
    return kept[0], kept[1]


def _end(lines: NDArray[np.int16], first: int) -> int:
    """Where a bar ends in lines of pixels [N, M, 3], the first that is not plain or shortly after; 0 where it fades.

    A bar ends along its whole length at once, as a plain wall or sky does not.
    """
    for line in range(first, min(first + BLURRED, len(lines) - 1) + 1):
        differs = np.abs(lines[line] - lines[first - 1]).max(axis=-1) > BARS
        # All along it, where something lies on a plain background the line's ends are background.
        if all(part.mean() > 0.5 for part in (differs, *np.array_split(differs, 10)[::9])):
            return line
    return 0


class Cutter:
    """Cuts a subject out of all of its photos, and says which cut-outs can be trusted.

    Args:
        segmentation: finds the masks; GrabCut is told by the encoder where to look.
        encoder: compares the photos.
        config: thresholds.
        longest: pixels of a photo's longest side.
    """

    def __init__(self, segmentation: Segmentation, encoder: Encoder, config: CutOutsConfig, longest: int) -> None:
        self._segmentation = segmentation
        self._encoder = encoder
        self._config = config
        self._longest = longest

    def cut(self, name: str, class_name: str, files: Sequence[Path]) -> list[CutOut]:
        """A subject's cut-outs, one a photo.

        Args:
            name, class_name: of the subject.
            files: its photos, in order.
        """
        photos = [read_photo(file, self._longest) for file in files]
        grids = [self._encoder.grid(pixels) for pixels in photos]
        masks, failures = self._masks(photos, grids, class_name)
        found = [CutOut(name, class_name, *item) for item in zip(files, photos, masks, strict=True)]
        for one, failure in zip(found, failures, strict=True):
            one.refused = failure
        _refuse_copies(found)
        self._score(found, grids)
        for one in found:
            one.refused = one.refused or self._verdict(one)
        return found

    def _masks(self, photos: Sequence[Pixels], grids: Sequence[Float], class_name: str) -> tuple[list[Mask], list[str | None]]:
        """A mask of each photo, empty where the segmentation finds none, and why it does not."""
        tried = [self._find(partial(self._segmentation.find, pixels, class_name, None), pixels) for pixels in photos]
        if isinstance(self._segmentation, GrabCut) and len(photos) > 1:
            masks = self._likeliest(self._segmentation, photos, grids, [mask for mask, _ in tried])
            tried = [(mask, None if mask.any() else failure) for mask, (_, failure) in zip(masks, tried, strict=True)]
        return [mask for mask, _ in tried], [failure for _, failure in tried]

    def _likeliest(
        self, grabcut: GrabCut, photos: Sequence[Pixels], grids: Sequence[Float], alone: Sequence[Mask]
    ) -> list[Mask]:
        """Of what GrabCut finds from several starts the mask of each photo that agrees best with the subject's other photos.

        Args:
            grabcut: the segmentation.
            photos, grids: of the subject.
            alone: what GrabCut finds in each photo by itself.
        """

        def guided(index: int, likely: Float) -> Mask:
            work = partial(grabcut.find_likely, photos[index], likely.reshape(GRID, GRID))
            return self._find(work, photos[index])[0]

        def trimmed(index: int, likely: Float, covered: Float) -> list[Mask]:
            # Cells along the outline look like both sides; only one that is covered as a whole can be background for certain.
            cut = partial(grabcut.trim, photos[index], chosen[index], likely.reshape(GRID, GRID))
            unlike = ((likely < UNLIKE) & (covered > WHOLE)).reshape(GRID, GRID)
            return [self._find(partial(cut, gone), photos[index])[0] for gone in (np.zeros_like(unlike), unlike)]

        chosen = [guided(index, common(grids, index)) for index in range(len(photos))]
        candidates = [[first, second] for first, second in zip(chosen, alone, strict=True)]
        for _ in range(ROUNDS):
            covered = [shares(mask) for mask in chosen]
            for index, grid in enumerate(grids):
                # Of three one bad mask must not cut the others down to what it shows; the verdict does count it.
                subject, others = likeness(grids, covered, index, enough=3)
                likely = subject - np.maximum(others, own_background(grid, covered[index]))
                candidates[index] += [guided(index, likely), *trimmed(index, likely, covered[index])]
                fits = [self._fit(mask, grid, subject, others) for mask in candidates[index]]
                chosen[index] = candidates[index][int(np.argmax(fits))]
        return chosen

    def _fit(self, mask: Mask, grid: Float, subject: Float, others: Float) -> float:
        if not self._config.min_area <= mask.mean() <= self._config.max_area:
            return -np.inf
        return -doubt(cell_scores(grid, shares(mask), subject, others))

    def _find(self, find: Callable[[], Mask], pixels: Pixels) -> tuple[Mask, str | None]:
        """What a segmentation finds, empty where that is nothing, and why it is nothing."""
        try:
            mask = find()
        except Rejected as reason:
            return np.zeros(pixels.shape[:2], bool), str(reason)
        return mask, None if mask.any() else "the segmentation finds nothing"

    def _score(self, found: Sequence[CutOut], grids: Sequence[Float]) -> None:
        """Compares each cut-out with the subject's others that are there."""
        there = [index for index, one in enumerate(found) if one.refused is None]
        if not there:
            return
        alone = self._encoder.embed([on_gray(found[i].pixels, found[i].mask) for i in there])
        cosines = alone @ alone.T
        covered = [shares(found[i].mask) for i in there]
        agreements = [float(np.median(np.delete(row, place))) for place, row in enumerate(cosines)] if len(there) > 1 else []
        for place, index in enumerate(there):
            one = found[index]
            one.scores["area"] = float(one.mask.mean())
            if agreements:
                subject, others = likeness([grids[i] for i in there], covered, place)
                one.scores |= {"agreement": agreements[place], **cell_scores(grids[index], covered[place], subject, others)}
                shortfall = max(float(np.median(agreements)) - agreements[place], 0.0)
                one.scores["doubt"] = shortfall + doubt(one.scores)

    def _verdict(self, one: CutOut) -> str | None:
        """Everything that speaks against a cut-out; None where nothing does."""
        config, scores = self._config, one.scores
        if "agreement" not in scores:
            return "no other cut-out of this subject to compare it with"
        faults = []
        if scores["area"] < config.min_area:
            faults.append(f"the mask covers {scores['area']:.1%} of the photo, under min_area={config.min_area:g}")
        if scores["area"] > config.max_area:
            faults.append(f"the mask covers {scores['area']:.0%} of the photo, over max_area={config.max_area:g}")
        if scores["agreement"] < config.min_agreement:
            fault = "does not look like the subject's other cut-outs"
            faults.append(f"{fault}: agreement {scores['agreement']:.2f}, under {config.min_agreement:g}")
        if scores["doubt"] > config.max_doubt:
            faults.append(
                f"a part of it looks like background, or unlike the subject: doubt {scores['doubt']:.2f}, over "
                f"{config.max_doubt:g}"
            )
        if scores["missing"] > config.max_missing:
            faults.append(f"a part of the subject seems left out: missing {scores['missing']:.2f}, over {config.max_missing:g}")
        return "; ".join(faults) or None


def cell_scores(grid: Float, covered: Float, subject: Float, others: Float) -> dict[str, float]:
    """How well a mask agrees with what the cells in it, and around it, look like.

    Args:
        grid: of the photo, [GRID * GRID, C].
        covered: which part of each cell the mask covers.
        subject, others: as `likeness` has them.
    """
    inside, outside = covered > INSIDE, covered < OUTSIDE
    if not inside.any():
        return {"purity": -1.0, "missing": 0.0}
    around = grow(inside.reshape(GRID, GRID), AROUND).ravel() & outside
    purity = np.quantile((subject - np.maximum(others, own_background(grid, covered)))[inside], 0.1)
    edge = grid[_border() & outside]
    if len(edge) > NEAREST:  # a background may look like nothing in the others, and still be one from edge to edge
        others = np.maximum(others, _nearest(grid, edge))
    return {"purity": float(purity), "missing": float((subject > others)[around].sum() / inside.sum())}


def doubt(scores: Mapping[str, float]) -> float:
    """What the cells in and around a mask say against it: two weak signs, added up, are one that counts."""
    return scores["missing"] - scores["purity"]


def default_cutter() -> Cutter:
    """What needs no model beside those of its packages: GrabCut, and EfficientNet-Lite0 to judge."""
    return Cutter(GrabCut(), EfficientNetLite0("cpu"), CutOutsConfig(), SIDE)


def _refuse_copies(found: Sequence[CutOut]) -> None:
    """Of photos that are one photo, mirrored or not, the first stays: the other as its reference would be no other view."""
    hashes = [
        [imagehash.phash(image) for image in (Image.fromarray(one.pixels), ImageOps.mirror(Image.fromarray(one.pixels)))]
        for one in found
    ]
    for index, one in enumerate(found):
        for other in range(index):
            for mirrored in (0, 1):
                if found[other].refused is None and hashes[index][0] - hashes[other][mirrored] <= SAME:
                    one.refused = f"is {found[other].file.name}{' mirrored' if mirrored else ''} once more"


def common(grids: Sequence[Float], index: int) -> Float:
    """How much each cell of a photo looks like something in the subject's other photos, and not like its own border.

    Args:
        grids: of the subject's photos, each [GRID * GRID, C] with rows of length 1.
        index: of the photo.

    Returns:
        float [GRID * GRID].
    """
    own = grids[index]
    others = [_nearest(own, grid) for other, grid in enumerate(grids) if other != index]
    return np.mean(others, axis=0) - 0.5 * _nearest(own, own[_border()], 5)


def likeness(grids: Sequence[Float], covered: Sequence[Float], index: int, enough: int = 4) -> tuple[Float, Float]:
    """What each cell of a photo looks like, as the subject's other photos tell.

    Args:
        grids: of the subject's photos, each [GRID * GRID, C] with rows of length 1.
        covered: which part of each cell the photo's mask covers, as `shares` has it.
        index: of the photo.
        enough: backgrounds from which two have to agree.

    Returns:
        mean cosines with the nearest cells, each [GRID * GRID]: of the other cut-outs their median, of the backgrounds around
        them the largest, or the second where there are enough.
    """
    own = grids[index]
    subjects, backgrounds = [np.full(len(own), -1, np.float32)], [np.full(len(own), -1, np.float32)]
    for other, (grid, share) in enumerate(zip(grids, covered, strict=True)):
        if other != index:
            if (share < OUTSIDE).sum() > NEAREST:
                backgrounds.append(_nearest(own, grid[share < OUTSIDE]))
            if (share > INSIDE).any():
                subjects.append(_nearest(own, grid[share > INSIDE]))
    # A mask that leaves out a part of the subject would make a background of it.
    place = -2 if len(backgrounds) > enough else -1
    return np.median(subjects[1:] or subjects, axis=0), np.sort(backgrounds, axis=0)[place]


def own_background(grid: Float, covered: Float) -> Float:
    """Mean cosine of each cell of a photo with the nearest of those that its mask leaves out, [GRID * GRID]."""
    outside = grid[covered < OUTSIDE]
    # A cell is nearest to itself.
    return _nearest(grid, outside, skip=True) if len(outside) > NEAREST else np.full(len(grid), -1, np.float32)


def _nearest(cells: Float, others: Float, count: int = NEAREST, skip: bool = False) -> Float:
    """Mean cosine of each cell with the `count` nearest of the others, or with those after the very nearest."""
    cosines = cells @ others.T
    nearest = min(skip + count, cosines.shape[1])
    largest = np.partition(cosines, -nearest, axis=1)[:, -nearest:]
    return (largest.sum(axis=1) - (largest.max(axis=1) if skip else 0)) / (nearest - skip)


def _border() -> NDArray[np.bool_]:
    """Cells along a photo's edges, but where subjects are cut off at the bottom."""
    edge = np.zeros((GRID, GRID), bool)
    edge[:2] = edge[:, :2] = edge[:, -2:] = True
    edge[-2:, : GRID // 5] = edge[-2:, -(GRID // 5) :] = True
    return edge.ravel()
