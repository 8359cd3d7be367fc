"""Intervals of shares: of means of values from 0 to 1, as accuracies, rates and coverages are."""

from __future__ import annotations

from scipy import stats

from focusdpo.metrics import LEVEL

LARGEST = 1e12  # number of values; beyond it scipy's quantiles end


def exact_interval(share: float, count: float, level: float = LEVEL) -> tuple[float, float]:
    """Clopper and Pearson's interval (Biometrika 26, 1934) of a share of `count` independent values.

    It has a width also where all values are 0, or all are 1: n of n give (alpha / 2)^(1 / n) to 1, which is 0.48 of 5 and 0.91
    of 40. That holds for values between 0 and 1 as well: all of them are 1 with probability mean^n at most.

    Args:
        share: from 0 to 1.
        count: above 0; need not be whole.
        level: of the interval, between 0 and 1.
    """
    tail, hits, misses = (1 - level) / 2, share * count, (1 - share) * count
    low = float(stats.beta.ppf(tail, hits, misses + 1)) if hits > 0 else 0.0
    high = float(stats.beta.ppf(1 - tail, hits + 1, misses)) if misses > 0 else 1.0
    return low, high


def clustered_interval(share: float, deviation: float, clusters: float, level: float = LEVEL) -> tuple[float, float]:
    """Interval of a share whose values come in clusters: Korn and Graubard's.

    Student's interval of few clusters near 0 or 1 leaves [0, 1], and covers the truth less often than it says. Korn and
    Graubard (Survey Methodology 24, 1998; the standard of the US National Center for Health Statistics, 2017) take Clopper and
    Pearson's at the number of independent values that would scatter as much as the share does, made smaller by how little so
    few clusters say of that. Away from the ends it is close to Student's. The number is that of the clusters at least, as
    nothing from 0 to 1 scatters more than 0 and 1 do: of clusters that are each a single 0 or 1 it is Clopper and Pearson's.

    Args:
        share: from 0 to 1.
        deviation: of the share, its standard error, above 0.
        clusters: how many independent ones, above 1; need not be whole.
        level: of the interval, between 0 and 1.
    """
    tail = (1 - level) / 2
    ratio = float(stats.norm.ppf(tail) / stats.t.ppf(tail, clusters - 1))
    count = share * (1 - share) * (ratio / deviation) ** 2
    return exact_interval(share, min(max(count, clusters), LARGEST), level)
