"""Beta, chosen before the comparison on scenes of its own, so that no arm is compared at a beta that suits another."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from focusdpo.foundation.files import write_json
from focusdpo.studies.ablation.jobs import JOB_WRITTEN, Job, run_jobs, run_of
from focusdpo.studies.ablation.variants import VARIANTS
from focusdpo.studies.config import MIDDLE, Variant
from focusdpo.studies.microcosm.stages import Stages

FOLDER, BETA_FILE = "tuning", "beta.json"
FACTORS = (0.25, 1.0, 4.0)  # of the size's beta
ARMS: tuple[Variant, ...] = ("prior", "focus")
SEED = 100  # of no training that is compared
WRITTEN = (r"beta\.json", *(f"{FOLDER}/{pattern}" for pattern in JOB_WRITTEN))


@dataclass(frozen=True)
class Betas:
    """What was chosen for the prior alone and for the masks within it.

    identity: by arm, each beta that was tried and the identity accuracy it gave, None where its training gave up; {} where beta
    was given.
    """

    prior: float
    focus: float
    identity: dict[str, list[tuple[float, float | None]]]

    def text(self) -> str:
        rows = []
        for arm, tried in self.identity.items():
            numbers = [f"{beta:g}: " + ("failed" if found is None else f"{found:.3f}") for beta, found in sorted(tried)]
            alike = len({found for _, found in tried}) == 1
            rows.append(f"  {VARIANTS[arm].label:<16}" + ", ".join(numbers) + ("; none better than another" if alike else ""))
        own = next(iter(self.identity.values()))[0][0]
        head = f"beta, and the identity accuracy it gave on the tuning scenes; {own:g} unless one is a standard error better:"
        return "\n".join([head, *rows, f"  chosen: {self.prior:g} and {self.focus:g}"])


def chosen_betas(stages: Stages) -> Betas:
    """Trains both arms with each beta and one seed on the middle model, and takes what draws most of the tuning identities.

    That is the size's own beta unless another draws more by over one standard error of their difference over the scenes (the
    rule of one standard error of Breiman et al., Classification and Regression Trees, 1984): scenes are few.
    """
    config, size = stages.config, stages.size
    if config.beta is not None:
        return Betas(config.beta, config.beta, {})
    betas = sorted((factor * size.beta for factor in FACTORS), key=lambda beta: abs(beta - size.beta))
    jobs = []
    for arm in ARMS:
        for beta in betas:
            folder = Path(config.out) / FOLDER / f"{arm},beta={beta:g}" / f"seed-{SEED}"
            run = run_of(stages.train_config(MIDDLE, beta, "tuning"), VARIANTS[arm], SEED, folder, None, 1, 0)
            jobs.append(Job(VARIANTS[arm], SEED, run, folder, (0.5,), 1, stages.judge()))
    results = run_jobs(jobs, config.workers)
    drawn: dict[str, dict[float, list[float]]] = {arm: {} for arm in ARMS}
    for job, result in zip(jobs, results, strict=True):
        drawn[job.change.name][job.config.loss.beta] = result.values.get("identity", [])
    found = {arm: [(beta, float(np.mean(of)) if of else None) for beta, of in tried.items()] for arm, tried in drawn.items()}
    prior, focus = (_best(drawn[arm]) for arm in ARMS)
    chosen = Betas(prior, focus, found)
    write_json(stages.folder / BETA_FILE, asdict(chosen))
    return chosen


def _best(tried: dict[float, list[float]]) -> float:
    """Of betas, the size's own first, with the identity of each scene, none where training gave up."""
    own = next(iter(tried))

    def is_better(beta: float) -> bool:
        if not tried[own] or not tried[beta]:
            return bool(tried[beta])
        gains = np.subtract(tried[beta], tried[own])
        return len(gains) > 1 and gains.mean() > gains.std(ddof=1) / math.sqrt(len(gains))

    return max([own, *filter(is_better, tried)], key=lambda beta: np.mean(tried[beta] or -1.0))
