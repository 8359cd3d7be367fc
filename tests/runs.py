"""Tiny training runs: their settings, running them, and the numbers that they wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from focusdpo.foundation.journals import Row, read_metrics
from focusdpo.training.config import (
    DataConfig,
    FocusConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)

CLOCK = ("pairs_per_second", "peak_memory_mib")  # what no two runs have in common


def tiny_config(model: Path, pairs: Path, folder: Path, settings: Mapping[str, Any] | None = None) -> TrainConfig:
    """A run of three steps on a tiny model.

    Args:
        model, pairs: of the fixtures tiny_flux and tiny_pairs.
        folder: the run goes into its folder run.
        settings: other values, by dotted names; of the whole run under names without a dot.
    """
    sections = {
        "model": ModelConfig(path=str(model), dtype="fp32", max_sequence_length=16, gradient_checkpointing=False),
        "data": DataConfig(train=str(pairs), resolution=96, reference_resolution_multiple=48, num_workers=0, check="headers"),
        "lora": LoraConfig(rank=4, alpha=8),
        "focus": FocusConfig(tau=0.6),
        "optim": OptimConfig(lr=1e-3),
    }
    config = TrainConfig(**sections, output_dir=str(folder / "run"), max_steps=3, mixed_precision="no", cpu=True)
    changes: dict[str, dict[str, Any]] = {}
    for name, value in (settings or {}).items():
        section, _, last = name.rpartition(".")
        changes.setdefault(section, {})[last] = value
    whole = changes.pop("", {})
    return replace(config, **{name: replace(getattr(config, name), **values) for name, values in changes.items()}, **whole)


def train(config: TrainConfig, **changes: Any) -> Any:
    """Trains with some settings changed; returns the trainer. Another may follow in the same process."""
    from accelerate.state import AcceleratorState

    from focusdpo.training.trainer import Trainer

    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = Trainer(replace(config, **changes))
    trainer.train()
    AcceleratorState._reset_state(reset_partial_state=True)
    return trainer


def rows_of(run: TrainConfig | str | Path, *files: str) -> list[Row]:
    """The metrics of a run, or what other journals of it have, without the clock's."""
    rows = (row for name in files or ("metrics",) for row in read_metrics(_folder_of(run) / f"{name}.jsonl"))
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in rows]


def lora_of(run: TrainConfig | str | Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(_folder_of(run) / "lora" / "pytorch_lora_weights.safetensors")


def _folder_of(run: TrainConfig | str | Path) -> Path:
    return Path(run.output_dir if isinstance(run, TrainConfig) else run)


def assert_same_lora(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """To the bit."""
    assert actual.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in actual.items())
