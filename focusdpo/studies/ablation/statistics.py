"""Means over seeds, and what they can be told apart by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from focusdpo.metrics.bootstrap import mean_interval
from focusdpo.metrics.shares import share_interval
from focusdpo.studies.ablation.jobs import Result
from focusdpo.studies.ablation.variants import Change
from focusdpo.studies.ablation.yardsticks import Measure

DECIMALS = 12  # what differs behind them differs by rounding, of which Student's interval would make a certainty
MAX_DIGITS = 6  # behind the point; what differs behind them is of no account
SAME_SIGN = 6  # items that all differ by one value, and so to one side: by chance in fewer than 5 % of cases, by the sign test


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval, which is NaN where the values say nothing of it."""

    mean: float
    low: float
    high: float

    @property
    def differs(self) -> bool:
        """Of a difference: whether the interval leaves 0 out."""
        return bool(self.low > 0 or self.high < 0)


def over_seeds(values: Mapping[int, Sequence[float]], is_share: bool = False) -> Estimate:
    """The mean over seeds of means over held-out items.

    With several seeds it is Student's interval over their means, of shares `share_interval`: it says what another training
    would give. With one it is a bootstrap over the items: what other items would give; and so where all seeds have the same
    mean, of which Student's would make a certainty.

    Args:
        values: by seed, one for each item; NaN counts as missing.
        is_share: whether they can be from 0 to 1 only.
    """
    table = np.array([list(numbers) for numbers in values.values()], dtype=float)  # [seeds, items]
    table = table[~np.isnan(table).all(axis=1)]
    if not table.size:
        return Estimate(np.nan, np.nan, np.nan)
    means = np.nanmean(table, axis=1).round(DECIMALS)
    if np.ptp(means) == 0:  # also of one seed
        items = np.nanmean(table[:, ~np.isnan(table).all(axis=0)], axis=0).round(DECIMALS)
        return Estimate(*mean_interval(items, is_share=is_share))
    if is_share:
        return Estimate(float(means.mean()), *share_interval(means))
    half = stats.t.ppf(0.975, len(means) - 1) * means.std(ddof=1) / np.sqrt(len(means))
    return Estimate(float(means.mean()), float(means.mean() - half), float(means.mean() + half))


def difference(
    values: Mapping[int, Sequence[float]],
    baseline: Mapping[int, Sequence[float]],
    untrained: Literal["values", "baseline"] | None = None,
) -> Estimate | None:
    """The mean difference to a baseline, seed by seed and item by item; None without a seed in common.

    Args:
        values, baseline: by seed, one for each item.
        untrained: which side is no training, so that its one seed stands beside each of the other's.
    """
    if untrained == "values":
        values = dict.fromkeys(baseline, next(iter(values.values())))
    elif untrained == "baseline":
        baseline = dict.fromkeys(values, next(iter(baseline.values())))
    common = [seed for seed in values if seed in baseline]
    if not common:
        return None
    gaps = {seed: np.subtract(values[seed], baseline[seed]).round(DECIMALS).tolist() for seed in common}
    found = over_seeds(gaps)
    every = {gap for numbers in gaps.values() for gap in numbers if not math.isnan(gap)}
    if len(every) == 1 and found.mean and min(map(len, gaps.values())) >= SAME_SIGN:
        return Estimate(found.mean, found.mean, found.mean)  # as where all pairs are told apart, and none was before
    return found


@dataclass(frozen=True)
class Cell:
    """A measure of a variant: its estimate, and its difference to the baseline (None for the baseline itself)."""

    measure: str
    estimate: Estimate
    difference: Estimate | None
    is_better: bool | None  # whether the difference leaves 0 out, and on which side; None where it does not


@dataclass(frozen=True)
class Row:
    """A variant. seeds: how many of its trainings came through; failed: what the others said."""

    variant: str
    seeds: int
    cells: tuple[Cell, ...]
    failed: tuple[str, ...]

    def cell(self, measure: str) -> Cell | None:
        return next((cell for cell in self.cells if cell.measure == measure), None)


@dataclass(frozen=True)
class Table:
    """All variants, and the measures that were taken."""

    rows: tuple[Row, ...]
    measures: dict[str, Measure]
    baseline: str

    def digits(self, measure: str, least: int) -> int:
        """Digits behind the point for a measure's numbers: more than `least` where so many would show all means as one."""
        found = (cell.estimate.mean for row in self.rows if (cell := row.cell(measure)))
        means = [mean for mean in found if math.isfinite(mean)]

        def shown(digits: int) -> int:
            return len({f"{mean:.{digits}f}" for mean in means})

        if shown(least) > 1:
            return least
        return next(digits for digits in range(least, MAX_DIGITS + 1) if shown(digits) == shown(MAX_DIGITS))


def tabulate(
    results: Sequence[Result],
    changes: Sequence[Change],
    baseline: str,
    measures: Mapping[str, Measure],
) -> Table:
    """Estimates and differences of all measures that were taken, by variant."""
    trained = {change.name: change.trained for change in changes}
    measured = {name: measure for name, measure in measures.items() if any(name in result.values for result in results)}
    rows = []
    for variant in trained:
        own, others = ([result for result in results if result.variant == name] for name in (variant, baseline))
        cells = []
        for name, measure in measured.items():
            numbers, other = ({one.seed: one.values[name] for one in part if name in one.values} for part in (own, others))
            if not numbers:
                continue
            side: Literal["values", "baseline"] | None = None
            if not (trained[variant] and trained[baseline]):
                side = "baseline" if trained[variant] else "values"
            gap = difference(numbers, other, side) if other and variant != baseline else None
            better = None
            if gap is not None and gap.differs and measure.better != "neither":
                better = (gap.mean < 0) == (measure.better == "less")
            cells.append(Cell(name, over_seeds(numbers, measure.is_share), gap, better))
        failed = tuple(f"seed {result.seed}: {result.failed}" for result in own if result.failed)
        rows.append(Row(variant, len(own) - len(failed), tuple(cells), failed))
    return Table(tuple(rows), measured, baseline)


def text_of(table: Table, names: Mapping[str, str]) -> str:
    """The table as text: a block per measure, a line per variant."""
    width = max(len(name) for name in names.values())
    lines = []
    for name, measure in table.measures.items():
        digits = table.digits(name, 4)
        lines += ["", measure.label + ("" if measure.better == "neither" else f" ({measure.better} is better)")]
        for row in table.rows:
            cell = row.cell(name)
            if cell is None:
                lines.append(f"  {names[row.variant]:<{width}}  failed")
                continue
            line = f"  {names[row.variant]:<{width}}  {_text(cell.estimate, digits)}"
            if cell.difference is not None:
                mark = "" if cell.is_better is None else "  better" if cell.is_better else "  worse"
                line += f"   difference {_text(cell.difference, digits, '+')}{mark}"
            lines.append(line)
    for row in table.rows:
        if row.failed:
            lines += [
                "",
                f"{names[row.variant]}: {row.seeds} of {row.seeds + len(row.failed)} trainings came through",
                *row.failed,
            ]
    return "\n".join(lines).strip("\n")


def _text(estimate: Estimate, digits: int, sign: str = "") -> str:
    form = f"{sign}.{digits}f"
    interval = "-" if math.isnan(estimate.low) else f"{estimate.low:{form}}, {estimate.high:{form}}"
    return f"{estimate.mean:{sign}{digits + 4}.{digits}f} [{interval}]"
