"""Intervals of means over trainings and held-out items: both are drawn, and each training is judged on the same items."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from focusdpo.metrics import LEVEL

POWER = 0.8  # with which the smallest detectable difference would have been found
DECIMALS = 12  # what differs behind them differs by rounding
MANY = 1e6  # degrees of freedom of what was not estimated
LEAST_P = 1e-15  # smaller ones are this

Values = NDArray[np.float64]  # [seeds, items]


@dataclass(frozen=True)
class Spread:
    """The variance of a mean over seeds and items, by what it comes from, and how well that is known.

    between_seeds: of the seeds' means, which is what seeds add and what is in no mean. within: the latter, of single values.
    between_items: of the items' means, less `within`. imagined: see `estimate`. seeds, items: degrees of freedom.
    """

    between_seeds: float
    within: float
    between_items: float
    imagined: float
    seeds: int
    items: int

    @property
    def variance(self) -> float:
        return max(self.between_seeds, self.within) + self.between_items + self.imagined

    def quantile(self, tail: float) -> float:
        """How many standard errors an interval reaches to each side, so that `tail` is left out there.

        Banerjee's (Sankhya 23, 1961): a variance that is a sum of several is met by the sum of each times its own Student's
        quantile squared, which leaves out `tail` at most, however small that is. Satterthwaite's degrees of freedom would leave
        out twenty times one of 0.00025 with three seeds, as so many comparisons need.
        """
        of_seeds, of_items, known = (special.stdtrit(df, tail) ** 2 for df in (max(self.seeds, 1), max(self.items, 1), MANY))
        reach = (
            max(of_seeds * self.between_seeds, of_items * self.within) + of_items * self.between_items + known * self.imagined
        )
        return math.sqrt(reach / self.variance)

    def p(self, statistic: float) -> float:
        """Two-sided, of a mean that is so many standard errors from what is tested."""
        if statistic >= self.quantile(LEAST_P / 2):
            return LEAST_P
        tail = optimize.brentq(lambda log: self.quantile(math.exp(log)) - statistic, math.log(LEAST_P / 2), math.log(0.5))
        return 2 * math.exp(tail)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and items, or a mean difference.

    low, high: its interval at `LEVEL`, not corrected for other comparisons; NaN where the values say nothing of it, as `spread`
    is None then. p: of a difference, two-sided, of there being none. seeds, items: how many; with one seed the interval is over
    items alone, and with one item over seeds alone.
    """

    mean: float
    low: float
    high: float
    p: float
    seeds: int
    items: int
    spread: Spread | None

    def detectable(self, level: float) -> float:
        """The smallest true difference that a test with this spread, at `level` (such as 0.95), finds with `POWER`."""
        if self.spread is None:
            return math.nan
        quantile = self.spread.quantile((1 - level) / 2)
        df = min(special.stdtridf((1 + level) / 2, quantile), MANY)  # at which Student's is the same
        return float(math.sqrt(self.spread.variance) * special.nctdtrinc(df, 1 - POWER, quantile))


def estimate(values: Sequence[Sequence[float]] | Values, is_share: bool = False, is_difference: bool = False) -> Estimate:
    """The mean over seeds of means over items, as the values of a two-way layout with random seeds and random items.

    Its variance is what a bootstrap that resamples seeds and items together is after (Owen, Annals of Applied Statistics 1,
    2007), by components instead of by drawing, which makes the part of few seeds too small: V_seeds + V_items - V_interaction,
    from the scatter of the seeds' means, of the items' means, and of what neither explains; a component below 0 counts as 0.
    `Spread.quantile` says how many standard errors the interval reaches.

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
        return Estimate(math.nan, math.nan, math.nan, math.nan, seeds, items, None)
    found = table[~np.isnan(table)]
    if is_share and (np.abs(found).max() > 1 or not (is_difference or found.min() >= 0)):
        got = f"{found.min():g} to {found.max():g}"
        raise ValueError(f"values: got {got}; expected shares, from 0 to 1, or differences of such")
    mean = float(np.nanmean(table, axis=1).mean())
    weight = float(np.unique(found, return_counts=True)[1].max() / found.size) ** items if is_share and items > 1 else 0.0
    spread = _spread(table, mean, weight / items**2)
    if not spread.variance:
        return Estimate(mean, math.nan, math.nan, math.nan, seeds, items, None)
    quantile, error = spread.quantile((1 - LEVEL) / 2), math.sqrt(spread.variance)
    if is_share:
        least, width = (-1, 2) if is_difference else (0, 1)
        share = (mean - least) / width
        shrunk = (items * share + weight) / (items + 2 * weight)
        count = shrunk * (1 - shrunk) * width**2 / spread.variance  # of independent values with this variance
        low, high = (end * width + least for end in _wilson(share, count, quantile))
        statistic = abs(mean) * math.sqrt(count)
    else:
        low, high = mean - quantile * error, mean + quantile * error
        statistic = abs(mean) / error
    return Estimate(mean, low, high, spread.p(statistic) if is_difference else math.nan, seeds, items, spread)


def _spread(table: Values, mean: float, imagined: float) -> Spread:
    there = ~np.isnan(table)
    seeds, items = table.shape
    if np.nanmin(table) == np.nanmax(table):  # also where a mean over them differs by rounding
        return Spread(0.0, 0.0, 0.0, imagined, seeds - 1, items - 1)
    weight = there / (seeds * there.sum(1, keepdims=True))
    gaps = np.where(there, table - mean, 0) * weight
    of_seeds = seeds / (seeds - 1) * float((gaps.sum(1) ** 2).sum()) if seeds > 1 else 0.0
    of_items = items / (items - 1) * float((gaps.sum(0) ** 2).sum()) if items > 1 else 0.0
    within = 0.0
    if seeds > 1 and items > 1:
        rest = table - np.nanmean(table, axis=1, keepdims=True) - np.nanmean(table, axis=0, keepdims=True) + mean
        within = float(((np.where(there, rest, 0) * weight) ** 2).sum()) * seeds * items / ((seeds - 1) * (items - 1))
    return Spread(of_seeds, within, max(of_items - within, 0.0), imagined, seeds - 1, items - 1)


def _wilson(share: float, count: float, quantile: float) -> tuple[float, float]:
    square = quantile**2 / count
    centre = (share + square / 2) / (1 + square)
    half = math.sqrt(square * (share * (1 - share) + square / 4)) / (1 + square)
    return max(min(centre - half, share), 0.0), min(max(centre + half, share), 1.0)  # rounding leaves an end out
