"""What a run says of itself, and that the commands it names do what it says."""

from __future__ import annotations

import logging
import shlex
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from focusdpo.commands.cli import main
from focusdpo.foundation.text import block, counted, duration
from focusdpo.training import announcements
from focusdpo.training.announcements import Announcements
from focusdpo.training.config import SamplesConfig
from focusdpo.training.memory import run_estimate
from focusdpo.training.trainer import Trainer
from tests.tiny_vision import write_tiny_clip

SETTINGS = {
    "data.validation": "{pairs}", "data.resolution": 48, "data.reference_resolution_multiple": None, "data.batch_size": 3,
    "data.reference_resolution": 32, "gradient_accumulation": 2, "max_steps": 12, "trackers": [],
}  # fmt: skip


def train(config, **changes):
    """As `focusdpo train` does it, but for the command line; returns the trainer."""
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = Trainer(replace(config, **changes), callbacks=[Announcements()])
    trainer.train()
    return trainer


def said(caplog, title):
    """The one message that begins so, as lines."""
    (found,) = (record.getMessage() for record in caplog.records if record.getMessage().startswith(title))
    return found.splitlines()


def test_blocks_at_start_and_end(config, caplog, tmp_path):
    caplog.set_level(logging.INFO)
    config.output_dir = str(tmp_path / "a run")
    trainer = train(config, checkpoint_every=6)
    begun = said(caplog, "training begins")
    rows = {line.split()[0]: line.split(maxsplit=1)[1] for line in begun[1:] if line[2] != " "}
    trained = sum(p.numel() for p in trainer.module.parameters() if p.requires_grad)
    assert rows["model"] == f"{config.model.path}: flux, frozen in fp32"
    assert rows["adapter"] == f"LoRA of rank 4, {trained:,} trainable parameters" and trained > 1000
    assert rows["device"] == "cpu, 1 process" and rows["precision"] == "no autocast; kernels: torch"
    layouts = trainer.batches.plan.layouts
    assert rows["pairs"] == f"8 pairs in {counted(len(layouts), 'layout')}, 8 held out"
    assert [line.strip() for line in begun if " of 48x48 px" in line] == [f"{n} of {sizes}" for sizes, n in layouts.items()]
    assert rows["batch"] == "up to 6 pairs a step (data.batch_size=3, gradient_accumulation=2)"
    batches = trainer.batches.plan.epoch(0)
    assert rows["length"].startswith(f"12 steps, {24 / len(batches):g} epochs; an epoch has {len(batches)} batches, ")
    assert rows["output"] == config.output_dir and "memory" not in rows, "a CPU's is not estimated"

    (pace,) = (record.getMessage() for record in caplog.records if record.getMessage().startswith("a step takes "))
    assert ", the 2 steps left about " in pace and pace.endswith(" GiB")

    done = said(caplog, "training is done, at step 12 of 12")
    for name in ("lora", "lora/README.md", "metrics.jsonl"):
        assert any(line.endswith(f"  {config.output_dir}/{name}") for line in done)
        assert (tmp_path / "a run" / name).exists()
    caplog.clear()
    train(config, resume="latest", max_steps=13)
    assert said(caplog, "training goes on from step 12")
    assert not [record for record in caplog.records if record.getMessage().startswith("a step takes ")]


def test_the_next_commands(config, caplog, tmp_path):
    """Of a run that had finished before: each is run as it is written, but for what it leaves to the user."""
    pytest.importorskip("torchmetrics", reason="needs the extra evaluation: pip install 'focusdpo[evaluation]'")
    caplog.set_level(logging.INFO)
    config.output_dir = str(tmp_path / "a run")
    config.max_steps = 1
    train(config)
    first = said(caplog, "training is done, at step 1 of 1")
    caplog.clear()
    settings = ("--config", f"{config.output_dir}/config.yaml", "--resume", "latest")
    main(["train", *settings])
    assert said(caplog, "training is done, at step 1 of 1") == [*first, "  a larger --max_steps goes on"]
    commands = [shlex.split(line) for line in first[first.index("  next") + 1 :]]
    assert [words[:2] for words in commands] == [["focusdpo", name] for name in ("report", "sample", "evaluate")]
    more = {"sample": ["--steps", "1", "--size", "48x48"], "evaluate": ["--resamples", "100"]}
    clip = str(write_tiny_clip(tmp_path / "clip"))
    for _, name, *words in commands:
        main([name, *(clip if word == "CLIP_FOLDER" else word for word in words), *more.get(name, [])])
    made = ("a run/report.html", "a run-images/index.html", "a run-evaluation/results.json")
    assert all((tmp_path / name).is_file() for name in made)
    assert "8 images, 8 of them new" in caplog.text


@pytest.mark.parametrize(("names", "expected"), [
    ({"samples": "prompts.jsonl", "validation": "held_out"}, "prompts.jsonl"), ({"validation": "held_out"}, "held_out"),
    ({"validation": "held_out/pairs.jsonl"}, "held_out/pairs.jsonl"), ({"validation": "shards"}, None), ({}, None),
    ({"samples": "gone.jsonl", "validation": "held_out"}, "held_out"), ({"validation": "held_out/metadata.jsonl"}, None),
])  # fmt: skip
def test_prompts_to_try_the_lora_on(config, tmp_path, monkeypatch, names, expected):
    monkeypatch.chdir(tmp_path)
    for folder in ("held_out", "shards"):
        (tmp_path / folder).mkdir()
    for name in ("held_out/pairs.jsonl", "prompts.jsonl", "held_out/metadata.jsonl"):
        (tmp_path / name).touch()
    config.samples = SamplesConfig(manifest=names.get("samples"))
    config.data.validation = names.get("validation")
    found = announcements.manifest_of(config)
    assert (None if found is None else str(found)) == expected
    text = announcements.finished(config, 3)
    assert ("--prompt TEXT --references IMAGE" in text, "focusdpo evaluate" in text) == (expected is None, expected is not None)


def test_memory_on_a_gpu(config, monkeypatch):
    """The device is pretended; the estimate is that of the advice where memory runs out."""
    trainer = Trainer(config)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=24 * 2**30))
    accelerator = SimpleNamespace(device=torch.device("cuda", 1), distributed_type=DistributedType.NO)
    trainer.accelerator = accelerator
    text = announcements.begun(trainer)
    estimated = run_estimate(config, trainer.train_set)
    assert f"memory     estimated at {estimated.total / 2**20:.2f} MiB of 24.00 GiB for the largest batch" in text
    assert "cuda:1 (Some GPU), 1 process" in text
    largest = max(len(batch) for batch in trainer.batches.plan.epoch(0))
    one = replace(config, data=replace(config.data, batch_size=1))
    assert estimated.tokens == largest * run_estimate(one, trainer.train_set).tokens
    accelerator.distributed_type = DistributedType.FSDP
    assert "  memory  " not in announcements.begun(trainer)
    pace = announcements.pace(2.0, 1800, 1536.0, accelerator.device)
    assert "the 1,800 steps left about 1 h, and " in pace and pace.endswith("peak memory so far: 1.50 GiB of 24.00 GiB")


def test_an_end_that_measured_something_else(config, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for rows in ("", '{"step": 0, "loss": 1.0}\n', '{"step": 0, "accuracy": null}\n'):
        (run / "validation.jsonl").write_text(rows)
        assert "accuracy" not in announcements.finished(config, 3)
    (run / "validation.jsonl").write_text('{"step": 2, "accuracy": 0.5}\n')
    assert "  held out  accuracy 0.50 at step 2\n" in announcements.finished(config, 3)


def test_the_folder_of_here(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config.output_dir = "."
    assert f" --output_dir {tmp_path}-images" in announcements.finished(config, 3)


def test_an_estimate_that_fails_is_left_out(config, monkeypatch):
    trainer = Trainer(config)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=24 * 2**30))
    monkeypatch.setattr(announcements, "run_estimate", lambda *_: 1 / 0)
    trainer.accelerator = SimpleNamespace(device=torch.device("cuda"), distributed_type=DistributedType.NO)
    assert "  memory  " not in announcements.begun(trainer)


def test_a_block_fits_its_terminal():
    text = block("a title", {"short": "words " * 12, "longer name": "one\nor two"}, 40)
    assert max(map(len, text.splitlines())) <= 40
    assert text.splitlines()[-2:] == ["  longer name  one", "               or two"]
    assert block("a title", {"a": "words " * 12 + "end"}, None).count("\n") == 1


def test_counts_and_durations():
    assert [counted(n, "pair") for n in (0, 1, 2, 12000)] == ["0 pairs", "1 pair", "2 pairs", "12,000 pairs"]
    assert [counted(n, "process", "processes") for n in (1, 2)] == ["1 process", "2 processes"]
    expected = {
        0: "0 s",
        0.4: "0 s",
        59.6: "1 min",
        200: "3 min 20 s",
        7500: "2 h 5 min",
        3600: "1 h",
        3605: "1 h",
        100000: "1 d 3 h",
    }
    assert {seconds: duration(seconds) for seconds in expected} == expected
