"""How t is drawn: other people's recipes by their settings, the pipelines' own shifts, and turns through a list."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling

from focusdpo.commands import cli
from focusdpo.foundation.journals import read_metrics
from focusdpo.models import BACKBONES
from focusdpo.models.tiny_flux import write_tiny_flux
from focusdpo.training.config import DataConfig, FocusConfig, LoraConfig, LossConfig, ModelConfig, TrainConfig
from focusdpo.training.times import draw_times
from focusdpo.training.trainer import Trainer
from tests.tiny_flux2 import write_tiny_flux2
from tests.tiny_qwen import write_tiny_qwen

WRITE = {
    "flux": write_tiny_flux,
    "kontext": lambda folder: write_tiny_flux(folder, kontext=True),
    "flux2": write_tiny_flux2,
    "qwen-edit-plus": write_tiny_qwen,
}


def draw(loss, count=200_000, shift=None):
    return draw_times(loss, torch.Generator().manual_seed(0), range(count), loss.shift if shift is None else shift)


def test_the_default_is_logit_normal():
    t = draw(LossConfig(logit_mean=0.4, logit_std=0.7))
    logits = torch.logit(t.double())
    assert logits.mean() == pytest.approx(0.4, abs=0.01) and logits.std() == pytest.approx(0.7, abs=0.01)
    assert t.mean() > 0.5, "a larger mean is more noise"


def test_diffusers_scripts_count_from_the_other_end():
    """Their density picks an index into times that fall from 1: the settings that give their times are the negative mean."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    u = compute_density_for_timestep_sampling(
        "logit_normal", 200_000, logit_mean=0.5, logit_std=1.0, generator=torch.Generator().manual_seed(1)
    )
    theirs = scheduler.sigmas[(u * scheduler.config.num_train_timesteps).long()]
    ours = draw(LossConfig(logit_mean=-0.5, shift=3.0))
    at = torch.linspace(0.05, 0.95, 19)
    torch.testing.assert_close(ours.quantile(at), theirs.quantile(at), rtol=0, atol=5e-3)
    assert draw(LossConfig(logit_mean=0.5, shift=3.0)).mean() - theirs.mean() > 0.1


def test_diffusers_scripts_without_a_density():
    """FLUX.1 dev's scheduler shifts by the image's size in sampling alone: its times are even, whatever its own shift."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    u = compute_density_for_timestep_sampling("none", 200_000, generator=torch.Generator().manual_seed(1))
    theirs = scheduler.sigmas[(u * scheduler.config.num_train_timesteps).long()]
    at = torch.linspace(0.05, 0.95, 19)
    torch.testing.assert_close(draw(LossConfig(times="uniform")).quantile(at), theirs.quantile(at), rtol=0, atol=5e-3)


def test_unos_recipe():
    """Uniform over 1000 times from 0 to 1 under FLUX.1's shift at 512 px: a mean of 0.604."""
    mu = 0.5 + (1024 - 256) * (1.15 - 0.5) / (4096 - 256)
    even = np.linspace(0, 1, 1000)[1:]
    theirs = np.exp(mu) / (np.exp(mu) + 1 / even - 1)
    t = draw(LossConfig(times="uniform", shift="auto"), shift=math.exp(mu))
    assert t.mean() == pytest.approx(theirs.mean(), abs=2e-3) and theirs.mean() == pytest.approx(0.604, abs=1e-3)
    at = np.linspace(0.05, 0.95, 19)
    np.testing.assert_allclose(np.quantile(t.numpy(), at), np.quantile(theirs, at), atol=5e-3)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("dynamic", ["exponential", "linear", None])
def test_auto_is_the_schedulers_own_shift(tmp_path, backbone, dynamic):
    """Against the sigmas that the pipeline's scheduler makes of even ones, for images of two sizes."""
    model = BACKBONES[backbone].from_pretrained(str(WRITE[backbone](tmp_path / "model")), dtype=torch.float32)
    options = {"use_dynamic_shifting": True, "time_shift_type": dynamic} if dynamic else {"shift": 2.5}
    model.pipeline.scheduler = scheduler = FlowMatchEulerDiscreteScheduler(**options, max_shift=0.9)
    even = torch.linspace(0.1, 0.9, 9)
    shifts = []
    for tokens in (1024, 3600):
        mu = model.time_shift(tokens, 50)  # 50 steps are FLUX.2's own number; the others' mu knows none
        if backbone != "flux2":
            low, high = (256, 0.5), (4096, 0.9)
            assert mu == pytest.approx(low[1] + (tokens - low[0]) * (high[1] - low[1]) / (high[0] - low[0]))
        scheduler.set_timesteps(sigmas=even.tolist(), mu=mu)
        shifts.append(model.training_shift(tokens))
        s = shifts[-1]
        torch.testing.assert_close(s * even / (1 + (s - 1) * even), scheduler.sigmas[:-1], rtol=1e-5, atol=1e-6)
    assert (shifts[0] < shifts[1]) == bool(dynamic)


def test_lists():
    loss = LossConfig(times=[0.8, 0.7, 0.55, 0.34])
    t = draw(loss, 4000)
    assert set(t.tolist()) == set(torch.tensor(loss.times).tolist())
    assert all(900 < int((t == one).sum()) < 1100 for one in torch.tensor(loss.times))
    in_turn = dataclasses.replace(loss, time_order="round_robin")
    assert draw(in_turn, 6).tolist() == pytest.approx([0.8, 0.7, 0.55, 0.34, 0.8, 0.7])


def test_options_and_files_take_lists(tmp_path):
    minimal = "model: {path: m}\ndata: {train: t}\noutput_dir: o\n"
    file = tmp_path / "train.yaml"
    for text, options, expected in (
        ("loss: {times: [0.2, 0.7], time_order: round_robin}", [], [0.2, 0.7]),
        ("", ["--loss.times", "0.2", "0.7"], [0.2, 0.7]),
        ("", ["--loss.times", "[0.2]"], [0.2]),
        ("", ["--loss.times", "uniform", "--loss.shift", "auto"], "uniform"),
        ("", ["--loss.shift", "3"], "logit_normal"),
    ):
        file.write_text(minimal + text)
        loss = cli.parse_config(["train", "--config", str(file), *options])[1].loss
        assert loss.times == expected
    assert loss.shift == 3.0


@pytest.mark.parametrize("batch_size", [1, 4])
def test_turns_of_a_run(tiny_flux, tiny_pairs, tmp_path, batch_size):
    """Four batches a step go through all four times; the next epoch begins one further; a resume goes on where it was."""
    config = TrainConfig(
        model=ModelConfig(path=str(tiny_flux), dtype="fp32", max_sequence_length=16),
        data=DataConfig(
            train=str(tiny_pairs),
            validation=str(tiny_pairs),
            resolution=96,
            reference_resolution_multiple=48,
            num_workers=0,
            batch_size=batch_size,
        ),
        output_dir=str(tmp_path / "run"),
        lora=LoraConfig(rank=2),
        focus=FocusConfig(mask="none"),
        loss=LossConfig(times=[0.2, 0.4, 0.6, 0.8], time_order="round_robin"),
        max_steps=3,
        gradient_accumulation=4,
        mixed_precision="no",
        cpu=True,
    )
    trainer, seen = Trainer(config), []
    original = trainer.step.compare
    trainer.step.compare = lambda noised, batch, reference=None: (
        seen.append([round(float(t), 3) for t in noised.t[: len(batch.indices)]]) or original(noised, batch, reference)
    )
    trainer.train()
    times = [t for batch in seen for t in batch]
    assert times[:8] == [0.2, 0.4, 0.6, 0.8] * 2, "of the held-out pairs"
    assert times[8:20] == [0.2, 0.4, 0.6, 0.8] * 2 + [0.4, 0.6, 0.8, 0.2]
    if batch_size > 1:  # pairs of several layouts: not every batch is full
        assert len({len(batch) for batch in seen}) > 1
        return
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["time"] for row in rows] == pytest.approx([0.5] * 3)
