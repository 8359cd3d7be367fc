"""A checkpoint, adapter or dataset that does not fit the run: each message names the field and both values."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file, save_file

from focusdpo.data import DatasetError
from focusdpo.demo.scenes import write_dataset
from focusdpo.foundation.files import checksum
from focusdpo.models import Flux1
from focusdpo.models.tiny_flux import write_tiny_flux
from focusdpo.training.adapter import adapter_state, add_adapter, load_adapter_state
from focusdpo.training.checkpoints import CHECKSUMS_FILE, SETTINGS_FILE
from focusdpo.training.config import DataConfig, FocusConfig, LoraConfig, ModelConfig, TrainConfig
from focusdpo.training.run_folder import RunFolder, settings_of
from focusdpo.training.trainer import Trainer


def fresh():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a model, pairs, and a run of one step."""
    folder = tmp_path_factory.mktemp("mismatch")
    write_tiny_flux(folder / "model")
    write_dataset(folder / "pairs", 4, 64, seed=0)
    config = TrainConfig(
        model=ModelConfig(path=str(folder / "model"), dtype="fp32", max_sequence_length=16, gradient_checkpointing=False),
        data=DataConfig(train=str(folder / "pairs"), resolution=64, reference_resolution_multiple=32, num_workers=0),
        output_dir=str(folder / "run"),
        lora=LoraConfig(rank=4, alpha=8),
        focus=FocusConfig(tau=0.6),
        max_steps=1,
        mixed_precision="no",
        cpu=True,
    )
    Trainer(config).train()
    fresh()
    return folder, config


@pytest.fixture
def copied(made, tmp_path):
    """All of it to be spoilt, at another place, with the settings to go on."""
    folder = tmp_path / "copy"
    shutil.copytree(made[0], folder)
    config = dataclasses.replace(
        made[1],
        model=dataclasses.replace(made[1].model, path=str(folder / "model")),
        data=dataclasses.replace(made[1].data, train=str(folder / "pairs")),
        output_dir=str(folder / "run"),
        max_steps=2,
        resume="latest",
    )
    return folder, config


def first_pair_lower(folder):
    line = json.loads((folder / "pairs" / "pairs.jsonl").read_text().splitlines()[0])
    for path in (line["winner"], line["loser"], line["prior"]):
        with Image.open(folder / "pairs" / path) as image:
            image.resize((image.width, image.height // 2)).save(folder / "pairs" / path)


def edit_pairs(folder, edit):
    file = folder / "pairs" / "pairs.jsonl"
    file.write_text("".join(edit(file.read_text().splitlines(keepends=True))))


def another(part):
    def change(folder):
        (file,) = (folder / "model" / part).glob("*.safetensors")
        save_file({name: 2 * value for name, value in load_file(file).items()}, file, metadata={"format": "pt"})

    return change


# What is changed: the settings of a section, or files; and the lines of the message. "x" stands for a hash.
CASES = {
    "backbone": ({"model": {"backbone": "kontext"}}, ["model.backbone: the checkpoint has 'flux', got 'kontext'"]),
    "dtype": ({"model": {"dtype": "bf16"}}, ["model.dtype: the checkpoint has 'fp32', got 'bf16'"]),
    "rank and alpha": (
        {"lora": {"rank": 8, "alpha": 1.0}},
        ["lora.rank: the checkpoint has 4, got 8", "lora.alpha: the checkpoint has 8, got 1.0"],
    ),
    "target modules": (
        {"lora": {"target_modules": ["to_q"]}},
        ["lora.target_modules: the checkpoint has ['to_q', 'to_k', 'to_v', 'to_out.0'], got ['to_q']"],
    ),
    "another transformer": (
        another("transformer"),
        ["model.path (transformer, all of it): the checkpoint has 'x', got 'x'"],
    ),
    "another VAE": (another("vae"), ["model.path (vae, all of it): the checkpoint has 'x', got 'x'"]),
    "fewer pairs": (
        lambda folder: edit_pairs(folder, lambda lines: lines[:3]),
        [
            "data.train (its content): the checkpoint has 'x', got 'x'",
            "data.train (number of pairs): the checkpoint has 4, got 3",
            "data.train (sizes of its images): the checkpoint has 'x', got 'x'",
        ],
    ),
    "another prompt": (
        lambda folder: edit_pairs(folder, lambda lines: [line.replace('"prompt": "', '"prompt": "so ') for line in lines]),
        ["data.train (its content): the checkpoint has 'x', got 'x'"],
    ),
    "other image sizes": (
        first_pair_lower,
        ["data.train (sizes of its images): the checkpoint has 'x', got 'x'"],
    ),
    "buckets": (
        {"data": {"buckets": ["1:1"], "max_crop": 0.9}},
        [
            "data.buckets: the checkpoint has None, got ['1:1']",
            "data.max_crop: the checkpoint has 0.2, got 0.9",
        ],
    ),
    "precision": ({"": {"mixed_precision": "bf16"}}, ["mixed_precision: the checkpoint has 'no', got 'bf16'"]),
}


def changed(config, folder, change):
    if callable(change):
        change(folder)
        return config
    for section, values in change.items():
        part = dataclasses.replace(getattr(config, section), **values) if section else None
        config = dataclasses.replace(config, **({section: part} if section else values))
    return config


@pytest.mark.parametrize("case", CASES)
def test_another_run_is_refused_by_field(copied, case, monkeypatch):
    folder, config = copied
    change, expected = CASES[case]
    monkeypatch.setattr(
        "focusdpo.training.prepared_run.load_backbone", lambda *_, **__: pytest.fail("before a model is loaded")
    )
    with pytest.raises(ValueError, match="made with other settings") as error:
        Trainer(changed(config, folder, change))
    lines = [re.sub(r"'[0-9a-f]{16}'", "'x'", line.strip()) for line in str(error.value).splitlines()[1:-1]]
    assert lines == expected


def test_another_number_of_processes(copied):
    _, config = copied
    trainer = Trainer(config)
    run = RunFolder.prepare(config, trainer.launch)
    run.check_settings(settings_of(config, 1, trainer.train_set))
    with pytest.raises(ValueError, match="number of processes: the checkpoint has 1, got 2"):
        run.check_settings(settings_of(config, 2, trainer.train_set))


def test_what_lies_elsewhere_is_the_same_run(copied):
    """The fixture has moved model and pairs; the backbone's own targets may be written out."""
    _, config = copied
    config.lora = dataclasses.replace(config.lora, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    assert Trainer(config).progress.step == 1


def rewrite_settings(config, edit):
    """As an earlier version would have written the checkpoint."""
    checkpoint = Path(config.output_dir) / "checkpoints" / "step-000001"
    settings = edit(json.loads((checkpoint / SETTINGS_FILE).read_text()))
    (checkpoint / SETTINGS_FILE).write_text(json.dumps(settings))
    checksums = json.loads((checkpoint / CHECKSUMS_FILE).read_text()) | {SETTINGS_FILE: checksum(checkpoint / SETTINGS_FILE)}
    (checkpoint / CHECKSUMS_FILE).write_text(json.dumps(checksums))


UNKNOWN = ("data.buckets", "data.max_crop", "loss.auto_beta", "data.train (number of pairs)", "model.path (vae, all of it)")


def test_a_checkpoint_older_than_a_setting(copied):
    _, config = copied
    older = {"model.path": "somewhere/else"}  # a setting that does not decide the numbers any more
    rewrite_settings(config, lambda saved: {k: v for k, v in saved.items() if k not in UNKNOWN} | older)
    assert Trainer(config).progress.step == 1
    fresh()
    config.data = dataclasses.replace(config.data, max_crop=0.5)
    with pytest.raises(ValueError, match=r"data.max_crop: the checkpoint has 0.2, got 0.5"):
        Trainer(config)
    rewrite_settings(config, lambda saved: saved | {"loss.gone": 3})
    with pytest.raises(ValueError, match=r"loss.gone: the checkpoint has 3, got None"):
        Trainer(config)


ADAPTERS = {
    "fewer layers": (
        LoraConfig(rank=4, target_modules=["to_q", "to_k"]),
        r"the adapter's layers differ: only the checkpoint has \S+to_v.lora_A.weight and 11 more; use the run's own model",
    ),
    "other layers": (
        LoraConfig(rank=4, target_modules=["to_add_out"]),
        r"only the checkpoint has \S+ and \d+ more; only the model has \S+to_add_out.lora_A.weight and \d+ more",
    ),
    "rank": (
        LoraConfig(rank=2),
        r"lora_A.weight: the checkpoint's shape is \[4, 64\], the model's \[2, 64\]; use the run's lora.rank",
    ),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_of_another_shape(made, case):
    lora, message = ADAPTERS[case]
    state = load_file(made[0] / "run" / "checkpoints" / "step-000001" / "adapter.safetensors")
    backbone = Flux1.from_pretrained(str(made[0] / "model"), dtype=torch.float32)
    add_adapter(backbone, lora, seed=0)
    before = {name: value.clone() for name, value in adapter_state(backbone.transformer).items()}
    with pytest.raises(ValueError, match=message):
        load_adapter_state(backbone.transformer, state)
    assert all(torch.equal(value, before[name]) for name, value in adapter_state(backbone.transformer).items())


def test_an_adapter_of_a_model_of_another_size(made):
    backbone = Flux1.from_pretrained(str(made[0] / "model"), dtype=torch.float32)
    add_adapter(backbone, LoraConfig(rank=4), seed=0)
    state = {name: value.repeat(1, 2) for name, value in adapter_state(backbone.transformer).items() if "lora_A" in name}
    state = adapter_state(backbone.transformer) | state
    message = r"the checkpoint's shape is \[4, 128\], the model's \[4, 64\]; use the run's model.path, it is of another size"
    with pytest.raises(ValueError, match=message):
        load_adapter_state(backbone.transformer, state)


BASE_LORAS = {
    "another model's layers": ("transformer.blocks.0.attn.to_q", 64, "names are no pair .* is it for another model"),
    "another width": ("transformer.transformer_blocks.0.attn.to_q", 32, r"lora_A is \[2, 32\] .*a model of another size"),
}


@pytest.mark.parametrize("case", BASE_LORAS)
def test_a_base_lora_for_another_model(made, tmp_path, case):
    layer, width, message = BASE_LORAS[case]
    file = tmp_path / "lora.safetensors"
    save_file({f"{layer}.lora_A.weight": torch.ones(2, width), f"{layer}.lora_B.weight": torch.ones(64, 2)}, file)
    model = dataclasses.replace(made[1].model, base_lora=str(file))
    with pytest.raises(ValueError, match=f"model.base_lora: {file}: .*{message}"):
        Trainer(dataclasses.replace(made[1], model=model, output_dir=str(tmp_path / "run")))


def test_held_out_pairs_without_a_prior_for_each_subject(copied):
    """Training pairs may have them: the held-out ones are named, with file and line."""
    folder, config = copied
    shutil.copytree(folder / "pairs", folder / "held_out")

    def per_subject(lines):
        pairs = [json.loads(line) for line in lines]
        return [json.dumps(pair | {"prior": [pair["prior"]] * len(pair["references"])}) + "\n" for pair in pairs]

    edit_pairs(folder, per_subject)
    data = dataclasses.replace(config.data, validation=str(folder / "held_out"))
    focus = dataclasses.replace(config.focus, per_subject=True)
    with pytest.raises(DatasetError) as error:
        Trainer(dataclasses.replace(config, data=data, focus=focus, resume=None, output_dir=str(folder / "new")))
    held_out = folder / "held_out" / "pairs.jsonl"
    assert [(p.file, p.line, p.field) for p in error.value.problems] == [(held_out, n, "prior") for n in range(1, 5)]
    assert "is one mask, but focus.per_subject needs a list" in str(error.value)
