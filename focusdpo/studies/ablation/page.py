"""The page of an ablation: table, intervals, curves, and what each variant draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go
import yaml

from focusdpo.data import leave_out_misfits
from focusdpo.data.images import to_pil
from focusdpo.drawing.contact_sheets import read_picture
from focusdpo.pages.html import COLOURS, image_uri, plot, write_page
from focusdpo.studies.ablation.equal_drift import DRIFT, EqualDrift, curves_of, mean_curve
from focusdpo.studies.ablation.jobs import Job, Result, sample_images
from focusdpo.studies.ablation.statistics import Table, how_judged
from focusdpo.studies.ablation.two_way import estimate
from focusdpo.studies.ablation.variants import Change
from focusdpo.studies.config import AblationConfig
from focusdpo.training.batches import dataset_of, load_records
from focusdpo.training.config import TrainConfig

TEMPLATE = "ablation.html"
VERDICTS = {None: "#7f8a96", True: "#2e9e5b", False: "#d1495b"}  # of a difference: for the better, or not; None: not told
LONGEST = 320  # pixels of an image on the page


@dataclass(frozen=True)
class Shown:
    """One held-out pair: its prompt, and images by caption, as the page embeds them."""

    prompt: str
    references: list[str]
    images: dict[str, str]


def write_ablation_page(
    path: Path,
    config: AblationConfig,
    run: TrainConfig,
    changes: Sequence[Change],
    results: Sequence[Result],
    table: Table,
    jobs: Sequence[Job],
    equal: EqualDrift | str,
) -> None:
    """Writes one HTML file that needs nothing else. equal: the variants at equal drift, or why they are not compared there."""
    names = {change.name: change.label for change in changes}
    points = [point for result in results for point in result.curve if point.step > 0]
    curved = [name for name in table.measures if any(name in point.values for point in points)]
    at_drift = equal if isinstance(equal, EqualDrift) else None
    write_page(
        path,
        "ablate",
        "Ablation",
        TEMPLATE,
        config=config,
        steps=config.max_steps or run.max_steps,
        names=names,
        table=table,
        intervals=[plot(interval_figure(table, name, names), f"interval-{i}") for i, name in enumerate(table.measures)],
        how=how_judged([table, *([at_drift.table] if at_drift else [])], names),
        equal=at_drift,
        not_equal=equal,
        drift=[plot(drift_figure(results, at_drift, names), "drift")] if at_drift else [],
        curves=[plot(curve_figure(results, table, name, names), f"curve-{i}") for i, name in enumerate(curved)],
        pairs=_shown_pairs(run, [job for job, one in zip(jobs, results, strict=True) if not one.failed], names, config.samples),
        settings=yaml.safe_dump({"ablation": vars(config)}, sort_keys=False),
    )


def interval_figure(table: Table, measure: str, names: Mapping[str, str]) -> go.Figure:
    """Mean and interval of a measure by variant, the baseline's mean as a line."""
    figure = go.Figure()
    for row in table.rows:
        cell = row.cell(measure)
        if cell is None:
            continue
        low, high = cell.estimate.mean - cell.estimate.low, cell.estimate.high - cell.estimate.mean
        figure.add_scatter(
            x=[cell.estimate.mean],
            y=[names[row.variant]],
            error_x={"type": "data", "array": [high], "arrayminus": [low], "thickness": 2},
            mode="markers",
            marker={"size": 9, "color": VERDICTS[cell.is_better]},
            name=names[row.variant],
            showlegend=False,
        )
        if row.variant == table.baseline:
            figure.add_vline(x=cell.estimate.mean, line={"dash": "dot", "width": 1, "color": VERDICTS[None]})
    order = [names[row.variant] for row in table.rows][::-1]
    figure.update_yaxes(categoryorder="array", categoryarray=order, automargin=True)
    kind = table.measures[measure]
    note = "" if kind.better == "neither" else f"{kind.better} is better"
    return figure.update_layout(title=kind.label, height=70 + 26 * len(order), meta={"note": note})


def curve_figure(results: Sequence[Result], table: Table, measure: str, names: Mapping[str, str]) -> go.Figure:
    """A yardstick over training, mean over seeds with the interval; the model before training is where all start."""
    start = [point for result in results for point in result.curve if point.step == 0 and measure in point.values][:1]
    figure = go.Figure()
    for number, row in enumerate(table.rows):
        curves = curves_of(results, row.variant, measure)
        if not curves:
            continue
        steps = sorted(set.intersection(*({point.step for point in curve} for curve in curves)))
        rows = [[point.values[measure] for curve in curves for point in curve if point.step == step] for step in steps]
        found = [estimate(values, table.measures[measure].is_share) for values in rows]
        colour = COLOURS[number % len(COLOURS)]
        figure.add_scatter(
            x=[0, *steps][-len(start) - len(steps) :],
            y=[*(point.mean(measure) for point in start), *(one.mean for one in found)],
            mode="lines+markers",
            name=names[row.variant],
            legendgroup=row.variant,
            line={"color": colour, "dash": "solid" if number < len(COLOURS) else "dot"},
        )
        if len(curves) > 1:
            figure.add_scatter(
                x=[*steps, *steps[::-1]],
                y=[*(one.high for one in found), *(one.low for one in found[::-1])],
                fill="toself",
                mode="lines",
                fillcolor=f"{colour}22",
                line={"width": 0},
                hoverinfo="skip",
                legendgroup=row.variant,
                showlegend=False,
            )
    figure.update_xaxes(title_text="optimiser step")
    return figure.update_layout(title=table.measures[measure].label, height=340, meta={"x": "steps"})


def drift_figure(results: Sequence[Result], equal: EqualDrift, names: Mapping[str, str]) -> go.Figure:
    """The measure that says at which drift, over drift: each training's points, their means as a line a variant."""
    figure = go.Figure()
    for number, row in enumerate(equal.table.rows):
        curves = curves_of(results, row.variant, equal.measure, DRIFT)
        if not curves:
            continue
        means = mean_curve(curves, equal.measure)
        colour = COLOURS[number % len(COLOURS)]
        figure.add_scatter(
            x=[drift for _, drift, _ in means],
            y=[mean for _, _, mean in means],
            mode="lines",
            name=names[row.variant],
            legendgroup=row.variant,
            line={"color": colour, "dash": "solid" if number < len(COLOURS) else "dot"},
        )
        figure.add_scatter(
            x=[point.mean(DRIFT) for curve in curves for point in curve],
            y=[point.mean(equal.measure) for curve in curves for point in curve],
            mode="markers",
            name=names[row.variant],
            legendgroup=row.variant,
            showlegend=False,
            marker={"size": 6, "color": colour},
        )
    figure.add_vline(x=equal.drift, line={"dash": "dot", "width": 1, "color": VERDICTS[None]})
    figure.update_xaxes(title_text="drift ||v - v_ref||²", type="log", exponentformat="power")
    note = f"lines: means over seeds; points: each training; dotted: the drift of the comparison, {equal.drift:.3g}"
    return figure.update_layout(title=equal.table.measures[equal.measure].label, height=380, meta={"note": note, "wide": True})


def _shown_pairs(run: TrainConfig, jobs: Sequence[Job], names: Mapping[str, str], count: int) -> list[Shown]:
    """The held-out pairs that were sampled, with each variant's image of the first seed."""
    drawn = {job.change.name: sample_images(job.folder) for job in reversed(jobs)}  # the first seed's stay
    numbers = sorted(set().union(*drawn.values())) if count else []
    if not numbers:
        return []
    dataset = dataset_of(load_records(run)[1], run.data, run.model.backbone)
    leave_out_misfits(dataset, run.data.max_crop)  # as the trainer does, so that a number means the same pair
    pairs = []
    for number in numbers:
        pair = dataset[number]
        images = {"winner": image_uri(to_pil(pair.winner), LONGEST)}
        for variant, files in drawn.items():
            image = read_picture(files[number]) if number in files else None
            if image is not None:
                images[names[variant]] = image_uri(image, LONGEST)
        ordered = {name: images[name] for name in ("winner", *names.values()) if name in images}
        pairs.append(Shown(pair.prompt, [image_uri(to_pil(one), LONGEST) for one in pair.references], ordered))
    return pairs
