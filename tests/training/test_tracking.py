"""Weights & Biases beside TensorBoard: an offline run with numbers and images; refused before anything is loaded."""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace

import pytest

from focusdpo.demo.scenes import write_dataset
from focusdpo.training.config import DataConfig, FocusConfig, LoraConfig, ModelConfig, SamplesConfig, TrainConfig
from focusdpo.training.tracking import check_trackers
from focusdpo.training.trainer import Trainer


@pytest.fixture
def config(tiny_flux, tmp_path):
    pairs = str(write_dataset(tmp_path / "pairs", 2, 64, seed=0))
    return TrainConfig(
        model=ModelConfig(path=str(tiny_flux), dtype="fp32", max_sequence_length=16, gradient_checkpointing=False),
        data=DataConfig(train=pairs, validation=pairs, resolution=64, reference_resolution_multiple=32, num_workers=0),
        output_dir=str(tmp_path / "run"),
        lora=LoraConfig(rank=4, alpha=8),
        focus=FocusConfig(mask="prior"),
        samples=SamplesConfig(every=1, count=1, steps=1),
        max_steps=1,
        mixed_precision="no",
        trackers=["tensorboard", "wandb"],
        backend="torch",
        cpu=True,
    )


def test_an_offline_run(config, monkeypatch):
    wandb = pytest.importorskip("wandb", exc_type=ImportError)
    monkeypatch.setenv("WANDB_MODE", "offline")
    trainer = Trainer(config)
    trainer.train()
    wandb.teardown()  # finish() does not wait until W&B's own process has written the file; a process's end does
    (run,) = (trainer.folder / "wandb").glob("offline-run-*")
    assert run.name.endswith((trainer.folder / "wandb" / "id").read_text()), "the id that a resumed run takes up again"
    assert next(run.glob("*.wandb")).stat().st_size > 1000
    images = sorted(path.name.split("_")[1] for path in (run / "files" / "media" / "images" / "samples").iterdir())
    assert images == ["0", "1"], "the sheet of both steps"
    assert list((trainer.folder / "tensorboard").glob("events.*"))


def test_without_wandb(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="trackers: wandb cannot be imported .*; pip install wandb, or leave it out"):
        Trainer(config)
    check_trackers(dataclasses.replace(config, trackers=["tensorboard"]))


def test_without_a_login(config, monkeypatch):
    def login():
        raise LookupError("No API key configured")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(login=login, Error=LookupError))
    with pytest.raises(ValueError, match="trackers: wandb cannot log in .No API key configured.*WANDB_MODE=offline"):
        check_trackers(config)


def test_each_once(config):
    with pytest.raises(ValueError, match="trackers: got"):
        dataclasses.replace(config, trackers=["wandb", "wandb"])
