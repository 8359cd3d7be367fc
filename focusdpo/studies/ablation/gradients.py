"""What the variants of an ablation ask for before any of them is trained: cosines of their mean gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from focusdpo.drawing.figures import colour_bar, new_figure
from focusdpo.studies.ablation.variants import Change
from focusdpo.training.batches import in_order, load_batches
from focusdpo.training.config import TrainConfig
from focusdpo.training.seeding import seeded
from focusdpo.training.step import ModelOutput, PreferenceStep
from focusdpo.training.trainer import VALIDATION_SEED, Trainer


@dataclass(frozen=True)
class Gradients:
    """Of each variant's loss with respect to the adapter at its start, the mean over pairs.

    cosines: between variants, in the order of `variants`; NaN where one is zero. norms: of the means. noise: of each variant,
    the cosine between the means over one half of the pairs and over the other: two variants whose cosine is below it differ by
    more than the pairs do. pairs: how many there are.
    """

    variants: tuple[str, ...]
    cosines: list[list[float]]
    norms: list[float]
    noise: list[float]
    pairs: int


def gradients_at_start(trainer: Trainer, run: TrainConfig, changes: Sequence[Change], pairs: int) -> Gradients:
    """Mean gradients over the first training pairs, at the same times and with the same noise for all variants.

    Args:
        trainer: of the run's model and pairs, before its first step: its adapter has no effect yet.
        run: what the variants are changes of.
        changes: the variants; those that are not trained have none.
        pairs: how many.
    """
    trained = [change for change in changes if change.trained]
    dataset, accelerator = trainer.train_set, trainer.accelerator
    plan = in_order(dataset, trainer.config.data.batch_size)
    plan = [kept for batch in plan if (kept := [index for index in batch if index < pairs])]
    halves = torch.zeros(len(trained), 2, sum(p.numel() for p in trainer.parameters), dtype=torch.float64)
    counts = torch.zeros(2, dtype=torch.float64)
    steps = [
        PreferenceStep(trainer.backbone, changed.focus, changed.loss, trainer.config.backend)
        for changed in (change.of(run) for change in trained)
    ]
    was_training = trainer.module.training
    trainer.module.eval()  # dropout would differ from variant to variant
    batches = load_batches(dataset, plan, trainer.config.data.num_workers, accelerator)
    for place, batch in enumerate(tqdm(batches, total=len(plan), desc="gradients before training", unit="batch", leave=False)):
        batch = batch.to(accelerator.device)
        known: ModelOutput | None = None
        for number, step in enumerate(steps):
            with accelerator.autocast():
                noised = step.noise(batch, seeded(VALIDATION_SEED, place))
                hears_reference = step.focus.taps_features and step.focus.feature_source == "reference"
                if known is None and not hears_reference:
                    known = step.reference_output(noised, batch)
                loss = step.compare(noised, batch, None if hears_reference else known).output.loss
            found = torch.autograd.grad(loss, trainer.parameters, allow_unused=True)
            flat = [torch.zeros_like(p) if g is None else g for p, g in zip(trainer.parameters, found, strict=True)]
            halves[number, place % 2] += torch.cat([g.flatten() for g in flat]).double().cpu() * len(batch.prompts)
        counts[place % 2] += len(batch.prompts)
    trainer.module.train(was_training)
    means = halves.sum(1) / counts.sum()
    unit, halves_unit = (torch.nn.functional.normalize(x, dim=-1) for x in (means, halves))
    zero = means.norm(dim=-1) == 0
    cosines = (unit @ unit.T).masked_fill(zero[:, None] | zero, torch.nan)
    noise = (halves_unit[:, 0] * halves_unit[:, 1]).sum(-1).masked_fill((halves.norm(dim=-1) == 0).any(-1), torch.nan)
    names = tuple(change.name for change in trained)
    return Gradients(names, cosines.tolist(), means.norm(dim=-1).tolist(), noise.tolist(), int(counts.sum()))


def text_of_gradients(found: Gradients, names: Mapping[str, str]) -> str:
    """The cosines as a table, numbered by row."""
    labels = [names[variant] for variant in found.variants]
    width = max(map(len, labels)) + 4
    lines = [
        f"Cosines of mean gradients before training, over {found.pairs} pairs; the last columns are the norm and the cosine of "
        "one half of the pairs with the other.",
        " " * width + "".join(f"{i + 1:>8}" for i in range(len(labels))) + f"{'norm':>11}{'halves':>8}",
    ]
    for i, label in enumerate(labels):
        numbers = "".join(f"{cosine:8.3f}" for cosine in found.cosines[i])
        lines.append(f"{i + 1:>2}  {label}".ljust(width) + numbers + f"{found.norms[i]:11.3g}{found.noise[i]:8.3f}")
    return "\n".join(lines)


def draw_gradients(found: Gradients, names: Mapping[str, str], path: Path) -> None:
    """The cosines as a matrix of colours with their numbers."""
    labels = [names[variant] for variant in found.variants]
    side = 0.75 * len(labels) + 3
    figure, axes = new_figure(1, 1, (side + 1, side))
    axis, values = axes[0, 0], np.array(found.cosines)
    drawn = axis.imshow(values, "RdBu_r", vmin=-1, vmax=1)
    for (i, j), cosine in np.ndenumerate(values):
        colour = "white" if abs(cosine) > 0.6 else "black"
        axis.text(j, i, f"{cosine:.2f}", ha="center", va="center", fontsize=8, color=colour)
    axis.set_xticks(range(len(labels)), labels, rotation=45, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(labels)), labels)
    axis.set_title(f"cosines of mean gradients before training, over {found.pairs} pairs")
    colour_bar(figure, drawn, axis, "cosine", shrink=0.7)
    figure.savefig(path, dpi=120)
