"""Looks at every file of a dataset before training, and reports all problems at once."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from tqdm.auto import tqdm

from focusdpo.data.checks import CheckedPair, Comparison, check_pair
from focusdpo.data.dataset import PairSizes, SizeRules
from focusdpo.data.formats import find_sources, items_of
from focusdpo.data.headers import INDEX
from focusdpo.data.lines import DatasetError, Problem
from focusdpo.data.records import PairRecord
from focusdpo.foundation.choices import Check
from focusdpo.foundation.garbage_collection import collector_paused
from focusdpo.foundation.text import counted, first_of, printable

logger = logging.getLogger(__name__)

LOGGED = 10  # warnings, before training; all are in the report
IMBALANCE = 10  # times as many references as the rarest class
FEW = 20  # references, which say nothing about balance
GROUP = 64  # pairs whose headers are read in one task
READERS = 1  # thread: two would wait for each other more than for the disk. Images are decoded on all cores
AHEAD = 32  # tasks, whose pairs are in memory

T = TypeVar("T")
S = TypeVar("S")


def load_pairs(path: str | Path, check: Check = "full", progress: bool = True, warn: bool = True) -> list[PairRecord]:
    """The records of a dataset, all of which are fit for training.

    Args:
        path: what `find_sources` takes: pairs.jsonl or its folder, shards, tables.
        check: "full" decodes every image, "headers" reads sizes only.
        progress: show a progress bar.
        warn: log warnings.

    Raises:
        FileNotFoundError: there is no such dataset.
        DatasetError: with every error found, each with file, line, field and remedy.
    """
    checks = Checks(path, check, progress)
    records = [pair.record for pair in checks]
    errors, warnings = _split(checks.problems)
    if errors:
        raise DatasetError(errors)
    if warnings and warn:
        lines = first_of(warnings, LOGGED, "\n")
        logger.warning("%s; `focusdpo data validate %s` lists all:\n%s", counted(len(warnings), "warning"), path, lines)
    return records


def check_pairs(path: str | Path, check: Check, progress: bool) -> tuple[list[CheckedPair], list[Problem]]:
    """All pairs that parse, and all problems, sorted by file and line. FileNotFoundError where there is no dataset."""
    checks = Checks(path, check, progress)
    return list(checks), checks.problems


class Checks:
    """Goes through a dataset once, holding a few pairs at a time: iterating gives those that parse, checked, in their order.

    Then `problems` has all that is wrong, by file and line, `classes` how often each class of a reference stands there, and
    `unnamed` how many references have none.

    Raises:
        FileNotFoundError: there is no such dataset.
    """

    def __init__(self, path: str | Path, check: Check, progress: bool) -> None:
        self._path, self._check, self._progress = path, check, progress
        self._sources = find_sources(path)
        self._problems: list[Problem] = []
        self.classes: Counter[str] = Counter()
        self.unnamed = 0

    def __iter__(self) -> Iterator[CheckedPair]:
        counts = [source.count() for source in self._sources] if self._progress else [None]
        total = None if None in counts else sum(filter(None, counts))
        bar = tqdm(total=total, desc="checking pairs", unit="pair", disable=not self._progress, leave=False)
        comparison = Comparison()
        only_headers = self._check == "headers"
        pool = ThreadPoolExecutor(READERS if only_headers else None)
        with collector_paused(only_headers), pool, bar, INDEX.kept(self._path):
            for pairs in _ahead(pool, lambda records: [check_pair(one, self._check) for one in records], self._groups()):
                for pair in pairs:
                    bar.update()
                    self._problems += pair.problems
                    self._problems += comparison.problems(pair)
                    for reference in pair.record.references:
                        if reference.class_name is None:
                            self.unnamed += 1
                        else:
                            self.classes[reference.class_name] += 1
                    yield pair

    def _groups(self) -> Iterator[list[PairRecord]]:
        """Records, some at a time: a task of its own for each would take longer than reading its headers."""
        group: list[PairRecord] = []
        size = GROUP if self._check == "headers" else 1
        for item in (item for source in self._sources for item in items_of(source)):
            if isinstance(item, Problem):
                self._problems.append(item)
                continue
            group.append(item)
            if len(group) == size:
                yield group
                group = []
        yield group

    @property
    def problems(self) -> list[Problem]:
        return sorted([*self._problems, *self._imbalance()], key=lambda p: (str(p.file), p.line))

    def _imbalance(self) -> list[Problem]:
        ranked = self.classes.most_common()
        if sum(self.classes.values()) < FEW or len(ranked) < 2 or ranked[0][1] < IMBALANCE * ranked[-1][1]:
            return []
        (most, many), (least, few) = ranked[0], ranked[-1]
        message = f"classes are out of balance: {many} references of {most}, {few} of {least}"
        return [
            Problem(self._sources[0].file, 1, "class_name", message, "add pairs of rare classes, or take some out", "warning")
        ]


def _ahead(pool: ThreadPoolExecutor, work: Callable[[T], S], items: Iterator[T]) -> Iterator[S]:
    """What `work` makes of items, in their order, some of them ahead; a pool's own `map` would take in all of them at once."""
    coming: deque[Future[S]] = deque()
    for item in items:
        coming.append(pool.submit(work, item))
        if len(coming) == AHEAD:
            yield coming.popleft().result()
    while coming:
        yield coming.popleft().result()


def _split(problems: list[Problem]) -> tuple[list[Problem], list[Problem]]:
    return [p for p in problems if p.severity == "error"], [p for p in problems if p.severity == "warning"]


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
            f"{self.path}: {counted(self.pairs, 'sound pair')}, {counted(len(self.errors), 'error')}, "
            f"{counted(len(self.warnings), 'warning')}: {verdict}"
        )
        return "\n".join(map(printable, lines))


def validate(path: str | Path, check: Check, rules: SizeRules, progress: bool = True) -> Report:
    """Everything there is to say about a dataset, of any length.

    Args:
        path, check, progress: as `load_pairs` takes them.
        rules: bring pairs to size, as a run would; by that layouts are counted.

    Raises:
        FileNotFoundError: there is no such dataset.
    """
    checks = Checks(path, check, progress)
    layouts: Counter[PairSizes] = Counter()
    misfits: list[Problem] = []
    for pair in checks:
        if any(problem.severity == "error" for problem in pair.problems):
            continue
        record, sizes = pair.record, pair.sizes
        references = tuple(sizes[name] for name in record.image_fields if "[" in name)
        try:
            layouts[rules.place(record, sizes["winner"], references).sizes] += 1
        except DatasetError as error:
            misfits += error.problems
    errors, warnings = _split(checks.problems)
    return Report(
        str(path),
        sum(layouts.values()),
        [*errors, *misfits],
        warnings,
        dict(checks.classes.most_common()),
        checks.unnamed,
        dict(layouts.most_common()),
    )
