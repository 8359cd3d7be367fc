"""Fixed draws of times and noise, and the reference's predictions computed once for them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from focusdpo.demo.scenes import write_dataset
from focusdpo.training.config import FocusConfig, LoraConfig, LossConfig
from focusdpo.training.seeding import batch_generators, fixed_generator, seeded
from focusdpo.training.step import PreferenceStep
from focusdpo.training.trainer import Trainer
from tests import runs
from tests.runs import rows_of


@pytest.fixture(scope="module")
def tiny_pairs(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "pairs", 4, 64, seed=0)


# Two and a half epochs of four pairs, each with two draws.
SETTINGS = {
    "model.gradient_checkpointing": True, "data.resolution": 64, "data.cache": "{folder}/encodings",
    "lora.dropout": 0.1, "loss.draws": 2, "max_steps": 10, "checkpoint_every": 5,
}  # fmt: skip


def with_cache(config, name="cached", **changes):
    data = dataclasses.replace(config.data, reference_cache=str(Path(config.output_dir).parent / "references"), **changes)
    return dataclasses.replace(config, data=data, output_dir=f"{config.output_dir}-{name}")


def train(config):
    runs.train(config)
    return rows_of(config)


@pytest.fixture
def reference_runs(monkeypatch):
    """Pairs that the reference model has run on."""
    runs, original = [], PreferenceStep.reference_output

    def counted(self, noised, batch):
        runs.extend(batch.indices)
        return original(self, noised, batch)

    monkeypatch.setattr(PreferenceStep, "reference_output", counted)
    return runs


FOCUS = {
    "policy": FocusConfig(tau=0.6),
    "reference": FocusConfig(tau=0.6, feature_source="reference"),
    "each": FocusConfig(tau=1.0, feature_source="reference", mask_from="each", layers=[0, 2]),
    "none": FocusConfig(mask="none"),
}


@pytest.mark.parametrize("focus", FOCUS)
def test_the_losses_are_the_same_with_and_without(config, focus, reference_runs):
    config = dataclasses.replace(config, focus=FOCUS[focus])
    without = train(config)
    assert len(reference_runs) == 10
    reference_runs.clear()
    cached = train(with_cache(config))
    assert cached == without
    assert sorted(reference_runs) == sorted([0, 1, 2, 3] * 2), "every pair at every draw once, and never in a step"
    assert without[-1]["loss"] != without[0]["loss"]


def test_times_in_turn_are_the_same_with_and_without(config):
    """Each pair meets one time after the other through its draws, and the kept prediction is of that time."""
    config.loss = dataclasses.replace(config.loss, draws=3, times=[0.2, 0.5, 0.8], time_order="round_robin")
    config.max_steps = 12
    without = train(config)
    assert train(with_cache(config)) == without
    times = [round(row["time"], 3) for row in without]
    assert sorted(times) == [0.2] * 4 + [0.5] * 4 + [0.8] * 4, "three epochs of four pairs"
    assert len(set(times[:4])) == 3


def test_batches_of_several_pairs(config):
    """The reference runs pair by pair for the cache, so that rounding may differ."""
    config.data = dataclasses.replace(config.data, batch_size=2)
    for row, other in zip(train(config), train(with_cache(config)), strict=True):
        assert row["pairs"] == other["pairs"]
        for name in ("loss", "margin", "error/reference_lose", "gradient_norm", "focus/coverage"):
            assert row[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6)


def test_an_interrupted_filling_goes_on_and_another_run_reuses_it(config, reference_runs, monkeypatch):
    from focusdpo.foundation.tensor_files import TensorFiles

    config, write, written = with_cache(config), TensorFiles.write, []

    def killed(self, key, tensors):
        if self.name == "data.reference_cache":
            written.append(key)
            if len(written) == 4:
                raise KeyboardInterrupt
        write(self, key, tensors)

    monkeypatch.setattr(TensorFiles, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        Trainer(config)
    monkeypatch.setattr(TensorFiles, "write", write)
    AcceleratorState._reset_state(reset_partial_state=True)
    reference_runs.clear()
    train(config)
    assert len(reference_runs) == 8 - 3
    reference_runs.clear()
    train(dataclasses.replace(config, output_dir=config.output_dir + "-again"))
    assert reference_runs == []


def test_a_resume_and_a_moved_cache_give_the_same_numbers(config, tmp_path, reference_runs):
    config = with_cache(config)
    straight = train(config)
    Path(config.data.reference_cache).rename(tmp_path / "moved")
    reference_runs.clear()
    moved = dataclasses.replace(config.data, reference_cache=str(tmp_path / "moved"))
    checkpoint = Path(config.output_dir) / "checkpoints" / "step-000005"
    assert train(dataclasses.replace(config, data=moved, resume=str(checkpoint))) == straight
    assert reference_runs == []


def test_other_models_settings_and_masks_are_not_mixed_up(config, tiny_flux, tiny_pairs, reference_runs):
    config = with_cache(config)
    Trainer(config)
    changes = {
        "seed": {"seed": 1},
        "times": {"loss": dataclasses.replace(config.loss, logit_mean=1.0)},
        "shift": {"loss": dataclasses.replace(config.loss, shift=2.0)},
        "shift of the scheduler": {"loss": dataclasses.replace(config.loss, shift="auto")},
        "listed times": {"loss": dataclasses.replace(config.loss, times=[0.2, 0.7])},
        "in turn": {"loss": dataclasses.replace(config.loss, times=[0.2, 0.7], time_order="round_robin")},
        "guidance": {"model": dataclasses.replace(config.model, guidance=3.5)},
        "precision": {"mixed_precision": "bf16"},
        "features": {"focus": FocusConfig(feature_source="reference")},
    }
    for name, change in changes.items():
        AcceleratorState._reset_state(reset_partial_state=True)
        reference_runs.clear()
        Trainer(dataclasses.replace(config, output_dir=f"{config.output_dir}-{name}", **change))
        assert len(reference_runs) == 8, name
    AcceleratorState._reset_state(reset_partial_state=True)
    reference_runs.clear()
    # What the reference does not see changes nothing: beta, the adapter, the optimiser.
    other = dataclasses.replace(config.loss, beta=500.0)
    Trainer(dataclasses.replace(config, output_dir=f"{config.output_dir}-beta", loss=other, lora=LoraConfig(rank=2)))
    assert reference_runs == []


def test_a_damaged_file_is_made_again(config, reference_runs, caplog):
    config = with_cache(config)
    Trainer(config)
    AcceleratorState._reset_state(reset_partial_state=True)
    file = sorted(Path(config.data.reference_cache).rglob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-4])
    reference_runs.clear()
    Trainer(dataclasses.replace(config, output_dir=config.output_dir + "-again"))
    assert len(reference_runs) == 1 and f"data.reference_cache: {file} is damaged" in caplog.text


def test_draws_come_in_turn_by_epoch(config):
    rows = train(dataclasses.replace(config, max_steps=12))
    epochs = [sorted(row["time"] for row in rows[i : i + 4]) for i in (0, 4, 8)]
    assert epochs[0] == epochs[2] and epochs[0] != epochs[1]
    assert len(set(epochs[0] + epochs[1])) == 8


def test_seeds():
    assert fixed_generator(0, 3, 1).initial_seed() == fixed_generator(0, 3, 1).initial_seed()
    draws = [fixed_generator(seed, index, draw).initial_seed() for seed in (0, 1) for index in (0, 1) for draw in (0, 1)]
    assert len(set(draws)) == 8
    single = batch_generators(7, 5, [2, 3], None)
    assert single.initial_seed() == seeded(7, 5).initial_seed() == torch.initial_seed()
    each = [generator.initial_seed() for generator in batch_generators(7, 5, [2, 3], 1)]
    assert each == [fixed_generator(7, i, 1).initial_seed() for i in (2, 3)]
    assert torch.initial_seed() == seeded(7, 5).initial_seed(), "dropout differs from epoch to epoch all the same"


def test_what_it_needs(config):
    with pytest.raises(ValueError, match="data.reference_cache: got '.*'; expected null without loss.draws"):
        with_cache(dataclasses.replace(config, loss=LossConfig()))
    with pytest.raises(ValueError, match="data.reference_cache: got '.*'; expected null without data.cache"):
        with_cache(config, cache=None)
    file = Path(config.output_dir)
    file.write_text("")
    data = dataclasses.replace(config.data, reference_cache=str(file / "here"))
    with pytest.raises(NotADirectoryError, match="data.reference_cache: .* is a file; name a folder"):
        Trainer(dataclasses.replace(config, data=data, output_dir=config.output_dir + "-run"))
