"""Variants compared where they have moved equally far from the model before training, and not after equally many steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from focusdpo.studies.ablation.jobs import Point, Result
from focusdpo.studies.ablation.statistics import Table, tabulate
from focusdpo.studies.ablation.variants import Change
from focusdpo.studies.ablation.yardsticks import Measure

DRIFT = "drift/whole"  # the measure of how far: the mean of ||v - v_ref||^2


class NoDriftError(ValueError):
    """Why there is no drift at which to compare."""


@dataclass(frozen=True)
class EqualDrift:
    """Variants at one drift.

    measure: whose gain says which drift. drift: there. table: of the measures at it.
    """

    measure: str
    drift: float
    table: Table

    def title(self, names: Mapping[str, str]) -> str:
        label = self.table.measures[self.measure].label
        return f"At equal drift, {self.drift:.3g}, where {names[self.table.baseline]} has half of its gain in: {label}"


def at_equal_drift(
    results: Sequence[Result], changes: Sequence[Change], baseline: str, measures: Mapping[str, Measure], measure: str
) -> EqualDrift:
    """All measures of all variants at the drift at which the baseline has half of what it gains.

    Its gain is from the model before training to its best point, of means over seeds and items; the drift at half of it is
    interpolated linearly in log drift between points, and so are each training's values of each item at that drift. A
    training that does not come to it, or whose first point is beyond it, is left out and named: nothing is extrapolated.

    Args:
        results: with `DRIFT` and the measures at the points of their curves.
        changes, measures: as of `tabulate`.
        baseline: the variant.
        measure: of which more or less is better.

    Raises:
        NoDriftError: there is no such drift.
    """
    drift = drift_of_half(results, baseline, measure, measures[measure])
    shown = {name: kind for name, kind in measures.items() if name != DRIFT}
    trained = [change for change in changes if change.trained]
    found = [values_at(result, drift) for result in results if any(result.variant == change.name for change in trained)]
    return EqualDrift(measure, drift, tabulate(found, trained, baseline, shown, "equal drift"))


def drift_of_half(results: Sequence[Result], variant: str, measure: str, kind: Measure) -> float:
    """The drift at which a variant has half of its gain; NoDriftError where there is none."""
    start = next((point for result in results for point in result.curve if point.step == 0 and measure in point.values), None)
    if start is None:
        raise NoDriftError(f'nothing has {measure} of the model before training, which is the variant "base"')
    curves = curves_of(results, variant, DRIFT, measure)
    if not curves:
        raise NoDriftError(f"no training of {variant} has {DRIFT} and {measure} in its course")
    means = mean_curve(curves, measure)
    sign = -1 if kind.better == "less" else 1
    gains = [sign * (mean - start.mean(measure)) for _, _, mean in means]
    half = max(gains, default=-1) / 2
    if not half > 0:
        raise NoDriftError(f"{variant} gains nothing in {measure} at any of its points")
    place = next(place for place, gain in enumerate(gains) if gain >= half)
    if place == 0 and gains[0] > half:
        raise NoDriftError(f"{variant} has half of its gain in {measure} before its first point; judge at more --points")
    if gains[place] == half:
        return means[place][1]
    share = (half - gains[place - 1]) / (gains[place] - gains[place - 1])
    before, after = means[place - 1][1], means[place][1]
    if not min(before, after) > 0:
        raise NoDriftError(f"{variant} has half of its gain in {measure} where its drift is 0")
    return math.exp((1 - share) * math.log(before) + share * math.log(after))


def curves_of(results: Sequence[Result], variant: str, *measures: str) -> list[list[Point]]:
    """Of each training of a variant that came through, the points that have the measures; no empty ones."""
    own = [result.curve for result in results if result.variant == variant and result.failed is None]
    curves = [[point for point in curve if point.step > 0 and set(measures) <= set(point.values)] for curve in own]
    return [curve for curve in curves if curve]


def mean_curve(curves: Sequence[Sequence[Point]], measure: str) -> list[tuple[int, float, float]]:
    """Step, drift and a measure at the points that all curves have, as means over the curves."""
    steps = sorted(set.intersection(*({point.step for point in curve} for curve in curves)))
    points = [[point for curve in curves for point in curve if point.step == step] for step in steps]

    def mean(name: str, place: int) -> float:
        return float(np.mean([point.mean(name) for point in points[place]]))

    return [(step, mean(DRIFT, place), mean(measure, place)) for place, step in enumerate(steps)]


def values_at(result: Result, drift: float) -> Result:
    """A training's values where its drift is first the one that is asked for."""
    if result.failed is not None:
        return result
    points = [point for point in result.curve if DRIFT in point.values]
    drifts = [point.mean(DRIFT) for point in points]
    for (before, low), (after, high) in pairwise(zip(points, drifts, strict=True)):
        if 0 < low <= drift <= high:
            share = math.log(drift / low) / math.log(high / low) if high > low else 0.0
            values = {
                name: ((1 - share) * np.array(numbers) + share * np.array(after.values[name])).tolist()
                for name, numbers in before.values.items()
                if name in after.values
            }
            return replace(result, values=values)
    reached = f"goes from {min(drifts):.3g} to {max(drifts):.3g}" if drifts else "was not measured"
    return replace(result, values={}, failed=f"its drift {reached} at its points, and is not {drift:.3g} between two of them")
