"""Intervals of means whose values come in clusters: what other clusters would give."""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from focusdpo.metrics import LEVEL, RESAMPLES
from focusdpo.metrics.shares import clustered_interval, exact_interval

DECIMALS = 12  # of shares; what differs behind them differs by rounding
Interval = tuple[float, float, float]  # mean, low, high


@dataclass(frozen=True)
class Clusters:
    """Which values are drawn together, and which of these draws depend on each other.

    Attributes:
        index: [N], the cluster of each value.
        sizes: [C], values of each.
        shared: [C, C], which clusters have a member in common, each with itself as well; None where none do.
        independent: how many independent clusters of one size would make the mean as uncertain, were members all that differs.
            It is C for C of one size without common members, and at least 1.
    """

    index: NDArray[np.intp]
    sizes: NDArray[np.float64]
    shared: NDArray[np.bool_] | None
    independent: float


def find_clusters(groups: Iterable[Hashable]) -> Clusters:
    """Clusters of values, by each value's group: values of equal groups are one cluster.

    A group that is a frozenset has its elements for members, as a prompt has subjects; any other is its own only member.
    """
    places: dict[Hashable, int] = {}
    index = np.array([places.setdefault(group, len(places)) for group in groups], dtype=np.intp)
    sizes = np.bincount(index).astype(np.float64)
    members: dict[Hashable, int] = {}
    cells = [[members.setdefault(one, len(members)) for one in (g if isinstance(g, frozenset) else {g})] for g in places]
    lengths = [len(cell) for cell in cells]
    reach = np.bincount([one for cell in cells for one in cell], np.repeat(sizes, lengths))  # values of each member
    independent = float(sizes.sum() * reach.sum() / (reach @ reach))
    if sum(lengths) == len(members):
        return Clusters(index, sizes, None, independent)
    table = np.zeros((len(cells), len(members)), dtype=np.float32)
    for row, cell in zip(table, cells, strict=True):
        row[cell] = 1
    return Clusters(index, sizes, table @ table.T > 0, independent)


def mean_interval(
    values: ArrayLike,
    groups: Iterable[Hashable] | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
    is_share: bool = False,
) -> Interval:
    """Mean, and its interval over groups.

    Values of one group are drawn together, as the images of one subject are not independent; a resample's mean is over its
    values, so that a group counts by its size. What differs within a group is not drawn again: its mean varies by it already.

    The interval is scipy's BCa, or its percentiles where BCa has no answer, stretched about the mean. A resample of n groups
    varies less than the mean does, by (n - 1) / n, and knows nothing of how little n groups say of their spread: Student's
    quantile does. Groups with common members (`find_clusters`) depend on each other: their covariance counts as well, as in a
    variance for dyads (Fafchamps and Gubert, Journal of Development Economics 83, 2007), and n is `Clusters.independent`. Of
    shares it is `clustered_interval` at the same deviation, which stays within [0, 1].

    Args:
        values: [N], finite.
        groups: [N], whatever tells groups apart, frozensets of members where they overlap; None makes each value its own.
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
        numbers = numbers.round(DECIMALS)  # 1 less other shares may be below 0 by rounding
        if not (numbers.min() >= 0 and numbers.max() <= 1):
            raise ValueError(f"values: got {numbers.min():g} to {numbers.max():g}; expected shares, from 0 to 1")
    clusters = find_clusters(range(numbers.size) if groups is None else groups)
    if len(clusters.index) != numbers.size:
        raise ValueError(f"groups: got {len(clusters.index)}; expected one per value, {numbers.size}")
    sums, sizes, count = np.bincount(clusters.index, numbers), clusters.sizes, clusters.independent
    mean, means = float(numbers.mean()), sums / sizes
    if np.ptp(means.round(DECIMALS) if is_share else means) == 0:
        return mean, *(exact_interval(mean, count, level) if is_share and mean in (0, 1) else (math.nan, math.nan))
    residuals = (sums - mean * sizes) / numbers.size
    alone = float(residuals @ residuals)
    together = alone if clusters.shared is None else max(alone, float(residuals @ clusters.shared @ residuals))
    deviation = math.sqrt(together * count / (count - 1))
    if is_share:
        return mean, *clustered_interval(mean, deviation, count, level)
    tail = (1 - level) / 2
    stretch = float(stats.t.ppf(tail, count - 1) / stats.norm.ppf(tail)) * deviation / math.sqrt(alone)
    for method in ("BCa", "percentile"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a degenerate BCa gives NaN, and the next method its interval
            found = stats.bootstrap(
                (sums, sizes),
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
    return mean, float(mean + stretch * (found.low - mean)), float(mean + stretch * (found.high - mean))


def _ratio(sums: NDArray[np.float64], sizes: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
    return np.asarray(sums.sum(axis=axis) / sizes.sum(axis=axis))
