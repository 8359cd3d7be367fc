"""`focusdpo microcosm`: a world, a model that learns it, and the ablation on that model."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL

from focusdpo.commands import ablate
from focusdpo.foundation.files import read_json, write_json, write_whole
from focusdpo.foundation.output_folder import OutputFolder, under
from focusdpo.foundation.packages import ENCODER, require_package
from focusdpo.foundation.settings import check_begun, require
from focusdpo.foundation.text import counted
from focusdpo.studies.ablation import yardsticks
from focusdpo.studies.ablation.equal_drift import EqualDrift
from focusdpo.studies.ablation.gradients import Gradients, text_of_gradients
from focusdpo.studies.ablation.jobs import Point, Result, fresh_trainer, run_of
from focusdpo.studies.ablation.statistics import Table
from focusdpo.studies.ablation.variants import VARIANTS, changes_of
from focusdpo.studies.config import BASES, MIDDLE, Base, MicrocosmConfig, Variant
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
from focusdpo.studies.microcosm.stages import JUDGE_FILE, MODELS, RUN_FILE, STAGES_WRITTEN, Stages
from focusdpo.studies.microcosm.tuning import FOLDER, Betas, chosen_betas
from focusdpo.studies.microcosm.tuning import WRITTEN as TUNING_WRITTEN
from focusdpo.studies.microcosm.verdicts import Outcome, compared, text_of_verdicts
from focusdpo.training.batches import dataset_of, load_records
from focusdpo.training.run_files import read_run_config

logger = logging.getLogger(__name__)

SETTINGS_FILE, GATES_FILE, VERDICTS_FILE = "microcosm.json", "gates.json", "verdicts.txt"
PICTURES = ("world.png", "losses.png", "verdicts.png")
BASE_PICTURES = ("samples.png", "intervals.png", "tuning.png", "curves.png")  # of each base
DRIFT_PICTURE = "drift.png"  # where variants are compared at equal drift
ABLATION = "ablation"
GRADIENT_PAIRS = 16
_OF_BASE = tuple(name.replace(".", r"\.") for name in (*BASE_PICTURES, DRIFT_PICTURE, GATES_FILE))
# What the microcosm writes, see `focusdpo.foundation.output_folder`.
WRITTEN = (
    r"microcosm\.json",
    r"verdicts\.txt",
    *(name.replace(".", r"\.") for name in PICTURES),
    *STAGES_WRITTEN,
    *TUNING_WRITTEN,
    *(pattern for base in BASES for pattern in under(base, _OF_BASE)),
    *(pattern for base in BASES for pattern in under(f"{base}/{ABLATION}", ablate.WRITTEN)),
    *(pattern for base in BASES for pattern in under(f"{base}/{ABLATION}/{ablate.GRADIENTS}", ablate.GRADIENTS_WRITTEN)),
)
CACHES = ("cache", "references")  # which further runs of train.yaml fill as well
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
    compare = partial(_check_settings, folder)
    out.check_begun(config.overwrite, SETTINGS_FILE, _settings(stages), compare, aside=RUN_FILES, proven=CACHES)
    stages.check()
    if out.goes_on and stages.are_done:  # refuse now what would be refused when an ablation begins
        for base in config.bases:
            begun = _betas_begun(folder, base)
            if begun is not None:
                with TemporaryDirectory() as place:
                    run = Path(place) / RUN_FILE
                    stages.write_run(run, base, begun.focus)
                    ablate.prepare(replace(config.ablation(base, begun.prior), config=str(run)), measures=MEASURES)

    def work() -> None:
        with out.begin():
            kinds = counted(len(set(stages.classes)), "class", "classes")
            logger.info("%s in %s", counted(len(stages.classes), "identity", "identities"), kinds)
            stages.run()
            known = {base: _gates(stages, base) for base in config.bases}
            betas = chosen_betas(stages)
            if betas.identity:
                print(betas.text(), flush=True)
            found = {}
            for base in config.bases:
                stages.write_run(folder / base / RUN_FILE, base, betas.focus)
                out.has_written(f"{base}/{RUN_FILE}")
                found[base] = _ablate(stages, base, betas, known[base].is_one_arm)
            comparisons = compared(
                found, {base for base, gates in known.items() if gates.is_one_arm}, config.primary, config.primary_at
            )
            text = text_of_verdicts(found, comparisons, {base: gates.found.why_not() for base, gates in known.items()})
            write_whole(folder / VERDICTS_FILE, text + "\n")
            _draw_world(stages)
            draw_verdicts(comparisons, folder / "verdicts.png")
        print(text)
        logger.info("pictures: %s", ", ".join(str(folder / name) for name in PICTURES))

    return work


class _Gates(NamedTuple):
    found: Correspondence
    is_one_arm: bool


def _gates(stages: Stages, base: Base) -> _Gates:
    """Prints what can be tested on a base, before anything is trained on it."""
    folder, config = stages.folder / base, stages.config
    ablation = config.ablation(base)
    needed: tuple[Variant, ...] = ("dpo", "prior")
    variants = [*ablation.variants, *(name for name in needed if name not in ablation.variants)]
    pairs = max(GRADIENT_PAIRS, 2 * stages.size.tuning_batch)  # whose halves are of whole batches
    file, table = folder / GATES_FILE, Path(ablation.output_dir) / ablate.GRADIENTS / ablate.GRADIENTS_FILE
    with TemporaryDirectory() as scratch:
        settings = Path(scratch) / RUN_FILE
        stages.write_run(settings, base, stages.size.beta if config.beta is None else config.beta)
        ablation = replace(ablation, config=str(settings), variants=variants, gradients=True, gradient_pairs=pairs)
        run = read_run_config("config", str(settings))
        changes = changes_of(ablation, run)
        if not file.is_file():
            trainer = fresh_trainer(run_of(run, VARIANTS["prior"], run.seed, Path(scratch) / "run", 1, 1, 0))
            try:
                write_json(file, asdict(correspondence(trainer)))
            finally:
                trainer.accelerator.free_memory()
        known = Gradients(**read_json(table)) if table.is_file() else None
        if known is None or not {change.name for change in changes if change.trained} <= set(known.variants):
            ablate.prepare(ablation)()
            known = Gradients(**read_json(table))
        else:
            print(text_of_gradients(known, {change.name: change.label for change in changes} | _labels(known.variants)))
    cosine = known.cosines[known.variants.index("dpo")][known.variants.index("prior")]
    is_one_arm = cosine > ONE_ARM
    is_named = "dpo" in config.ablation(base).variants
    where = "--everywhere" if "dpo" in config.variants else "--variants"
    said = "one arm" if is_one_arm else "two arms" + ("" if is_named else f", compared where dpo is named among {where}")
    found = Correspondence(**read_json(file))
    lines = [f"\nThe {base} model:", found.text()]
    print(
        "\n".join([*lines, f"  Diffusion-DPO and the prior alone, cosine of their gradients: {cosine:.3f}, {said}\n"]),
        flush=True,
    )
    return _Gates(found, is_one_arm)


def _ablate(stages: Stages, base: Base, betas: Betas, is_one_arm: bool) -> Outcome:
    """All variants on a base; of Diffusion-DPO and the prior alone only this one, where they are one arm."""
    ablation = stages.config.ablation(base, betas.prior)
    if is_one_arm and "prior" in ablation.variants:
        ablation = replace(ablation, variants=[name for name in ablation.variants if name != "dpo"])
    found: list[Outcome] = []

    def draw(table: Table, equal: EqualDrift | str, results: Sequence[Result]) -> None:
        found.append(Outcome(table, equal, results))
        _draw_base(stages, base, found[0])

    ablate.prepare(ablation, stages.judge(), MEASURES, draw)()
    return found[0]


def _betas_begun(folder: Path, base: Base) -> Betas | None:
    """Those of the ablation that was begun on a base; None where none was."""
    try:
        begun = json.loads((folder / base / ABLATION / ablate.SETTINGS_FILE).read_bytes())
        return Betas(begun["ablation"]["prior_beta"], begun["run"]["loss.beta"], {})
    except (OSError, ValueError, KeyError):  # what is damaged, the ablation itself says
        return None


def _settings(stages: Stages) -> dict[str, Any]:
    """What decides the numbers: of the world and its model, and of the preference training."""
    config = stages.config
    numbers = asdict(config.sizes)
    tuning = {name: numbers.pop(name) for name in ("tuning_steps", "tuning_batch", "lr", "beta", "rank")}
    tuning["beta tried"] = tuning.pop("beta")
    tuning["draws"] = stages.train_config(MIDDLE, 1.0).loss.draws
    tuning["judged_pairs"] = config.ablation(MIDDLE).judged_pairs
    tuning["beta is kept within"] = "one standard error"
    given = {"tuning_steps": config.steps, "lr": config.lr, "reduction": config.reduction}
    tuning |= {name: value for name, value in given.items() if value is not None} | {"beta": config.beta}
    source = None if config.dreambench is None else str(Path(config.dreambench).resolve())
    world = {"size": config.size, "dreambench": source, "seed": config.seed, "device": stages.device.type, **numbers}
    return {"world": world, "tuning": tuning}


def _check_settings(folder: Path, begun: dict[str, Any], now: dict[str, Any]) -> None:
    """ValueError names what differs from what the folder holds."""
    check_begun("microcosm", folder, begun, {"world": now["world"]}, setting="out")
    tuned = [place for place in (folder / FOLDER, *(folder / base / ABLATION for base in BASES)) if place.exists()]
    if tuned:
        remedy = f"delete {', '.join(map(str, tuned))} to tune this world's models anew"
        check_begun("microcosm", folder, begun, {"tuning": now["tuning"]}, setting="out", remedy=remedy)


def _draw_world(stages: Stages) -> None:
    folder = stages.folder
    vae = AutoencoderKL.from_pretrained(folder / "autoencoder").to(stages.device)
    scenes = stages.held_out.scenes[:SCENES]
    draw_world(scenes, restore(vae, scenes), folder / "world.png")
    names = {"autoencoder": "autoencoder", JUDGE_FILE: "judge"} | {f"{name}/model": f"flow, {name}" for name in MODELS}
    facts = stages.facts()
    draw_losses({label: facts[name]["losses"] for name, label in names.items()}, folder / "losses.png")


def _labels(variants: Iterable[str]) -> dict[str, str]:
    return {name: VARIANTS[name].label if name in VARIANTS else name for name in variants}


def _draw_base(stages: Stages, base: Base, outcome: Outcome) -> None:
    """The pictures of one base's ablation; that over drift where it is compared at one."""
    folder, config = stages.folder / base, stages.config
    table, equal, results = outcome
    labels = _labels(row.variant for row in table.rows)
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
    failed = {result.variant for result in results if result.failed and result.seed == config.seeds[0]}
    folders = {label: runs_folder / variant / seed for variant, label in labels.items() if variant not in failed}
    runs = {label: run for label, run in folders.items() if (run / IMAGES_FILE).is_file()}
    settings = stages.train_config(base, 1.0)
    held_out = dataset_of(load_records(settings)[1], settings.data, settings.model.backbone)
    identities = [*(identity.name for identity in stages.identities), "nobody"]
    with torch.no_grad():
        draw_samples(held_out, runs, judge, identities, ROWS, stages.size.samples, folder / "samples.png")
