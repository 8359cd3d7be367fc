"""Pictures of a stress test: AUC by layer, where matches lie, what the structure field notices, and example scenes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from focusdpo.data import PairBatch
from focusdpo.drawing.figures import colour_bar, new_figure
from focusdpo.drawing.overlays import (
    COLOURS,
    PANEL,
    SUBJECTS,
    frame,
    outline,
    picture,
    show,
    show_matches,
    show_scores,
    token_lines,
)
from focusdpo.studies.config import StressConfig
from focusdpo.studies.stress.summary import ALL, Row, find
from focusdpo.studies.stress.work import Arrays
from focusdpo_kernels import topk_mask

KIND_COLOURS = {"alike": "#c8323c", "easy": "#1f6fb4"}
STYLES = {"reference": "-", "max": "--"}
FORMS = {"A_union": "union", "A_per_subject": "per subject"}
NAMES = {"alike": "look-alikes", "easy": "easy pairs"}


def draw_auc(config: StressConfig, rows: Sequence[Row], layers: Sequence[str], path: Path) -> None:
    """AUC of S by tapped block, a column per time: own region against the other subject, and against all else."""
    measures = {"auc_others": "own region against\nthe other subject's", "auc_rest": "own region against\nall other tokens"}
    times = config.timesteps
    figure, axes = new_figure(len(measures), len(times), (4.6 * len(times) + 2.2, 7), sharex=True, sharey="row")
    blocks = np.arange(len(layers) - 1)
    end = len(blocks) + max(0.06 * len(blocks), 0.5)  # where the mean over all blocks stands
    for axis_row, (measure, label) in zip(axes, measures.items(), strict=True):
        for axis, t in zip(axis_row, times, strict=True):
            axis.axhline(0.5, color="gray", linestyle=":", label="chance")
            for i, (kind, pooling) in enumerate((k, p) for k in KIND_COLOURS for p in config.poolings):
                found = {row.layer: row for row in find(rows, kind=kind, pooling=pooling, t=t, measure=measure)}
                each = [found[layer] for layer in layers[1:]]
                colour, name = KIND_COLOURS[kind], f"{NAMES[kind]}, {pooling}"
                marker = "o" if pooling == "reference" else "s"
                axis.plot(
                    blocks, [row.mean for row in each], STYLES[pooling], color=colour, label=name, marker=marker, markersize=4
                )
                axis.fill_between(
                    blocks, [row.low for row in each], [row.high for row in each], color=colour, alpha=0.12, linewidth=0
                )
                mean, place = found[ALL], end + 0.02 * len(blocks) * i
                axis.plot([place, place], [mean.low, mean.high], color=colour, linewidth=2)
                axis.plot(place, mean.mean, marker, color=colour, markersize=7, markeredgecolor="black")
            axis.grid(alpha=0.3)
            axis.set_title(f"t = {t:g}")
        axis_row[0].set_ylabel(f"AUC: {label}")
    step = max(1, len(blocks) // 10)
    for axis in axes[-1]:
        axis.set_xticks([*blocks[::step], end], [*layers[1::step], "mean"])
        axis.set_xlabel("block")
    handles, labels = axes[0, -1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", title=f"bands: {config.level:.0%} intervals\nover scenes")
    figure.savefig(path, dpi=110)


def draw_confusion(config: StressConfig, rows: Sequence[Row], path: Path) -> None:
    """Where each subject's matches lie, for the mean over layers and the first of the counts, a column per time."""
    count = str(config.match_counts[0])
    columns = {"precision": "its own", "confused": "the other\nsubject's", "background": "background"}
    panels = [(kind, pooling) for kind in KIND_COLOURS for pooling in config.poolings]
    subjects = {k: sorted({row.subject for row in rows if row.subject and row.kind == k}) for k in KIND_COLOURS}
    heights = [len(subjects[kind]) + 2.5 for kind, _ in panels]
    size = 3.4 * len(config.timesteps) + 2.5, 0.34 * sum(heights) + 0.8
    figure, axes = new_figure(len(panels), len(config.timesteps), size, height_ratios=heights)
    drawn = None
    for axis_row, (kind, pooling) in zip(axes, panels, strict=True):
        names = [*subjects[kind], None]
        for axis, t in zip(axis_row, config.timesteps, strict=True):
            wanted = find(rows, kind=kind, pooling=pooling, t=t, count=count, layer=ALL)
            here = (kind, pooling, t, count, ALL)
            wanted += [r for r in rows if r.subject and (r.kind, r.pooling, r.t, r.count, r.layer) == here]
            by_place = {(row.subject, row.measure): row.mean for row in wanted}
            shares = np.array([[by_place[name, column] for column in columns] for name in names])
            drawn = axis.imshow(shares, cmap=COLOURS, vmin=0, vmax=1, aspect="auto")
            for y, x in np.ndindex(shares.shape):
                colour = "black" if shares[y, x] > 0.6 else "white"
                axis.text(x, y, f"{shares[y, x]:.2f}", ha="center", va="center", color=colour, fontsize=8)
            axis.axhline(len(names) - 1.5, color="white", linewidth=2)
            axis.set_xticks(range(3), list(columns.values()), fontsize=8)
            labels = [name or "all" for name in names] if axis is axis_row[0] else [""] * len(names)
            axis.set_yticks(range(len(names)), labels)
            axis.set_title(f"{NAMES[kind]}, {pooling}, t = {t:g}", fontsize=10)
    assert drawn is not None
    colour_bar(
        figure, drawn, axes, f"share of a\nreference's\nmatches\n(K: {count})\nthat lie in\na region", shrink=0.6, aspect=40
    )
    figure.savefig(path, dpi=110)


def draw_exchange(config: StressConfig, rows: Sequence[Row], path: Path) -> None:
    """Coverage A with the subjects in place and exchanged, as union and per subject, a column per time."""
    count, times = str(config.match_counts[0]), config.timesteps
    figure, axes = new_figure(1, len(times), (4.4 * len(times) + 1.8, 5), sharey=True)
    bars = [(form, kind, pooling) for form in FORMS for kind in KIND_COLOURS for pooling in config.poolings]
    for axis, t in zip(axes[0], times, strict=True):
        for x, (form, kind, pooling) in enumerate(bars):
            colour = KIND_COLOURS[kind]
            for shift, image, face in ((-0.16, "winner", colour), (0.16, "loser", "white")):
                (row,) = find(rows, kind=kind, pooling=pooling, t=t, count=count, layer=ALL, measure=f"{form}_{image}")
                axis.plot([x + shift] * 2, [row.low, row.high], color=colour, linewidth=2)
                label = (
                    f"{NAMES[kind]}, {'in place' if image == 'winner' else 'exchanged'}"
                    if x in (0, len(config.poolings))
                    else None
                )
                axis.plot(x + shift, row.mean, "o", color=colour, markerfacecolor=face, markersize=8, label=label)
        axis.axvline(len(bars) / 2 - 0.5, color="gray", linewidth=0.8)
        axis.set_xticks(range(len(bars)), [f"{pooling}\n{FORMS[form]}" for form, _, pooling in bars], fontsize=8, rotation=45)
        axis.set_title(f"t = {t:g}")
        axis.grid(alpha=0.3, axis="y")
        axis.set_ylim(-0.03, 1.03)
    axes[0, 0].set_ylabel(f"A, share of the prior not matched (K: {count})")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=110)


def draw_examples(
    config: StressConfig, examples: Mapping[int, tuple[PairBatch, Arrays]], t: int, title: str, path: Path
) -> None:
    """Scenes with S of each subject and M' by pooling, at one time, for the mean over layers and the first of the counts.

    Args:
        config: settings.
        examples: by number, a scene and what was measured of it.
        t: place of the time among the settings' timesteps.
        title: above all.
        path: the PNG.
    """
    subjects = len(next(iter(examples.values()))[0].references)
    panels = subjects + 1 + (subjects + 1) * len(config.poolings)
    figure, axes = new_figure(len(examples), panels, ((PANEL - 0.4) * panels, PANEL * len(examples) + 0.5))
    figure.suptitle(f"{title}, t = {config.timesteps[t]:g}, K: {config.match_counts[0]}")
    for row, (number, (batch, arrays)) in zip(axes, examples.items(), strict=True):
        winner, regions = picture(batch.winner[0]), list(arrays["regions"])
        for r, image in enumerate(batch.references):
            show(row[r], picture(image[0]), f"scene {number}, reference {r + 1}")
            frame(row[r], SUBJECTS[r])
        show(row[subjects], winner, "winner, exact regions")
        token_lines(row[subjects], regions[0].shape)
        outline(row[subjects], regions)
        for i, pooling in enumerate(config.poolings):
            first = subjects + 1 + i * (subjects + 1)
            scores = np.asarray(arrays["scores"][t, i], dtype=np.float32)
            show_scores(figure, list(row[first : first + subjects]), winner, list(scores), regions)
            for axis in row[first : first + subjects]:
                axis.set_title(f"{axis.get_title()}, {pooling}", fontsize=9)
            k = torch.from_numpy(np.asarray(arrays["K"][0]))
            matched = topk_mask(torch.from_numpy(scores).flatten(1), k, backend="torch").reshape(scores.shape).numpy()
            precision = np.asarray(arrays["confusion"], dtype=np.float64)[t, i, 0, 0]
            own = " and ".join(f"{precision[r, r]:.2f}" for r in range(subjects))
            show_matches(row[first + subjects], winner, list(matched), regions, f"M', {pooling}\nprecision {own}")
    figure.savefig(path, dpi=90)
