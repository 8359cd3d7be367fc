"""How often intervals cover the mean of the population that a set was drawn from: `python -m tests.metrics.coverage` prints it.

A set has subjects, prompts of these and images of those, each of which adds to a value: other sets have other subjects, prompts
and images. Rates are of images that leak with a probability whose log-odds are such sums.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from focusdpo.foundation.text import aligned
from focusdpo.metrics.bootstrap import Interval, find_clusters, mean_interval

Values = NDArray[np.float64]
IMAGES, RESAMPLES = 2, 1000
# UNO's list for several subjects: 30 pairs of 30 subjects, 12 of them in one pair, others in two to five.
PAIRS = [(2, 3), (4, 5), (6, 8), (9, 16), (17, 18), (19, 20), (21, 22), (23, 24), (25, 26), (28, 29), (0, 10), (0, 12), (0, 15)]
PAIRS += [
    (0, 1),
    (1, 11),
    (1, 14),
    (10, 27),
    (11, 13),
    (12, 14),
    (14, 15),
    (7, 0),
    (3, 1),
    (5, 10),
    (8, 27),
    (11, 16),
    (13, 18),
]
PAIRS += [(12, 20), (14, 22), (15, 24), (12, 28)]


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Values:
    return rng.normal(size=shape)


def skewed(rng: np.random.Generator, shape: tuple[int, ...]) -> Values:
    """Of skewness 1."""
    return (rng.gamma(4, size=shape) - 4) / 2


def exponential(rng: np.random.Generator, shape: tuple[int, ...]) -> Values:
    """Of skewness 2."""
    return rng.exponential(size=shape) - 1


@dataclass(frozen=True)
class Design:
    """A population and what a set has of it.

    Attributes:
        sets: the subjects of each set's clusters, as pairs; their effects are averaged.
        prompts: of each cluster.
        spread: standard deviations between subjects, between sets of subjects, prompts and images.
        effect: what subjects' effects are drawn from, with mean 0 and deviation 1.
        odds: the log-odds of a rate; None for a value.
    """

    sets: Sequence[tuple[int, ...]]
    prompts: Sequence[int]
    spread: tuple[float, float, float, float] = (1, 0, 1, 1)
    effect: Callable[[np.random.Generator, tuple[int, ...]], Values] = normal
    odds: float | None = None

    @cached_property
    def subjects(self) -> list[Hashable]:
        """Of each value: its subjects."""
        return [frozenset(each) for each, count in zip(self.sets, self.prompts, strict=True) for _ in range(count * IMAGES)]

    @cached_property
    def lines(self) -> list[Hashable]:
        """Of each value: its prompt."""
        return list(np.repeat(np.arange(sum(self.prompts)), IMAGES))

    def draw(self, rng: np.random.Generator) -> Values:
        """A set: [N]."""
        of_subjects, of_sets, of_prompts, of_images = self.spread
        effects = self.effect(rng, (1 + max(map(max, self.sets)),)) * of_subjects
        found = np.array([effects[list(each)].mean() for each in self.sets]) + rng.normal(size=len(self.sets)) * of_sets
        found = np.repeat(found, self.prompts)
        found = np.repeat(found + rng.normal(size=found.shape) * of_prompts, IMAGES)
        if self.odds is None:
            return found + rng.normal(size=found.shape) * of_images
        return (rng.uniform(size=found.shape) < 1 / (1 + np.exp(-found - self.odds))).astype(np.float64)

    @cached_property
    def truth(self) -> float:
        """The population's mean: 0 of values; of rates that of the logistic function of a normal variable, by quadrature."""
        if self.odds is None:
            return 0.0
        of_subjects, of_sets, of_prompts, _ = self.spread  # images differ by what they are drawn with
        nodes, weights = np.polynomial.hermite_e.hermegauss(80)
        scale = np.sqrt(of_subjects**2 / len(self.sets[0]) + of_sets**2 + of_prompts**2)
        return float((weights / (1 + np.exp(-self.odds - scale * nodes))).sum() / weights.sum())

    def interval(self, values: Values, seed: int) -> Interval:
        """That of `focusdpo evaluate`."""
        return mean_interval(values, self.subjects, resamples=RESAMPLES, seed=seed, is_share=self.odds is not None)

    def over_prompts(self, values: Values, seed: int) -> Interval:
        """Draws prompts, as if these had no subject in common."""
        return mean_interval(values, self.lines, resamples=RESAMPLES, seed=seed, is_share=self.odds is not None)

    def percentiles(self, values: Values, seed: int) -> Interval:
        """Percentiles of resamples of subjects, or pairs, with all that they have."""
        clusters = find_clusters(self.subjects)
        sums, sizes = np.bincount(clusters.index, values), clusters.sizes
        drawn = np.random.default_rng(seed).integers(0, len(sums), (RESAMPLES, len(sums)))
        return self._percentiles(values, sums[drawn].sum(1) / sizes[drawn].sum(1))

    def every_level(self, values: Values, seed: int) -> Interval:
        """Percentiles of resamples of subjects, then of prompts within them, then of images within these; of equal numbers."""
        rng = np.random.default_rng(seed)
        table = values.reshape(len(self.sets), -1, IMAGES)
        clusters, prompts, _ = table.shape
        means = np.empty(RESAMPLES)
        for i in range(RESAMPLES):
            first = rng.integers(0, clusters, (clusters, 1, 1))
            second = rng.integers(0, prompts, (clusters, prompts, 1))
            means[i] = table[first, second, rng.integers(0, IMAGES, table.shape)].mean()
        return self._percentiles(values, means)

    @staticmethod
    def _percentiles(values: Values, means: Values) -> Interval:
        low, high = np.quantile(means, [0.025, 0.975])
        return float(values.mean()), float(low), float(high)


def singles(count: int, prompts: int | Sequence[int], **population: object) -> Design:
    """Each prompt with one of so many subjects."""
    each = [prompts] * count if isinstance(prompts, int) else list(prompts)
    return Design([(subject,) for subject in range(count)], each, **population)  # type: ignore[arg-type]


UNO = {"sets": PAIRS, "prompts": [25] * len(PAIRS)}
MEANS = {
    "30 subjects x 25 prompts": singles(30, 25),
    "30 x 5": singles(30, 5),
    "30 x 5, subjects hardly differ": singles(30, 5, spread=(0.2, 0, 1, 1)),
    "8 x 25": singles(8, 25),
    "8 x 25, skewed": singles(8, 25, effect=skewed),
    "12, of 2 to 24 prompts": singles(12, range(2, 26, 2)),
    "UNO's 30 pairs x 25": Design(**UNO, spread=(1, 0.5, 1, 1)),
    "the same, pairs alone differ": Design(**UNO, spread=(0, 1, 1, 1)),
}
RATES = {
    f"{name}, about {share}": design
    for odds, share in ((-4.0, "0.04"), (0.0, "0.50"), (4.0, "0.96"))
    for name, design in {
        "30 x 25": singles(30, 25, odds=odds),
        "30 x 5": singles(30, 5, odds=odds),
        "8 x 25": singles(8, 25, odds=odds),
        "UNO's pairs": Design(**UNO, spread=(1, 0.5, 1, 1), odds=odds),
    }.items()
}
CONCENTRATED = {
    "30 x 25, in few subjects": singles(30, 25, spread=(2, 0, 1, 1), odds=-5.0),
    "8 x 25, in few subjects": singles(8, 25, spread=(2, 0, 1, 1), odds=-5.0),
    "8 x 5, few leaks": singles(8, 5, odds=-5.0),
}
SCHEMES = {
    "prompts": Design.over_prompts,
    "every level": Design.every_level,
    "subjects": Design.percentiles,
    "evaluate": Design.interval,
}


def intervals(design: Design, sets: int, scheme: Callable[[Design, Values, int], Interval] = Design.interval) -> Values:
    """[sets, 2]: low and high of each set's interval."""
    rng = np.random.default_rng(0)
    return np.array([scheme(design, design.draw(rng), seed)[1:] for seed in range(sets)])


def coverage(design: Design, sets: int, scheme: Callable[[Design, Values, int], Interval] = Design.interval) -> float:
    """The share of sets whose interval has the population's mean in it."""
    low, high = intervals(design, sets, scheme).T
    return float(np.mean((low <= design.truth) & (design.truth <= high)))


def _rows(sets: int) -> Iterator[tuple[str, ...]]:
    yield ("drawn over", *SCHEMES)
    for name, design in (MEANS | RATES | CONCENTRATED).items():
        table = design.odds is None and len(set(design.prompts)) == 1  # what `every_level` takes
        schemes = (scheme if table or scheme is not Design.every_level else None for scheme in SCHEMES.values())
        yield (name, *("-" if scheme is None else f"{coverage(design, sets, scheme):.3f}" for scheme in schemes))


def _few(sets: int) -> Iterator[tuple[str, ...]]:
    effects = (normal, skewed, exponential)
    yield ("evaluate, subjects' means alone", *(effect.__name__ for effect in effects))
    for count in (2, 3, 4, 5, 6, 8, 10, 12, 15, 30):
        designs = (singles(count, 1, spread=(1, 0, 0, 0), effect=effect) for effect in effects)
        yield (str(count), *(f"{coverage(design, sets):.3f}" for design in designs))


if __name__ == "__main__":
    print(aligned([*_rows(1000)], words=1), aligned([*_few(4000)], words=1), sep="\n\n")
