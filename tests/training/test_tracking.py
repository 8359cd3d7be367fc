"""Weights & Biases beside TensorBoard: an offline run with numbers and images; refused before anything is loaded."""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace

import pytest

from focusdpo.demo.scenes import write_dataset
from focusdpo.training.tracking import check_trackers
from focusdpo.training.trainer import Trainer

SETTINGS = {
    "data.validation": "{pairs}", "data.resolution": 64, "data.reference_resolution_multiple": 32,
    "focus.mask": "prior", "optim.lr": 2e-05, "samples.every": 1, "samples.count": 1, "samples.steps": 1,
    "max_steps": 1, "trackers": ["tensorboard", "wandb"], "backend": "torch",
}  # fmt: skip


@pytest.fixture
def tiny_pairs(tmp_path):
    return write_dataset(tmp_path / "pairs", 2, 64, seed=0)


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
