"""Numbers of held-out pairs that mean the same whatever mask a run was trained under."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from focusdpo.features import pool_mask
from focusdpo.loss import pair_accuracy, prediction_drift
from focusdpo.training.batches import in_order, load_batches
from focusdpo.training.step import ModelOutput
from focusdpo.training.trainer import VALIDATION_SEED, Trainer
from focusdpo_kernels import preference_residual


@dataclass(frozen=True)
class Measure:
    """A measure of a trained model.

    label: what it is. better: whether more of it is better, or less, or neither by itself. is_share: whether it is from 0 to 1.
    """

    label: str
    better: Literal["more", "less", "neither"] = "more"
    is_share: bool = False


REGIONS = ("whole", "inside", "outside")
# Ratios are 1 and accuracies one half for the model before training.
MEASURES = {
    "accuracy/inside": Measure("pairs told apart within the prior", is_share=True),
    "accuracy/whole": Measure("pairs told apart in the whole image", is_share=True),
    "win/inside": Measure("winner's error within the prior, to the reference's", "less"),
    "lose/inside": Measure("loser's error within the prior, to the reference's", "neither"),
    "win/whole": Measure("winner's error in the whole image, to the reference's", "less"),
    "lose/whole": Measure("loser's error in the whole image, to the reference's", "neither"),
    "win/outside": Measure("winner's error outside the prior, to the reference's", "less"),
    "drift/whole": Measure("drift: mean square of policy less reference, in the whole image", "neither"),
    "drift/inside": Measure("drift within the prior", "neither"),
    "drift/outside": Measure("drift outside the prior", "neither"),
    "coverage": Measure(
        "coverage A: share of the prior that is not matched, under the variant's own settings", "neither", is_share=True
    ),
    "coverage/chance": Measure("coverage A of an S that knows nothing", "neither", is_share=True),
    "coverage/floor": Measure("coverage A of an S whose matches all lie within the prior", "neither", is_share=True),
}


@torch.no_grad()
def judge(
    trainer: Trainer, times: Sequence[float], limit: int | None = None, known: dict[int, ModelOutput] | None = None
) -> dict[str, list[float]]:
    """Values per held-out pair, averaged over times.

    `accuracy/REGION` is whether the implicit reward prefers the winner, `win/REGION` and `lose/REGION` the policy's squared
    error as a share of the reference model's, with regions "whole", "inside" and "outside" the prior. `drift/REGION` is how far
    the policy's predictions are from the reference model's. `coverage` is A of the focus mask under the run's own settings,
    beside what an S that knows nothing would have, and the least that so many matches can reach; these are NaN for an estimate,
    which has no number of matches.

    Args:
        trainer: whose model is judged.
        times: at which errors are taken; noise is the same for all models.
        limit: how many pairs, the first ones.
        known: where what the reference model says is kept, in main memory, and found again by later calls with the same
            trainer, times and limit: it does not learn.
    """
    known = {} if known is None else known
    dataset, step, accelerator = trainer.validation_set, trainer.step, trainer.accelerator
    plan = in_order(dataset, trainer.config.data.batch_size)
    if limit is not None:
        plan = [kept for batch in plan if (kept := [index for index in batch if index < limit])]
    values: dict[str, dict[int, list[float]]] = {}
    was_training = trainer.module.training
    trainer.module.eval()
    for place, batch in enumerate(load_batches(dataset, plan, trainer.config.data.num_workers, accelerator)):
        batch = batch.to(accelerator.device)
        prior = pool_mask(batch.prior)
        inside = (prior if prior.ndim == 2 else prior.any(1)).float()
        for number, t in enumerate(times):
            draw = place * len(times) + number
            generator = torch.Generator().manual_seed(VALIDATION_SEED + draw)
            with accelerator.autocast():
                noised = step.noise(batch, generator, torch.full((len(batch.prompts),), t))
                before = known[draw].to(accelerator.device) if draw in known else None
                policy, reference, focus = step.predictions(noised, batch, before)
            if before is None:
                known[draw] = reference.to("cpu")
            found = _by_region(policy, reference.prediction, noised.target, inside, step.backend)
            chance = focus.coverage_chance
            floor = torch.where(chance.isnan(), chance, focus.coverage_floor)
            found |= {"coverage": focus.coverage, "coverage/chance": chance, "coverage/floor": floor}
            for name, numbers in found.items():
                for index, value in zip(batch.indices, numbers.tolist(), strict=True):
                    values.setdefault(name, {}).setdefault(index, []).append(value)
    trainer.module.train(was_training)
    return {name: [sum(taken) / len(taken) for _, taken in sorted(by.items())] for name, by in values.items()}


def _by_region(policy: Tensor, reference: Tensor, target: Tensor, inside: Tensor, backend: str | None) -> dict[str, Tensor]:
    """Accuracies and errors [B] by region, of predictions [2B, P, C] and the tokens [B, P] inside the prior."""
    pairs = inside.shape[0]
    (win, lose), (reference_win, reference_lose), (target_win, target_lose) = (
        torch.split(x, pairs) for x in (policy, reference, target)
    )
    six = (win, lose, reference_win, reference_lose, target_win, target_lose)
    found: dict[str, Tensor] = {}
    for region, weight in zip(REGIONS, (None, inside, 1 - inside), strict=True):
        residual = preference_residual(*six, weight, reduction="masked_mean", backend=backend)
        found[f"accuracy/{region}"] = pair_accuracy(-residual.margin)
        found[f"win/{region}"] = residual.policy_win / residual.reference_win
        found[f"lose/{region}"] = residual.policy_lose / residual.reference_lose
    drift = prediction_drift(win, lose, reference_win, reference_lose, inside > 0, backend)
    return found | {f"drift/{region}": value for region, value in drift._asdict().items()}
