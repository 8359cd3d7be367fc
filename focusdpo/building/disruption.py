"""The fourth stage: a subject becomes another instance, in place; the prior is what changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from focusdpo.building.blending import (
    Float,
    box_of,
    fill_background,
    grow,
    light_gain,
    move_cutout,
    paste,
    put,
    to_lab,
    to_rgb,
    transfer_colours,
)
from focusdpo.building.candidate import Candidate, Mask, Photo, Pixels, Rejected
from focusdpo.building.encoder import Encoder, on_gray

Change = tuple[Pixels, Mask, dict[str, object]]  # the changed loser, where it may differ, and notes for the pair's meta
LEAST_FIT = 0.5  # intersection over union of a donor and the subject that it replaces


class Disruption:
    """Changes the subjects that a candidate names; a subclass says how.

    Args:
        encoder: compares what comes out with the winner's subject; None does not.
        max_resemblance: largest cosine of the two.
    """

    device = "cpu"

    def __init__(self, encoder: Encoder | None, max_resemblance: float) -> None:
        self._encoder = encoder
        self._max_resemblance = max_resemblance

    def changes(self, candidate: Candidate, number: int, loser: Pixels) -> Iterator[Change]:
        """Ways in which subject `number` becomes another instance, the first one first.

        Yields:
            the loser with the change, uint8 [H, W, 3]; where it may differ, bool [H, W]; and what is noted in the pair's meta.
        """
        raise NotImplementedError

    def __call__(self, candidate: Candidate) -> None:
        assert candidate.scene is not None
        candidate.loser = candidate.scene
        candidate.priors = [np.zeros(candidate.scene.shape[:2], bool) for _ in candidate.subjects]
        notes = [self._change(candidate, number) for number in candidate.changing]
        candidate.notes["disruption"] = notes
        if self._encoder is not None:
            candidate.notes["resemblance"] = max(note["resemblance"] for note in notes)

    def _change(self, candidate: Candidate, number: int) -> dict[str, Any]:
        """Changes a subject in the first way after which one does not see it any more; returns the note."""
        assert candidate.scene is not None and candidate.loser is not None
        before, tried = candidate.loser, False
        for pixels, region, note in self.changes(candidate, number, before):
            after = np.where(region[..., None], pixels, before)
            prior = _closed((after != before).any(axis=-1))
            resemblance = {}
            if self._encoder is not None:
                shown = on_gray(candidate.scene, candidate.subjects[number].region), on_gray(after, prior)
                one, other = self._encoder.embed(shown)
                resemblance["resemblance"] = round(float(one @ other), 3)
                tried = True
                if one @ other > self._max_resemblance:
                    continue
            candidate.loser, candidate.priors[number] = after, prior
            return {"subject": number, **note, **resemblance}
        if tried:
            raise Rejected("the loser still shows the winner's subject")
        raise Rejected(f"nothing to disrupt with: {', '.join(sorted(candidate.kinds[number]))} does not apply")


def _closed(changed: Mask) -> Mask:
    """The changed pixels as a region: gaps that one would not see are part of it."""
    return grow(grow(changed, 3), -3) | changed


class Embedded(Disruption):
    """Disruptions without weights: another instance from a photo, turned hues, a pattern, another subject's colours."""

    def changes(self, candidate: Candidate, number: int, loser: Pixels) -> Iterator[Change]:
        rng, mask = candidate.rng(f"disruption {number}"), candidate.subjects[number].region

        def painted(pixels: Pixels) -> Change:
            return paste(loser, pixels, mask, edge=3), mask, {}

        ways: dict[str, Callable[[], Change | None]] = {
            "swap": lambda: self._swap(candidate, number, loser),
            "recolour": lambda: painted(recolour(loser, rng)),
            "retexture": lambda: painted(retexture(loser, mask, rng)),
            "leak": lambda: self._leak(candidate, number, loser, rng),
        }
        for kind in candidate.kinds[number]:
            changed = ways[kind]()
            if changed is not None:
                pixels, region, note = changed
                yield pixels, region, {"kind": kind, **note}

    def _leak(self, candidate: Candidate, number: int, loser: Pixels, rng: np.random.Generator) -> Change | None:
        others = [index for index in range(len(candidate.subjects)) if index != number]
        if not others:
            return None
        other = int(rng.choice(others))
        mask, reference = candidate.subjects[number].region, candidate.references[other]
        painted = transfer_colours(loser, mask, reference.pixels, reference.region)
        return paste(loser, painted, mask, edge=3), mask, {"from": other}

    def _swap(self, candidate: Candidate, number: int, loser: Pixels) -> Change | None:
        mask = candidate.subjects[number].region
        others = np.zeros_like(mask)
        for index in range(len(candidate.subjects)):
            if index != number:
                others |= candidate.subjects[index].region | candidate.priors[index]
        # What does not cover the subject leaves a hole, of which a background is needed.
        least = LEAST_FIT if candidate.background is None else 0.0
        fits = [fit for donor in candidate.donors.get(number, []) if (fit := fit_donor(donor, mask, least)) is not None]
        if not fits:
            return None
        score, donor, pixels, inside = max(fits, key=lambda fit: fit[0])
        inside &= ~others
        if not inside.any():
            return None
        pixels = relight(pixels, inside, loser, mask | others, donor)
        # The old outline's soft edge belongs to the old subject: a fill that touched it would take its colours on.
        edge = max(4, round(0.03 * np.sqrt(mask.sum())))
        gone = grow(mask, edge) & ~others
        if candidate.background is None:
            filled = fill_background(loser, gone, mask | others)
        else:  # which tells how far the edge reaches
            gone |= (loser != candidate.background).any(axis=-1) & grow(mask, 4 * edge) & ~grow(others, edge)
            filled = np.where(gone[..., None], candidate.background, loser)
        swapped = put(filled, pixels, inside)
        return swapped, gone | inside, {"donor": donor.subject.name, "donor_photo": photo_of(donor), "fit": round(score, 3)}


def photo_of(donor: Photo) -> str:
    """A donor's photo, as the meta of composed scenes names photos: a cut-out's is stored under its name and .png."""
    image = donor.view.image
    name = image.name.removesuffix(".png") if Path(image.stem).suffix else image.name
    return f"{donor.subject.name}/{name}"


def fit_donor(donor: Photo, mask: Mask, least: float = LEAST_FIT) -> tuple[float, Photo, Pixels, Mask] | None:
    """Puts a donor's cut-out where the subject is, in the size and mirroring that covers it best.

    Returns:
        how well it covers (intersection over union), the donor, its pixels [H, W, 3] and its mask [H, W] in the scene; None
        where it does not fit: it is cut off by its photo where the subject is not, is too small, or covers less than `least`.
    """
    if not donor.region.any() or not cut_edges(donor.region) <= cut_edges(mask):
        return None
    rows, columns = box_of(donor.region)
    cutout, shape = donor.pixels[rows, columns], donor.region[rows, columns].astype(np.float32)
    place_rows, place_columns = box_of(mask)
    height, width = mask.shape
    bottom, middle = place_rows.stop, (place_columns.start + place_columns.stop) / 2
    base = float(np.sqrt(mask.sum() / shape.sum()))
    if base > 2.0:
        return None
    coarse = 96 / max(height, width)
    small_mask = cv2.resize(mask.astype(np.float32), None, fx=coarse, fy=coarse, interpolation=cv2.INTER_AREA) > 0.5
    best: tuple[float, Float] | None = None
    for flip, factor, stretch, shift in product((False, True), (0.9, 1.0, 1.1, 1.2), (0.92, 1.0, 1.08), (-0.08, 0.0, 0.08)):
        scale_x, scale_y = base * factor * stretch, base * factor / stretch
        left = middle - scale_x * shape.shape[1] / 2 + shift * width
        top = bottom - scale_y * shape.shape[0]
        move = np.array([[scale_x, 0, left], [0, scale_y, top]], np.float32)
        if flip:
            move = move @ np.array([[-1, 0, shape.shape[1] - 1], [0, 1, 0], [0, 0, 1]], np.float32)
        reduce = np.diag([coarse, coarse]).astype(np.float32)
        there = cv2.warpAffine(shape, reduce @ move, small_mask.shape[::-1]) > 0.5
        shared = float((there & small_mask).sum())
        # With what lies outside of the scene: a subject that is cut off fits less.
        area = float(shape.sum()) * scale_x * scale_y * coarse**2
        score = shared / (area + float(small_mask.sum()) - shared)
        if best is None or score > best[0]:
            best = score, move
    assert best is not None
    score, move = best
    if score < least:
        return None
    pixels, inside = move_cutout(cutout, donor.region[rows, columns], move, (width, height))
    return score, donor, pixels, inside


def cut_edges(mask: Mask) -> set[str]:
    """The image's edges that cut a subject off: where a tenth of its extent lies on them."""
    extent = 0.1 * np.sqrt(mask.sum())
    near = max(1, round(0.01 * max(mask.shape)))
    edges = {
        "top": mask[:near].any(0),
        "bottom": mask[-near:].any(0),
        "left": mask[:, :near].any(1),
        "right": mask[:, -near:].any(1),
    }
    return {name for name, touched in edges.items() if touched.sum() > extent}


def relight(pixels: Pixels, inside: Mask, scene: Pixels, subjects: Mask, donor: Photo) -> Pixels:
    """A donor in the scene's light: its lightness moves half of the way that the two backgrounds are apart."""
    if subjects.all() or donor.region.all():
        return pixels
    lab = to_lab(pixels)
    lab[..., 0] = np.clip(lab[..., 0] * light_gain(donor.pixels[~donor.region][None], scene[~subjects][None]), 0, 100)
    return to_rgb(lab)


def recolour(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """The hues turned by a quarter to three quarters of the circle; what is gray takes on a tint. The lightness stays."""
    lab = to_lab(pixels)
    angle, tint = rng.uniform(0.5 * np.pi, 1.5 * np.pi), rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], np.float32)
    turned = lab[..., 1:] @ turn.T
    chroma = np.linalg.norm(turned, axis=-1, keepdims=True)
    colour = np.array([np.cos(tint), np.sin(tint)], np.float32) * 28
    # Black and white hold no colour; in between a gray part takes most.
    room = np.clip(4 * (lab[..., :1] / 100) * (1 - lab[..., :1] / 100), 0.25, 1)
    lab[..., 1:] = turned + colour * room * np.exp(-((chroma / 15) ** 2))
    return to_rgb(lab)


def retexture(pixels: Pixels, mask: Mask, rng: np.random.Generator) -> Pixels:
    """A pattern of its own, stripes or blotches in another colour, under the subject's own shading."""
    height, width = mask.shape
    extent = float(np.sqrt(mask.sum()))
    angle, period = rng.uniform(0, np.pi), extent * rng.uniform(0.08, 0.16)
    noise = rng.standard_normal((height, width)).astype(np.float32)
    if rng.random() < 0.5:  # stripes, bent
        y, x = np.mgrid[:height, :width].astype(np.float32)
        bend = cv2.GaussianBlur(noise, (0, 0), extent / 10)
        bend *= 0.35 * period / max(float(bend.std()), 1e-6)
        wave = np.sin(2 * np.pi * (np.cos(angle) * x + np.sin(angle) * y + bend) / period)
    else:  # blotches
        wave = cv2.GaussianBlur(noise, (0, 0), period / 6) - cv2.GaussianBlur(noise, (0, 0), period / 3)
        wave = wave / max(float(wave.std()), 1e-6) - 0.3
    share = 0.1 + 0.75 / (1 + np.exp(-4 * wave))[..., None]
    lab = to_lab(pixels)
    hue = rng.uniform(0, 2 * np.pi)
    colour = np.array([np.cos(hue), np.sin(hue)], np.float32) * 45
    level = lab[..., :1][mask].mean()
    painted = np.concatenate([lab[..., :1] + (25 if level < 50 else -25), np.broadcast_to(colour, lab[..., 1:].shape)], axis=-1)
    return to_rgb(((1 - share) * lab + share * painted).astype(np.float32))
