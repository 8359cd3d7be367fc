"""The memory estimate against bytes that a step really keeps, and what a user reads when memory runs out."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils._pytree import tree_leaves

from benchmarks.results import FOCUS_STEP, read_result
from focusdpo.commands import cli
from focusdpo.data import collate
from focusdpo.models import Backbone, Flux1, Flux2, QwenEditPlus, TokenLayout
from focusdpo.models.sizes import RELEASED, Architecture
from focusdpo.training import checkpoints
from focusdpo.training.adapter import add_adapter
from focusdpo.training.config import DataConfig, LoraConfig, ModelConfig
from focusdpo.training.memory import Estimate, Launched, advice, estimate, launched
from focusdpo.training.step import PreferenceStep
from focusdpo.training.trainer import Trainer
from tests import ROOT
from tests.tiny_flux2 import write_tiny_flux2
from tests.tiny_qwen import write_tiny_qwen

SETTINGS = {
    "data.batch_size": 2, "data.shuffle": False, "lora.rank": 8, "gradient_accumulation": 2,
}  # fmt: skip


class Saved:
    """Bytes of the storages that autograd saves, by address; independent of the estimate's own counting."""

    def __init__(self, *fixed):
        self.fixed = {tensor.untyped_storage().data_ptr() for tensor in fixed}
        self.storages = {}

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.fixed:
            self.storages[storage.data_ptr()] = storage  # alive: no address is given out twice
        return tensor

    def hooks(self):
        return torch.autograd.graph.saved_tensors_hooks(self.add, lambda tensor: tensor)

    @property
    def bytes(self):
        return sum(storage.nbytes() for storage in self.storages.values())


def block_bytes(trainer, inputs):
    """What each block, run by itself, saves beyond its inputs and weights."""
    sizes = []
    for path, (args, kwargs) in inputs.items():
        block = trainer.module.get_submodule(path)
        saved = Saved(*block.parameters(), *(x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)))
        with saved.hooks():
            output = block(*args, **kwargs)
        sizes.append(saved.bytes)
        del output
    return sizes


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_is_what_a_step_keeps(config, checkpointing):
    config.model.gradient_checkpointing = checkpointing
    trainer = Trainer(config)
    trainer.module.train()
    sizes = trainer.train_set.sizes
    batch = collate([trainer.train_set[i] for i in range(len(sizes)) if sizes[i] == sizes[0]][:2])
    noised = trainer.step.noise(batch, torch.Generator().manual_seed(0))

    inputs = {}
    handles = [
        trainer.module.get_submodule(path).register_forward_pre_hook(
            lambda module, args, kwargs, path=path: inputs.update({path: (args, kwargs)}), with_kwargs=True
        )
        for path in trainer.backbone.tap_paths()
    ]
    saved = Saved(*trainer.module.parameters(), *trainer.module.buffers())
    with saved.hooks():
        loss = trainer.step.compare(noised, batch).output.loss
    for handle in handles:
        handle.remove()
    for tensor in (noised.tokens, noised.target, noised.references):
        saved.add(tensor)
    activations = saved.bytes + (max(block_bytes(trainer, inputs)) if checkpointing else 0)
    loss.backward()
    trainer.optimizer.step()

    layout, pairs = noised.layout, len(batch.prompts)
    architecture = Architecture.of(trainer.backbone)
    expected = estimate(architecture, config.model, config.lora, config.mixed_precision, layout, pairs)
    trained = trainer.parameters
    moments = [x for state in trainer.optimizer.state.values() for x in state.values() if x.ndim]
    parts = [x for x in trainer.backbone.pipeline.components.values() if isinstance(x, torch.nn.Module)]
    weights = sum(p.nbytes for part in parts for p in part.parameters())
    assert expected.frozen_weights + expected.companions + expected.adapter_weights == weights
    assert expected.adapter_gradients == sum(p.grad.nbytes for p in trained)
    assert expected.optimizer_state == sum(x.nbytes for x in moments)
    estimated = expected.kept_activations + expected.recomputed_block + expected.tokens
    assert estimated == pytest.approx(activations, rel=0.04)
    measured = weights + sum(p.grad.nbytes for p in trained) + sum(x.nbytes for x in moments) + activations
    assert expected.total - expected.temporaries == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(
    ("file", "model", "target", "references", "measure", "variant", "checkpointing"),
    [
        ("", "FLUX.1 dev", 512, 320, "overhead", FOCUS_STEP, True),
        ("", "FLUX.1 dev", 1024, 320, "overhead", FOCUS_STEP, True),
        ("", "FLUX.2 klein 4B", 512, 512, "overhead", FOCUS_STEP, True),
        ("-training", "FLUX.1 dev", 512, 320, "throughput", f"{FOCUS_STEP}, no checkpointing", False),
    ],
)
def test_the_estimate_is_the_peak_that_was_measured(file, model, target, references, measure, variant, checkpointing):
    """Of full-size steps on an H200; text encoders and VAE were not there."""
    result = read_result(ROOT / "benchmarks" / "results" / f"2026-11-26-h200{file}.jsonl")
    backbone = {"FLUX.1 dev": "flux1", "FLUX.2 klein 4B": "flux2-klein-4b"}[model]
    (step,) = [
        s
        for s in result.steps
        if (s.backbone, s.measure) == (backbone, measure) and s.setting.startswith(f"one pair at {target} px")
    ]
    architecture = dataclasses.replace(RELEASED[model], companions=0)
    layout = TokenLayout((target // 16,) * 2, ((references // 16,) * 2,) * 2)
    settings = ModelConfig("", max_sequence_length=512, gradient_checkpointing=checkpointing)
    expected = estimate(architecture, settings, LoraConfig(rank=32), "bf16", layout, pairs=1)
    assert 0.995 <= expected.total / step.variants[variant].peak_memory <= 1.015


def raising(monkeypatch, call):
    """Lets a step run out of memory at its n-th call."""
    calls, step = [], PreferenceStep.__call__

    def run(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(PreferenceStep, "__call__", run)


def message_of(config):
    file = Path(config.output_dir).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(dataclasses.asdict(config)))
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--config", str(file)])
    return stop.value.code


def test_out_of_memory_in_the_first_step_says_what_to_change(config, monkeypatch):
    raising(monkeypatch, call=1)
    message = message_of(config)
    where = (
        "focusdpo train: error: out of memory in step 1, 1 pair of 96x96 px with references of 32x48, 48x16 px. The estimate"
    )
    assert message.startswith(where), message
    head, remedies = message.split("What would save most, each by itself:\n")
    for part in ("frozen weights", "optimizer state", "kept activations", "total"):
        assert part in head
    assert len(remedies.splitlines()) == 3
    assert all(f"model.{name}" in remedies for name in ("gradient_checkpointing=true", "quantization=nf4", "dtype=bf16"))


def test_out_of_memory_later_names_step_and_sizes(config, monkeypatch):
    raising(monkeypatch, call=3)
    message = message_of(config)
    assert "out of memory in step 2, " in message and " px with references of " in message
    assert "What would save" not in message, "a batch fitted: the settings are not the news"


def fail(monkeypatch, owner, name):
    def run(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(owner, name, run)


BEFORE_THE_FIRST_STEP = {
    "loading": (Backbone, "from_pretrained", "the model was loaded"),
    "moving": (Backbone, "to", "the model was moved to cpu"),
    "preparing": (Accelerator, "prepare", "the model was moved to cpu"),
}


@pytest.mark.parametrize("phase", BEFORE_THE_FIRST_STEP)
def test_out_of_memory_before_the_first_step(config, monkeypatch, phase):
    owner, name, doing = BEFORE_THE_FIRST_STEP[phase]
    fail(monkeypatch, owner, name)
    message = message_of(config)
    assert message.startswith(f"focusdpo train: error: out of memory while {doing}. The largest batch is 2 pairs of 96x96 px")
    head, remedies = message.split("What would save most, each by itself:\n")
    assert "frozen weights" in head and len(remedies.splitlines()) == 3
    with_cache = dataclasses.replace(config.data, cache=str(Path(config.output_dir).parent / "cache"))
    if phase == "preparing":
        assert "companions            0.00 MiB" in message_of(dataclasses.replace(config, data=with_cache))


def test_out_of_memory_while_encoding(config, monkeypatch):
    config.data.cache = config.output_dir + "-cache"
    fail(monkeypatch, Backbone, "to")
    message = message_of(config)
    assert "out of memory while images and prompts were encoded. VAE and text encoders take 0." in message
    assert "lower data.resolution" in message


def test_out_of_memory_while_restoring(config, monkeypatch):
    config.max_steps = 1
    Trainer(config).train()
    AcceleratorState._reset_state(reset_partial_state=True)
    fail(monkeypatch, checkpoints, "load_accelerator_state")
    message = message_of(dataclasses.replace(config, resume="latest", max_steps=2))
    assert "out of memory while adapter and optimiser were restored. The largest batch is " in message


def test_architecture_of_a_folder_is_that_of_the_loaded_model(tiny_flux, tmp_path):
    folders = {Flux1: tiny_flux, Flux2: write_tiny_flux2(tmp_path / "flux2"), QwenEditPlus: write_tiny_qwen(tmp_path / "qwen")}
    for backbone, folder in folders.items():
        loaded = Architecture.of(backbone.from_pretrained(str(folder), dtype=torch.float32))
        read = Architecture.of_folder(backbone, Path(folder))
        assert read.companions == loaded.companions > 0 and read.transformer is loaded.transformer
        built = [architecture.build(torch.float32, 16).transformer for architecture in (read, loaded)]
        shapes = [{name: p.shape for name, p in transformer.named_parameters()} for transformer in built]
        assert shapes[0] == shapes[1]


def test_out_of_memory_in_the_evaluation(config, monkeypatch):
    config.data.validation = config.data.train
    raising(monkeypatch, call=1)
    assert "out of memory in the evaluation of the held-out pairs, 1 pair of 96x96 px" in message_of(config)


def test_advised_savings_are_differences_of_estimates(config):
    trainer = Trainer(config)
    architecture, layout = Architecture.of(trainer.backbone), TokenLayout((6, 6), ((3, 3), (3, 3)))
    lines = advice(architecture, config, lambda data: layout, 2).split("each by itself:\n")[1].splitlines()
    saved = {line.split()[0]: float(line.split()[1]) for line in lines}  # MiB at this size
    before, after = (
        estimate(architecture, dataclasses.replace(config.model, gradient_checkpointing=on), config.lora, "no", layout, 2)
        for on in (False, True)
    )
    assert saved["model.gradient_checkpointing=true"] == pytest.approx((before.total - after.total) / 2**20, abs=0.01)
    assert "data.batch_size=1" in saved, "half of the activations"
    assert list(saved.values()) == sorted(saved.values(), reverse=True) and min(saved.values()) > 0


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, "data.reference_resolution=256"),  # half of what the backbone's own rule gave
        ({"reference_resolution": 128}, "data.reference_resolution=64"),
        ({"reference_resolution": 128, "reference_resolution_multiple": 96}, "data.reference_resolution_multiple=48"),
    ],
)
def test_smaller_references_are_advised_from_what_they_are(config, settings, named):
    config.data = DataConfig("-", **settings)
    config.model.gradient_checkpointing, config.data.cache = True, "-"
    architecture = Architecture.of_folder(Flux1, Path(config.model.path))

    def layout_of(data):
        return TokenLayout((2, 2), ((32, 20), (32, 32)) if data == config.data else ((2, 2), (2, 2)))

    assert named in advice(architecture, config, layout_of, 1)


def test_models_counts_references_in_each_backbones_own_size(capsys, monkeypatch):
    # The table of released sizes is estimated below, in twenty seconds; here the layouts alone count.
    monkeypatch.setattr("focusdpo.commands.models.estimate", lambda *arguments: Estimate(6, 5, 4, 4, 8, 3, 2, 1, 1))
    cli.main(["models", "--references", "1", "--photo", "400x272"])
    rows = {line[:20].strip(): line[20:].split() for line in capsys.readouterr().out.splitlines() if line[-1:].isdigit()}
    expected = {"flux": 32 * 21, "kontext": 52 * 78, "flux2": 25 * 17, "qwen-edit-plus": 78 * 52}  # by hand, in tokens
    assert {row[0]: int(row[5]) for row in rows.values()} == expected


def test_models_lists_the_released_sizes(capsys):
    size = ["--resolution", "1024", "--references", "2", "--reference_resolution", "320", "--rank", "32"]
    cli.main(["models", *size, "--processes", "8"])
    text, several = capsys.readouterr().out.split("\n\n8 processes on one machine")
    assert "FluxPipeline, FluxKontextPipeline" in text and "4096 tokens of 16x16 px" in text
    rows = {line[:20].strip(): line[20:].split() for line in text.splitlines() if line.endswith(tuple("0123456789"))}
    # Parameters as published; FLUX.1's LoRA by hand: 57 blocks of q, k, v, the 19 double ones' to_out, 2 * 3072 * 32 each.
    # FLUX.2's: four projections in a double block, one to 9 times the width in a single one.
    published = {
        "FLUX.1 dev": ("flux", "11.9B", f"{(57 * 3 + 19) * 2 * 3072 * 32 / 1e6:.1f}M", "57"),
        "FLUX.1 Kontext dev": ("kontext", "11.9B", "37.4M", "57"),
        "FLUX.2 dev": ("flux2", "32.2B", f"{(8 * 8 + 48 * 10) * 6144 * 32 / 1e6:.1f}M", "56"),
        "FLUX.2 klein 4B": ("flux2", "3.9B", f"{(5 * 8 + 20 * 10) * 3072 * 32 / 1e6:.1f}M", "25"),
        "FLUX.2 klein 9B": ("flux2", "9.1B", f"{(8 * 8 + 24 * 10) * 4096 * 32 / 1e6:.1f}M", "32"),
        "Qwen-Image-Edit 2509": ("qwen-edit-plus", "20.4B", f"{60 * 4 * 2 * 3072 * 32 / 1e6:.1f}M", "60"),
    }
    assert {name: tuple(row[:4]) for name, row in rows.items()} == published
    for row in rows.values():
        references, *parts, total = map(float, row[5:])
        assert references == 2 * 20 * 20, "two of 320 px, whatever the backbone"
        assert total == pytest.approx(math.fsum(parts), abs=0.04)
    row = next(line for line in several.splitlines() if line.startswith("FLUX.1 dev"))
    check_several(row.split()[3:], rows["FLUX.1 dev"])


def check_several(row, alone):
    """Eight processes with FLUX.1, by hand, from what one takes."""
    files, ddp, fsdp2, device_ddp, device_fsdp2, gathered = map(float, row)
    weights, companions, adapter = map(float, alone[6:9])
    width, adapted, gib = 3072, 2 * 3072 * 32, 2**30  # parameters of the two matrices of an adapted layer
    trained = 4 * (57 * 3 + 19) * adapted / gib
    assert files == pytest.approx(weights + companions, abs=0.02)
    assert (ddp, fsdp2) == (pytest.approx(8 * 3 * trained, abs=0.01), pytest.approx(weights + 8 * trained, abs=0.01))
    assert device_ddp == pytest.approx(float(alone[-1]) - companions, abs=0.02)
    # Modulation, attention with its norms, and MLP, of both streams; a single block has one of each.
    double = 2 * (36 * width**2 + 30 * width + 4 * 128) + 4 * 4 * adapted
    single = 2 * (15 * width**2 + 15 * width + 2 * 128) + 4 * 3 * adapted
    outside = weights + trained - (19 * double + 38 * single) / gib
    assert gathered == pytest.approx(outside + 3 * double / gib, abs=0.02)
    assert device_fsdp2 == pytest.approx(device_ddp - (weights + adapter) * 7 / 8 + gathered, abs=0.03)


def test_several_processes_are_refused_what_fsdp2_refuses():
    architecture, part = RELEASED["FLUX.1 dev"], Estimate(6, 5, 4, 4, 8, 3, 2, 1, 1)
    plain = launched(architecture, ModelConfig(""), LoraConfig(), part, "adamw", 2)
    prodigy = launched(architecture, ModelConfig(""), LoraConfig(), part, "prodigy", 2)
    nf4 = launched(architecture, ModelConfig("", quantization="nf4"), LoraConfig(), part, "adamw", 2)
    weights = plain.files - 5
    assert (plain.host_ddp, plain.host_fsdp2) == (2 * 12, weights + 2 * 4)
    assert plain.gathered is not None and plain.device_fsdp2 == (6 + 16) // 2 + plain.gathered + 3 + 2 + 1 + 1
    assert prodigy == Launched(plain.files, 2 * 12, None, None, None)
    assert nf4 == Launched(plain.files, 2 * (weights + 12), None, None, None), "each process reads all of it"


def test_an_adapter_of_a_model_without_weights_has_none(monkeypatch):
    """Of a rank whose matrices would take gigabytes, and minutes to draw."""
    backbone = RELEASED["FLUX.1 dev"].build(torch.bfloat16, 512)
    drawn = []
    monkeypatch.setattr(torch.nn.init, "normal_", lambda tensor, *_, **__: drawn.append(tensor) or tensor)
    parameters = add_adapter(backbone, LoraConfig(rank=4096), seed=0)
    assert sum(p.numel() for p in parameters) == 128 * 37355520, "as many times those of rank 32"
    assert drawn and all(tensor.is_meta for tensor in (*parameters, *drawn))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (["--processes", "0"], "processes: got 0; expected at least 1"),
        (["--references", "0"], "references: got 0; expected at least 1"),
        (["--references", "7"], "references: got 7; expected at most 6, as a pair has"),
        (["--photo", "1024"], "photo: got '1024'; expected width and height in pixels, such as 1024x1024"),
        (["--photo", "900x100"], "photo: got 900x100; flux2 cannot bring it to size: Aspect ratio too extreme"),
        (["--rank", "0"], "lora.rank: got 0"),
        (["--resolution", "8"], "data.resolution: got 8; expected at least 16 pixels"),
    ],
)
def test_models_refuses_by_name(argument, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(["models", *argument])
    assert message in stop.value.code
