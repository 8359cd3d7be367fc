"""`focusdpo stress`: scenes composed, measured one by one, averaged, drawn. A test that is killed goes on where it was."""

from __future__ import annotations

import logging
import platform
import re
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from focusdpo.data import LongestSide, PairDataset, collate, load_pairs
from focusdpo.foundation.files import checksum, write_json
from focusdpo.foundation.output_folder import OutputFolder
from focusdpo.foundation.packages import version_of
from focusdpo.foundation.settings import check_begun
from focusdpo.models import BACKBONES
from focusdpo.studies.config import KINDS, StressConfig
from focusdpo.studies.stress import plots, summary
from focusdpo.studies.stress.scenes import write_scenes
from focusdpo.studies.stress.subjects import SubjectSource, source_of
from focusdpo.studies.stress.work import Arrays, load_scene, measure_scene, save_scene
from focusdpo.training.checkpoints import ADAPTER_FILE
from focusdpo.training.config import TrainConfig
from focusdpo.training.loading import check_files_and_packages, checkpoint_of, load_step
from focusdpo.training.run_files import model_as_run, read_run_config
from focusdpo.training.run_folder import model_contents
from focusdpo.training.step import PreferenceStep

logger = logging.getLogger(__name__)

SETTINGS_FILE, SCENES, MEASURED, RESULTS_FILE = "stress.json", "scenes", "measured", "results.json"
AUC_FILE, CONFUSION_FILE, EXCHANGE_FILE = "auc.png", "confusion.png", "exchange.png"
EXAMPLES_FILES = {kind: f"examples-{kind}.png" for kind in KINDS}
PICTURES = (AUC_FILE, CONFUSION_FILE, EXCHANGE_FILE, *EXAMPLES_FILES.values())
_KIND = "|".join(KINDS)
# What the test writes, see `focusdpo.foundation.output_folder`.
WRITTEN = (
    *(re.escape(name) for name in (SETTINGS_FILE, RESULTS_FILE, *PICTURES)),
    rf"{SCENES}/pairs\.jsonl",
    rf"{SCENES}/({_KIND})-\d+/(line\.json|(winner|loser|reference\d+(_mask)?|prior\d+)\.png)",
    rf"{MEASURED}/({_KIND})-\d+\.npz",
)
FREE = ("output_dir", "overwrite", "scenes", "level", "resamples", "backend", "cpu", "config", "checkpoint", "model")
EXAMPLES = 3  # scenes of each kind that are drawn
PACKAGES = ("focusdpo", "torch", "diffusers", "numpy", "pillow", "scipy")


def prepare(config: StressConfig) -> Callable[[], None]:
    """Checks settings, model, photos and folder, loads the model if a scene is left to measure, and returns the test.

    Raises:
        FileNotFoundError, ValueError, ModuleNotFoundError: model, run or photos cannot be used, or a package is missing.
        FileExistsError, NotADirectoryError: the folder holds something else.
    """
    run = run_of(config)
    checkpoint = None if config.config is None else checkpoint_of("checkpoint", run, config.checkpoint)
    check_files_and_packages(run)
    source = source_of(config)
    folder = Path(config.output_dir)
    settings = settings_of(config, run, checkpoint, source)
    out = OutputFolder("output_dir", folder, "stress", WRITTEN)
    out.check_begun(config.overwrite, SETTINGS_FILE, settings, partial(check_begun, "test", folder), aside=(RESULTS_FILE,))
    measured: dict[Path, Arrays] = {}
    if out.goes_on:
        files = [file for kind in KINDS for file in _measured(config, kind)]
        measured = {file: arrays for file in files if (arrays := load_scene(file)) is not None}
    step = None if len(measured) == len(KINDS) * config.scenes else load_step(run, checkpoint)

    def work() -> None:
        with out.begin():
            _test(config, run, source, step, settings, measured)

    return work


def run_of(config: StressConfig) -> TrainConfig:
    """The run that is tested, or the model as a run that has not begun, with all blocks tapped."""
    if config.config is not None:
        run = read_run_config("config", config.config)
    else:
        assert config.model is not None
        run = model_as_run(config.model)
    run.cpu = run.cpu or config.cpu
    run.backend = config.backend or run.backend
    # Scenes have sizes of their own, and their latents are not those of the run's pairs.
    run.data.cache = run.data.reference_cache = None
    return run


def settings_of(config: StressConfig, run: TrainConfig, checkpoint: Path | None, source: SubjectSource) -> dict[str, Any]:
    """What decides the numbers of a scene, models and photos by their content."""
    own = {name: value for name, value in asdict(config).items() if name not in FREE}
    own["dreambench"] = source.photos
    model = {name: value for name, value in asdict(run.model).items() if name not in ("path", "revision", "base_lora")}
    return {
        "settings": own,
        "model": model
        | {
            **model_contents(run.model),
            "checkpoint": None if checkpoint is None else checksum(checkpoint / ADAPTER_FILE)[:16],
            "layers": run.focus.layers,
            "feature_source": run.focus.feature_source,
            "mixed_precision": run.mixed_precision,
        },
    }


def _measured(config: StressConfig, kind: str) -> list[Path]:
    return [Path(config.output_dir) / MEASURED / f"{kind}-{number:04d}.npz" for number in range(config.scenes)]


def _test(
    config: StressConfig,
    run: TrainConfig,
    source: SubjectSource,
    step: PreferenceStep | None,
    settings: dict[str, Any],
    measured: dict[Path, Arrays],
) -> None:
    """Measures the scenes that are not among the measured ones yet, sums up and draws."""
    folder = Path(config.output_dir)
    records = load_pairs(str(write_scenes(config, source, folder / SCENES)), "headers")
    dataset = PairDataset(
        records,
        resolution=config.resolution,
        reference_rule=LongestSide(config.reference_resolution),
        prompt_rule=BACKBONES[run.model.backbone].prompt_rule,
    )
    files = [file for kind in KINDS for file in _measured(config, kind)]
    missing = [index for index, file in enumerate(files) if file not in measured]
    for index in tqdm(missing, desc="measuring scenes", unit="scene", initial=len(files) - len(missing), total=len(files)):
        assert step is not None
        batch = collate([dataset[index]]).to(step.backbone.device)
        seed = config.seed, index % config.scenes  # the same noise for the scenes of both kinds in the same places
        autocast = run.mixed_precision == "bf16"
        arrays = measure_scene(step, batch, config.timesteps, config.poolings, config.match_counts, seed, autocast)
        save_scene(files[index], arrays)
        measured[files[index]] = arrays

    scenes: dict[str, list[Arrays]] = {kind: [measured[file] for file in _measured(config, kind)] for kind in KINDS}
    names: dict[str, list[list[str]]] = {
        kind: [list(r.meta["subjects"]) for r in records if r.meta["kind"] == kind] for kind in KINDS
    }
    blocks = scenes[KINDS[0]][0]["confusion"].shape[2] - 1
    tapped = range(blocks) if run.focus.layers == "all" else run.focus.layers
    layers = [summary.ALL, *map(str, tapped)]
    rows = summary.summarise(config, layers, scenes, names)
    plots.draw_auc(config, rows, layers, folder / AUC_FILE)
    plots.draw_confusion(config, rows, folder / CONFUSION_FILE)
    plots.draw_exchange(config, rows, folder / EXCHANGE_FILE)
    for part, kind in enumerate(KINDS):
        shown = {
            n: (collate([dataset[part * config.scenes + n]]), scenes[kind][n]) for n in range(min(EXAMPLES, config.scenes))
        }
        title = plots.NAMES[kind]
        plots.draw_examples(config, shown, len(config.timesteps) // 2, title, folder / EXAMPLES_FILES[kind])
    results = {
        "settings": asdict(config),
        "model": settings["model"] | {"path": run.model.path},
        "versions": {"python": platform.python_version(), **{name: version_of(name) for name in PACKAGES}},
        "blocks": blocks,
        "scenes": {kind: _about(scenes[kind], names[kind]) for kind in KINDS},
        "rows": [asdict(row) for row in rows],
    }
    write_json(folder / RESULTS_FILE, results)
    print(summary.table(config, rows, summary.LABELS) + "\n\n" + summary.table(config, rows, summary.VERDICTS))
    logger.info("%s: %s, %s", folder, RESULTS_FILE, ", ".join(PICTURES))


def _about(scenes: list[Any], names: list[list[str]]) -> list[dict[str, Any]]:
    """Of each scene its subjects, and their tokens in the scene and as K; a share of the scene is what chance would hit."""
    return [
        {
            "subjects": both,
            "region_tokens": arrays["regions"].sum((1, 2)).tolist(),
            "tokens": int(arrays["regions"][0].size),
            "K": arrays["K"].tolist(),
        }
        for arrays, both in zip(scenes, names, strict=True)
    ]
