"""What the microcosm's comparison says: few comparisons, fixed before it was run, on each base, and how they are to be read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from focusdpo.metrics import LEVEL
from focusdpo.studies.ablation.equal_drift import EqualDrift, values_at
from focusdpo.studies.ablation.jobs import Result
from focusdpo.studies.ablation.statistics import Cell, Table, judged, tabulate
from focusdpo.studies.ablation.two_way import POWER
from focusdpo.studies.ablation.variants import VARIANTS
from focusdpo.studies.config import At, Base

# Variant, what it is compared with, and the measure; each at equal drift and at the end of training.
COMPARISONS = (
    ("focus", "prior", "identity"),
    ("focus", "prior", "leakage"),
    ("focus", "prior", "win/inside"),
    ("truth", "prior", "identity"),
    ("focus", "dpo", "identity"),
    ("structure", "random", "identity"),
    ("per_subject", "random", "identity"),
    ("estimate", "prior", "identity"),
    ("focus_estimate", "prior", "identity"),
    ("subject", "prior", "identity"),
    ("detail", "prior", "identity"),
)


class Outcome(NamedTuple):
    """An ablation's tables at the end and at equal drift (or why there is none), and its results."""

    table: Table
    equal: EqualDrift | str
    results: Sequence[Result]


def text_of_verdicts(found: Mapping[Base, Outcome], why_not: Mapping[Base, str | None], primary: Sequence[str], at: At) -> str:
    """The comparisons of all bases with their verdicts, judged as one family, and what follows from them by base.

    Args:
        found: by base.
        why_not: why a base cannot test a field of its features; None where it can.
        primary, at: the comparison that is judged by itself, as in `focusdpo ablate`.
    """
    places = [(base, table) for base, outcome in found.items() for table in _tables(outcome)]
    tables = judged([table for _, table in places], primary, at)
    count = sum(not verdict.is_primary for table in tables for verdict in table.verdicts)
    lines = [
        f"Differences with their {LEVEL:.0%} intervals over trainings and scenes together. The primary comparison is judged by "
        f"itself on each base, all {count} others with Holm's correction; visible from: the smallest true difference that "
        f"would have been found with {POWER:.0%} power at that level.",
    ]
    for base, outcome in found.items():
        lines += ["", _heading(base, outcome)]
        cells: dict[tuple[str, str], Cell] = {}
        for (own, _), table in zip(places, tables, strict=True):
            for name, baseline, measure in COMPARISONS if own == base else ():
                row = next((row for row in table.rows if row.variant == name), None)
                cell = row.cell(measure) if row is not None and table.baseline == baseline else None
                if cell is not None and cell.difference is not None and cell.verdict is not None:
                    lines.append(_line(table, name, cell))
                    if table.at == "equal drift":
                        cells[name, measure] = cell
        if isinstance(outcome.equal, str):
            lines.append(f"  not compared at equal drift: {outcome.equal}")
        lines += [f"  {sentence}" for sentence in _reading(cells, why_not[base])]
    return "\n".join(lines)


def _tables(outcome: Outcome) -> list[Table]:
    """At equal drift and at the end, of the fixed comparisons alone, a table for each of their baselines."""
    table, equal, results = outcome
    parts = [(table, results)]
    if isinstance(equal, EqualDrift):
        parts.insert(0, (equal.table, [values_at(result, equal.drift) for result in results]))
    tables = []
    for whole, values in parts:
        tables.append(_kept(whole, whole.baseline))
        known = [row.variant for row in whole.rows]
        for baseline in dict.fromkeys(other for _, other, _ in COMPARISONS if other != whole.baseline and other in known):
            wanted = {baseline, *(name for name, other, _ in COMPARISONS if other == baseline)}
            changes = [VARIANTS[name] for name in known if name in wanted]
            tables.append(_kept(tabulate(values, changes, baseline, whole.measures, whole.at), baseline))
    return tables


def _kept(table: Table, baseline: str) -> Table:
    """The fixed comparisons with a baseline, and the baseline."""
    wanted = {(name, measure) for name, other, measure in COMPARISONS if other == baseline}
    rows = []
    for row in table.rows:
        cells = [cell for cell in row.cells if (row.variant, cell.measure) in wanted or row.variant == baseline]
        rows.append(replace(row, cells=tuple(cells)))
    return replace(table, rows=tuple(rows))


def _heading(base: Base, outcome: Outcome) -> str:
    said = [f"{base} model"]
    for name, what in (("base", "before training"), ("prior", "with the prior alone at the end")):
        row = next((row for row in outcome.table.rows if row.variant == name), None)
        cell = row.cell("identity") if row is not None else None
        if cell is not None:
            said.append(f"identity {what} {cell.estimate.mean:.3f}")
    if isinstance(outcome.equal, EqualDrift):
        said.append(f"equal drift at {outcome.equal.drift:.3g}")
    return "; ".join(said)


def _line(table: Table, name: str, cell: Cell) -> str:
    gap, verdict = cell.difference, cell.verdict
    assert gap is not None and verdict is not None
    interval = "-" if math.isnan(gap.low) else f"{gap.low:+.3f}, {gap.high:+.3f}"
    what = f"{cell.measure}: {VARIANTS[name].label} - {VARIANTS[table.baseline].label}"
    said = {None: "not told apart", True: "better", False: "worse"}[verdict.is_better]
    place = "equal drift" if table.at == "equal drift" else "end"
    primary = " (primary)" if verdict.is_primary else ""
    return (
        f"  {place:<12}{what:<68}{gap.mean:+.3f} [{interval}]  p {verdict.p:.2g}, visible from {verdict.detectable:.3f}: "
        f"{said}{primary}"
    )


def _reading(cells: Mapping[tuple[str, str], Cell], why_not: str | None) -> list[str]:
    """What the comparisons at equal drift mean, as it was written down before the run."""

    def is_better(name: str) -> bool | None:
        cell = cells.get((name, "identity"))
        return None if cell is None else cell.is_better

    said = []
    if ("truth", "identity") in cells:
        helps = is_better("truth")
        said.append(
            "The true places are better than the prior alone: weighting within the prior can help here."
            if helps
            else "The true places are not told from the prior alone, or worse: weighting within the prior was not seen to help."
        )
    if why_not is not None:
        said.append(f"This base cannot test the learned field: {why_not}.")
    elif ("structure", "identity") in cells:
        said.append(
            "The learned field is better than random places: the method does what it says."
            if is_better("structure")
            else "The learned field is not told from random places of its size, or worse."
        )
    for name, what in (("estimate", "The estimate field"), ("subject", "One sigmoid for each subject")):
        if (name, "identity") in cells:
            said.append(f"{what} is {'better than' if is_better(name) else 'not told from, or worse than,'} the prior alone.")
    return said
