"""Tables of means over seeds and items, which differences survive so many comparisons, and which could have been seen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from focusdpo.foundation.text import counted
from focusdpo.metrics import LEVEL
from focusdpo.studies.ablation.jobs import Result
from focusdpo.studies.ablation.two_way import POWER, Estimate, estimate
from focusdpo.studies.ablation.variants import Change
from focusdpo.studies.ablation.yardsticks import Measure
from focusdpo.studies.config import At

MAX_DIGITS = 6  # behind the point; what differs behind them is of no account
NOTHING = {"end": "failed", "equal drift": "not reached"}  # where a variant has no number
COUNTED = {"end": "trainings came through", "equal drift": "trainings are compared at that drift"}

Values = Mapping[int, Sequence[float]]  # by seed, one for each item


def difference(values: Values, baseline: Values, is_share: bool, untrained: str | None = None) -> Estimate | None:
    """The mean difference to a baseline, seed by seed and item by item; None without a seed in common.

    Args:
        values, baseline: NaN counts as missing.
        is_share: whether values can be from 0 to 1 only.
        untrained: which side, "values" or "baseline", is no training, so that its one seed stands beside each of the other's.
    """
    if untrained == "values":
        values = dict.fromkeys(baseline, next(iter(values.values())))
    elif untrained == "baseline":
        baseline = dict.fromkeys(values, next(iter(baseline.values())))
    gaps = [np.subtract(values[seed], baseline[seed]).tolist() for seed in values if seed in baseline]
    return estimate(gaps, is_share, is_difference=True) if gaps else None


@dataclass(frozen=True)
class Verdict:
    """What a comparison to the baseline says.

    level: the confidence it was judged at: `LEVEL` for the primary one, and for any other what Holm's correction leaves it.
    p: as it is compared with 1 - `LEVEL`, corrected by Holm unless `is_primary`. detectable: the smallest true difference that
    would have been found at `level` with `POWER`. is_better: None where the difference is not told from 0.
    """

    level: float
    p: float
    detectable: float
    is_primary: bool
    is_better: bool | None


@dataclass(frozen=True)
class Cell:
    """A measure of a variant: its estimate, its difference to the baseline (None for itself), and what that says.

    verdict: None before `judged`, and where nothing is to be judged: no difference, none with an interval, or a measure of
    which neither more nor less is better.
    """

    measure: str
    estimate: Estimate
    difference: Estimate | None
    verdict: Verdict | None = None

    @property
    def is_better(self) -> bool | None:
        return None if self.verdict is None else self.verdict.is_better


@dataclass(frozen=True)
class Row:
    """A variant. seeds: how many of its trainings are in the table; failed: why the others are not."""

    variant: str
    seeds: int
    cells: tuple[Cell, ...]
    failed: tuple[str, ...]

    def cell(self, measure: str) -> Cell | None:
        return next((cell for cell in self.cells if cell.measure == measure), None)


@dataclass(frozen=True)
class Table:
    """All variants, and the measures that were taken. at: where in their trainings."""

    rows: tuple[Row, ...]
    measures: dict[str, Measure]
    baseline: str
    at: At = "end"

    def digits(self, measure: str, least: int) -> int:
        """Digits behind the point for a measure's numbers: more than `least` where so many would show all means as one."""
        found = (cell.estimate.mean for row in self.rows if (cell := row.cell(measure)))
        means = [mean for mean in found if math.isfinite(mean)]

        def shown(digits: int) -> int:
            return len({f"{mean:.{digits}f}" for mean in means})

        if shown(least) > 1:
            return least
        return next(digits for digits in range(least, MAX_DIGITS + 1) if shown(digits) == shown(MAX_DIGITS))

    @property
    def verdicts(self) -> list[Verdict]:
        return [cell.verdict for row in self.rows for cell in row.cells if cell.verdict is not None]

    def said(self, cell: Cell, digits: int) -> str:
        """What a cell's verdict rests on; "" where it has none."""
        if cell.verdict is None:
            return ""
        seen = cell.verdict.detectable
        some = seen <= 1 or not self.measures[cell.measure].is_share
        p = f"p {cell.verdict.p:.3f}" if cell.verdict.p >= 0.001 else "p < 0.001"
        kind = "primary " if cell.verdict.is_primary else ""
        return f"{kind}{p}, {f'visible from {seen:.{digits}f}' if some else 'nothing visible'}"

    def fate(self, row: Row) -> str:
        return f"{row.seeds} of {row.seeds + len(row.failed)} {COUNTED[self.at]}"


def tabulate(
    results: Sequence[Result], changes: Sequence[Change], baseline: str, measures: Mapping[str, Measure], at: At = "end"
) -> Table:
    """Estimates and differences of all measures that were taken, by variant; `judged` adds what they say."""
    trained = {change.name: change.trained for change in changes}
    measured = {name: measure for name, measure in measures.items() if any(name in result.values for result in results)}
    rows = []
    for variant in trained:
        own, others = ([result for result in results if result.variant == name] for name in (variant, baseline))
        untrained = None if trained[variant] and trained[baseline] else "baseline" if trained[variant] else "values"
        cells = []
        for name, measure in measured.items():
            numbers, other = ({one.seed: one.values[name] for one in part if name in one.values} for part in (own, others))
            if not numbers:
                continue
            gap = difference(numbers, other, measure.is_share, untrained) if other and variant != baseline else None
            cells.append(Cell(name, estimate(list(numbers.values()), measure.is_share), gap))
        failed = tuple(f"seed {result.seed}: {result.failed}" for result in own if result.failed)
        rows.append(Row(variant, len(own) - len(failed), tuple(cells), failed))
    return Table(tuple(rows), measured, baseline, at)


def judged(tables: Sequence[Table], primary: Sequence[str] = (), at: At = "end") -> list[Table]:
    """The tables with the verdicts of all their comparisons, as one family.

    The primary comparison is judged at `LEVEL` by itself. All others have Holm's correction (Scandinavian Journal of Statistics
    6, 1979): with a chance of `LEVEL` at least none of those that are marked is marked by chance.

    Args:
        tables: of one ablation, or of one on each of several models.
        primary: variant and measure of the comparison that was chosen before there were results; () for none.
        at: of the table that it is in, the first that has the first table's baseline.
    """
    Place = tuple[int, str, str]  # number of the table, variant and measure
    places: dict[Place, float] = {}
    for number, table in enumerate(tables):
        for row in table.rows:
            for cell in row.cells:
                if (
                    cell.difference is not None
                    and math.isfinite(cell.difference.p)
                    and table.measures[cell.measure].better != "neither"
                ):
                    places[number, row.variant, cell.measure] = cell.difference.p

    home = (number for number, table in enumerate(tables) if table.at == at and table.baseline == tables[0].baseline)
    chosen = (next(home, -1), *primary)
    others = sorted((place for place in places if place != chosen), key=lambda place: places[place])
    corrected = {place: p for place, p in places.items() if place == chosen}
    levels, worst = dict.fromkeys(corrected, LEVEL), 0.0
    for rank, place in enumerate(others):
        worst = max(worst, min(places[place] * (len(others) - rank), 1.0))
        corrected[place] = worst
    found = sum(corrected[place] <= 1 - LEVEL for place in others)
    for rank, place in enumerate(others):  # what is not found was judged as the first that is not
        levels[place] = 1 - (1 - LEVEL) / (len(others) - min(rank, found))

    def with_verdict(number: int, row: Row, cell: Cell) -> Cell:
        place, table = (number, row.variant, cell.measure), tables[number]
        if place not in places or cell.difference is None:
            return cell
        better = (cell.difference.mean < 0) == (table.measures[cell.measure].better == "less")
        level, p = levels[place], corrected[place]
        is_better = better if p <= 1 - LEVEL else None
        return replace(cell, verdict=Verdict(level, p, cell.difference.detectable(level), place == chosen, is_better))

    return [
        replace(
            table,
            rows=tuple(replace(row, cells=tuple(with_verdict(number, row, cell) for cell in row.cells)) for row in table.rows),
        )
        for number, table in enumerate(tables)
    ]


def how_judged(tables: Sequence[Table], names: Mapping[str, str]) -> list[str]:
    """Sentences on what intervals and verdicts of judged tables are."""
    baseline = names[tables[0].baseline]
    count = sum(not verdict.is_primary for table in tables for verdict in table.verdicts)
    primary = [
        f"{names[row.variant]} in {cell.measure} at {'the end' if table.at == 'end' else 'equal drift'}"
        for table in tables
        for row in table.rows
        for cell in row.cells
        if cell.verdict is not None and cell.verdict.is_primary
    ]
    others = f"all {'others, ' if primary else ''}{counted(count, 'comparison')} with it"
    level, power = f"{LEVEL * 100:.0f} %", f"{POWER * 100:.0f} %"
    lines = [
        f"Each interval is a {level} interval by itself, over trainings and held-out items together, not corrected for the "
        "number of comparisons; where there is one training (*) it is over items alone and speaks of this training.",
        f"better, worse: told from {baseline} at {level} after Holm's correction over {others}; p is corrected as well.",
        f"visible from: the smallest true difference that would have been found with {power} power at the level at which the "
        "comparison was judged, by the standard error of this very ablation.",
    ]
    if primary:
        lines.insert(2, f"The primary comparison is judged by itself at {level}: {primary[0]}.")
    return lines


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
                lines.append(f"  {names[row.variant]:<{width}}  {NOTHING[table.at]}")
                continue
            line = f"  {names[row.variant]:<{width}}  {_text(cell.estimate, digits)}"
            if cell.difference is not None:
                line += f"   difference {_text(cell.difference, digits, '+')}"
            mark = "" if cell.is_better is None else "  better" if cell.is_better else "  worse"
            lines.append(f"{line}   {table.said(cell, digits)}{mark}".rstrip())
    for row in table.rows:
        if row.failed:
            lines += ["", f"{names[row.variant]}: {table.fate(row)}", *row.failed]
    return "\n".join(lines).strip("\n")


def _text(found: Estimate, digits: int, sign: str = "") -> str:
    form = f"{sign}.{digits}f"
    interval = "-" if math.isnan(found.low) else f"{found.low:{form}}, {found.high:{form}}"
    return f"{found.mean:{sign}{digits + 4}.{digits}f} [{interval}]{'*' if found.seeds == 1 else ''}"
