"""`focusdpo microcosm`: a world, a model that learns it, and the ablation on that model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from focusdpo.commands import ablate
from focusdpo.foundation.output_folder import OutputFolder, under
from focusdpo.foundation.packages import require_package
from focusdpo.foundation.settings import check_begun, require
from focusdpo.foundation.text import counted
from focusdpo.studies.ablation.equal_drift import EqualDrift
from focusdpo.studies.ablation.jobs import Point, Result
from focusdpo.studies.ablation.statistics import Table
from focusdpo.studies.ablation.variants import VARIANTS
from focusdpo.studies.config import MicrocosmConfig
from focusdpo.studies.microcosm.autoencoder import restore
from focusdpo.studies.microcosm.classifier import IdentityClassifier
from focusdpo.studies.microcosm.judging import IMAGES_FILE, MEASURES
from focusdpo.studies.microcosm.pictures import draw_curves, draw_drift, draw_intervals, draw_losses, draw_samples, draw_world
from focusdpo.studies.microcosm.stages import RUN_FILE, STAGES_WRITTEN, Stages
from focusdpo.training.batches import dataset_of, load_records

logger = logging.getLogger(__name__)

SETTINGS_FILE = "microcosm.json"
PICTURES = ("world.png", "losses.png", "samples.png", "intervals.png", "tuning.png", "curves.png")
DRIFT_PICTURE = "drift.png"  # where variants are compared at equal drift
ABLATION = "ablation"
# What the microcosm writes, see `focusdpo.foundation.output_folder`.
WRITTEN = (
    r"microcosm\.json",
    *(name.replace(".", r"\.") for name in (*PICTURES, DRIFT_PICTURE)),
    *STAGES_WRITTEN,
    *under(ABLATION, ablate.WRITTEN),
)
JUDGED = ("identity", "leakage", "wrong instance", "class", "FID")
TUNED = ("accuracy/inside", "win/inside", "lose/inside", "win/outside", "win/whole", "coverage")
DRAWN = ("win/inside", "lose/inside", "win/outside")  # as curves
ROWS = 8  # of the sheet of samples
SCENES = 16  # on the picture of the world


def prepare(config: MicrocosmConfig) -> Callable[[], None]:
    """Looks at folder and packages, and returns what composes, trains, judges and draws.

    Raises:
        ModuleNotFoundError: a package of the extras `demo`, `evaluation` or, for DreamBench, `build` is missing.
        FileExistsError, NotADirectoryError, FileNotFoundError: the folder holds something else, or DreamBench is not there.
        ValueError: the folder holds another world, several processes were started, or the device has no such kernels.
    """
    ablate.check_alone("microcosm")
    for module, extra in (("skimage", "demo"), ("torchmetrics", "evaluation")):
        require_package(module, "the microcosm", extra)
    if "layers" in config.grids:
        blocks = sum(config.sizes.layers)
        require(blocks >= 3, "grids", config.grids, f"no grid over layers with size={config.size!r}, which has {blocks}")
    folder, stages = Path(config.out), Stages(config)
    out = OutputFolder("out", folder, "microcosm", WRITTEN)
    out.check_begun(config.overwrite, SETTINGS_FILE, _settings(stages), partial(_check_settings, folder), aside=(RUN_FILE,))
    stages.check()
    if out.goes_on and stages.are_done:  # refuse now what would be refused when the ablation begins
        with TemporaryDirectory() as place:
            run = Path(place) / RUN_FILE
            stages.write_run(run)
            ablate.prepare(replace(config.ablation, config=str(run)))

    def work() -> None:
        with out.begin():
            kinds = counted(len(set(stages.classes)), "class", "classes")
            logger.info("%s in %s", counted(len(stages.classes), "identity", "identities"), kinds)
            stages.run()
            ablate.prepare(config.ablation, stages.judge(), MEASURES, partial(draw, stages))()
        logger.info("pictures: %s", ", ".join(str(folder / name) for name in PICTURES))

    return work


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
    if (folder / ABLATION).exists():
        remedy = f"delete {folder / ABLATION} to tune this world's model anew"
        check_begun("microcosm", folder, begun, {"tuning": now["tuning"]}, setting="out", remedy=remedy)


def draw(stages: Stages, table: Table, equal: EqualDrift | str, results: Sequence[Result]) -> None:
    """The pictures of docs/microcosm.md, of finished stages and ablation; that over drift where it is compared at one."""
    folder, config = stages.folder, stages.config
    vae = AutoencoderKL.from_pretrained(folder / "autoencoder").to(stages.device)
    scenes = stages.held_out.scenes[:SCENES]
    draw_world(scenes, restore(vae, scenes), folder / "world.png")
    names = {"autoencoder": "autoencoder", "classifier.safetensors": "classifier", "model": "flow matching"}
    facts = stages.facts()
    draw_losses({label: facts[name]["losses"] for name, label in names.items()}, folder / "losses.png")

    labels = {row.variant: VARIANTS[row.variant].label if row.variant in VARIANTS else row.variant for row in table.rows}
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
    classifier = IdentityClassifier(len(stages.identities))
    classifier.load_state_dict(load_file(folder / "classifier.safetensors"))
    runs_folder, seed = Path(config.ablation.output_dir) / ablate.RUNS, f"seed-{config.seeds[0]}"
    folders = {label: runs_folder / variant / seed for variant, label in labels.items()}
    runs = {label: run for label, run in folders.items() if (run / IMAGES_FILE).is_file()}
    settings = stages.train_config()
    held_out = dataset_of(load_records(settings)[1], settings.data, settings.model.backbone)
    identities = [identity.name for identity in stages.identities]
    with torch.no_grad():
        draw_samples(held_out, runs, classifier.eval(), identities, ROWS, stages.size.samples, folder / "samples.png")
