"""Cosines of images with their references and prompts, and of regions with right and wrong references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from focusdpo.metrics.leakage import leakage_of_similarities

Vectors = Mapping[str, NDArray[np.float64]]  # embeddings [D] of length 1, by key


def similarity_to_references(image: str, references: Sequence[Sequence[str]], vectors: Vectors) -> list[float]:
    """Cosine of an image, or a region, with each reference: of several photos of a subject the mean of their cosines.

    Args:
        image: its key.
        references: keys of the photos of each reference.
        vectors: all of these.
    """
    return [float(np.mean([vectors[image] @ vectors[photo] for photo in photos])) for photos in references]


def image_values(
    image: str, references: Sequence[Sequence[str]], prompt: str, by_encoder: Mapping[str, Vectors], texts: Vectors | None
) -> dict[str, Any]:
    """What one image is measured by: per encoder the similarity to each reference, their mean and their minimum; and CLIP-T.

    Args:
        image: key of the image.
        references: keys of each reference's photos.
        prompt: key of the prompt.
        by_encoder: vectors by the encoder's setting.
        texts: CLIP's vectors of prompts.
    """
    values: dict[str, Any] = {}
    for setting, vectors in by_encoder.items():
        similarities = similarity_to_references(image, references, vectors)
        name = METRIC_OF[setting]
        values[f"{name}_references"] = similarities
        values[name] = float(np.mean(similarities))
        values[f"{name}_min"] = min(similarities)
    if texts is not None:
        values["clip_t"] = float(by_encoder["clip"][image] @ texts[prompt])
    return values


def region_values(
    region: str, references: Sequence[Sequence[str]], own: int, by_encoder: Mapping[str, Vectors]
) -> dict[str, float]:
    """How like its right reference and the wrong ones a region is, by encoder: dino_gap, dino_leaks, ..."""
    values: dict[str, float] = {}
    for setting, vectors in by_encoder.items():
        table = [similarity_to_references(region, references, vectors)]
        found = leakage_of_similarities(table, np.array([own]))
        values |= {f"{METRIC_OF[setting]}_{name}": float(value[0]) for name, value in found.items()}
    return values


METRIC_OF = {"clip": "clip_i", "dino": "dino", "dinov2": "dinov2"}
LABELS = {"clip_i": "CLIP-I", "dino": "DINO", "dinov2": "DINOv2"}
LEAKAGE = {"right": "right", "wrong_mean": "wrong, mean", "wrong_max": "wrong, nearest", "gap": "gap", "leaks": "leakage rate"}


def image_metrics(settings: Sequence[str]) -> dict[str, str]:
    """The metrics of an image and how reports call them, given the encoders that there are."""
    names: dict[str, str] = {}
    for setting in settings:
        name = METRIC_OF[setting]
        names |= {name: LABELS[name], f"{name}_min": f"{LABELS[name]}, minimum over references"}
    return names | ({"clip_t": "CLIP-T"} if "clip" in settings else {})


def region_metrics(settings: Sequence[str]) -> dict[str, str]:
    """The metrics of a region, likewise."""
    return {
        f"{METRIC_OF[setting]}_{name}": f"{LABELS[METRIC_OF[setting]]}, {label}"
        for setting in settings
        for name, label in LEAKAGE.items()
    }
