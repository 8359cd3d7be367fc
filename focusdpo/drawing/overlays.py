"""The masks of a pair, drawn over its winner: which token matches whom, and what the loss looks at; and their coverage."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch
from numpy.typing import NDArray
from torch import Tensor

from focusdpo.data import PairBatch
from focusdpo.data.images import PATCH_SIZE
from focusdpo.drawing.figures import colour_bar, new_figure
from focusdpo.features import pool_mask
from focusdpo.mask import FocusMask

Field = NDArray[np.float32]  # [rows, columns] of tokens
COLOURS = "viridis"  # perceptually uniform
SUBJECTS = ("#ff5a36", "#36c5ff", "#ff7ad9", "#ffffff", "#ffb000", "#b388ff")  # hardly any of them in viridis
COMMON = "#ff2d95"  # a prior for all subjects
STRIPES = 12  # parts of a token's width, so that two to six subjects share it evenly
PANEL = 2.7  # inches
NAMES = {"estimate": "aligned", "random": "left out at random"}  # of what is no subject's match


@dataclass(frozen=True)
class MaskAtTime:
    """The focus mask of one pair (a batch of one) at one time."""

    t: float
    focus: FocusMask


def draw_overlays(batch: PairBatch, masks: Sequence[MaskAtTime], path: Path | BinaryIO, title: str) -> None:
    """Draws references with their masks, winner and loser, then S of each subject, M', M_s, M_d and M over the winner.

    A row per time.

    Args:
        batch: one pair of R references.
        masks: its masks at several times.
        path: the PNG, or an open file to write it to.
        title: what the page is headed with.
    """
    winner, loser = picture(batch.winner[0]), picture(batch.loser[0])
    grid = winner.shape[0] // PATCH_SIZE, winner.shape[1] // PATCH_SIZE
    priors = token_fields(pool_mask(batch.prior)[0], grid)
    subjects, rows = len(batch.references), len(masks) + 1
    high = PANEL * max(winner.shape[0] / winner.shape[1], 0.6) + 0.35
    figure, axes = new_figure(rows, subjects + 4, (PANEL * (subjects + 4) + 0.8, high * rows + 0.5))
    figure.suptitle(title.replace("$", r"\$"), wrap=True)  # it has the prompt, whose dollar signs are no formulas
    for r, (image, pixels) in enumerate(zip(batch.references, batch.reference_masks, strict=True)):
        _show_reference(axes[0, r], picture(image[0]), pixels, r)
    show(axes[0, subjects], winner, "winner, prior, token grid")
    outline(axes[0, subjects], priors)
    token_lines(axes[0, subjects], grid)
    show(axes[0, subjects + 1], loser, "loser")
    show(axes[0, subjects + 2], np.abs(winner - loser).clip(0, 1), "|winner - loser|")
    source = masks[0].focus.source if masks else "features"
    legend(axes[0, subjects + 3], subjects, len(priors) > 1, NAMES.get(source))
    weights = None
    for row, mask in zip(axes[1:], masks, strict=True):
        weights = _draw_fields(figure, row, winner, priors, mask)
    if weights is not None:
        colour_bar(
            figure, weights, list(axes[1:, -1]), "$M_s$, $M_d$, M:\nweight of a\ntoken\n(0 is clear)", shrink=0.6, aspect=25
        )
    figure.savefig(path, dpi=100)


def _show_reference(axis: Axes, image: Field, mask: Tensor, number: int) -> None:
    """A reference with the tokens of its mask [1, h, w], which alone count in S; the others are dim."""
    grid = image.shape[0] // PATCH_SIZE, image.shape[1] // PATCH_SIZE
    (kept,) = token_fields(pool_mask(mask), grid)
    dim = np.where(np.kron(kept, np.ones((PATCH_SIZE, PATCH_SIZE)))[..., None], image, 0.35 * image)
    show(axis, dim, f"reference {number + 1}: {int(kept.sum())} of {kept.size} tokens")
    outline(axis, [kept], [SUBJECTS[number]])
    frame(axis, SUBJECTS[number])


def _draw_fields(figure: Figure, row: NDArray[np.object_], winner: Field, priors: list[Field], mask: MaskAtTime) -> AxesImage:
    """S of each subject, M', M_s, M_d and M at one time."""
    focus, grid = mask.focus, priors[0].shape
    scores = token_fields(focus.scores[0], grid)
    matched = token_fields(focus.matched[0], grid)
    subjects = len(row) - 4
    if focus.source == "estimate":
        show_estimate(figure, row[0], winner, scores[0], priors)
        for axis in row[1:subjects]:
            axis.axis("off")
    else:
        show_scores(figure, list(row[:subjects]), winner, scores, priors, focus.source == "truth")
    row[0].set_ylabel(f"t = {mask.t:g}", fontsize=13, fontweight="bold")
    coverage, tau = float(focus.coverage[0]), focus.tau
    branch = f"detail: A \N{LESS-THAN OR EQUAL TO} {tau:g}" if bool(focus.uses_detail[0]) else f"structure: A > {tau:g}"
    counts = " + ".join(str(int(one.sum())) for one in matched)
    title = f"{NAMES[focus.source]}: {counts} tokens" if focus.source in NAMES else f"M': {counts} matches"
    show_matches(row[subjects], winner, matched, priors, title, None if focus.source == "features" else COMMON)
    chance = float(focus.coverage_chance[0])
    known = "" if math.isnan(chance) else f"\nby chance {chance:.2f}, least {float(focus.coverage_floor[0]):.2f}"
    fields = {
        f"$M_s$: A = {coverage:.2f}{known}": focus.structure,
        "$M_d$ within the prior": focus.detail,
        f"M ({branch})": focus.mask,
    }
    for axis, (name, field) in zip(row[subjects + 1 :], fields.items(), strict=True):
        (values,) = token_fields(field, grid)
        drawn = _show_field(axis, winner, np.ma.masked_less_equal(values, 0), priors, name, 0.85, (0, 1))
    return drawn


def _show_field(
    axis: Axes,
    winner: Field,
    field: Field,
    priors: Sequence[Field],
    title: str,
    opacity: float,
    limits: tuple[float, float],
) -> AxesImage:
    """A field over the gray winner, with the priors' borders; masked tokens are clear."""
    show(axis, gray(winner), title)
    (low, high), extent = limits, _extent(field.shape)
    drawn = axis.imshow(field, COLOURS, vmin=low, vmax=high, alpha=opacity, extent=extent, interpolation="nearest")
    outline(axis, priors)
    return drawn


def picture(image: Tensor) -> Field:
    """Pixels [3, H, W] in [0, 1] as [H, W, 3]."""
    return image.permute(1, 2, 0).float().cpu().numpy()


def gray(image: Field) -> Field:
    """An image without colours and with less contrast, to lay fields over."""
    return np.repeat(0.15 + 0.7 * image.mean(-1, keepdims=True), 3, axis=-1)


def token_fields(values: Tensor, grid: tuple[int, ...]) -> list[Field]:
    """[P] or [R, P] as one field [rows, columns] each."""
    fields = values.reshape(-1, *grid)
    return list((fields if fields.dtype == torch.bool else fields.float()).cpu().numpy())


def show(axis: Axes, image: Field, title: str) -> None:
    """An image [H, W, 3] under its title."""
    axis.imshow(image, extent=(0, image.shape[1], image.shape[0], 0))
    axis.set_title(title, fontsize=10)
    axis.set_xticks([])
    axis.set_yticks([])


def show_scores(
    figure: Figure,
    axes: Sequence[Axes],
    winner: Field,
    scores: Sequence[Field],
    priors: Sequence[Field],
    are_priors: bool = False,
) -> None:
    """S of each subject in a panel of its own, on one scale whose ends are named; a subject without a token has none.

    are_priors: they are shares that the subjects' own priors cover.
    """
    what, scale = ("share in the prior", "share of\na token") if are_priors else ("S", "S (cosine,\n-1 to 1)")
    finite = np.concatenate([one[np.isfinite(one)] for one in scores])
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    drawn = None
    for r, (axis, field) in enumerate(zip(axes, scores, strict=True)):
        values, title = np.ma.masked_invalid(field), f"{what} of reference {r + 1}"
        drawn = _show_field(axis, winner, values, priors, title, 0.78, (low, high))
        frame(axis, SUBJECTS[r])
    assert drawn is not None
    bar = colour_bar(figure, drawn, list(axes), scale, shrink=0.75, aspect=25, pad=0.02)
    # Ends first: a narrow range of cosines is the finding, and must not look like a wide one.
    ticks = np.linspace(low, high, 3).tolist()
    bar.set_ticks(ticks, labels=[f"{value:.3f}" for value in ticks])


def show_estimate(figure: Figure, axis: Axes, winner: Field, alignment: Field, priors: Sequence[Field]) -> None:
    """s of E10 within the priors, from the loser's latent to the winner's; what lies beyond either is drawn as the end."""
    inside = np.any([np.asarray(one, bool) for one in priors], axis=0)
    values = np.ma.masked_where(~inside, np.ma.masked_invalid(alignment))
    drawn = _show_field(axis, winner, values, priors, "s of the estimate", 0.85, (0, 1))
    bar = colour_bar(figure, drawn, axis, "s", shrink=0.75, aspect=25, pad=0.02)
    bar.set_ticks([0, 0.5, 1], labels=["0 loser", "0.5", "1 winner"])


def show_matches(
    axis: Axes,
    winner: Field,
    matched: Sequence[Field],
    priors: Sequence[Field],
    title: str,
    colour: str | None = None,
) -> None:
    """M': each subject's matches in its colour, or all in one; a token that several match is striped."""
    stripes = np.zeros((*matched[0].shape, STRIPES, 4))
    stack = np.stack([one.astype(bool) for one in matched])
    for y, x in zip(*np.nonzero(stack.any(0)), strict=True):
        who = np.flatnonzero(stack[:, y, x])
        for i in range(STRIPES):
            stripes[y, x, i] = to_rgba(colour or SUBJECTS[who[i * len(who) // STRIPES]], 0.85)
    show(axis, gray(winner), title)
    rows, columns = matched[0].shape
    axis.imshow(
        stripes.reshape(rows, columns * STRIPES, 4), extent=_extent((rows, columns)), interpolation="nearest", aspect="equal"
    )
    outline(axis, priors)


def outline(axis: Axes, priors: Sequence[Field], colours: Sequence[str] | None = None) -> None:
    """The border of each token region along token edges, in its subject's colour where there are several."""
    for prior, colour in zip(priors, colours or (SUBJECTS if len(priors) > 1 else [COMMON]), strict=False):
        edges = np.array([*_edges(prior)], float).reshape(-1, 2, 2)  # [edge, x or y, end]
        xs, ys = np.pad(edges, ((0, 0), (0, 0), (0, 1)), constant_values=np.nan).transpose(1, 0, 2)  # as one line with gaps
        for width, stroke in ((3.2, "black"), (1.6, colour)):  # dark around it: seen on any field
            axis.plot(xs.ravel(), ys.ravel(), color=stroke, linewidth=width, solid_capstyle="round")


def _edges(region: Field) -> Iterable[tuple[tuple[int, int], tuple[int, int]]]:
    padded = np.pad(region.astype(bool), 1)
    for row, column in zip(*np.nonzero(region), strict=True):
        x, y = int(column) * PATCH_SIZE, int(row) * PATCH_SIZE
        right, bottom = x + PATCH_SIZE, y + PATCH_SIZE
        edges = {(0, 1): ((x, right), (y, y)), (2, 1): ((x, right), (bottom, bottom)), (1, 0): ((x, x), (y, bottom))}
        edges[1, 2] = ((right, right), (y, bottom))
        yield from (edge for (dy, dx), edge in edges.items() if not padded[row + dy, column + dx])


def token_lines(axis: Axes, grid: tuple[int, ...]) -> None:
    """The borders of all tokens."""
    for row in range(1, grid[0]):
        axis.axhline(row * PATCH_SIZE, color="white", linewidth=0.4, alpha=0.6)
    for column in range(1, grid[1]):
        axis.axvline(column * PATCH_SIZE, color="white", linewidth=0.4, alpha=0.6)


def frame(axis: Axes, colour: str) -> None:
    """A panel's border in a subject's colour; white needs a dark rim."""
    for spine in axis.spines.values():
        spine.set(edgecolor="black" if colour == "#ffffff" else colour, linewidth=3)


def legend(axis: Axes, subjects: int, per_subject: bool, tokens: str | None = None) -> None:
    """What the colours mean; `tokens` is what those are called that are no subject's matches."""
    axis.axis("off")
    labels = {SUBJECTS[r]: f"matches of reference {r + 1}" for r in range(subjects)} if tokens is None else {COMMON: tokens}
    handles = [Patch(facecolor=colour, edgecolor="black", label=label) for colour, label in labels.items()]
    if per_subject:
        handles += [
            Patch(facecolor="none", edgecolor=SUBJECTS[r], linewidth=2, label=f"prior {r + 1}") for r in range(subjects)
        ]
    else:
        handles.append(Patch(facecolor="none", edgecolor=COMMON, linewidth=2, label="prior, of all subjects"))
    if tokens is None:
        handles.append(Patch(facecolor="none", edgecolor="none", label="striped: several match it"))
    axis.legend(handles=handles, loc="center left", fontsize=9, frameon=False)


def _extent(grid: tuple[int, ...]) -> tuple[float, float, float, float]:
    return 0, grid[1] * PATCH_SIZE, grid[0] * PATCH_SIZE, 0


def draw_coverage(masks: Mapping[str, Sequence[MaskAtTime]], path: Path, title: str) -> None:
    """Draws A with the branch that it takes, a row per group of blocks and a column per time; tau is marked on the scale.

    Args:
        masks: of one pair, by group, at the same times.
        path: the PNG.
        title: above the picture.
    """
    times = [one.t for one in next(iter(masks.values()))]
    coverage = np.array([[float(one.focus.coverage[0]) for one in each] for each in masks.values()])
    first = next(iter(masks.values()))[0].focus
    size = (max(1.5 * len(times) + 3.5, 6.5), 0.62 * len(masks) + 1.9)
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    drawn = axis.imshow(coverage, cmap=COLOURS, vmin=0, vmax=1, aspect="auto")
    axis.set_xticks(range(len(times)), [f"{t:g}" for t in times])
    axis.set_yticks(range(len(masks)), list(masks))
    axis.set_xlabel("t (0 is clean, 1 is noise)")
    chance, floor = float(first.coverage_chance[0]), float(first.coverage_floor[0])
    known = "of the estimate" if math.isnan(chance) else f"of an S that knows nothing {chance:.2f}, the least {floor:.2f}"
    axis.set_title(f"{title}\n{known}", fontsize=11)
    for y, each in enumerate(masks.values()):
        for x, one in enumerate(each):
            branch = "detail" if bool(one.focus.uses_detail[0]) else "structure"
            colour = "black" if coverage[y, x] > 0.6 else "white"
            axis.text(x, y, f"{coverage[y, x]:.2f}\n{branch}", ha="center", va="center", color=colour, fontsize=9)
    bar = colour_bar(figure, drawn, axis, "A, share of the\nprior not matched")
    bar.ax.axhline(first.tau, color=(1.0, 0.18, 0.58), linewidth=2.5)
    bar.ax.text(-0.2, first.tau, f"tau {first.tau:g}", fontsize=9, ha="right", va="center")
    figure.savefig(path, dpi=110)
