"""Callbacks: the documented example, and what is on the disk when a hook is called."""

from __future__ import annotations

import dataclasses
import re

import yaml

from focusdpo.foundation.journals import read_metrics, read_rows
from focusdpo.training.callbacks import Callback
from focusdpo.training.config import SamplesConfig
from focusdpo.training.trainer import Trainer
from tests import ROOT

# Two steps in which an alarm is raised: without matches coverage cannot fall to tau.
SETTINGS = {
    "data.validation": "{pairs}", "data.resolution": 48, "data.reference_resolution_multiple": 16, "focus.match_count": 0,
    "max_steps": 2, "checkpoint_every": 1,
}  # fmt: skip


def test_the_documented_example(config, tmp_path, monkeypatch, capsys):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config)))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), re.DOTALL)
    (example,) = (block for block in blocks if "callbacks=" in block)
    exec(compile(example, "docs/training.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 0 of 2: accuracy 0.50 on held-out pairs" and lines[-1].startswith("step 2 of 2: accuracy ")
    assert [line for line in lines if line.startswith("step 1, detail_unreachable: 100 % of its pairs have fewer matches")]


class Recorder(Callback):
    """Notes each call, with what is on the disk by then."""

    def __init__(self):
        self.calls = []
        self.alarms = []

    def note(self, trainer, hook):
        folder = trainer.folder
        steps = {
            "rows": len(read_metrics(folder / "metrics.jsonl")),
            "evaluated": len(read_metrics(folder / "validation.jsonl")),
            "samples": len(list(folder.glob("samples/step-*"))),
            "checkpoints": len(list(folder.glob("checkpoints/step-*"))),
            "lora": (folder / "lora" / "README.md").exists(),
        }
        self.calls.append((hook, *steps.values()))

    def on_train_begin(self, trainer):
        self.note(trainer, "begin")

    def on_step_end(self, trainer, row):
        assert read_metrics(trainer.folder / "metrics.jsonl")[-1] == row and row["step"] == trainer.progress.step
        self.note(trainer, "step")

    def on_evaluate(self, trainer, row):
        assert read_metrics(trainer.folder / "validation.jsonl")[-1] == row
        self.note(trainer, "evaluate")

    def between_steps(self, trainer):
        self.note(trainer, "between")

    def on_alarm(self, trainer, alarm):
        assert dataclasses.asdict(alarm) == list(read_rows(trainer.folder / "alarms.jsonl"))[-1]
        self.alarms.append(alarm)

    def on_train_end(self, trainer):
        assert not trainer.stopped
        self.note(trainer, "end")


def test_the_order_of_what_a_run_does(config, caplog):
    recorder = Recorder()
    Trainer(dataclasses.replace(config, samples=SamplesConfig(every=5, count=1, steps=1)), callbacks=[recorder]).train()
    assert recorder.calls == [  # rows, evaluations, samples, checkpoints, whether the LoRA and its card are there
        ("begin", 0, 0, 0, 0, False),
        ("evaluate", 0, 1, 0, 0, False),
        ("between", 0, 1, 1, 0, False),
        ("step", 1, 1, 1, 0, False),
        ("between", 1, 1, 1, 0, False),
        ("step", 2, 1, 1, 1, False),
        ("evaluate", 2, 2, 1, 1, False),
        ("between", 2, 2, 2, 1, False),
        ("end", 2, 2, 2, 2, True),
    ]
    (alarm,) = recorder.alarms
    assert alarm.name == "detail_unreachable" and f"step 1, {alarm.name}: {alarm.message}" in caplog.text
