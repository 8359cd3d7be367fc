"""The files of a run by name, and its settings: what may be known of it without loading what trains."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import yaml

from focusdpo.foundation.settings_text import build, read_settings
from focusdpo.training.config import DataConfig, ModelConfig, TrainConfig

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
VALIDATION_FILE = "validation.jsonl"
ALARMS_FILE = "alarms.jsonl"
ENVIRONMENT_FILE = "environment.json"
REPORT_FILE = "report.html"
LEFT_OUT_FILE = "left_out.jsonl"
SAMPLES_FOLDER = "samples"
CHECKPOINTS_FOLDER = "checkpoints"
_STEP = rf"{CHECKPOINTS_FOLDER}/step-\d+(\.abandoned(-\d+)?)?"
# What a run writes, see `focusdpo.foundation.output_folder`.
WRITTEN = (
    r"config\.yaml",
    r"(metrics|validation|alarms|left_out)\.jsonl",
    r"environment\.json",
    rf"{_STEP}/(adapter\.safetensors|state\.pt|settings\.json|checksums\.json|random_states_\d+\.pkl)",
    rf"{_STEP}/lora/pytorch_lora_weights\.safetensors",
    rf"{_STEP}/deepspeed/**",
    rf"{SAMPLES_FOLDER}/step-\d+/(line-)?\d+(_sample|_masks)?\.png",
    r"lora(_ema)?/(pytorch_lora_weights\.safetensors|README\.md|curves\.png|samples\.png)",
    r"lora(_ema)?/peft/adapter_(config\.json|model\.safetensors)",
    r"tensorboard/events\.out\.tfevents\..+",
    r"wandb/(id|latest-run|wandb-resume\.json|debug(-\w+)?\.log)",
    r"wandb/(offline-)?run-\d{8}_\d{6}-.+/**",
)

TIME_BINS = 4  # of t, alike in width, by which metrics are also given
COVERAGE_BINS = 10  # of A


def samples_in(*folders: Path) -> list[str]:
    """What the samples of some steps are of: the numbers of held-out pairs, then line-N of samples.manifest, each once."""
    stems = {file.stem for folder in folders for file in folder.glob("*.png")}
    found = filter(None, (re.fullmatch(r"(line-)?(\d+)", stem) for stem in stems))
    return [match[0] for match in sorted(found, key=lambda match: (match[1] is not None, int(match[2])))]


def read_starts(file: Path) -> list[dict[str, Any]]:
    """The starts in an environment.json; none where there is no such file, or it is damaged."""
    try:
        starts: list[dict[str, Any]] = json.loads(file.read_text())
        return [start for start in starts if isinstance(start["step"], int)]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return []


def model_as_run(model: ModelConfig) -> TrainConfig:
    """A model as a run that has not begun, to be looked at like one; it has no pairs and no folder."""
    return TrainConfig(model, DataConfig("-"), "-", mixed_precision="bf16" if model.dtype == "bf16" else "no")


# Settings that name files or folders; `model.path` may be an id on the hub instead, and `resume` "latest".
PATHS = (
    "model.path", "model.base_lora", "data.train", "data.validation", "data.cache", "data.reference_cache", "samples.manifest",
    "output_dir", "resume",
)  # fmt: skip


def settings_text(config: TrainConfig) -> str:
    """A run's settings as its folder has them: as YAML, with absolute paths, so that they serve from any folder."""
    settings = asdict(config)
    for name in PATHS:
        section, _, last = name.rpartition(".")
        within = settings[section] if section else settings
        value = within[last]
        if value not in (None, "latest") and (name != "model.path" or os.path.isdir(value)):
            within[last] = str(Path(value).absolute())  # not normalised: what is above a link is not above its target
    return yaml.safe_dump(settings, sort_keys=False)


def read_run_config(name: str, run: str | Path) -> TrainConfig:
    """Checked settings. A folder's are those of the run that lies there now, whatever its name was when it was written.

    Args:
        name: of the setting that names the run, for messages.
        run: folder of a run, or a YAML file with the settings of `focusdpo train`.

    Raises:
        FileNotFoundError: there is no such run.
        ValueError: the file does not hold a run's settings.
    """
    path = Path(run)
    is_folder = os.path.isdir(path)  # Path's own raises where a name is too long or a link leads to itself
    file = path / CONFIG_FILE if is_folder else path
    if not os.path.isfile(file):
        hint = f"a folder with {CONFIG_FILE}" if is_folder else "a training run's folder, or its settings as YAML"
        raise FileNotFoundError(f"{name}: no such file: {file}; expected {hint}")
    try:
        settings = read_settings(file, TrainConfig) | ({"output_dir": str(path)} if is_folder else {})
        return cast(TrainConfig, build(TrainConfig, settings))
    except ValueError as error:
        raise ValueError(f"{name}: {file} does not hold the settings of a training run: {error}") from error
