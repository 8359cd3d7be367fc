"""Training runs on a tiny FLUX: same numbers after a resume, with checkpointing, on two processes."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from focusdpo.commands.cli import main
from focusdpo.data import DatasetError, collate
from focusdpo.foundation.journals import read_metrics
from focusdpo.foundation.settings_text import build
from focusdpo.training.callbacks import Callback
from focusdpo.training.config import FocusConfig, LoraConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig
from focusdpo.training.run_files import PATHS, read_run_config, settings_text
from focusdpo.training.seeding import batch_generators
from focusdpo.training.trainer import Trainer
from tests import PATIENCE
from tests.runs import lora_of, rows_of

# Six steps with everything that could spoil a resume: dropout, accumulation, a schedule, shuffled epochs.
SETTINGS = {
    "model.gradient_checkpointing": True, "data.validation": "{pairs}", "data.batch_size": 2,
    "data.check": "full", "lora.dropout": 0.1, "optim.scheduler": "cosine", "optim.warmup_steps": 2,
    "max_steps": 6, "gradient_accumulation": 2, "checkpoint_every": 3, "validate_every": 3,
}  # fmt: skip


def run(config):
    trainer = Trainer(config)
    trainer.train()
    return rows_of(config), rows_of(config, "validation"), lora_of(config), trainer


class Killed(Callback):
    def on_step_end(self, trainer, row):
        if row["step"] == 5:
            raise KeyboardInterrupt


def test_resume_gives_the_same_bits(config, tmp_path):
    straight, validation, lora, _ = run(config)
    assert [row["step"] for row in straight] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in validation] == [0, 3, 6]
    AcceleratorState._reset_state(reset_partial_state=True)

    config.output_dir = str(tmp_path / "interrupted")
    with pytest.raises(KeyboardInterrupt):
        Trainer(config, callbacks=[Killed()]).train()
    assert len(read_metrics(tmp_path / "interrupted" / "metrics.jsonl")) == 5
    AcceleratorState._reset_state(reset_partial_state=True)

    torch.manual_seed(12345)  # whatever the new process's random state is
    config.resume = "latest"
    resumed, resumed_validation, resumed_lora, _ = run(config)
    assert resumed == straight and resumed_validation == validation
    assert lora.keys() == resumed_lora.keys()
    assert all(torch.equal(value, resumed_lora[name]) for name, value in lora.items())


def test_metrics(config):
    metrics, validation, _, trainer = run(config)
    first = validation[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and first["accuracy"] == 0.5 and first["margin"] == 0
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=0.05)
    expected = {
        "step", "loss", "margin", "logit", "accuracy", "time", "pairs", "gradient_norm", "learning_rate",
        "error/policy_win", "error/policy_lose", "error/reference_win", "error/reference_lose",
        "focus/coverage", "focus/detail_share", "focus/coverage_floor", "focus/detail_unreachable", "focus/all_matched",
        "focus/coverage_chance", "drift/whole", "drift/inside", "drift/outside",
        "skipped_in_a_row", "gradient_factor", "beta",
    }  # fmt: skip
    assert {name for name in metrics[0] if not name.startswith(("by_time/", "focus/coverage_histogram/"))} == expected
    assert any(name.startswith("by_time/") for name in metrics[0])
    rows = read_metrics(Path(config.output_dir) / "metrics.jsonl")
    assert all(row["pairs_per_second"] > 0 and row["peak_memory_mib"] > 100 for row in rows)
    assert all(math.isfinite(v) for row in metrics for v in row.values())
    # Cosine with two warm-up steps, the rate that each step used.
    assert [round(row["learning_rate"] / 1e-3, 3) for row in metrics] == [0.0, 0.5, 1.0, 0.854, 0.5, 0.146]
    assert trainer.progress.batches == 12
    assert list((Path(config.output_dir) / "tensorboard").glob("**/events.*")), "TensorBoard has its file"
    written = yaml.safe_load((Path(config.output_dir) / "config.yaml").read_text())
    assert written == dataclasses.asdict(config), "all paths are absolute"


@pytest.mark.parametrize("feature_source", ["policy", "reference"])
def test_gradient_checkpointing_changes_nothing(config, feature_source):
    config.lora.dropout = 0.0
    config.focus.feature_source = feature_source
    results = []
    for checkpointing in (True, False):
        config.model.gradient_checkpointing = checkpointing
        config.output_dir += "x"
        trainer = Trainer(config)
        trainer.module.train()
        for p in trainer.parameters:
            torch.nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(0))
        batch = collate([trainer.train_set[0]])
        result = trainer.step(batch, torch.Generator().manual_seed(0))
        result.output.loss.backward()
        results.append((result, [p.grad for p in trainer.parameters]))
    (first, gradients), (second, others) = results
    assert float(first.output.margin) != 0
    assert torch.equal(first.focus.mask, second.focus.mask)
    assert torch.equal(first.output.loss, second.output.loss)
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))


def test_the_base_stays_frozen_and_the_adapter_learns(config):
    trainer = Trainer(config)
    before = {n: p.clone() for n, p in trainer.module.named_parameters() if "lora" not in n}
    adapter = [p.clone() for p in trainer.parameters]
    trainer.train()
    assert all(torch.equal(p, before[n]) for n, p in trainer.module.named_parameters() if n in before)
    assert all(not torch.equal(a, b) for a, b in zip(adapter, trainer.parameters, strict=True))


SWITCHES = {
    "prior": {"focus": FocusConfig(mask="prior")},
    "no mask": {"focus": FocusConfig(mask="none")},
    "each": {"focus": FocusConfig(mask_from="each", layers=[0, 3], match_count=0.5, tau=1.0)},
    "reference features": {"focus": FocusConfig(feature_source="reference", entropy_method="histogram", match_count="prior")},
    "loss family": {
        "loss": LossConfig(loser_scale="sdpo", winner_anchor=0.1, timestep_weight="noise", reduction="masked_mean")
    },
    "bf16": {"mixed_precision": "bf16"},
}


@pytest.mark.parametrize("name", SWITCHES)
def test_switches_train(config, name):
    config = dataclasses.replace(config, max_steps=2, validate_every=0, **SWITCHES[name])
    if name == "bf16":
        config.model.dtype = "bf16"
    metrics, validation, _, _ = run(config)
    # At initialisation the margin is exactly 0 whatever the mask; winner_anchor adds the winner's error.
    anchor = config.loss.winner_anchor * validation[0]["error/policy_win"]
    assert validation[0]["margin"] == 0 and validation[0]["loss"] == pytest.approx(math.log(2) + anchor, abs=1e-5)
    assert len(metrics) == 2 and metrics[1]["gradient_norm"] > 0
    assert ("focus/coverage" in metrics[0]) == (config.focus.mask == "focus")


def test_masks_differ_between_switches(config):
    masks = {}
    for name in ("prior", "each", "reference features"):
        trainer = Trainer(dataclasses.replace(config, output_dir=config.output_dir + name[0], **SWITCHES[name]))
        result = trainer.step(collate([trainer.train_set[0]]), torch.Generator().manual_seed(0))
        masks[name] = result.focus.mask if result.focus else None
        AcceleratorState._reset_state(reset_partial_state=True)
    assert masks["prior"] is None and not torch.equal(masks["each"], masks["reference features"])


def test_unreachable_detail_warns_once(config, caplog):
    config.focus = FocusConfig(match_count=0)
    run(config)
    warnings = [r for r in caplog.records if "coverage cannot fall to tau" in r.getMessage()]
    assert len(warnings) == 1


def test_earlier_run_is_protected(config, tmp_path):
    run(dataclasses.replace(config, max_steps=1))
    AcceleratorState._reset_state(reset_partial_state=True)
    metrics = Path(config.output_dir) / "metrics.jsonl"
    before = metrics.read_text()
    with pytest.raises(FileExistsError, match="output_dir: .* holds an earlier run .*--resume latest.*--overwrite true"):
        Trainer(config)
    empty = tmp_path / "empty"
    empty.mkdir()
    for path, message in {"/nowhere": "model.path: no such folder", str(empty): "it has no model_index.json"}.items():
        with pytest.raises(FileNotFoundError, match=message):
            Trainer(dataclasses.replace(config, overwrite=True, model=ModelConfig(path=path)))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model_index.json").write_text(json.dumps({"_class_name": "NoSuchPipeline"}))
    with pytest.raises(ValueError, match="holds a NoSuchPipeline"):
        Trainer(dataclasses.replace(config, overwrite=True, model=ModelConfig(path=str(broken))))
    assert metrics.read_text() == before, "a run that cannot start deletes nothing"
    AcceleratorState._reset_state(reset_partial_state=True)
    rows, _, _, _ = run(dataclasses.replace(config, overwrite=True, max_steps=2))
    assert len(rows) == 2
    assert not (Path(config.output_dir) / "checkpoints" / "step-000001").exists()


def test_nothing_to_resume(config, tmp_path):
    """A preempted job restarts with one command, also when it was killed before its first checkpoint."""
    trainer = Trainer(dataclasses.replace(config, resume="latest"))
    assert trainer.progress.step == 0
    with pytest.raises(FileNotFoundError, match="is not a checkpoint"):
        Trainer(dataclasses.replace(config, resume=str(tmp_path)))


@pytest.mark.parametrize("name", PATHS)
def test_a_runs_settings_have_absolute_paths(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    data = {"train": "/pairs", "cache": "/cache"}  # with draws, as reference_cache asks for
    settings = {"model": {"path": "owner/name"}, "data": data, "samples": {}, "loss": {"draws": 1}}
    settings |= {"output_dir": "/run", "resume": "latest"}
    section, _, last = name.rpartition(".")
    (settings[section] if section else settings)[last] = "there"
    written = yaml.safe_load(settings_text(build(TrainConfig, settings)))
    assert (written[section] if section else written)[last] == str(tmp_path / "there")
    if name not in ("model.path", "resume"):
        assert (written["model"]["path"], written["resume"]) == ("owner/name", "latest"), "no paths"


def test_a_runs_settings_serve_from_any_folder(config, tiny_flux, tiny_pairs, tmp_path, monkeypatch, capsys):
    """Its paths were given relative to the folder in which it was started; those of other settings are named with theirs."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    for folder in (here, elsewhere):
        folder.mkdir()
    (here / "model").symlink_to(tiny_flux)
    (here / "pairs").symlink_to(tiny_pairs.parent)
    monkeypatch.chdir(here)
    config.model.path, config.output_dir, config.max_steps, config.optim = "model", "run", 1, OptimConfig()
    config.data = dataclasses.replace(config.data, train="pairs", validation="pairs/pairs.jsonl", cache="cache")
    run(config)
    assert config.data.train == "pairs", "the caller's settings stay as they are"
    monkeypatch.chdir(elsewhere)
    read = read_run_config("config", "../here/run")
    there = {name: str(here / name) for name in ("model", "pairs", "pairs/pairs.jsonl", "cache")}
    assert [read.model.path, read.data.train, read.data.validation, read.data.cache] == list(there.values())
    AcceleratorState._reset_state(reset_partial_state=True)
    main(["train", "--config", "../here/run/config.yaml", "--resume", "latest", "--max_steps", "2"])
    assert len(read_metrics(here / "run" / "metrics.jsonl")) == 2 and not list(elsewhere.iterdir())

    for words, named in (
        (["--data.train", "pairs"], "no such dataset: pairs;"),
        (["--model.path", "model"], "model.path: no such folder: model "),
        (["--model.base_lora", "lora"], "model.base_lora: no such file or folder: lora;"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            main(["train", "--config", "../here/run/config.yaml", "--output_dir", "new", *words])
        assert named in str(stop.value.code) and str(stop.value.code).endswith(f"; paths are relative to {elsewhere}")
    with pytest.raises(SystemExit) as stop:
        main(["train", "--config", "../here/run/config.yaml", "--output_dir", "new", "--data.train", "/nowhere"])
    assert "relative" not in str(stop.value.code)


def test_resume_with_other_settings_is_refused(config):
    run(dataclasses.replace(config, max_steps=1))
    written = (Path(config.output_dir) / "config.yaml").read_text()
    AcceleratorState._reset_state(reset_partial_state=True)
    other = dataclasses.replace(config, resume="latest", optim=OptimConfig(lr=5e-4, scheduler="cosine", warmup_steps=2))
    other.lora = LoraConfig(rank=4, alpha=64, dropout=0.1)
    with pytest.raises(ValueError, match="made with other settings") as error:
        Trainer(other)
    for line in ("optim.lr: the checkpoint has 0.001, got 0.0005", "lora.alpha: the checkpoint has 8, got 64"):
        assert line in str(error.value)
    assert "lora.rank" not in str(error.value)
    assert (Path(config.output_dir) / "config.yaml").read_text() == written


def test_a_schedule_that_ends_keeps_its_end(config):
    """The cosine's rates follow from max_steps: a run that goes on for longer had other ones from its start."""
    run(dataclasses.replace(config, max_steps=1))
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="max_steps, which optim.scheduler depends on: the checkpoint has 1, got 6"):
        Trainer(dataclasses.replace(config, resume="latest"))


def test_another_runs_checkpoint_goes_on_in_a_new_folder(config, tmp_path):
    config.optim = OptimConfig(lr=1e-3)
    run(dataclasses.replace(config, max_steps=1))
    AcceleratorState._reset_state(reset_partial_state=True)
    checkpoint = str(Path(config.output_dir) / "checkpoints" / "step-000001")
    busy = dataclasses.replace(config, output_dir=str(tmp_path / "busy"))
    run(dataclasses.replace(busy, max_steps=2))
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(FileExistsError, match="a checkpoint of another run goes on in a new folder"):
        Trainer(dataclasses.replace(busy, resume=checkpoint))
    assert len(read_metrics(tmp_path / "busy" / "metrics.jsonl")) == 2
    fresh = Trainer(dataclasses.replace(config, output_dir=str(tmp_path / "fresh"), resume=checkpoint))
    assert fresh.progress.step == 1


def test_going_back_sets_later_checkpoints_aside(config):
    straight, _, _, _ = run(config)
    checkpoints = Path(config.output_dir) / "checkpoints"
    for resume in (str(checkpoints / "step-000003"), "latest"):
        AcceleratorState._reset_state(reset_partial_state=True)
        trainer = Trainer(dataclasses.replace(config, resume=resume))
        assert trainer.progress.step == 3, "the abandoned step 6 is not the latest any more"
    assert (checkpoints / "step-000006.abandoned").is_dir()
    trainer.train()
    assert rows_of(config) == straight


def test_checkpoints_hold_a_loadable_lora(config, tiny_flux):
    _, _, lora, _ = run(dataclasses.replace(config, max_steps=1))
    saved = Path(config.output_dir) / "checkpoints" / "step-000001" / "lora" / "pytorch_lora_weights.safetensors"
    assert all(torch.equal(value, lora[name]) for name, value in load_file(saved).items())
    assert all(name.startswith("transformer.") for name in lora)


def test_foreign_files_are_never_deleted(config):
    folder = Path(config.output_dir)
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "mine.safetensors").write_text("precious")
    (folder / "metrics.jsonl").write_text("mine too")
    with pytest.raises(FileExistsError, match=r"run holds metrics.jsonl, which this command did not write"):
        Trainer(dataclasses.replace(config, overwrite=True))
    assert (folder / "checkpoints" / "mine.safetensors").read_text() == "precious"
    assert (folder / "metrics.jsonl").read_text() == "mine too"
    (folder / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="output_dir: .* is a file"):
        Trainer(dataclasses.replace(config, output_dir=str(folder / "file" / "run")))


def test_seed_decides_times_and_noise(config):
    noised = []
    for number, seed in enumerate((0, 1, 0)):
        trainer = Trainer(dataclasses.replace(config, seed=seed, output_dir=f"{config.output_dir}{number}"))
        batch = collate([trainer.train_set[0]])
        noised.append(trainer.step.noise(batch, batch_generators(seed, 0, batch.indices, None)))
        AcceleratorState._reset_state(reset_partial_state=True)
    assert torch.equal(noised[0].tokens, noised[2].tokens)
    assert not torch.equal(noised[0].t, noised[1].t)
    assert not torch.allclose(noised[0].target, noised[1].target)


def test_steps_without_a_finite_gradient_are_skipped(config, caplog):
    trainer = Trainer(dataclasses.replace(config, max_steps=20, validate_every=0))
    before = [p.clone() for p in trainer.parameters]
    for p in trainer.parameters:
        p.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(FloatingPointError, match="10 steps in a row up to step 10 had no finite gradient; the adapter is"):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))
    assert "step 1, non_finite_gradient: skipped, the gradient norm is nan; its pairs: " in caplog.text
    assert caplog.text.count(f"{config.data.train}:") >= 4, "with their lines"


def test_a_step_is_a_mean_over_pairs(config):
    """Accumulated batches of different size weigh by their pairs: the gradient is that of one large batch."""
    config.lora.dropout = 0.0
    config.data.shuffle = False
    trainer = Trainer(dataclasses.replace(config, optim=OptimConfig(max_grad_norm=1e9)))
    sizes = [len(batch) for batch in trainer.batches.plan.epoch(0)[:2]]
    assert sizes != [2, 2], "the fixture's first batches differ in size"
    for p in trainer.parameters:
        torch.nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(0))
    batches = trainer.batches.start(0)
    expected, total = [torch.zeros_like(p) for p in trainer.parameters], 0
    for _ in range(2):
        batch, factor = next(batches)
        pairs = len(batch.prompts)
        loss = trainer.step(batch, torch.Generator().manual_seed(pairs)).output.loss
        for sum_, gradient in zip(expected, torch.autograd.grad(loss, trainer.parameters), strict=True):
            sum_ += pairs * gradient
        total += pairs
        # accelerate divides by the accumulation, 2 here.
        assert factor / 2 == pytest.approx(pairs / sum(sizes))
    assert total == sum(sizes)


def test_match_count_beyond_the_target(config):
    config.focus.match_count = 37
    with pytest.raises(ValueError, match=r"focus.match_count: got 37; expected at most 36, the tokens of the smallest target"):
        Trainer(config)


def test_triton_without_a_gpu_is_refused_early(config, monkeypatch):
    monkeypatch.setattr("focusdpo_kernels.backend.INTERPRETED", False)
    with pytest.raises(ValueError, match="'triton' needs tensors on an accelerator"):
        Trainer(dataclasses.replace(config, backend="triton"))


def test_half_written_checkpoints_are_ignored(config):
    config.optim = OptimConfig(lr=1e-3)
    run(dataclasses.replace(config, max_steps=1))
    AcceleratorState._reset_state(reset_partial_state=True)
    (Path(config.output_dir) / "checkpoints" / "step-000009.partial").mkdir()
    trainer = Trainer(dataclasses.replace(config, resume="latest"))
    assert trainer.progress.step == 1


def test_problems_of_both_datasets_come_before_the_model(config, tmp_path):
    for name in ("train", "held_out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pairs.jsonl").write_text("{}\n")
    config.data.train, config.data.validation = str(tmp_path / "train"), str(tmp_path / "held_out")
    config.model.path = "nobody/no-such-model"
    with pytest.raises(DatasetError) as error:
        Trainer(config)
    assert {p.file.parent.name for p in error.value.problems} == {"train", "held_out"}
    assert len(error.value.problems) == 10


def test_per_subject_needs_per_subject_priors(config):
    config.focus.per_subject = True
    with pytest.raises(DatasetError, match="prior: is one mask, but focus.per_subject needs a list"):
        Trainer(config)


def test_layers_beyond_the_model(config):
    config.focus.layers = [4]
    with pytest.raises(ValueError, match=r"focus.layers: the model has blocks 0 to 3, got 4"):
        Trainer(config)


def test_the_command_under_accelerate_launch(config):
    file = Path(config.output_dir).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(dataclasses.asdict(dataclasses.replace(config, max_steps=1, validate_every=0))))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "focusdpo"]
    done = subprocess.run([*launch, "train", "--config", str(file)], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(read_metrics(Path(config.output_dir) / "metrics.jsonl")) == 1
