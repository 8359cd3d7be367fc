"""Bootstrap intervals of means whose values come in groups."""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from focusdpo.metrics import LEVEL, RESAMPLES
from focusdpo.metrics.shares import exact_interval

Interval = tuple[float, float, float]  # mean, low, high


def mean_interval(
    values: ArrayLike,
    groups: ArrayLike | Sequence[Hashable] | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
    is_share: bool = False,
) -> Interval:
    """Mean, and its bootstrap interval over groups.

    Values of one group are drawn together, as the images of one prompt are not independent; a resample's mean is over its
    values, so that a group counts by its size. The interval is scipy's BCa, and its percentiles where BCa has no answer, as
    for rates near 0 or 1.

    Args:
        values: [N], finite.
        groups: [N], whatever tells groups apart; None makes each value its own.
        level: of the interval, between 0 and 1.
        resamples: at least 1.
        seed: the same seed gives the same interval.
        is_share: whether values can be from 0 to 1 only, which makes all 0 and all 1 say something of others.

    Returns:
        (mean, low, high). Where all groups have one mean, or there is a single one, nothing is known of how much it varies, and
        [mean, mean] would claim a certainty (a rate of 0 of three prompts): low and high are NaN then, and of a share that is 0
        or 1 `exact_interval` over the groups.

    Raises:
        ValueError: no values, values that are not finite or no share, or another number of groups.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not numbers.size or not np.isfinite(numbers).all():
        raise ValueError(f"values: got shape {numbers.shape}; expected [N] finite numbers, N at least 1")
    if not 0 < level < 1:
        raise ValueError(f"level: got {level!r}; expected a number between 0 and 1")
    if resamples < 1:
        raise ValueError(f"resamples: got {resamples!r}; expected at least 1")
    if is_share:
        numbers = numbers.round(12)  # 1 less other shares may be below 0 by rounding
        if not (numbers.min() >= 0 and numbers.max() <= 1):
            raise ValueError(f"values: got {numbers.min():g} to {numbers.max():g}; expected shares, from 0 to 1")
    sums, counts = _by_group(numbers, groups)
    mean = float(numbers.mean())
    if np.ptp(sums / counts) == 0:
        return mean, *(exact_interval(mean, len(sums), level) if is_share and mean in (0, 1) else (math.nan, math.nan))
    for method in ("BCa", "percentile"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a degenerate BCa gives NaN, and the next method its interval
            found = stats.bootstrap(
                (sums, counts),
                _ratio,
                n_resamples=resamples,
                vectorized=True,
                paired=True,
                confidence_level=level,
                method=method,
                rng=np.random.default_rng(seed),
            ).confidence_interval
        if np.isfinite([found.low, found.high]).all():
            break
    return mean, float(found.low), float(found.high)


def _ratio(sums: NDArray[np.float64], counts: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
    return np.asarray(sums.sum(axis=axis) / counts.sum(axis=axis))


def _by_group(
    numbers: NDArray[np.float64], groups: ArrayLike | Sequence[Hashable] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum and number of each group's values."""
    if groups is None:
        return numbers, np.ones_like(numbers)
    names = np.asarray(groups)
    if names.shape != numbers.shape:
        raise ValueError(f"groups: got shape {names.shape}; expected one per value, {numbers.shape}")
    _, index = np.unique(names, return_inverse=True)
    return np.asarray(np.bincount(index, numbers), dtype=np.float64), np.asarray(np.bincount(index), dtype=np.float64)
