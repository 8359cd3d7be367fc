"""Attribute leakage: does a subject's region look like its own reference, or like another subject's?"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def region_leakage(
    regions: ArrayLike, references: ArrayLike, own: ArrayLike, present: ArrayLike | None = None
) -> dict[str, NDArray[np.float64]]:
    """Cosine similarity of each region to its own reference and to the wrong ones.

    Args:
        regions: [M, D] features of image regions, one subject each.
        references: [M, R, D] features of the references of each region's image, by the same encoder.
        own: [M] int, which of the R shows the region's own subject.
        present: [M, R] bool, false where an image has fewer than R references; None where all have R.

    Returns:
        [M] each, float64: `right`, the similarity to the own reference; `wrong_mean` and `wrong_max` over the others;
        `gap` = right - wrong_max; `leaks`, 1 where the region's first choice among its image's references is another than
        its own (gap < 0), else 0, also where it is as near to both.

    Raises:
        ValueError: shapes that do not fit, an `own` that is out of range or absent, no wrong reference, a zero feature, or
            similarities that are not finite.
    """
    features, others = np.asarray(regions, dtype=np.float64), np.asarray(references, dtype=np.float64)
    if features.ndim != 2 or others.ndim != 3 or (len(features), features.shape[1]) != (len(others), others.shape[2]):
        raise ValueError(f"regions, references: got {features.shape} and {others.shape}; expected [M, D] and [M, R, D]")
    dots = np.einsum("md,mrd->mr", features, others)
    lengths = np.linalg.norm(features, axis=-1)[:, None] * np.linalg.norm(others, axis=-1)
    found = leakage_of_similarities(np.divide(dots, lengths, out=np.zeros_like(dots), where=lengths > 0), own, present)
    if not (lengths > 0)[slice(None) if present is None else np.asarray(present, bool)].all():
        raise ValueError("regions, references: a feature is zero, or not a number; its direction means nothing")
    return found


def leakage_of_similarities(
    similarities: ArrayLike, own: ArrayLike, present: ArrayLike | None = None
) -> dict[str, NDArray[np.float64]]:
    """As `region_leakage`, from the similarities [M, R] of each region to each reference of its image."""
    table, index = np.asarray(similarities, dtype=np.float64), np.asarray(own)
    if table.ndim != 2:
        raise ValueError(f"similarities: got {table.shape}; expected [M, R]")
    known = np.ones(table.shape, bool) if present is None else np.asarray(present, dtype=bool)
    if known.shape != table.shape:
        raise ValueError(f"present: got {known.shape}; expected [M, R], {table.shape}")
    if index.shape != table.shape[:1] or not np.issubdtype(index.dtype, np.integer):
        raise ValueError(f"own: got {index.dtype} {index.shape}; expected integers [M], M {len(table)}")
    if not ((index >= 0) & (index < table.shape[1])).all():
        raise ValueError(f"own: got {index.min()} to {index.max()}; expected 0 to {table.shape[1] - 1}")
    rows = np.arange(len(table))
    if not known[rows, index].all():
        raise ValueError("own: a region's own reference is not present")
    if not np.isfinite(table[known]).all():
        raise ValueError("similarities: not finite; which reference is nearest cannot be told")
    wrong = known.copy()
    wrong[rows, index] = False
    if not wrong.any(axis=1).all():
        raise ValueError("references: a region has no wrong reference; leakage needs at least two subjects in an image")
    right = table[rows, index]
    wrong_mean = np.where(wrong, table, 0.0).sum(axis=1) / wrong.sum(axis=1)
    wrong_max = np.where(wrong, table, -np.inf).max(axis=1)
    gap = right - wrong_max
    return {"right": right, "wrong_mean": wrong_mean, "wrong_max": wrong_max, "gap": gap, "leaks": (gap < 0).astype(np.float64)}
