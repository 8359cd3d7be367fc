"""The files of a run by name: what may be known of it without loading what trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
    rf"{SAMPLES_FOLDER}/step-\d+/\d+(_sample|_masks)?\.png",
    r"lora(_ema)?/(pytorch_lora_weights\.safetensors|README\.md|curves\.png|samples\.png)",
    r"lora(_ema)?/peft/adapter_(config\.json|model\.safetensors)",
    r"tensorboard/events\.out\.tfevents\..+",
    r"wandb/(id|latest-run|wandb-resume\.json|debug(-\w+)?\.log)",
    r"wandb/(offline-)?run-\d{8}_\d{6}-.+/**",
)

TIME_BINS = 4  # of t, alike in width, by which metrics are also given
COVERAGE_BINS = 10  # of A


def read_starts(file: Path) -> list[dict[str, Any]]:
    """The starts in an environment.json; none where there is no such file, or it is damaged."""
    try:
        starts: list[dict[str, Any]] = json.loads(file.read_text())
        return [start for start in starts if isinstance(start["step"], int)]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return []
