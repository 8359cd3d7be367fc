"""What the microcosm's comparison says: few comparisons, fixed before it was run, on each base, and how they are to be read."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from focusdpo.metrics import LEVEL
from focusdpo.studies.ablation.equal_drift import EqualDrift, values_at
from focusdpo.studies.ablation.jobs import Result
from focusdpo.studies.ablation.statistics import NOTHING, Cell, Table, judged, tabulate
from focusdpo.studies.ablation.two_way import POWER
from focusdpo.studies.ablation.variants import VARIANTS
from focusdpo.studies.config import MIDDLE, At, Base

Fixed = tuple[str, str, str]  # variant, what it is compared with, and the measure
# Each at equal drift and at the end of training.
COMPARISONS: tuple[Fixed, ...] = (
    ("focus", "prior", "identity"),
    ("focus", "prior", "leakage"),
    ("focus", "prior", "win/inside"),
    ("focus", "dpo", "identity"),
    ("truth", "prior", "identity"),
    ("structure", "random", "identity"),
    ("per_subject", "random", "identity"),
    ("estimate", "prior", "identity"),
    ("focus_estimate", "prior", "identity"),
    ("subject", "prior", "identity"),
    ("detail", "prior", "identity"),
)
WITH_DPO = ("focus", "dpo", "identity")  # not made where Diffusion-DPO and the prior alone are one


class Outcome(NamedTuple):
    """An ablation's tables at the end and at equal drift (or why there is none), and its results."""

    table: Table
    equal: EqualDrift | str
    results: Sequence[Result]


@dataclass(frozen=True)
class Comparison:
    """One of the comparisons, on a base, at the end or at equal drift.

    cell: with difference and verdict; None where a variant has no numbers there. seeds: in how many trainings of how many.
    """

    base: Base
    at: At
    fixed: Fixed
    cell: Cell | None
    seeds: tuple[int, int]

    @property
    def label(self) -> str:
        name, baseline, measure = self.fixed
        return f"{measure}: {_label(name)} - {_label(baseline)}"

    @property
    def is_better(self) -> bool | None:
        return None if self.cell is None else self.cell.is_better

    def text(self) -> str:
        """One line of the table."""
        start = f"  {'equal drift' if self.at == 'equal drift' else 'end':<12}{self.label:<72}"
        if self.cell is None or self.cell.difference is None:
            return f"{start}{NOTHING[self.at]}"
        gap, verdict = self.cell.difference, self.cell.verdict
        interval = "-" if math.isnan(gap.low) else f"{gap.low:+.3f}, {gap.high:+.3f}"
        some = "" if self.seeds[0] == self.seeds[1] else f"  {self.seeds[0]} of {self.seeds[1]} trainings"
        if verdict is None:
            return f"{start}{gap.mean:+.3f} [{interval}]{some}"
        said = {None: "not told apart", True: "better", False: "worse"}[verdict.is_better]
        primary = " (primary)" if verdict.is_primary else ""
        judgement = f"p {verdict.p:.2g}, visible from {verdict.detectable:.3f}: {said}{primary}"
        return f"{start}{gap.mean:+.3f} [{interval}]  {judgement}{some}"


def compared(found: Mapping[Base, Outcome], one_arm: Collection[Base], primary: Sequence[str], at: At) -> list[Comparison]:
    """The comparisons of all bases, judged as one family: base by base, at equal drift before the end.

    Args:
        found: by base.
        one_arm: bases on which Diffusion-DPO and the prior alone are one.
        primary, at: the comparison that is judged by itself, as in `focusdpo ablate`, on the middle model; of the first base
            where that is none of them. Where the middle model has no equal drift none takes its place.
    """
    parts: list[tuple[Base, Outcome, Table]] = []
    for base in sorted(found, key=lambda base: base != MIDDLE):  # whose primary comparison it is
        wanted = _wanted(found[base], primary, base in one_arm)
        parts += [(base, found[base], table) for table in _tables(found[base], wanted)]
    is_made = at == "end" or MIDDLE not in found or isinstance(found[MIDDLE].equal, EqualDrift)
    tables = judged([table for *_, table in parts], primary if is_made else (), at)
    comparisons = []
    for base, outcome in found.items():
        for place in ("equal drift", "end") if isinstance(outcome.equal, EqualDrift) else ("end",):
            own = [table for (other, *_), table in zip(parts, tables, strict=True) if other == base and table.at == place]
            for fixed in _wanted(outcome, primary, base in one_arm):
                table = next(table for table in own if table.baseline == fixed[1])
                row = next(row for row in table.rows if row.variant == fixed[0])
                cell = row.cell(fixed[2])
                cell = None if cell is None or cell.difference is None else cell
                trained = {result.seed for result in outcome.results if result.variant == fixed[0]}
                seeds = 0 if cell is None or cell.difference is None else cell.difference.seeds
                comparisons.append(Comparison(base, table.at, fixed, cell, (seeds, len(trained))))
    return comparisons


def text_of_verdicts(
    found: Mapping[Base, Outcome], comparisons: Sequence[Comparison], why_not: Mapping[Base, str | None]
) -> str:
    """The comparisons with their verdicts, and what follows from them, by base.

    Args:
        found, comparisons: of `compared`.
        why_not: why a base cannot test a field of its features; None where it can.
    """
    verdicts = [one.cell.verdict for one in comparisons if one.cell is not None and one.cell.verdict is not None]
    primary = next((one for one in comparisons if one.cell and one.cell.verdict and one.cell.verdict.is_primary), None)
    others = f"all {len(verdicts)}" if primary is None else f"all {len(verdicts) - 1} others"
    itself = (
        "No comparison is judged by itself; "
        if primary is None
        else f"The primary comparison, on the {primary.base} model, is judged by itself; "
    )
    lines = [
        f"Differences with their {LEVEL:.0%} intervals over trainings and scenes together, each by itself. {itself}better and "
        f"worse: told apart after Holm's correction over {others}; visible from: the smallest true difference that "
        f"would have been found with {POWER:.0%} power at that level.",
    ]
    for base, outcome in found.items():
        own = [one for one in comparisons if one.base == base]
        lines += ["", _heading(base, outcome), *(one.text() for one in own)]
        if isinstance(outcome.equal, str):
            lines.append(f"  not compared at equal drift: {outcome.equal}")
        lines += [f"  {sentence}" for sentence in _reading(own, why_not[base])]
    return "\n".join(lines)


def _label(variant: str) -> str:
    return VARIANTS[variant].label if variant in VARIANTS else variant


def _wanted(outcome: Outcome, primary: Sequence[str], is_one_arm: bool) -> list[Fixed]:
    """The comparisons that can be made of an ablation's variants and measures; the primary one first."""
    table = outcome.table
    chosen = [(primary[0], table.baseline, primary[1])] if primary else []
    fixed = dict.fromkeys([*chosen, *COMPARISONS])
    known = {row.variant for row in table.rows}
    return [one for one in fixed if {*one[:2]} <= known and one[2] in table.measures and not (is_one_arm and one == WITH_DPO)]


def _tables(outcome: Outcome, wanted: Sequence[Fixed]) -> list[Table]:
    """At equal drift and at the end, of the comparisons alone: a table for each of what they are with."""
    parts: list[tuple[At, Sequence[Result]]] = [("end", outcome.results)]
    if isinstance(outcome.equal, EqualDrift):
        drift = outcome.equal.drift
        parts.insert(0, ("equal drift", [values_at(result, drift) for result in outcome.results]))
    tables = []
    for at, results in parts:
        for baseline in dict.fromkeys([outcome.table.baseline, *(one[1] for one in wanted)]):
            own = {(name, measure) for name, other, measure in wanted if other == baseline}
            known = [row.variant for row in outcome.table.rows if row.variant == baseline or row.variant in {x for x, _ in own}]
            changes = [VARIANTS[name] if name in VARIANTS else replace(VARIANTS["focus"], name=name) for name in known]
            table = tabulate(results, changes, baseline, outcome.table.measures, at)
            rows = [
                replace(row, cells=tuple(cell for cell in row.cells if (row.variant, cell.measure) in own))
                for row in table.rows
            ]
            tables.append(replace(table, rows=tuple(rows), measures=outcome.table.measures))
    return tables


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


def _reading(comparisons: Sequence[Comparison], why_not: str | None) -> list[str]:
    """What the comparisons mean, as it was written down before the run: at equal drift, or at the end where there is none."""
    places = {one.at for one in comparisons}
    at = "equal drift" if "equal drift" in places else "end"
    known = {one.fixed: one.is_better for one in comparisons if one.at == at and one.cell is not None}

    def is_better(name: str, baseline: str = "prior") -> bool | None:
        return known.get((name, baseline, "identity"))

    def is_known(name: str, baseline: str = "prior") -> bool:
        return (name, baseline, "identity") in known

    said = []
    if is_known("focus"):
        kind = {True: "better than", False: "worse than", None: "not told from"}[is_better("focus")]
        said.append(f"FocusDPO is {kind} the prior alone.")
    if is_known("truth"):
        said.append(
            "The true places are better than the prior alone: weighting within the prior can help here."
            if is_better("truth")
            else "The true places are not told from the prior alone, or worse: weighting within the prior was not seen to help."
        )
    if why_not is not None:
        said.append(f"This base cannot test the learned field: {why_not}.")
    elif is_known("structure", "random"):
        learned = is_better("structure", "random")
        said.append(
            "The learned field is better than random places: the method does what it says."
            if learned
            else "The learned field is not told from random places of its size, or worse."
            + (" As the true places help, the features are at fault." if is_better("truth") else "")
        )
    for name, what in (("estimate", "The estimate field"), ("subject", "One sigmoid for each subject")):
        if is_known(name):
            said.append(f"{what} is {'better than' if is_better(name) else 'not told from, or worse than,'} the prior alone.")
    return said
