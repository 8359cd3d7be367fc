"""Means over scenes, with bootstrap intervals, and the table that is printed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from focusdpo.foundation.text import aligned
from focusdpo.metrics.bootstrap import mean_interval
from focusdpo.studies.config import StressConfig
from focusdpo.studies.stress.work import Arrays

Values = NDArray[np.float64]
ALL = "all"
LABELS = {
    "auc_others": "AUC: own / other subject",
    "auc_rest": "AUC: own / all else",
    "precision": "precision",
    "chance": "by chance",
    "recall": "recall",
    "confused": "on the other subject",
    "union_precision": "union precision",
    "union_recall": "union recall",
}
VERDICTS = {
    "A_union_winner": "union A: in place",
    "A_union_loser": "exchanged",
    "A_union_rise": "rise",
    "A_per_subject_winner": "per-subject A: in place",
    "A_per_subject_loser": "exchanged",
    "A_per_subject_rise": "rise",
}


@dataclass(frozen=True)
class Row:
    """The mean of one measure over the scenes of a kind, and its interval; `count` is None where matches play no part.

    subject is None for the mean over a scene's subjects.
    """

    kind: str
    t: float
    pooling: str
    layer: str
    count: str | None
    measure: str
    subject: str | None
    mean: float
    low: float
    high: float
    scenes: int


def by_scene(arrays: Arrays) -> dict[str, Values]:
    """Measures of a scene, the mean over its subjects: AUC [T, O, L], the others [T, O, L, C]."""
    subjects = {name: value.mean(-1) for name, value in by_subject(arrays).items()}
    coverage = np.asarray(arrays["coverage"], dtype=np.float64)
    whole = {name: np.asarray(arrays[name], dtype=np.float64) for name in ("union_precision", "union_recall")}
    for i, form in enumerate(("union", "per_subject")):
        winner, loser = coverage[..., i, 0], coverage[..., i, 1]
        whole |= {f"A_{form}_winner": winner, f"A_{form}_loser": loser, f"A_{form}_rise": loser - winner}
    return subjects | whole


def by_subject(arrays: Arrays) -> dict[str, Values]:
    """Measures of each subject of a scene: AUC [T, O, L, R], the others [T, O, L, C, R].

    "chance" is the precision of matches drawn at random: the region's share of the scene.
    """
    shares = np.asarray(arrays["confusion"], dtype=np.float64)  # [T, O, L, C, R, R + 1]
    own = np.diagonal(shares[..., :-1], axis1=-2, axis2=-1)
    chance = np.asarray(arrays["regions"], dtype=np.float64).mean((1, 2))  # [R]
    found = {
        "precision": own,
        "chance": np.broadcast_to(chance, own.shape),
        "confused": 1 - own - shares[..., -1],
        "background": shares[..., -1],
    }
    return found | {name: np.asarray(arrays[name], dtype=np.float64) for name in ("recall", "auc_others", "auc_rest")}


def summarise(
    config: StressConfig,
    layers: Sequence[str],
    scenes: Mapping[str, Sequence[Arrays]],
    names: Mapping[str, Sequence[list[str]]],
) -> list[Row]:
    """All rows.

    Args:
        config: settings.
        layers: names of the layers, the mean of all first.
        scenes: measures of each scene, by kind.
        names: subjects of each scene, by kind.
    """
    rows = []
    for kind, each in scenes.items():
        found = [by_scene(arrays) for arrays in each]
        of_subjects = [by_subject(arrays) for arrays in each]
        for measure in tqdm(found[0], desc=f"intervals, {kind}", unit="measure", leave=False):
            values = np.stack([one[measure] for one in found])
            rows += list(_rows(config, layers, kind, measure, values, None))
        for subject in sorted({name for both in names[kind] for name in both}):
            places = [(i, both.index(subject)) for i, both in enumerate(names[kind]) if subject in both]
            for measure in of_subjects[0]:
                values = np.stack([of_subjects[i][measure][..., r] for i, r in places])
                rows += list(_rows(config, layers, kind, measure, values, subject))
    return rows


def _rows(
    config: StressConfig, layers: Sequence[str], kind: str, measure: str, values: Values, subject: str | None
) -> Iterator[Row]:
    counted = values.ndim == 5  # [scenes, T, O, L, C]
    for place in np.ndindex(values.shape[1:]):
        t, pooling, layer = config.timesteps[place[0]], config.poolings[place[1]], layers[place[2]]
        count = str(config.match_counts[place[3]]) if counted else None
        here = values[(slice(None), *place)]
        finite = here[np.isfinite(here)]
        if finite.size:
            if subject is None or layer == ALL:
                is_share = not measure.endswith("_rise")
                interval = mean_interval(
                    finite, level=config.level, resamples=config.resamples, seed=config.seed, is_share=is_share
                )
            else:  # subjects times blocks are thousands, and a bootstrap of each would take longer than the test
                interval = float(finite.mean()), math.nan, math.nan
            yield Row(kind, t, pooling, layer, count, measure, subject, *interval, scenes=finite.size)


def find(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    """Rows with the given values; of the mean over subjects unless `subject` is among them."""
    wanted = {"subject": None} | wanted
    return [row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())]


def table(config: StressConfig, rows: Sequence[Row], labels: Mapping[str, str]) -> str:
    """A line per time, number of matches, pooling and kind, of the mean over layers; mean and interval of each measure."""
    lines = [["t", "K", "pooling", "scenes", *labels.values()]]
    indexed = {(r.kind, r.t, r.pooling, r.count, r.measure): r for r in find(rows, layer=ALL)}
    for t in config.timesteps:
        for count in map(str, config.match_counts):
            for pooling in config.poolings:
                for kind in dict.fromkeys(row.kind for row in rows):
                    found = [indexed.get((kind, t, pooling, c, m)) for m in labels for c in (count, None)]
                    cells = [_cell(pair) for pair in zip(found[::2], found[1::2], strict=True)]
                    lines.append([f"{t:g}", count, pooling, kind, *cells])
    return aligned(lines, words=len(lines[0]))


def _cell(found: tuple[Row | None, Row | None]) -> str:
    row = found[0] or found[1]
    if row is None:
        return "-"
    return f"{row.mean:.3f}" if math.isnan(row.low) else f"{row.mean:.3f} [{row.low:.2f}, {row.high:.2f}]"
