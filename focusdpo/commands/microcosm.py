"""`focusdpo microcosm`: a world, a model that learns it, and the ablation on that model."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import AutoencoderKL

from focusdpo.commands import ablate
from focusdpo.foundation.files import write_json, write_whole
from focusdpo.foundation.output_folder import OutputFolder, under
from focusdpo.foundation.packages import ENCODER, require_package
from focusdpo.foundation.settings import check_begun, require
from focusdpo.foundation.text import counted
from focusdpo.studies.ablation import yardsticks
from focusdpo.studies.ablation.equal_drift import EqualDrift
from focusdpo.studies.ablation.gradients import Gradients, text_of_gradients
from focusdpo.studies.ablation.jobs import Point, Result, fresh_trainer, run_of
from focusdpo.studies.ablation.statistics import Table
from focusdpo.studies.ablation.variants import VARIANTS
from focusdpo.studies.config import BASES, Base, MicrocosmConfig, Variant
from focusdpo.studies.microcosm.autoencoder import restore
from focusdpo.studies.microcosm.gates import ONE_ARM, Correspondence, correspondence
from focusdpo.studies.microcosm.judge import load_judge
from focusdpo.studies.microcosm.judging import IMAGES_FILE, MEASURES
from focusdpo.studies.microcosm.pictures import (
    draw_curves,
    draw_drift,
    draw_intervals,
    draw_losses,
    draw_samples,
    draw_verdicts,
    draw_world,
)
from focusdpo.studies.microcosm.stages import JUDGE_FILE, RUN_FILE, STAGES_WRITTEN, Stages
from focusdpo.studies.microcosm.tuning import FOLDER, Betas, chosen_betas
from focusdpo.studies.microcosm.tuning import WRITTEN as TUNING_WRITTEN
from focusdpo.studies.microcosm.verdicts import Outcome, text_of_verdicts
from focusdpo.training.batches import dataset_of, load_records
from focusdpo.training.run_files import read_run_config

logger = logging.getLogger(__name__)

SETTINGS_FILE, GATES_FILE, VERDICTS_FILE = "microcosm.json", "gates.json", "verdicts.txt"
PICTURES = ("world.png", "losses.png", "verdicts.png")
BASE_PICTURES = ("samples.png", "intervals.png", "tuning.png", "curves.png")  # of each base
DRIFT_PICTURE = "drift.png"  # where variants are compared at equal drift
ABLATION = "ablation"
GRADIENT_PAIRS = 32
_OF_BASE = tuple(name.replace(".", r"\.") for name in (*BASE_PICTURES, DRIFT_PICTURE, GATES_FILE))
# What the microcosm writes, see `focusdpo.foundation.output_folder`.
WRITTEN = (
    r"microcosm\.json",
    r"verdicts\.(txt|png)",
    *(name.replace(".", r"\.") for name in PICTURES),
    *STAGES_WRITTEN,
    *TUNING_WRITTEN,
    *(pattern for base in BASES for pattern in under(base, _OF_BASE)),
    *(pattern for base in BASES for pattern in under(f"{base}/{ABLATION}", ablate.WRITTEN)),
    *(pattern for base in BASES for pattern in under(f"{base}/{ABLATION}/{ablate.GRADIENTS}", ablate.GRADIENTS_WRITTEN)),
)
RUN_FILES = tuple(f"{base}/{RUN_FILE}" for base in BASES)  # which people may edit
JUDGED = ("identity", "leakage", "wrong instance", "nobody", "class", "FID")
TUNED = ("accuracy/inside", "win/inside", "lose/inside", "win/outside", "win/whole", "coverage")
DRAWN = ("win/inside", "lose/inside", "win/outside")  # as curves
ROWS = 8  # of the sheet of samples
SCENES = 16  # on the picture of the world


def prepare(config: MicrocosmConfig) -> Callable[[], None]:
    """Looks at folder and packages, and returns what composes, trains, judges and draws.

    Raises:
        ModuleNotFoundError: a package of the extras `demo`, `evaluation` or `build` is missing.
        FileExistsError, NotADirectoryError, FileNotFoundError: the folder holds something else, or DreamBench is not there.
        ValueError: the folder holds another world, several processes were started, or the device has no such kernels.
    """
    ablate.check_alone("microcosm")
    for module, extra in (("skimage", "demo"), ("torchmetrics", "evaluation"), *((name, "build") for name in ENCODER)):
        require_package(module, "the microcosm", extra)
    if "layers" in config.grids:
        blocks = sum(config.sizes.layers)
        require(blocks >= 3, "grids", config.grids, f"no grid over layers with size={config.size!r}, which has {blocks}")
    folder, stages = Path(config.out), Stages(config)
    for base in config.bases:
        taken = {**MEASURES, **yardsticks.MEASURES}
        ablate.check_primary(config.ablation(base), taken, at_the_end=() if config.judge_points else tuple(MEASURES))
    out = OutputFolder("out", folder, "microcosm", WRITTEN)
    out.check_begun(config.overwrite, SETTINGS_FILE, _settings(stages), partial(_check_settings, folder), aside=RUN_FILES)
    stages.check()
    if out.goes_on and stages.are_done and all((folder / base / RUN_FILE).is_file() for base in config.bases):
        # Refuse now what would be refused when an ablation begins.
        for base in config.bases:
            with TemporaryDirectory() as place:
                run = Path(place) / RUN_FILE
                known = read_run_config("config", str(folder / base / RUN_FILE))
                stages.write_run(run, base, known.loss.beta)
                ablate.prepare(replace(config.ablation(base, _beta_begun(folder, base)), config=str(run)), measures=MEASURES)

    def work() -> None:
        with out.begin():
            kinds = counted(len(set(stages.classes)), "class", "classes")
            logger.info("%s in %s", counted(len(stages.classes), "identity", "identities"), kinds)
            stages.run()
            for base in config.bases:
                _gates(stages, base)
            betas = chosen_betas(stages)
            if betas.identity:
                print(betas.text(), flush=True)
            found = {base: _ablate(stages, base, betas) for base in config.bases}
            why_not = {base: _correspondence(folder / base).why_not() for base in config.bases}
            text = text_of_verdicts(found, why_not, config.primary, config.primary_at)
            write_whole(folder / VERDICTS_FILE, text + "\n")
            _draw_world(stages)
            draw_verdicts(
                found, config.primary[1] if config.primary else "identity", _labels(found.values()), folder / "verdicts.png"
            )
        print(text)
        logger.info("pictures: %s", ", ".join(str(folder / name) for name in PICTURES))

    return work


def _gates(stages: Stages, base: Base) -> None:
    """Prints what can be tested on a base, before anything is trained on it."""
    folder, config = stages.folder / base, stages.config
    stages.write_run(folder / RUN_FILE, base, stages.size.beta if config.beta is None else config.beta)
    needed: tuple[Variant, ...] = ("dpo", "prior")
    ablation = config.ablation(base)
    variants = [*ablation.variants, *(name for name in needed if name not in ablation.variants)]
    ablation = replace(ablation, variants=variants, gradients=True, gradient_pairs=GRADIENT_PAIRS)
    run = read_run_config("config", ablation.config)
    file, table = folder / GATES_FILE, Path(ablation.output_dir) / ablate.GRADIENTS / ablate.GRADIENTS_FILE
    if not (file.is_file() and table.is_file()):
        with TemporaryDirectory() as scratch:
            trainer = fresh_trainer(run_of(run, VARIANTS["prior"], run.seed, Path(scratch) / "run", 1, 1, 0))
            try:
                known = correspondence(trainer)
            finally:
                trainer.accelerator.free_memory()
        ablate.prepare(ablation)()
        write_json(file, asdict(known))
    else:
        print(text_of_gradients(Gradients(**json.loads(table.read_text())), {name: VARIANTS[name].label for name in variants}))
    lines = [f"\nThe {base} model:", _correspondence(folder).text()]
    found = json.loads(table.read_text())
    cosine = found["cosines"][found["variants"].index("dpo")][found["variants"].index("prior")]
    said = "one arm" if cosine > ONE_ARM else "two arms; dpo among --variants would compare both"
    print(
        "\n".join([*lines, f"  Diffusion-DPO and the prior alone, cosine of their gradients: {cosine:.3f}, {said}\n"]),
        flush=True,
    )


def _correspondence(folder: Path) -> Correspondence:
    return Correspondence(**json.loads((folder / GATES_FILE).read_text()))


def _ablate(stages: Stages, base: Base, betas: Betas) -> Outcome:
    """All variants on a base."""
    stages.write_run(stages.folder / base / RUN_FILE, base, betas.focus)
    found: list[Outcome] = []

    def draw(table: Table, equal: EqualDrift | str, results: Sequence[Result]) -> None:
        found.append(Outcome(table, equal, results))
        _draw_base(stages, base, found[0])

    ablate.prepare(stages.config.ablation(base, betas.prior), stages.judge(), MEASURES, draw)()
    return found[0]


def _beta_begun(folder: Path, base: Base) -> float | None:
    """Of the prior alone, as the begun ablation has it."""
    file = folder / base / ABLATION / ablate.SETTINGS_FILE
    return json.loads(file.read_text())["ablation"]["prior_beta"] if file.is_file() else None


def _settings(stages: Stages) -> dict[str, Any]:
    """What decides the numbers: of the world and its model, and of the preference training."""
    config = stages.config
    numbers = asdict(config.sizes)
    tuning = {name: numbers.pop(name) for name in ("tuning_steps", "tuning_batch", "lr", "beta", "rank")}
    given = {"tuning_steps": config.steps, "lr": config.lr, "beta": config.beta, "reduction": config.reduction}
    tuning |= {name: value for name, value in given.items() if value is not None}
    source = None if config.dreambench is None else str(Path(config.dreambench).resolve())
    world = {"size": config.size, "dreambench": source, "seed": config.seed, "device": stages.device.type, **numbers}
    return {"world": world, "tuning": tuning}


def _check_settings(folder: Path, begun: dict[str, Any], now: dict[str, Any]) -> None:
    """ValueError names what differs from what the folder holds."""
    check_begun("microcosm", folder, begun, {"world": now["world"]}, setting="out")
    tuned = [str(folder / name) for name in (FOLDER, *BASES) if (folder / name / ("" if name == FOLDER else ABLATION)).exists()]
    if tuned:
        remedy = f"delete {', '.join(tuned)} to tune this world's models anew"
        check_begun("microcosm", folder, begun, {"tuning": now["tuning"]}, setting="out", remedy=remedy)


def _draw_world(stages: Stages) -> None:
    folder = stages.folder
    vae = AutoencoderKL.from_pretrained(folder / "autoencoder").to(stages.device)
    scenes = stages.held_out.scenes[:SCENES]
    draw_world(scenes, restore(vae, scenes), folder / "world.png")
    names = {"autoencoder": "autoencoder", JUDGE_FILE: "judge"} | {f"{base}/model": f"flow, {base}" for base in BASES}
    facts = stages.facts()
    draw_losses({label: facts[name]["losses"] for name, label in names.items()}, folder / "losses.png")


def _labels(found: Iterable[Outcome]) -> dict[str, str]:
    rows = [row for outcome in found for row in outcome.table.rows]
    return {row.variant: VARIANTS[row.variant].label if row.variant in VARIANTS else row.variant for row in rows}


def _draw_base(stages: Stages, base: Base, outcome: Outcome) -> None:
    """The pictures of one base's ablation; that over drift where it is compared at one."""
    folder, config = stages.folder / base, stages.config
    table, equal, results = outcome
    labels = _labels([outcome])
    draw_intervals(table, labels, JUDGED, folder / "intervals.png")
    draw_intervals(table, labels, TUNED, folder / "tuning.png")
    if isinstance(equal, EqualDrift):
        draw_drift(results, equal, labels, folder / DRIFT_PICTURE)
    points: dict[str, list[list[Point]]] = {}
    start: Point | None = None
    for result in results:
        if result.curve and result.curve[0].step == 0:
            start = result.curve[0]
        elif not result.failed:
            points.setdefault(labels[result.variant], []).append(result.curve)
    if start and points:
        draw_curves(points, start, {name: table.measures[name].label for name in DRAWN}, folder / "curves.png")
    judge = load_judge(stages.folder / JUDGE_FILE, len(stages.identities))
    runs_folder, seed = folder / ABLATION / ablate.RUNS, f"seed-{config.seeds[0]}"
    folders = {label: runs_folder / variant / seed for variant, label in labels.items()}
    runs = {label: run for label, run in folders.items() if (run / IMAGES_FILE).is_file()}
    settings = stages.train_config(base, 1.0)
    held_out = dataset_of(load_records(settings)[1], settings.data, settings.model.backbone)
    identities = [*(identity.name for identity in stages.identities), "nobody"]
    with torch.no_grad():
        draw_samples(held_out, runs, judge, identities, ROWS, stages.size.samples, folder / "samples.png")
