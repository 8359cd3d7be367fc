"""Intervals of means over trainings and held-out items: both are drawn, and each training is judged on the same items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from focusdpo.metrics import LEVEL

POWER = 0.8  # with which the smallest detectable difference would have been found
KNOWN = 10**6  # degrees of freedom of a variance that was not estimated
DECIMALS = 12  # what differs behind them differs by rounding

Table = NDArray[np.float64]  # [seeds, items]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and items, or a mean difference.

    low, high: its interval at `LEVEL`, not corrected for other comparisons; NaN where the values say nothing of it. error: the
    standard error. df: its degrees of freedom. p: of a difference, two-sided, of there being none. seeds, items: how many;
    with one seed the interval is over items alone, and with one item over seeds alone.
    """

    mean: float
    low: float
    high: float
    error: float
    df: float
    p: float
    seeds: int
    items: int

    def detectable(self, level: float) -> float:
        """The smallest true difference that a test with this error, at `level` (such as 0.95), finds with `POWER`."""
        return float(self.error * special.nctdtrinc(self.df, 1 - POWER, stats.t.ppf((1 + level) / 2, self.df)))


def estimate(values: Sequence[Sequence[float]] | Table, is_share: bool = False, is_difference: bool = False) -> Estimate:
    """The mean over seeds of means over items, as the values of a two-way layout with random seeds and random items.

    Its variance is what a bootstrap that resamples seeds and items together is after (Owen, Annals of Applied Statistics 1,
    2007), by components instead of by drawing, which makes the part of few seeds too small: V_seeds + V_items - V_interaction,
    from the scatter of the seeds' means, of the items' means, and of what neither explains; a component below 0 counts as 0.
    Student's quantile has Satterthwaite's degrees of freedom (Biometrics Bulletin 2, 1946).

    Of shares, and of differences of shares, the interval is Wilson's (JASA 22, 1927) at the number of independent values that
    would have this variance, which stays within the bounds. Where most values are one and the same, as where no item of few
    leaks, their scatter does not say how rare the others are; one item at either side is then imagined (as by Agresti and
    Min, Biometrics 61, 2005), with the weight q^items, the chance of seeing that value alone if a share q of all have it.

    Args:
        values: [seeds, items], NaN where missing. A single row, or a single column, leaves the other to vary.
        is_share: whether they can be from 0 to 1 only, or are differences of such.
        is_difference: whether they are paired differences.

    Raises:
        ValueError: they are no shares where they should be.
    """
    table = np.array(values, dtype=np.float64, ndmin=2).round(DECIMALS)
    there = ~np.isnan(table)
    table = table[there.any(1)][:, there.any(0)]
    seeds, items = table.shape
    if not table.size:
        return Estimate(np.nan, np.nan, np.nan, np.nan, np.nan, np.nan, seeds, items)
    there = ~np.isnan(table)
    mean = float(np.nanmean(table, axis=1).mean())
    if is_share and (np.abs(table[there]).max() > 1 or not (is_difference or table[there].min() >= 0)):
        got = f"{table[there].min():g} to {table[there].max():g}"
        raise ValueError(f"values: got {got}; expected shares, from 0 to 1, or differences of such")
    parts = _variances(table, there, mean)
    tied = np.unique(table[there], return_counts=True)[1].max() / there.sum() if is_share and items > 1 else 0.0
    weight = tied**items
    parts.append((weight / items**2, weight / items**2, KNOWN))
    variance = sum(part for part, _, _ in parts)
    if not variance:
        return Estimate(mean, np.nan, np.nan, np.nan, np.nan, np.nan, seeds, items)
    df = variance**2 / sum(raw**2 / max(own, 1) for _, raw, own in parts)
    error, quantile = float(np.sqrt(variance)), float(stats.t.ppf((1 + LEVEL) / 2, df))
    if is_share:
        least, width = (-1, 2) if is_difference else (0, 1)
        share = (mean - least) / width
        shrunk = (items * share + weight) / (items + 2 * weight)
        count = shrunk * (1 - shrunk) * width**2 / variance  # of independent values with this variance
        low, high = (float(end) * width + least for end in _wilson(share, count, quantile))
        statistic = abs(mean) * np.sqrt(count)
    else:
        low, high = mean - quantile * error, mean + quantile * error
        statistic = abs(mean) / error
    p = float(2 * stats.t.sf(statistic, df)) if is_difference else np.nan
    return Estimate(mean, low, high, error, float(df), p, seeds, items)


def _variances(table: Table, there: NDArray[np.bool_], mean: float) -> list[tuple[float, float, int]]:
    """What seeds, items and their interaction add to the variance of the mean, the sum of squares behind it, and its df."""
    seeds, items = table.shape
    if np.nanmin(table) == np.nanmax(table):
        return []  # also where a mean over them differs by rounding
    weight = there / (seeds * there.sum(1, keepdims=True))
    gaps = np.where(there, table - mean, 0) * weight
    of_seeds = seeds / (seeds - 1) * float((gaps.sum(1) ** 2).sum()) if seeds > 1 else 0.0
    of_items = items / (items - 1) * float((gaps.sum(0) ** 2).sum()) if items > 1 else 0.0
    if seeds == 1 or items == 1:
        return [(of_seeds, of_seeds, seeds - 1), (of_items, of_items, items - 1)]
    rest = table - np.nanmean(table, axis=1, keepdims=True) - np.nanmean(table, axis=0, keepdims=True) + mean
    df = (seeds - 1) * (items - 1)
    of_cells = seeds * items / df * float(((np.where(there, rest, 0) * weight) ** 2).sum())
    return [
        (max(of_seeds, of_cells), of_seeds, seeds - 1),
        (max(of_items, of_cells), of_items, items - 1),
        (-of_cells, of_cells, df),
    ]


def _wilson(share: float, count: float, quantile: float) -> tuple[float, float]:
    square = quantile**2 / count
    centre = (share + square / 2) / (1 + square)
    half = np.sqrt(square * (share * (1 - share) + square / 4)) / (1 + square)
    return max(min(centre - half, share), 0.0), min(max(centre + half, share), 1.0)  # rounding leaves an end out
