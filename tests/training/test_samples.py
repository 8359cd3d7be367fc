"""Samples while training: what is drawn, what it may not change, and where it goes."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from focusdpo.data import DatasetError, LongestSide, PairDataset, collate, load_pairs
from focusdpo.demo.scenes import write_dataset
from focusdpo.drawing.contact_sheets import sample_sheet
from focusdpo.models import BACKBONES, Backbone, TokenLayout
from focusdpo.training.config import FocusConfig, SamplesConfig
from focusdpo.training.trainer import Trainer
from tests import PATIENCE, ROOT
from tests.runs import rows_of, train
from tests.tiny_qwen import write_tiny_qwen


@pytest.fixture(scope="module")
def tiny_pairs(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "pairs", 4, 64, seed=0)


# Two steps with dropout, which draws from the global generator, and samples at 0, 1 and 2.
SETTINGS = {
    "data.validation": "{pairs}", "data.resolution": 64, "data.reference_resolution_multiple": 32,
    "data.batch_size": 2, "lora.dropout": 0.1, "optim.lr": 0.01, "samples.every": 1, "samples.count": 2,
    "samples.steps": 2, "max_steps": 2, "checkpoint_every": 1, "validate_every": 1, "backend": "torch",
}  # fmt: skip


def numbers(folder):
    return rows_of(folder, "metrics", "validation")


def pixels(folder, step, pair, kind="_sample"):
    return np.asarray(Image.open(Path(folder) / "samples" / f"step-{step:06d}" / f"{pair}{kind}.png"))


def test_files_and_tensorboard(config):
    folder = train(config).folder
    steps = {path.name: sorted(file.name for file in path.iterdir()) for path in (folder / "samples").iterdir()}
    expected = sorted(f"{pair}{kind}.png" for pair in range(2) for kind in ("", "_sample", "_masks"))
    assert steps == {f"step-{step:06d}": expected for step in (0, 1, 2)}
    assert pixels(folder, 2, 0).shape == (64, 64, 3)
    assert not np.array_equal(pixels(folder, 0, 0), pixels(folder, 2, 0)), "training changes them"
    assert not np.array_equal(pixels(folder, 0, 0), pixels(folder, 0, 1)), "each pair has noise of its own"
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert set(events.Tags()["images"]) == {f"samples/{pair}{kind}" for pair in range(2) for kind in ("", "_masks")}
    assert [event.step for event in events.Images("samples/1")] == [0, 1, 2]


def test_a_sample_is_what_the_loaded_lora_gives(config, tiny_flux):
    """The last sample from its parts: the saved LoRA in a fresh pipeline, the dataset's own tensors, the seeded noise."""
    config.samples = SamplesConfig(every=2, count=2, steps=2, guidance=2.0, cfg_scale=3.0, seed=5)
    folder = train(config).folder
    backbone = BACKBONES["flux"].from_pretrained(str(tiny_flux), dtype=torch.float32, max_sequence_length=16)
    backbone.pipeline.load_lora_weights(folder / "lora")
    pair = collate([PairDataset(load_pairs(config.data.train), resolution=64, reference_rule=LongestSide(32))[1]])
    layout = TokenLayout((4, 4), tuple((image.shape[2] // 16, image.shape[3] // 16) for image in pair.references))
    tokens = backbone.sample(
        torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(6)),
        backbone.encode_prompts(pair.prompts),
        torch.cat([backbone.encode_images(image) for image in pair.references], dim=1),
        layout,
        steps=2,
        guidance=2.0,
        negative=backbone.encode_prompts([""]),
        cfg_scale=3.0,
    )
    expected = (backbone.decode_images(tokens, (4, 4))[0].permute(1, 2, 0) * 255).round().numpy()
    assert np.abs(pixels(folder, 2, 1) - expected).max() <= 1  # of 255, by rounding


def test_samples_change_no_number(config, tmp_path):
    config.samples.count = 1
    first = train(config)
    plain = dataclasses.replace(config, samples=SamplesConfig(), output_dir=str(tmp_path / "plain"))
    second = Trainer(plain)  # whose accelerator the samples below need
    second.train()
    assert numbers(first.folder) == numbers(second.folder) and len(numbers(first.folder)) == 5
    loras = [load_file(t.folder / "lora" / "pytorch_lora_weights.safetensors") for t in (first, second)]
    assert all(torch.equal(value, loras[1][name]) for name, value in loras[0].items())
    assert not (second.folder / "samples").exists()
    state, was_training = torch.get_rng_state(), first.module.training
    first.module.train()
    first.samples.make(9, first)
    assert torch.equal(torch.get_rng_state(), state) and first.module.training
    first.module.train(was_training)


def test_the_cache_gives_the_same_samples(config, tmp_path, monkeypatch):
    """Also where the negative prompt sees the references; VAE and text encoders stay away from the transformer."""
    config.model.path, config.model.backbone = str(write_tiny_qwen(tmp_path / "qwen")), "qwen-edit-plus"
    config = dataclasses.replace(config, max_steps=1, samples=SamplesConfig(every=1, count=1, steps=2))
    plain = train(config).folder
    loaded = []
    load = Backbone.from_pretrained.__func__
    monkeypatch.setattr(
        Backbone,
        "from_pretrained",
        classmethod(lambda cls, *args, parts="all", **kwargs: loaded.append(parts) or load(cls, *args, parts=parts, **kwargs)),
    )
    cached = dataclasses.replace(config, output_dir=str(tmp_path / "cached"))
    cached.data = dataclasses.replace(config.data, cache=str(tmp_path / "cache"))
    train(cached)
    assert loaded == ["encoders", "transformer", "vae"]
    for step in (0, 1):
        assert np.array_equal(pixels(plain, step, 0), pixels(cached.output_dir, step, 0))


def test_a_resumed_run_makes_them_again(config):
    folder = train(config).folder
    straight = {step: pixels(folder, step, 0) for step in (0, 1, 2)}
    (folder / "samples" / "step-000002" / "0_sample.png").unlink()
    (folder / "samples" / "step-000003").mkdir()
    (folder / "samples" / ".step-000002.partial").mkdir()
    changed = dataclasses.replace(config, resume=str(folder / "checkpoints" / "step-000001"))
    changed.samples = dataclasses.replace(config.samples, count=1)
    train(changed)
    assert {path.name for path in (folder / "samples").iterdir()} == {f"step-00000{step}" for step in (0, 1, 2)}
    assert len(list((folder / "samples" / "step-000002").iterdir())) == 3, "of one pair now"
    assert all(np.array_equal(pixels(folder, step, 0), image) for step, image in straight.items())


def test_without_masks(config):
    config = dataclasses.replace(config, focus=FocusConfig(mask="none"), max_steps=1, validate_every=0)
    folder = train(config).folder
    assert not list((folder / "samples").rglob("*_masks.png")) and len(list((folder / "samples").rglob("*.png"))) == 8


def test_two_processes(config, tmp_path):
    """Each draws its share, and the first writes all: three pairs and a prompt, in more rounds than one process has of them."""
    manifest = Path(prompts_of(config, Path(config.output_dir).with_name("mine")))
    manifest.write_text(manifest.read_text().splitlines()[1])
    config = dataclasses.replace(config, max_steps=1, samples=SamplesConfig(every=1, count=3, steps=2, manifest=str(manifest)))
    alone = train(dataclasses.replace(config, output_dir=config.output_dir + "-alone", focus=FocusConfig(mask="none"))).folder
    file = Path(config.output_dir).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(dataclasses.asdict(config)))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    script = tmp_path / "train.py"
    script.write_text(
        "from focusdpo.commands.cli import main\n"
        "from focusdpo.foundation import progress_bars\n"
        "progress_bars.EVERY = 0.0  # every state of a bar is a line\n"
        f"main(['train', '--config', {str(file)!r}])\n"
    )
    command = [*launch, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in (*range(3), "line-1"):
        assert np.array_equal(pixels(config.output_dir, 0, name), pixels(alone, 0, name))
    assert len(list((Path(config.output_dir) / "samples" / "step-000001").iterdir())) == 11
    bars = re.findall(r"sampling: +\d+%.*?/(\d+) ", done.stderr)
    assert set(bars) == {"6"}, "three rounds of two steps"


def prompts_of(config, folder):
    """A manifest of two prompts: a pair's, and one with a photo of its own beside the file."""
    folder.mkdir()
    first = json.loads(Path(config.data.train).read_text().splitlines()[0])
    lines = [{"prompt": first["prompt"], "references": []}, {"prompt": "a cup", "references": [{"image": "cup.png"}]}]
    for reference in first["references"]:
        shutil.copy(Path(config.data.train).parent / reference["image"], folder)
        lines[0]["references"].append({"image": Path(reference["image"]).name})
    Image.effect_noise((48, 64), 40).convert("RGB").save(folder / "cup.png")
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def test_prompts_of_the_users_own(config, tmp_path):
    """Beside held-out pairs or without any; with a cache the same, and after a resume; masks are those of pairs alone."""
    config.samples.manifest, config.samples.count = prompts_of(config, tmp_path / "mine"), 1
    folder = train(config).folder
    names = sorted(file.name for file in (folder / "samples" / "step-000002").iterdir())
    pair, prompts = (
        ["0.png", "0_masks.png", "0_sample.png"],
        ["line-1.png", "line-1_sample.png", "line-2.png", "line-2_sample.png"],
    )
    assert names == [*pair, *prompts]
    straight = {(step, line): pixels(folder, step, f"line-{line}") for step in (0, 1, 2) for line in (1, 2)}
    assert straight[0, 1].shape == (64, 64, 3) and not np.array_equal(straight[0, 1], straight[2, 1])
    sheet = Image.open(folder / "samples" / "step-000002" / "line-2.png")
    assert sheet.width == 3 * 320 + 4 * 12, "references, step 0, step 2: there is no winner"
    card = (folder / "lora" / "README.md").read_text()
    assert "samples.png" in card and str(tmp_path) not in card
    assert Image.open(folder / "lora" / "samples.png").height > 3 * sheet.height - 3

    train(dataclasses.replace(config, resume=str(folder / "checkpoints" / "step-000001")))
    assert all(np.array_equal(pixels(folder, step, f"line-{line}"), image) for (step, line), image in straight.items())

    alone = dataclasses.replace(config, output_dir=str(tmp_path / "alone"), validate_every=0, max_steps=1)
    alone.data = dataclasses.replace(config.data, validation=None, cache=str(tmp_path / "cache"))
    files = sorted(file.name for file in (train(alone).folder / "samples" / "step-000001").iterdir())
    assert files == prompts
    assert all(
        np.array_equal(pixels(alone.output_dir, step, f"line-{n}"), straight[step, n]) for step in (0, 1) for n in (1, 2)
    )


def test_prompts_are_checked_before_a_model_is_loaded(config, tmp_path, monkeypatch):
    monkeypatch.setattr("focusdpo.training.prepared_run.load_backbone", lambda *_, **__: pytest.fail("too early"))
    config.samples.manifest = prompts_of(config, tmp_path / "mine")
    (tmp_path / "mine" / "cup.png").unlink()
    with pytest.raises(DatasetError, match=r"mine/prompts.jsonl:2: references\[0\].image: no such file"):
        Trainer(config)
    config.samples.manifest = "nowhere.jsonl"
    with pytest.raises(FileNotFoundError, match=r"samples.manifest: no such file: nowhere.jsonl"):
        Trainer(config)
    assert not Path(config.output_dir).exists()


def test_settings_are_checked(config):
    with pytest.raises(ValueError, match=r"samples.every: got 1; expected 0 without data.validation"):
        dataclasses.replace(config, data=dataclasses.replace(config.data, validation=None))
    for name, value in {"every": -1, "count": 0, "steps": 0, "guidance": -1.0, "cfg_scale": float("nan"), "seed": -1}.items():
        with pytest.raises(ValueError, match=f"samples.{name}: got"):
            SamplesConfig(**{name: value})


def test_a_sheet():
    images = {name: Image.new("RGB", (64, 32), name) for name in ("red", "blue")}
    references = [Image.new("RGB", (32, 64), colour) for colour in ("lime", "yellow", "cyan")]
    sheet = sample_sheet("a very long prompt " * 20, references, images)
    colours = {colour: count for count, colour in sheet.getcolors(2**20)}
    assert colours[255, 0, 0] == colours[0, 0, 255] == 320 * 160, "five times as large, whole pixels"
    assert colours[0, 255, 0] == colours[255, 255, 0] == colours[0, 255, 255] == 40 * 80, "fitted into a quarter of the panel"
    assert sheet.width == 3 * 320 + 4 * 12 and sheet.height > 160 + 24 * 3
