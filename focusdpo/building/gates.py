"""The fifth stage: what a pair must be like; and which pairs are the same, once all are there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise

import imagehash
import numpy as np
import torch
from PIL import Image

from focusdpo.building.blending import box_of, to_lab
from focusdpo.building.candidate import Candidate, Mask, Pixels, Rejected
from focusdpo.building.config import GatesConfig

LEAST_CHANGE = {"lab": 8.0, "features": 0.05}  # below which a change counts as not visible, by how it is measured


def lab_distance(winner: Pixels, loser: Pixels, changed: Mask) -> float:
    """Mean colour distance within the changed region, CIE76."""
    return float(np.linalg.norm(to_lab(winner) - to_lab(loser), axis=-1)[changed].mean())


class FeatureDistance:
    """Cosine distance between a vision model's features of the changed region, as a crop of winner and loser.

    Args:
        path: local folder of a transformers vision model, such as DINO or CLIP.
        device: where it runs.
    """

    def __init__(self, path: str, device: str) -> None:
        from transformers import AutoImageProcessor, AutoModel

        self._device = device
        self._processor = AutoImageProcessor.from_pretrained(path, local_files_only=True)
        self._model = AutoModel.from_pretrained(path, local_files_only=True).to(device).eval()
        self._model = getattr(self._model, "vision_model", self._model)  # CLIP's without its text encoder

    @torch.inference_mode()
    def __call__(self, winner: Pixels, loser: Pixels, changed: Mask) -> float:
        crops = [Image.fromarray(image[box_of(changed)]) for image in (winner, loser)]
        inputs = self._processor(images=crops, return_tensors="pt").to(self._device)
        features = self._model(**inputs).pooler_output.float()
        return float(1 - torch.cosine_similarity(features[0], features[1], dim=0))


class Gates:
    """Lets a candidate pass, or says why not."""

    def __init__(self, config: GatesConfig) -> None:
        self._config = config
        self.device = config.device
        # That there is a path for features is checked by the config.
        self._distance = lab_distance if config.path is None else FeatureDistance(config.path, config.device)
        self._minimum = LEAST_CHANGE[config.visibility] if config.min_change is None else config.min_change

    def __call__(self, candidate: Candidate) -> None:
        assert candidate.scene is not None and candidate.loser is not None
        changed = np.logical_or.reduce(candidate.priors)
        if ((candidate.scene != candidate.loser).any(axis=-1) & ~changed).any():
            raise Rejected("pixels outside the prior changed")
        area = float(changed.mean())
        if area < self._config.min_area:
            raise Rejected("the change is too small")
        if area > self._config.max_area:
            raise Rejected("the change is too large")
        distance = self._distance(candidate.scene, candidate.loser, changed)
        if not distance >= self._minimum:
            raise Rejected("the change is not visible")
        candidate.notes |= {"area": round(area, 4), "change": round(distance, 3)}


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
