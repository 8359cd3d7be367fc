"""What the top of a run's page says: what was trained, how far it got, and what came of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from focusdpo.foundation.files import tensor_shapes
from focusdpo.foundation.journals import read_metrics, read_rows
from focusdpo.foundation.output_folder import OutputFolder
from focusdpo.foundation.settings import flat
from focusdpo.pages.run.binning import BinnedRun
from focusdpo.training.config import DataConfig, ModelConfig, TrainConfig
from focusdpo.training.run_files import ALARMS_FILE, LEFT_OUT_FILE, METRICS_FILE, WRITTEN

LORA_FILE = "lora/pytorch_lora_weights.safetensors"  # written when a run is through
METHODS = {"focus": "FocusDPO", "prior": "Diffusion-DPO within the prior", "none": "Diffusion-DPO"}
BEFORE_AND_AFTER = {"accuracy": ("implicit accuracy", True), "loss": ("loss", False), "margin": ("margin", False)}


@dataclass(frozen=True)
class Fact:
    """A line of the summary; `mood` is "good", "bad" or neither."""

    name: str
    value: str
    note: str = ""
    mood: str = ""


def read_alarms(folder: Path) -> list[dict[str, Any]] | None:
    """The alarms of a run; None where an older version wrote no file."""
    file = folder / ALARMS_FILE
    return [row for row in read_metrics(file) if isinstance(row.get("name"), str)] if file.is_file() else None


def facts(
    folder: Path,
    config: TrainConfig,
    run: BinnedRun,
    held_out: Sequence[dict[str, float]],
    alarms: Sequence[dict[str, Any]] | None,
    starts: Sequence[dict[str, Any]],
) -> list[Fact]:
    """The summary of a run."""
    method = "supervised fine-tuning on the winners" if config.loss.loss_type == "sft" else METHODS[config.focus.mask]
    if method == METHODS["focus"] and config.focus.source != "features":
        method += f", focus.source: {config.focus.source}"
    found = [
        _state(folder, config, run),
        Fact("model", Path(config.model.path).name, f"{config.model.backbone}, LoRA of rank {config.lora.rank}"),
        Fact("method", method, "" if config.loss.loss_type == "sft" else f"beta {config.loss.beta:g}"),
        _pairs(folder, config, starts),
    ]
    if run.seconds:
        hours = f"{run.seconds / 3600:.1f} hours" if run.seconds >= 7200 else f"{run.seconds / 60:.1f} minutes"
        found.append(Fact("speed", f"{run.pairs / run.seconds:.3g} pairs per second", f"{hours} in steps"))
    memory = run.curves.get("peak_memory_mib")
    if memory is not None and np.isfinite(memory.high).any():
        found.append(Fact("peak memory", f"{np.nanmax(memory.high) / 1024:.1f} GiB", "main process"))
    if alarms is None:
        found.append(Fact("alarms", "not recorded", "the run is of an older version"))
    else:
        kinds = len({alarm["name"] for alarm in alarms})
        found.append(Fact("alarms", str(len(alarms)), f"of {kinds} kinds" if kinds > 1 else "", "bad" if alarms else "good"))
    found += _held_out(held_out)
    return found


def _state(folder: Path, config: TrainConfig, run: BinnedRun) -> Fact:
    steps = f"{run.last:,} of {config.max_steps:,} steps"
    out = OutputFolder("run_dir", folder, "train", WRITTEN)
    if run.last >= config.max_steps and (folder / LORA_FILE).is_file() and not out.is_unfinished:
        if _is_whole(out):
            return Fact("state", "finished", steps, "good")
        return Fact("state", "finished, but its LoRA is damaged", f"{LORA_FILE} is not what the run wrote", "bad")
    if run.last == 0:
        return Fact("state", "not begun", f"of {config.max_steps:,} steps; no row in {METRICS_FILE} yet")
    written = datetime.fromtimestamp((folder / METRICS_FILE).stat().st_mtime, UTC)
    # Nothing in the folder tells a run that goes on from one that was killed.
    return Fact("state", f"running, or stopped at step {run.last:,}", f"{steps}; last written {written:%Y-%m-%d %H:%M} UTC")


def _is_whole(out: OutputFolder) -> bool:
    """Whether the LoRA is as long as it says of itself, and, where the run listed its files, what was written."""
    try:
        if not tensor_shapes(out.path / LORA_FILE):
            return False
    except (OSError, SafetensorError):
        return False
    return not out.has_list or out.is_as_written(LORA_FILE)


def _pairs(folder: Path, config: TrainConfig, starts: Sequence[dict[str, Any]]) -> Fact:
    left_out = folder / LEFT_OUT_FILE
    count = len({(str(row.get("file")), str(row.get("line"))) for row in read_rows(left_out)})
    notes = [config.data.train] + ([f"{count:,} left out ({LEFT_OUT_FILE})"] if count else [])
    if not starts or "training_pairs" not in starts[-1]:
        return Fact("pairs", "not recorded", "; ".join(notes))
    last = starts[-1]
    notes.insert(0, f"{last['held_out_pairs']:,} held out")
    return Fact("pairs", f"{last['training_pairs']:,}", "; ".join(notes))


def _held_out(rows: Sequence[dict[str, float]]) -> Iterator[Fact]:
    if not rows:
        yield Fact("held-out pairs", "not evaluated")
        return
    before, after = rows[0], rows[-1]
    for name, (label, is_higher_better) in BEFORE_AND_AFTER.items():
        if name not in before or name not in after:
            continue
        change = after[name] - before[name]
        is_worse = (change > 0) != is_higher_better or not math.isfinite(change)
        mood = "" if not change else "bad" if is_worse else "good"
        note = f"held out, step {before['step']:,} → {after['step']:,}"
        yield Fact(label, f"{_short(before[name])} → {_short(after[name])}", note, mood if len(rows) > 1 else "")


def changed_settings(config: TrainConfig) -> list[tuple[str, str, str]]:
    """Settings that are not their default, as YAML has them: name, value, default (empty with those that have none)."""
    defaults = flat(TrainConfig(ModelConfig("-"), DataConfig("-"), "-"))
    needed = ("model.path", "data.train", "output_dir")
    return [
        (name, json.dumps(value), "" if name in needed else json.dumps(defaults[name]))
        for name, value in flat(config).items()
        if name in needed or value != defaults[name]
    ]


def _short(value: float) -> str:
    return f"{value:.3f}" if value == 0 or 0.001 <= abs(value) < 1000 else f"{value:.2g}"
