"""Frozen weights in fewer bits, and optimisers that keep less: the real libraries, on the tiny model."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from focusdpo.data import collate
from focusdpo.foundation.journals import read_metrics
from focusdpo.models import BACKBONES, TokenLayout
from focusdpo.models.precision import BITS, check_quantization, quantize, quantized_layers
from focusdpo.models.sizes import Architecture
from focusdpo.training.adapter import add_adapter
from focusdpo.training.config import LoraConfig, ModelConfig, OptimConfig
from focusdpo.training.memory import estimate
from focusdpo.training.optimizers import build_optimizer, check_optimizer
from focusdpo.training.trainer import Trainer
from tests.runs import rows_of

CPU = torch.device("cpu")


SETTINGS = {
    "model.dtype": "bf16", "model.gradient_checkpointing": True, "max_steps": 4,
    "mixed_precision": "bf16", "checkpoint_every": 2,
}  # fmt: skip


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


KINDS = [pytest.param("nf4", marks=needs("bitsandbytes")), pytest.param("fp8", marks=needs("torchao"))]


def load(tiny_flux):
    return BACKBONES["flux"].from_pretrained(str(tiny_flux), dtype=torch.bfloat16, max_sequence_length=16)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_keep_what_they_compute_in_fewer_bits(tiny_flux, kind):
    backbone, original = load(tiny_flux), load(tiny_flux)
    before = {id(parent): name for parent, name, _ in quantized_layers(original)}
    assert before
    quantize(backbone, kind, CPU)
    layers = list(zip(quantized_layers(backbone), quantized_layers(original), strict=True))
    assert len(layers) == sum(
        isinstance(m, torch.nn.Linear) for p in original.tap_paths() for m in original.transformer.get_submodule(p).modules()
    )
    bits, numbers, errors = 0, 0, []
    for (_, _, layer), (_, _, plain) in layers:
        x = torch.randn(8, plain.in_features, dtype=torch.bfloat16, requires_grad=True)
        y = torch.autograd.grad(layer(x).float().square().sum(), x)[0], layer(x)
        z = torch.autograd.grad(plain(x).float().square().sum(), x)[0], plain(x)
        errors += [((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(y, z, strict=True)]
        weight = layer.weight
        bits += 8 * (weight.nbytes if kind == "nf4" else weight.qdata.nbytes)
        numbers += plain.weight.numel()
        assert torch.equal(layer.bias, plain.bias) if plain.bias is not None else layer.bias is None
    assert bits / numbers == {"nf4": 4, "fp8": 8}[kind]
    # Uniform steps of a normal distribution's quantiles, and three bits of mantissa: errors of some percent, not of rounding.
    low, high = {"nf4": (0.02, 0.2), "fp8": (0.005, 0.05)}[kind]
    assert low < sum(errors) / len(errors) < high
    # What is outside of the blocks is as it was.
    inside = tuple(path + "." for path in original.tap_paths())
    for name, value in original.transformer.state_dict().items():
        if not name.startswith(inside):
            assert torch.equal(backbone.transformer.state_dict()[name], value)


def stored(weight):
    return getattr(weight, "qdata", weight.data)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_model_trains_and_resumes(config, kind):
    config.model.quantization = kind
    trainer = Trainer(config)
    frozen = {n: stored(p).clone() for n, p in trainer.module.named_parameters() if not p.requires_grad}
    trainer.train()
    rows = read_metrics(Path(config.output_dir) / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6), "the reference model is quantised too"
    assert all(row["gradient_norm"] > 0 for row in rows) and rows[-1]["loss"] != rows[0]["loss"]
    assert all(torch.equal(stored(p), frozen[n]) for n, p in trainer.module.named_parameters() if n in frozen)
    AcceleratorState._reset_state(reset_partial_state=True)
    config.resume = str(Path(config.output_dir) / "checkpoints" / "step-000002")
    Trainer(config).train()
    again = read_metrics(Path(config.output_dir) / "metrics.jsonl")
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_errors_of_a_quantized_model_are_near_the_original(config, kind):
    errors = []
    for quantization in (None, kind):
        changed = dataclasses.replace(config, model=dataclasses.replace(config.model, quantization=quantization))
        trainer = Trainer(dataclasses.replace(changed, output_dir=f"{config.output_dir}-{quantization}"))
        result = trainer.step(collate([trainer.train_set[0]]), torch.Generator().manual_seed(0))
        errors.append(float(result.output.policy_win))
        AcceleratorState._reset_state(reset_partial_state=True)
    assert errors[0] != errors[1] and errors[0] == pytest.approx(errors[1], rel=0.05)


@needs("bitsandbytes")
def test_the_estimate_counts_bits(tiny_flux):
    backbone = load(tiny_flux)
    architecture = Architecture.of(backbone)
    layout = TokenLayout((6, 6), ((3, 3),))
    plain, small = (
        estimate(
            architecture, ModelConfig("", max_sequence_length=16, quantization=kind), LoraConfig(rank=4), "bf16", layout, 1
        )
        for kind in (None, "nf4")
    )
    saved = sum(layer.weight.numel() for _, _, layer in quantized_layers(backbone)) * (2 - BITS["nf4"] / 8)
    assert plain.frozen_weights - small.frozen_weights == pytest.approx(saved, abs=1)
    assert plain.kept_activations == small.kept_activations
    quantize(backbone, "nf4", CPU)
    state = [layer.weight.quant_state for _, _, layer in quantized_layers(backbone)]
    scales = sum(s.absmax.nbytes + s.state2.absmax.nbytes for s in state)
    weights = sum(p.nbytes for p in backbone.transformer.parameters())
    assert small.frozen_weights == pytest.approx(weights + scales, rel=0.01)


@pytest.mark.parametrize("name", ["adamw", pytest.param("adamw8bit", marks=needs("bitsandbytes")),
                                  pytest.param("prodigy", marks=needs("prodigyopt"))])  # fmt: skip
def test_optimizers_resume_to_the_same_bits(config, name):
    config.optim = OptimConfig(optimizer=name, lr=1.0 if name == "prodigy" else 1e-3, warmup_steps=1)
    config.lora.rank = 64  # tensors of fewer than 4096 numbers stay in 32 bits
    trainer = Trainer(config)
    trainer.train()
    rows, expected = read_metrics(Path(config.output_dir) / "metrics.jsonl"), rows_of(config)
    AcceleratorState._reset_state(reset_partial_state=True)
    config.resume = str(Path(config.output_dir) / "checkpoints" / "step-000002")
    resumed = Trainer(config)
    resumed.train()
    assert rows_of(config) == expected
    assert all(torch.equal(a, b) for a, b in zip(trainer.parameters, resumed.parameters, strict=True))
    if name == "adamw8bit":
        states = [v for state in resumed.optimizer.state.values() for k, v in state.items() if k in ("state1", "state2")]
        assert any(v.dtype == torch.uint8 for v in states)
    if name == "prodigy":
        assert rows[-1]["learning_rate"] == pytest.approx(resumed.optimizer.param_groups[0]["d"], rel=1e-6)
        assert rows[-1]["learning_rate"] != rows[0]["learning_rate"], "its own step size is what is reported"


def test_state_is_as_large_as_estimated(tiny_flux):
    backbone = load(tiny_flux)
    parameters = add_adapter(backbone, LoraConfig(rank=128), seed=0)
    count = sum(p.numel() for p in parameters)
    for name, package in {"adamw": "torch", "adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}.items():
        if importlib.util.find_spec(package) is None:
            continue
        optimizer = build_optimizer(parameters, OptimConfig(optimizer=name, lr=1.0))
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizer.step()
        size = sum(v.nbytes for state in optimizer.state.values() for k, v in state.items() if torch.is_tensor(v) and v.ndim
                   and "map" not in k and "absmax" not in k)  # fmt: skip
        layout = TokenLayout((6, 6), ((3, 3),))
        model = ModelConfig("", max_sequence_length=16)
        architecture = Architecture.of(load(tiny_flux))
        expected = estimate(architecture, model, LoraConfig(rank=128), "bf16", layout, 1, name).optimizer_state
        assert expected == {"adamw": 8, "adamw8bit": 2, "prodigy": 16}[name] * count
        # Prodigy keeps its sums over slices of 11, one value each.
        assert size == pytest.approx(expected, rel=0.02), name


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"model.quantization: fp8 needs torchao.*pip install 'focusdpo\[quantiz"):
        check_quantization("fp8")
    with pytest.raises(ModuleNotFoundError, match=r"optim.optimizer: prodigy needs prodigyopt.*'focusdpo\[prodigy\]'"):
        check_optimizer("prodigy")
    check_optimizer("adamw")


def test_prodigys_rate_is_a_factor():
    with pytest.raises(ValueError, match="optim.lr: got 2e-05; expected about 1 with optimizer='prodigy'"):
        OptimConfig(optimizer="prodigy")
