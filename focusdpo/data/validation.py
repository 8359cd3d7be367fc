"""Looks at every file of a dataset before training, and reports all problems at once."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from focusdpo.data.checks import Check, CheckedPair, check_pair, compare_pairs
from focusdpo.data.dataset import PairDataset, PairSizes
from focusdpo.data.records import DatasetError, PairRecord, Problem
from focusdpo.data.sources import parse_pairs
from focusdpo.text import printable

logger = logging.getLogger(__name__)

LOGGED = 10  # warnings, before training; all are in the report
IMBALANCE = 10  # times as many references as the rarest class
FEW = 20  # references, which say nothing about balance


def load_pairs(path: str | Path, check: Check = "full", progress: bool = True) -> list[PairRecord]:
    """The records of a dataset, all of which are fit for training. Warnings are logged.

    Args:
        path: what `find_sources` takes: pairs.jsonl or its folder, shards, tables.
        check: "full" decodes every image, "headers" reads sizes only.
        progress: show a progress bar.

    Raises:
        FileNotFoundError: there is no such dataset.
        DatasetError: with every error found, each with file, line, field and remedy.
    """
    pairs, problems = check_pairs(path, check, progress)
    errors, warnings = _split(problems)
    if errors:
        raise DatasetError(errors)
    if warnings:
        lines = "\n".join(map(str, warnings[:LOGGED]))
        more = f"\nand {len(warnings) - LOGGED} more" if len(warnings) > LOGGED else ""
        logger.warning("%d warnings; `focusdpo data validate %s` lists all:\n%s%s", len(warnings), path, lines, more)
    return [pair.record for pair in pairs]


def check_pairs(path: str | Path, check: Check, progress: bool) -> tuple[list[CheckedPair], list[Problem]]:
    """All pairs that parse, and all problems, sorted by file and line. FileNotFoundError where there is no dataset."""
    records, problems = parse_pairs(path, progress)
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda record: check_pair(record, check), records)
        pairs = list(tqdm(found, total=len(records), desc="checking pairs", unit="pair", disable=not progress, leave=False))
    for pair in pairs:
        problems += pair.problems
    problems += compare_pairs(pairs)
    problems += _imbalance(pairs)
    return pairs, sorted(problems, key=lambda p: (str(p.file), p.line))


def _split(problems: list[Problem]) -> tuple[list[Problem], list[Problem]]:
    return [p for p in problems if p.severity == "error"], [p for p in problems if p.severity == "warning"]


def _classes(pairs: list[CheckedPair]) -> Counter[str]:
    return Counter(r.class_name for pair in pairs for r in pair.record.references if r.class_name is not None)


def _imbalance(pairs: list[CheckedPair]) -> list[Problem]:
    ranked = _classes(pairs).most_common()
    if sum(count for _, count in ranked) < FEW or len(ranked) < 2 or ranked[0][1] < IMBALANCE * ranked[-1][1]:
        return []
    (most, many), (least, few) = ranked[0], ranked[-1]
    message = f"classes are out of balance: {many} references of {most}, {few} of {least}"
    first = pairs[0].record
    return [Problem(first.file, 1, "class_name", message, "add pairs of rare classes, or take some out", "warning")]


@dataclass(frozen=True)
class Report:
    """What `focusdpo data validate` found; `pairs` counts sound ones, `layouts` by the sizes that training brings them to."""

    path: str
    pairs: int
    errors: list[Problem]
    warnings: list[Problem]
    classes: dict[str, int]
    unnamed: int
    layouts: dict[PairSizes, int]

    @property
    def may_start(self) -> bool:
        return not self.errors

    def as_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "may_start": self.may_start,
            "pairs": self.pairs,
            "errors": len(self.errors),
            "warnings": len(self.warnings),
            "problems": [{**asdict(p), "file": str(p.file)} for p in (*self.errors, *self.warnings)],
            "classes": self.classes,
            "references_without_class": self.unnamed,
            "layouts": [{**asdict(sizes), "pairs": count} for sizes, count in self.layouts.items()],
        }

    def __str__(self) -> str:
        lines = [*map(str, self.errors), *map(str, self.warnings)]
        if self.classes or self.unnamed:
            counts = [f"{name} {count}" for name, count in self.classes.items()]
            lines.append("references: " + ", ".join([*counts, *([f"without class {self.unnamed}"] if self.unnamed else [])]))
        lines += [f"layout: {count} of {sizes}" for sizes, count in self.layouts.items()]
        verdict = "training may start" if self.may_start else "training would not start"
        lines.append(
            f"{self.path}: {self.pairs} sound pairs, {len(self.errors)} errors, {len(self.warnings)} warnings: {verdict}"
        )
        return "\n".join(map(printable, lines))


def validate(
    path: str | Path, check: Check, dataset: Callable[[Sequence[PairRecord]], PairDataset], progress: bool = True
) -> Report:
    """Everything there is to say about a dataset.

    Args:
        path: what `find_sources` takes.
        check: "full" decodes every image, "headers" reads sizes only.
        dataset: brings records to size, as a run would; by it layouts are counted.
        progress: show a progress bar.

    Raises:
        FileNotFoundError: there is no such dataset.
    """
    pairs, problems = check_pairs(path, check, progress)
    errors, warnings = _split(problems)
    bad = {(p.file, p.line) for p in errors}
    sound = [pair.record for pair in pairs if (pair.record.file, pair.record.line) not in bad]
    try:
        layouts = Counter(dataset(sound).sizes)
    except DatasetError as error:  # of references that cannot be brought to size
        errors = [*errors, *error.problems]
        bad = {(p.file, p.line) for p in errors}
        sound = [record for record in sound if (record.file, record.line) not in bad]
        layouts = Counter(dataset(sound).sizes)
    unnamed = sum(reference.class_name is None for pair in pairs for reference in pair.record.references)
    return Report(
        str(path), len(sound), errors, warnings, dict(_classes(pairs).most_common()), unnamed, dict(layouts.most_common())
    )
