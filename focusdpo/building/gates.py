"""The fifth stage: what a pair must be like; and which pairs are the same, once all are there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise

import imagehash
import numpy as np
from PIL import Image

from focusdpo.building.blending import box_of, to_lab
from focusdpo.building.candidate import Candidate, Mask, Pixels, Rejected
from focusdpo.building.config import EncoderConfig, GatesConfig
from focusdpo.building.encoder import load_encoder

SEEN = 5.0  # distance of two colours in Lab (CIE76) from which one sees it in a picture
LEAST_CHANGE = {"lab": 8.0, "features": 0.05}  # below which a change counts as not visible, by how it is measured


def lab_distance(winner: Pixels, loser: Pixels, changed: Mask) -> float:
    """Mean colour distance within the changed region, CIE76."""
    return float(np.linalg.norm(to_lab(winner) - to_lab(loser), axis=-1)[changed].mean())


def changed_share(winner: Pixels, loser: Pixels, prior: Mask) -> float:
    """Share of a prior's pixels in which one sees a difference of colour."""
    return float((np.linalg.norm(to_lab(winner) - to_lab(loser), axis=-1)[prior] > SEEN).mean())


class Gates:
    """Lets a candidate pass, or says why not.

    Args:
        config: thresholds.
        encoder: what sees the change, with visibility="features".
    """

    def __init__(self, config: GatesConfig, encoder: EncoderConfig) -> None:
        self._config = config
        self.device = encoder.device
        self._encoder = load_encoder(encoder) if config.visibility == "features" else None
        self._minimum = LEAST_CHANGE[config.visibility] if config.min_change is None else config.min_change

    def __call__(self, candidate: Candidate) -> None:
        winner, loser = candidate.scene, candidate.loser
        assert winner is not None and loser is not None
        changed = np.logical_or.reduce(candidate.priors)
        if ((winner != loser).any(axis=-1) & ~changed).any():
            raise Rejected("pixels outside the prior changed")
        area = float(changed.mean())
        if area < self._config.min_area:
            raise Rejected("the change is too small")
        if area > self._config.max_area:
            raise Rejected("the change is too large")
        distance = self._distance(winner, loser, changed)
        if not distance >= self._minimum:
            raise Rejected("the change is not visible")
        shares = [changed_share(winner, loser, candidate.priors[number]) for number in candidate.changing]
        if min(shares) < self._config.min_changed:
            raise Rejected("much of a prior looks the same in winner and loser")
        candidate.notes |= {"area": round(area, 4), "change": round(distance, 3), "changed": round(min(shares), 3)}

    def _distance(self, winner: Pixels, loser: Pixels, changed: Mask) -> float:
        if self._config.visibility == "lab":
            return lab_distance(winner, loser, changed)
        assert self._encoder is not None  # as the settings check
        one, other = self._encoder.embed([winner[box_of(changed)], loser[box_of(changed)]])
        return float(1 - one @ other)


def pair_hash(winner: Pixels, loser: Pixels, changed: Mask) -> str:
    """Perceptual hash of a pair, in hexadecimal: winner and loser, and the colours of the changed region."""
    crop = Image.fromarray(loser[box_of(changed)])
    bits = [imagehash.phash(Image.fromarray(winner)), imagehash.phash(Image.fromarray(loser)), imagehash.colorhash(crop)]
    return np.packbits(np.concatenate([part.hash.ravel() for part in bits])).tobytes().hex()


def duplicates(hashes: Iterable[tuple[str, str]], distance: int) -> Iterator[tuple[str, str]]:
    """Pairs that are fewer than `distance` bits from an earlier one that is none itself, exactly.

    Args:
        hashes: name and `pair_hash` of each pair, in order.
        distance: in bits.

    Yields:
        name of the duplicate, name of the earlier one.
    """
    if not distance:
        return
    # Of `distance` pieces at least one is the same where fewer bits than that differ.
    seen: dict[tuple[int, str], list[tuple[str, int]]] = defaultdict(list)
    for name, value in hashes:
        ends = [len(value) * number // distance for number in range(distance + 1)]
        pieces = [(start, value[start:end]) for start, end in pairwise(ends)]
        bits = int(value, 16)
        candidates = (candidate for piece in pieces for candidate in seen[piece])
        earlier = next((other for other, known in candidates if (known ^ bits).bit_count() < distance), None)
        if earlier is not None:
            yield name, earlier
            continue
        for piece in pieces:
            seen[piece].append((name, bits))
