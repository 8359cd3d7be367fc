"""Pasting without seams: a matte for the outline, Poisson blending for the light, real texture for what is uncovered."""

from __future__ import annotations

from typing import cast

import cv2
import numpy as np
from numpy.typing import NDArray

from focusdpo.building.candidate import Mask, Pixels

Float = NDArray[np.float32]


def grow(mask: Mask, pixels: int) -> Mask:
    """The mask with a border of `pixels` more, or fewer where negative; the image's edge is no outline."""
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * abs(pixels) + 1,) * 2)
    change = cv2.dilate if pixels > 0 else cv2.erode
    padded = cv2.copyMakeBorder(mask.astype(np.uint8), *(abs(pixels),) * 4, cv2.BORDER_REPLICATE)
    changed = change(padded, disc).astype(bool)
    inner = slice(abs(pixels), -abs(pixels) or None)
    return cast(Mask, changed[inner, inner])


def box_of(mask: Mask, margin: int = 0) -> tuple[slice, slice]:
    """Rows and columns of the mask's bounding box and `margin` pixels around it, within the image."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return (
        slice(max(int(rows[0]) - margin, 0), int(rows[-1]) + 1 + margin),
        slice(max(int(columns[0]) - margin, 0), int(columns[-1]) + 1 + margin),
    )


def matte(mask: Mask, width: float) -> Float:
    """Opacity [H, W] in [0, 1]: the mask with an edge about `width` pixels wide, 0 outside of the mask."""
    inside = cv2.distanceTransform(cv2.copyMakeBorder(mask.astype(np.uint8), *(1,) * 4, cv2.BORDER_REPLICATE), cv2.DIST_L2, 3)
    share: Float = np.clip(inside[1:-1, 1:-1] / (width + 1), 0, 1)
    return np.where(mask, share * share * (3 - 2 * share), 0).astype(np.float32)


def paste(scene: Pixels, patch: Pixels, mask: Mask, edge: float) -> Pixels:
    """`patch` within the mask, with a soft edge; pixels outside the mask are the scene's own.

    Args:
        scene, patch: uint8 [H, W, 3].
        mask: bool [H, W].
        edge: width of the transition in pixels.
    """
    opacity = matte(mask, edge)[..., None]
    mixed = opacity * patch + (1 - opacity) * scene
    return np.where(mask[..., None], np.round(mixed).astype(np.uint8), scene)


def poisson(scene: Pixels, patch: Pixels, mask: Mask, reach: float | None = None) -> Pixels:
    """`patch` within the mask, with its colours bent to meet the scene's at the outline (Poisson blending).

    Args:
        scene, patch: uint8 [H, W, 3].
        mask: bool [H, W].
        reach: pixels from the outline over which the bending fades, so that what is pasted keeps its own colours; None: never.
    """
    if not mask.any():
        return scene
    rows, columns = box_of(mask, 3)
    # OpenCV solves over the mask's bounding box, and needs a rim around it.
    rim = 3
    target, source = (cv2.copyMakeBorder(image[rows, columns], *(rim,) * 4, cv2.BORDER_REPLICATE) for image in (scene, patch))
    inside = cv2.copyMakeBorder(mask[rows, columns].astype(np.uint8) * 255, *(rim,) * 4, cv2.BORDER_CONSTANT)
    left, top, width, height = cv2.boundingRect(inside)
    cloned = cv2.seamlessClone(source, target, inside, (left + width // 2, top + height // 2), cv2.NORMAL_CLONE)
    bent = scene.copy()
    bent[rows, columns] = cloned[rim:-rim, rim:-rim]
    if reach is not None:
        distance = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 3)[..., None]
        share = np.exp(-distance / reach)
        bent = np.round(share * bent + (1 - share) * patch).astype(np.uint8)
    return np.where(mask[..., None], bent, scene)


def fill_background(scene: Pixels, hole: Mask, blocked: Mask) -> Pixels:
    """The hole filled with a shifted part of the scene's own background, the one that agrees best around the hole.

    Args:
        scene: uint8 [H, W, 3].
        hole: bool [H, W], what to fill.
        blocked: bool [H, W], what shows no background either, such as the subjects.
    """
    if not hole.any():
        return scene
    height, width = hole.shape
    scale = min(96 / max(height, width), 1.0)
    size = (max(round(width * scale), 8), max(round(height * scale), 8))
    small = cv2.resize(scene, size, interpolation=cv2.INTER_AREA)
    small_hole = cv2.resize(hole.astype(np.float32), size, interpolation=cv2.INTER_AREA) > 0
    small_blocked = (cv2.resize(blocked.astype(np.float32), size, interpolation=cv2.INTER_AREA) > 0.1) | small_hole
    smooth = cv2.inpaint(small, small_blocked.astype(np.uint8), 3, cv2.INPAINT_TELEA)
    without = np.where(small_blocked[..., None], smooth, small)

    rows, columns = box_of(small_hole, 4)
    part = small_hole[rows, columns]
    ring = (~small_blocked[rows, columns]).astype(np.float32)
    ring *= grow(part, 4)
    top, left = rows.start, columns.start
    colours = without.astype(np.float32)
    rings = np.repeat(ring[..., None], 3, axis=2)
    cost = cv2.matchTemplate(colours, colours[rows, columns], cv2.TM_SQDIFF, mask=rings) / max(rings.sum(), 1)
    taken = cv2.matchTemplate(small_blocked.astype(np.float32), part.astype(np.float32), cv2.TM_CCORR) / part.sum()
    near = np.hypot(*np.meshgrid(np.arange(cost.shape[1]) - left, np.arange(cost.shape[0]) - top)) / max(size)
    # What is filled from a smoothed part shows no texture: worse than colours that are off by some levels.
    best = np.unravel_index(np.argmin(cost + 60.0**2 * taken + 100 * near), cost.shape)
    shift_y, shift_x = round((best[0] - top) / scale), round((best[1] - left) / scale)

    whole = np.where(blocked[..., None] | hole[..., None], cv2.resize(without, (width, height)), scene)
    move = np.array([[1, 0, -shift_x], [0, 1, -shift_y]], np.float32)
    patch = cv2.warpAffine(whole, move, (width, height), borderMode=cv2.BORDER_REFLECT)
    return poisson(scene, patch, hole)


def move_cutout(cutout: Pixels, shape: Mask, move: NDArray[np.float32], size: tuple[int, int]) -> tuple[Pixels, Mask]:
    """A cut-out brought into a scene.

    Args:
        cutout: uint8 [h, w, 3]. shape: bool [h, w].
        move: affine map from the cut-out's pixels to the scene's, [2, 3].
        size: width and height of the scene.

    Returns:
        its pixels [H, W, 3], continued outside of it, and its mask [H, W].
    """
    scale = float(np.sqrt(abs(np.linalg.det(move[:, :2]))))
    # A photo reduced without averaging would be sharper than the scene.
    softened = cv2.GaussianBlur(cutout, (0, 0), 0.5 / scale - 0.5) if scale < 0.8 else cutout
    pixels = cv2.warpAffine(softened, move, size, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    inside = cv2.warpAffine(shape.astype(np.float32), move, size, flags=cv2.INTER_LINEAR) > 0.5
    return pixels, grow(inside, -1)  # the outermost pixels still show the cut-out's own background


def put(scene: Pixels, pixels: Pixels, inside: Mask) -> Pixels:
    """A cut-out in its place, its outline blended."""
    return paste(scene, poisson(scene, pixels, inside, reach=2.0), inside, edge=1.5)


def transfer_colours(patch: Pixels, inside: Mask, like: Pixels, like_inside: Mask) -> Pixels:
    """The patch in the other's colours: the linear map between their Lab means and covariances that moves colours least.

    Args:
        patch, like: uint8 images. inside, like_inside: which pixels count.
    """
    lab = to_lab(patch)
    own = lab[inside].astype(np.float64)
    other = to_lab(like)[like_inside].astype(np.float64)
    a, b = (np.cov(values.T) + 4.0 * np.eye(3) for values in (own, other))  # no direction is quite flat
    root, inverse = _power(a, 0.5), _power(a, -0.5)
    matrix = inverse @ _power(root @ b @ root, 0.5) @ inverse
    moved = (lab - own.mean(0)) @ matrix.T + other.mean(0)
    return to_rgb(moved.astype(np.float32))


def _power(matrix: NDArray[np.float64], exponent: float) -> NDArray[np.float64]:
    values, vectors = np.linalg.eigh(matrix)
    return cast("NDArray[np.float64]", (vectors * np.maximum(values, 1e-9) ** exponent) @ vectors.T)


def to_lab(pixels: Pixels) -> Float:
    """CIE Lab [H, W, 3], L in [0, 100]."""
    return cast(Float, cv2.cvtColor(pixels.astype(np.float32) / 255, cv2.COLOR_RGB2LAB))


def to_rgb(lab: Float) -> Pixels:
    """Lab back to uint8 RGB."""
    return np.round(np.clip(cv2.cvtColor(lab, cv2.COLOR_LAB2RGB), 0, 1) * 255).astype(np.uint8)


def light_gain(there: Pixels, here: Pixels) -> float:
    """What a subject's lightness is multiplied by when it moves from before one background to another: half of the way."""
    old, new = (float(to_lab(pixels)[..., 0].mean()) for pixels in (there, here))
    return float(np.clip(np.sqrt((new + 5) / (old + 5)), 0.75, 1.15))
