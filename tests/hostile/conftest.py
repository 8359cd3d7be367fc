"""A small run, for tests of what damages and misleads it."""

from __future__ import annotations

import pytest

from focusdpo.training.config import DataConfig, LoraConfig, ModelConfig, OptimConfig, TrainConfig


@pytest.fixture
def config(tiny_flux, tiny_pairs, tmp_path):
    """A run of four steps on the tiny model."""
    return TrainConfig(
        model=ModelConfig(path=str(tiny_flux), dtype="fp32", max_sequence_length=16, gradient_checkpointing=False),
        data=DataConfig(train=str(tiny_pairs), resolution=64, reference_resolution=32, num_workers=0, check="headers"),
        output_dir=str(tmp_path / "run"),
        lora=LoraConfig(rank=2, alpha=2, target_modules=["to_q"]),
        optim=OptimConfig(lr=1e-3),
        max_steps=4,
        mixed_precision="no",
        checkpoint_every=2,
        cpu=True,
    )
