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
from focusdpo.studies.ablation.jobs import Job, Result, sample_images
from focusdpo.studies.ablation.statistics import Table, over_seeds
from focusdpo.studies.ablation.variants import Change
from focusdpo.studies.config import AblationConfig
from focusdpo.training.batches import dataset_of, load_records
from focusdpo.training.config import TrainConfig

TEMPLATE = "ablation.html"
VERDICTS = {None: "#7f8a96", True: "#2e9e5b", False: "#d1495b"}  # of a difference: it leaves 0 out for the better, or not
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
) -> None:
    """Writes one HTML file that needs nothing else."""
    names = {change.name: change.label for change in changes}
    points = [point for result in results for point in result.curve if point["step"] > 0]
    curved = [name for name in table.measures if any(name in point for point in points)]
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
    points = [point for result in results for point in result.curve if point["step"] == 0]
    figure = go.Figure()
    for number, row in enumerate(table.rows):
        own = [result for result in results if result.variant == row.variant and result.failed is None]
        curves = [result.curve for result in own if result.curve]
        if not curves or curves[0][0]["step"] == 0:
            continue
        steps = [point["step"] for point in curves[0]]
        pairs = len(own[0].values[measure])  # of which a curve has the mean alone
        found = [
            over_seeds({i: [curve[k][measure]] * pairs for i, curve in enumerate(curves)}, table.measures[measure].is_share)
            for k in range(len(steps))
        ]
        colour = COLOURS[number % len(COLOURS)]
        start = [points[0][measure]] if points else []
        figure.add_scatter(
            x=[0, *steps][-len(start) - len(steps) :],
            y=[*start, *(one.mean for one in found)],
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
