"""A run that is killed, stopped or damaged goes on to the same numbers."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from focusdpo.foundation.journals import read_metrics
from focusdpo.foundation.launch import Launch
from focusdpo.training.checkpoints import complete_checkpoints
from focusdpo.training.config import (
    FocusConfig,
    LossConfig,
    OptimConfig,
    SamplesConfig,
)
from focusdpo.training.determinism import repeatable
from focusdpo.training.signals import GRACE, StopError, StopSignals
from focusdpo.training.trainer import Trainer
from tests import PATIENCE, ROOT
from tests.runs import assert_same_lora, lora_of, rows_of

SETTINGS = {
    "lora.dropout": 0.1, "optim.scheduler": "cosine", "optim.warmup_steps": 2, "max_steps": 8,
    "gradient_accumulation": 2, "checkpoint_every": 2,
}  # fmt: skip


def written(config):
    """Metrics without the clock's, and the adapter."""
    return rows_of(config), lora_of(config)


def train(config):
    Trainer(config).train()
    AcceleratorState._reset_state(reset_partial_state=True)
    return written(config)


def assert_same(actual, expected):
    assert actual[0] == expected[0]
    assert_same_lora(actual[1], expected[1])


def write_yaml(config):
    file = Path(config.output_dir).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(dataclasses.asdict(config)))
    return str(file)


def test_killed_twenty_times(config, tmp_path):
    config = dataclasses.replace(config, max_steps=100, gradient_accumulation=1, checkpoints_total_limit=3)
    expected = train(config)
    config.output_dir = str(tmp_path / "killed")
    command = [sys.executable, "-m", "tests.training.killed_worker", write_yaml(config), "20"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert done.stdout.count("killed at") == 20
    assert {"start", "step", "checkpoint"} == {line.split()[-1] for line in done.stdout.splitlines() if "killed at" in line}
    assert_same(written(config), expected)
    kept = [path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()]
    assert sorted(kept) == ["step-000096", "step-000098", "step-000100"], "and nothing half written"


# In its third step it waits for the signal: a fast run would have ended by then.
HEARS = """
import sys, time
from pathlib import Path
from focusdpo.commands import cli
from focusdpo.training.trainer import Trainer
compute_loss, sent = Trainer._compute_loss, Path(sys.argv.pop(1))

def waits(self, batch):
    while self.progress.step == 2 and not sent.exists():
        time.sleep(0.01)
    return compute_loss(self, batch)

Trainer._compute_loss = waits
cli.main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_saves_the_running_step(config, tmp_path, number):
    config = dataclasses.replace(config, checkpoint_every=0)
    expected = train(config)
    config.output_dir = str(tmp_path / "stopped")
    sent = tmp_path / "sent"
    command = [sys.executable, "-c", HEARS, str(sent), "train", "--config", write_yaml(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        time.sleep(0.005)
    process.send_signal(number)
    sent.touch()
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + number, errors[-3000:]
    assert f"{number.name}: stopping after this batch, with all steps saved" in errors and "Traceback" not in errors
    (checkpoint,) = complete_checkpoints(tmp_path / "stopped" / "checkpoints")
    steps = len(read_metrics(metrics))
    assert checkpoint.name == f"step-{steps:06d}" and 2 <= steps < 8
    assert not (tmp_path / "stopped" / "lora").exists(), "the run is not done"
    assert_same(train(dataclasses.replace(config, resume="latest")), expected)


def everything(config):
    """What a run has left, as far as it follows from its settings alone: metrics, evaluations, samples, the last checkpoint."""
    folder = Path(config.output_dir)
    (checkpoint,) = complete_checkpoints(folder / "checkpoints")[-1:]
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    pictures = {str(path.relative_to(folder)): path.read_bytes() for path in sorted((folder / "samples").rglob("*_sample.png"))}
    held_out = [{k: v for k, v in row.items() if k != "step"} for row in read_metrics(folder / "validation.jsonl")]
    steps = [row["step"] for row in read_metrics(folder / "validation.jsonl")]
    return written(config), steps, held_out, pictures, checkpoint.name, state["progress"]


def test_a_stop_at_any_batch_changes_nothing(config, tiny_pairs, tmp_path, monkeypatch):
    """In the midst of an accumulation, an evaluation or a sample: saved at once, and what was owed is made up for."""
    config.data = dataclasses.replace(config.data, validation=str(tiny_pairs), resolution=48, reference_resolution_multiple=16)
    config.focus = FocusConfig(mask="prior")  # whose masks take no time to draw
    config = dataclasses.replace(config, max_steps=4, validate_every=2, samples=SamplesConfig(every=2, count=1, steps=2))
    train(config)
    expected = everything(config)
    check = StopSignals.check
    numbers = iter(range(10**6))
    monkeypatch.setattr(StopSignals, "check", lambda self: next(numbers) and check(self))
    train(dataclasses.replace(config, output_dir=str(tmp_path / "counted")))
    points = next(numbers) - 1
    assert points > 40
    owed = 0
    for point in range(1, points, 7):
        left = point

        def stop(self):
            nonlocal left
            left -= 1
            if left == 0:
                raise StopError

        config.output_dir = str(tmp_path / f"stopped-{point}")
        monkeypatch.setattr(StopSignals, "check", stop)
        with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
            train(config)
        for checkpoint in complete_checkpoints(Path(config.output_dir) / "checkpoints"):
            owed += torch.load(checkpoint / "state.pt", weights_only=True)["progress"]["owes"]
        assert not (Path(config.output_dir) / "lora").exists(), "the run is not done"
        monkeypatch.setattr(StopSignals, "check", check)
        train(dataclasses.replace(config, resume="latest"))
        actual = everything(config)
        assert_same(actual[0], expected[0])
        assert actual[1:] == expected[1:], point
    assert owed >= 2, "some stops came between a step and what comes after it"


def test_a_stop_saves_what_a_run_has_taken_over(config, tmp_path):
    """A checkpoint of another run, before any step of its own: the new folder would else begin at step 0."""
    config.optim = OptimConfig(lr=1e-3)
    train(dataclasses.replace(config, max_steps=2))
    other = str(tmp_path / "run" / "checkpoints" / "step-000002")
    config = dataclasses.replace(config, output_dir=str(tmp_path / "new"), resume=other)
    trainer = Trainer(config)
    trainer._signals.received = signal.SIGTERM
    with pytest.raises(SystemExit):
        trainer.train()
    assert [path.name for path in complete_checkpoints(tmp_path / "new" / "checkpoints")] == ["step-000002"]


@pytest.fixture
def interruptible():
    """Python's own handler of Ctrl-C, which a process in the background does without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_second_signal_stops_at_once(monkeypatch):
    """But for one that a launcher passes on in the same moment."""
    with StopSignals(Launch()) as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(number)
        monkeypatch.setitem(GRACE, signal.SIGINT, 0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    seen = []
    thread = threading.Thread(target=lambda: seen.append(StopSignals(Launch()).__enter__().received))
    thread.start()
    thread.join()
    assert seen == [None], "not the main thread's business"


def spoil(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_passed_over(config, caplog):
    expected = train(config)
    checkpoints = Path(config.output_dir) / "checkpoints"
    spoil(checkpoints / "step-000008" / "adapter.safetensors")
    (checkpoints / "step-000006" / "state.pt").unlink()
    trainer = Trainer(dataclasses.replace(config, resume="latest"))
    assert trainer.progress.step == 4
    assert "step-000008 is damaged (adapter.safetensors is not what was written)" in caplog.text
    assert "step-000006 is damaged (state.pt is missing)" in caplog.text
    trainer.train()
    assert_same(written(config), expected)


def test_nothing_but_damaged_checkpoints(config):
    train(dataclasses.replace(config, max_steps=2))
    checkpoint = Path(config.output_dir) / "checkpoints" / "step-000002"
    spoil(checkpoint / "checksums.json")
    for resume, message in (
        ("latest", "all 1 checkpoints under .* are damaged; start anew"),
        (str(checkpoint), "step-000002 is damaged .*; resume from the one before it"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(dataclasses.replace(config, resume=resume))
    assert read_metrics(Path(config.output_dir) / "metrics.jsonl"), "and nothing is lost"


def test_the_limit_keeps_the_latest(config):
    train(dataclasses.replace(config, checkpoints_total_limit=2))
    checkpoints = Path(config.output_dir) / "checkpoints"
    assert [path.name for path in complete_checkpoints(checkpoints)] == ["step-000006", "step-000008"]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-000006", "step-000008"]
    with pytest.raises(ValueError, match="checkpoints_total_limit: got 0; expected at least 1"):
        dataclasses.replace(config, checkpoints_total_limit=0)


def test_beta_and_the_moving_average_resume_as_well(config, tmp_path):
    config.loss = LossConfig(auto_beta=0.5)
    config.optim = OptimConfig(lr=1e-3, ema_decay=0.9)
    expected, lora = train(config)
    betas = [row["beta"] for row in expected]
    assert betas[0] == 2000 and len(set(betas)) == 8
    for before, after, row in zip(betas, betas[1:], expected, strict=False):
        assert after == pytest.approx(before * math.exp(0.05 * (row["gradient_factor"] - 0.5)))
    average = load_file(Path(config.output_dir) / "lora_ema" / "pytorch_lora_weights.safetensors")
    moved = {name for name, value in lora.items() if not torch.equal(value, average[name])}
    assert moved and all(average[name].norm() < lora[name].norm() for name in moved if "lora_B" in name), "it lags behind"

    config.output_dir = str(tmp_path / "interrupted")
    train_until = dataclasses.replace(config, max_steps=4)
    Trainer(train_until).train()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert_same(train(dataclasses.replace(config, resume="latest")), (expected, lora))
    again = load_file(Path(config.output_dir) / "lora_ema" / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in average.items())
    with pytest.raises(ValueError, match="loss.auto_beta: got 1.5; expected 0 < auto_beta < 1"):
        LossConfig(auto_beta=1.5)


@pytest.mark.parametrize("before", [0, 1])
def test_training_takes_algorithms_that_always_give_the_same_bits(config, before):
    modes = []

    def look(trainer):
        modes.append((torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory))

    torch.set_deterministic_debug_mode(before)
    try:
        for deterministic in (True, False):
            config = dataclasses.replace(config, deterministic=deterministic, max_steps=1, overwrite=True)
            Trainer(config, evaluation=look).train()
            AcceleratorState._reset_state(reset_partial_state=True)
            assert torch.get_deterministic_debug_mode() == before
    finally:
        torch.set_deterministic_debug_mode(0)
    assert modes == [(2, False)] * 2 + [(before, True)] * 2, "before the first step and after the last"


def test_an_operation_without_such_an_algorithm(config):
    def differs(trainer):
        torch.zeros(2).put_(torch.tensor([0]), torch.ones(1), accumulate=False)

    with pytest.raises(RuntimeError, match=r"deterministic: put_ does not .*\n?.*deterministic=false trains without"):
        Trainer(config, evaluation=differs).train()
    assert torch.get_deterministic_debug_mode() == 0
    with pytest.raises(RuntimeError, match="^another$"), repeatable():
        raise RuntimeError("another")


def test_the_setting_may_change_when_a_run_is_resumed(config):
    train(dataclasses.replace(config, checkpoint_every=4))
    (Path(config.output_dir) / "checkpoints" / "step-000008").rename(Path(config.output_dir) / "later")
    rows, _ = train(dataclasses.replace(config, checkpoint_every=4, deterministic=False, resume="latest"))
    assert [row["step"] for row in rows] == list(range(1, 9))
