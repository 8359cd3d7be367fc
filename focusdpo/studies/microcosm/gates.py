"""What can be tested on a base at all: whether its S knows where the subjects are, before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm.auto import tqdm

from focusdpo.features import pool_mask
from focusdpo.studies.stress.match_measures import auc
from focusdpo.training.batches import in_order, load_batches
from focusdpo.training.health import KNOWING
from focusdpo.training.step import PreferenceStep
from focusdpo.training.trainer import VALIDATION_SEED, Trainer

TIMES = (0.2, 0.4, 0.6, 0.8)
LEAST_AUC = 0.65  # of S between the own subject's region and the other's
ONE_ARM = 0.98  # cosine of two arms' gradients from which on they are one


@dataclass(frozen=True)
class Correspondence:
    """How well S of a base finds the subjects of held-out winners, means over subjects and pairs, by time.

    own_other, own_background: AUC of S_r between its subject's region and the other's, and what is in none. coverage, chance,
    floor: A of the union, that of an S that knows nothing, and the least that so many matches can reach.
    """

    times: tuple[float, ...]
    own_other: list[float]
    own_background: list[float]
    coverage: list[float]
    chance: list[float]
    floor: list[float]

    def why_not(self) -> str | None:
        """Why this base cannot test a field made of its features; None where it can."""
        mean = sum(self.own_other) / len(self.own_other)
        if not mean >= LEAST_AUC:
            return f"S tells a subject from the other with an AUC of {mean:.2f}, below {LEAST_AUC}"
        chance, floor, coverage = (sum(values) / len(values) for values in (self.chance, self.floor, self.coverage))
        if not chance - coverage >= KNOWING * (chance - floor):
            return f"A is {coverage:.2f}, where an S that knows nothing has {chance:.2f}"
        return None

    def text(self) -> str:
        rows = {
            "time t": self.times,
            "AUC of S, own subject / the other": self.own_other,
            "AUC of S, own subject / background": self.own_background,
            "A": self.coverage,
            "A of an S that knows nothing": self.chance,
            "A of matches all within the prior": self.floor,
        }
        lines = [f"  {name:<36}" + "".join(f"{value:7.2f}" for value in values) for name, values in rows.items()]
        why = self.why_not()
        lines.append("  it can test the learned field" if why is None else f"  it cannot test the learned field: {why}")
        return "\n".join(lines)


@torch.no_grad()
def correspondence(trainer: Trainer) -> Correspondence:
    """Of the model before its first step, on the run's held-out pairs; the same noise at each time."""
    config, dataset = trainer.config, trainer.validation_set
    focus = replace(config.focus, mask="focus", source="features", per_subject=False)
    step = PreferenceStep(trainer.backbone, focus, config.loss, config.backend)
    plan = in_order(dataset, config.data.batch_size)
    found: dict[str, list[list[float]]] = {
        name: [[] for _ in TIMES] for name in Correspondence.__dataclass_fields__ if name != "times"
    }
    batches = load_batches(dataset, plan, config.data.num_workers, trainer.accelerator)
    for place, batch in enumerate(tqdm(batches, total=len(plan), desc="correspondence", unit="batch", leave=False)):
        batch = batch.to(trainer.accelerator.device)
        regions = pool_mask(batch.prior)
        for number, t in enumerate(TIMES):
            mask = step.masks(batch, t, VALIDATION_SEED + place)["all"]
            values: dict[str, Any] = {"coverage": mask.coverage, "chance": mask.coverage_chance, "floor": mask.coverage_floor}
            for name, numbers in values.items():
                found[name][number] += numbers.tolist()
            for scores, priors in zip(mask.scores, regions, strict=True):
                for r, own in enumerate(priors):
                    found["own_other"][number].append(float(auc(scores[r], own & (priors.sum(0) == 1), priors.any(0) & ~own)))
                    found["own_background"][number].append(float(auc(scores[r], own, ~priors.any(0))))
    means = {name: [float(torch.tensor(each).nanmean()) for each in values] for name, values in found.items()}
    return Correspondence(TIMES, **means)
