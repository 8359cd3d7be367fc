"""Beta, chosen before the comparison on scenes of its own, so that no arm is compared at a beta that suits another."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from focusdpo.foundation.files import write_json
from focusdpo.studies.ablation.jobs import JOB_WRITTEN, Job, run_jobs, run_of
from focusdpo.studies.ablation.variants import VARIANTS
from focusdpo.studies.config import MIDDLE, Variant
from focusdpo.studies.microcosm.stages import Stages

FOLDER, BETA_FILE = "tuning", "beta.json"
FACTORS = (0.25, 1.0, 4.0)  # of the size's beta; of two that are as good, the one nearer to it
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
        head = "beta, and the identity accuracy it gave on the tuning scenes:"
        return "\n".join([head, *rows, f"  chosen: {self.prior:g} and {self.focus:g}"])


def chosen_betas(stages: Stages) -> Betas:
    """Trains both arms with each beta and one seed on the middle model, and takes what draws most of the tuning identities."""
    config, size = stages.config, stages.size
    if config.beta is not None:
        return Betas(config.beta, config.beta, {})
    betas = sorted((factor * size.beta for factor in FACTORS), key=lambda beta: abs(beta - size.beta))
    jobs = []
    for arm in ARMS:
        for beta in betas:
            folder = Path(config.out) / FOLDER / f"{arm},beta={beta:g}" / f"seed-{SEED}"
            run = run_of(stages.train_config(MIDDLE, beta, "tuning"), VARIANTS[arm], SEED, folder, None, 1, 0)
            jobs.append(Job(VARIANTS[arm], SEED, run, folder, (0.5,), None, stages.judge()))
    results = run_jobs(jobs, config.workers)
    found: dict[str, list[tuple[float, float | None]]] = {}
    for job, result in zip(jobs, results, strict=True):
        values = result.values.get("identity", [])
        found.setdefault(job.change.name, []).append((job.config.loss.beta, sum(values) / len(values) if values else None))
    prior, focus = (max(found[arm], key=lambda tried: -1.0 if tried[1] is None else tried[1])[0] for arm in ARMS)
    chosen = Betas(prior, focus, found)
    write_json(stages.folder / BETA_FILE, asdict(chosen))
    return chosen
