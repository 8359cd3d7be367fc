"""UNO's LoRA: against the original FLUX blocks with UNO's processors, there and back, and merged into the base of a run."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from focusdpo.commands import cli
from focusdpo.data import collate
from focusdpo.models import Flux1, Kontext, TokenLayout
from focusdpo.models.base_lora import merge_base_lora
from focusdpo.models.flux import position_ids
from focusdpo.models.lora_reading import read_lora
from focusdpo.models.uno_lora import diffusers_to_uno, uno_to_diffusers
from focusdpo.training.adapter import add_adapter, reference_model
from focusdpo.training.config import LoraConfig, ModelConfig
from focusdpo.training.trainer import Trainer
from tests.models.original_flux import MLP, D, Diffusers, Original, base_weights, load_base, rotations

RANK = 4
WEIGHTS = "pytorch_lora_weights.safetensors"


def uno_lora(blocks=((0, 1), (0, 1)), rank=RANK, dtype=torch.float32, seed=1, std=0.2):
    """A random LoRA under UNO's names."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {}
    for i in blocks[0]:
        for stream in "12":
            sizes[f"double_blocks.{i}.processor.qkv_lora{stream}"] = (D, 3 * D)
            sizes[f"double_blocks.{i}.processor.proj_lora{stream}"] = (D, D)
    for i in blocks[1]:
        sizes[f"single_blocks.{i}.processor.qkv_lora"] = (D, 3 * D)
        sizes[f"single_blocks.{i}.processor.proj_lora"] = (D + MLP, D)
    state = {}
    for name, (inputs, outputs) in sizes.items():
        state[f"{name}.down.weight"] = (std * torch.randn(rank, inputs, generator=generator)).to(dtype)
        state[f"{name}.up.weight"] = (std * torch.randn(outputs, rank, generator=generator)).to(dtype)
    return state


@pytest.fixture
def uno_file(tmp_path):
    save_file(uno_lora(), tmp_path / "dit_lora.safetensors")
    return tmp_path / "dit_lora.safetensors"


def convert(*arguments):
    cli.main(["convert-uno", *map(str, arguments)])


@pytest.fixture
def both(tiny_flux):
    """Original (given a LoRA) and diffusers' blocks with the same base, and inputs of target, two references and text."""
    ids = torch.cat([torch.zeros(5, 3), position_ids(TokenLayout((3, 4), ((2, 2), (1, 3))))])
    pipeline = FluxPipeline.from_pretrained(tiny_flux)
    weights = base_weights()
    load_base(pipeline.transformer, weights)
    inputs = (torch.randn(2, len(ids) - 5, D), torch.randn(2, 5, D), torch.randn(2, D))
    return lambda lora: Original(weights, lora, rotations(ids))(*inputs), Diffusers(pipeline, ids), inputs


def test_diffusers_with_the_converted_lora_is_the_original(both, uno_file, tmp_path):
    original, diffusers, inputs = both
    lora = load_file(uno_file)
    expected, base = original(lora), original({k: torch.zeros_like(v) for k, v in lora.items()})
    torch.testing.assert_close(diffusers(*inputs), base, rtol=0, atol=1e-5)
    assert (expected - base).abs().mean() > 0.1, "the LoRA does something"

    convert(uno_file, tmp_path / "out")
    diffusers.pipeline.load_lora_weights(tmp_path / "out")
    torch.testing.assert_close(diffusers(*inputs), expected, rtol=0, atol=1e-5)
    diffusers.pipeline.unload_lora_weights()
    torch.testing.assert_close(diffusers(*inputs), base, rtol=0, atol=1e-5)
    merge_base_lora(diffusers.pipeline, str(uno_file), 1.0)
    torch.testing.assert_close(diffusers(*inputs), expected, rtol=0, atol=1e-5)


def test_each_matrix_matters(both):
    """Without any one of the 24 the output is another, the original's without it."""
    original, diffusers, inputs = both
    lora = uno_lora()
    whole = original(lora)
    assert len(lora) == 24
    for name in lora:
        without = lora | {name: torch.zeros_like(lora[name])}
        expected = original(without)
        assert (expected - whole).abs().max() > 1e-3, name
        diffusers.pipeline.load_lora_weights(uno_to_diffusers(without))
        torch.testing.assert_close(diffusers(*inputs), expected, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
        diffusers.pipeline.unload_lora_weights()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back(tmp_path, dtype):
    """Bitwise, through the files, and for a choice of blocks."""
    lora = uno_lora(blocks=((1,), (0, 7)), rank=3, dtype=dtype)
    save_file(lora, tmp_path / "uno.safetensors")
    convert(tmp_path / "uno.safetensors", tmp_path / "there")
    there = load_file(tmp_path / "there" / WEIGHTS)
    assert len(there) == 2 * (8 + 2 * 4)
    convert(tmp_path / "there", tmp_path / "back", "--reverse", "true")
    back = load_file(tmp_path / "back" / "dit_lora.safetensors")
    assert back.keys() == lora.keys()
    assert all(back[k].dtype == dtype and torch.equal(back[k], v) for k, v in lora.items())
    again = uno_to_diffusers(back)
    assert again.keys() == there.keys() and all(torch.equal(again[k], v) for k, v in there.items())


def test_the_files_settings(uno_file, tmp_path):
    convert(uno_file, tmp_path / "out")
    with safe_open(tmp_path / "out" / WEIGHTS, framework="pt") as content:
        settings = json.loads(content.metadata()["lora_adapter_metadata"])
    assert settings["transformer.r"] == settings["transformer.lora_alpha"] == RANK
    layers = {key.removeprefix("transformer.").split(".lora_")[0] for key in load_file(tmp_path / "out" / WEIGHTS)}
    assert set(settings["transformer.target_modules"]) == layers and len(layers) == 2 * 8 + 2 * 4


def test_downs_of_their_own_do_not_fit_unos_format():
    state = uno_to_diffusers(uno_lora())
    name = "transformer.transformer_blocks.1.attn.add_k_proj.lora_A.weight"
    state[name] = state[name] + 1e-3
    with pytest.raises(ValueError, match=r"share one lora_A; these differ:\n.*s.1.attn.add_q_proj") as error:
        diffusers_to_uno(state)
    assert "blocks.0" not in str(error.value)


KEY = "single_blocks.1.processor.proj_lora.down.weight"
BROKEN = {
    "unknown": (lambda s: s.update({"double_blocks.0.processor.ip_lora.weight": torch.ones(2)}), "ip_lora.weight: unknown"),
    "prefix": (
        lambda s: s.update({f"module.{KEY}": s.pop(KEY)}),
        rf"2 of its matrices are wrong:\n  module.{KEY}: unknown\n  {KEY}: missing",
    ),
    "missing": (lambda s: s.pop(KEY), rf"1 of its matrices are wrong:\n  {KEY}: missing"),
    "attention only": (
        lambda s: s.update({KEY: torch.ones(RANK, D)}),
        rf"  {KEY}: shape \[4, 64\], expected \[4, 320\]",
    ),
    "another rank": (
        lambda s: s.update({k: torch.ones(s[k].shape[0], 2) for k in s if "blocks.0.processor.qkv_lora1.up" in k}),
        r"qkv_lora1.up.weight: shape \[192, 2\], expected \[192, 4\]",
    ),
    "many": (lambda s: [s.pop(k) for k in list(s) if ".up." in k], "12 of its matrices .*and 7 more"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_not_unos_is_listed(case, tmp_path):
    change, message = BROKEN[case]
    state = uno_lora()
    change(state)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        uno_to_diffusers(state)
    save_file(state, tmp_path / "broken.safetensors")
    with pytest.raises(SystemExit, match="convert-uno: error: source: .*broken.safetensors: not a LoRA in UNO's format"):
        convert(tmp_path / "broken.safetensors", tmp_path / "out")
    with pytest.raises(ValueError, match="model.base_lora: .*broken.safetensors: not a LoRA in UNO's format"):
        read_lora("model.base_lora", str(tmp_path / "broken.safetensors"))
    assert not (tmp_path / "out").exists()


def test_command_refuses_by_name(uno_file, tmp_path, monkeypatch):
    def refused(message, *arguments):
        with pytest.raises(SystemExit, match=message):
            convert(*arguments)

    out = tmp_path / "out"
    refused("source: no such file or folder: /nowhere", "/nowhere", out)
    refused("source: .* is in UNO's format; leave --reverse out", uno_file, out, "--reverse", "true")
    (tmp_path / "text.safetensors").write_text("no tensors")
    refused("source: .* is no safetensors file", tmp_path / "text.safetensors", out)
    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    refused("source: .* holds no LoRA, .* it has weight", tmp_path / "other.safetensors", out)
    refused("source: .* holds 3 .safetensors files and no pytorch_lora", tmp_path, out)
    refused("out_dir: .* is a file; name a folder", uno_file, uno_file / "out")
    assert not out.exists()

    convert(uno_file, out)
    before = (out / WEIGHTS).read_bytes()
    refused("source: .* is in another format; if it is diffusers', say --reverse true", out, tmp_path / "twice")
    save_file(uno_lora(seed=2), uno_file)
    refused("out_dir: .* holds an earlier run .pytorch_lora_weights.safetensors.; replace it with --overwrite", uno_file, out)
    assert (out / WEIGHTS).read_bytes() == before

    def fails(file, content):
        file.open("wb").write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fails)
        with pytest.raises(SystemExit, match="out_dir: .*No space left on device"):
            convert(uno_file, out, "--overwrite", "true")
    assert (out / WEIGHTS).read_bytes() == before
    assert {path.name for path in out.iterdir()} == {".focusdpo", WEIGHTS}
    convert(uno_file, out, "--overwrite", "true")
    assert (out / WEIGHTS).read_bytes() != before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / WEIGHTS).write_text("precious")
    refused("which this command did not write", uno_file, tmp_path / "mine", "--overwrite", "true")


def test_command_by_position_and_its_help(capsys):
    name, settings = cli.parse_config(["convert-uno", "lora.safetensors", "out", "--reverse", "true"])
    assert name == "convert-uno" and dataclasses.astuple(settings) == ("lora.safetensors", "out", True, False)
    with pytest.raises(SystemExit):
        cli.parse_config(["convert-uno", "lora.safetensors"])
    assert "OUT_DIR" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.parse_config(["convert-uno", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "convert-uno SOURCE OUT_DIR",
        "source UNO's LoRA",
        "out_dir Folder for",
        "--reverse",
        "Replace what an earlier",
    ):
        assert part in text


def test_a_scale_goes_into_unos_matrices(tmp_path):
    """Its format cannot say one."""
    lora = uno_lora()
    settings = {"transformer.r": RANK, "transformer.lora_alpha": 3 * RANK}
    save_file(uno_to_diffusers(lora), tmp_path / WEIGHTS, {"lora_adapter_metadata": json.dumps(settings)})
    convert(tmp_path, tmp_path / "out", "--reverse", "true")
    converted = load_file(tmp_path / "out" / "dit_lora.safetensors")
    assert converted.keys() == lora.keys()
    for name, value in lora.items():
        torch.testing.assert_close(converted[name], value if ".down." in name else 3 * value, rtol=1e-6, atol=0)


# base_lora


def backbone_of(folder, dtype=torch.float32):
    return Flux1.from_pretrained(str(folder), dtype=dtype, max_sequence_length=16)


def test_merged_in_fp32_and_rounded_once(tiny_flux, uno_file, tmp_path):
    """Also what bf16 would lose of the LoRA itself; nothing else changes, and nothing stays trainable."""
    lora = {name: 0.1 * value for name, value in uno_lora().items()}
    save_file(lora, uno_file)
    backbone = backbone_of(tiny_flux, torch.bfloat16)
    before = {name: p.clone() for name, p in backbone.transformer.named_parameters()}
    merge_base_lora(backbone.pipeline, str(uno_file), 0.5)
    after = dict(backbone.transformer.named_parameters())
    assert after.keys() == before.keys() and not any(p.requires_grad for p in after.values())
    stem = "transformer_blocks.1.attn.add_"
    a, b = (lora[f"double_blocks.1.processor.qkv_lora2.{side}.weight"] for side in ("down", "up"))
    for name, rows in zip("qkv", b.split(D), strict=True):
        expected = (before[f"{stem}{name}_proj.weight"].float() + 0.5 * (rows @ a)).bfloat16()
        assert torch.equal(after[f"{stem}{name}_proj.weight"], expected)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 24 and all(name.endswith(".weight") for name in changed)


def test_alpha_counts(tiny_flux, tmp_path):
    """An adapter of ours, alpha twice its rank, merged or loaded by diffusers: the same model."""
    backbone = backbone_of(tiny_flux)
    for parameter in add_adapter(backbone, LoraConfig(rank=4, alpha=8), seed=0):
        torch.nn.init.normal_(parameter, std=0.2)
    backbone.save_lora(tmp_path)
    layout = TokenLayout((2, 3), ((2, 2),))
    arguments = (torch.randn(1, 6, 16), torch.rand(1), backbone.encode_prompts(["a cat"]), torch.randn(1, 4, 16), layout)
    merged = backbone_of(tiny_flux)
    base = merged.predict(*arguments)
    merge_base_lora(merged.pipeline, str(tmp_path), 1.0)
    expected = backbone.predict(*arguments)
    assert (expected - base).abs().max() > 0.01
    torch.testing.assert_close(merged.predict(*arguments), expected, rtol=0, atol=1e-5)


def test_lora_of_another_model(tiny_flux, tmp_path):
    backbone = backbone_of(tiny_flux)
    before = {name: p.clone() for name, p in backbone.transformer.named_parameters()}
    file = tmp_path / "lora.safetensors"

    def refused(state, message):
        save_file(state, file)
        with pytest.raises(ValueError, match=message):
            merge_base_lora(backbone.pipeline, str(file), 1.0)

    refused(
        uno_lora(blocks=((0, 2), (0,))),
        r"16 of 40 names are no pair .* for a linear layer .*: transformer.transformer_blocks.2",
    )
    state = uno_to_diffusers(uno_lora())
    stem = "transformer.transformer_blocks.0.attn.to_q.lora"
    refused(
        state | {"transformer.nowhere.lora_A.weight": torch.ones(4, D)},
        "1 of 49 names are no pair .*: transformer.nowhere.lora_A",
    )
    refused({k: v for k, v in state.items() if k != f"{stem}_B.weight"}, f"1 of 47 names are no pair .*: {stem}_A.weight")
    wide = state | {f"{stem}_A.weight": torch.ones(4, 2 * D)}
    refused(wide, r"attn.to_q: lora_A is \[4, 128\] and lora_B \[64, 4\], but the layer's weight is \[64, 64\]")
    assert all(torch.equal(p, before[name]) for name, p in backbone.transformer.named_parameters()), "nothing is changed then"


SETTINGS = {
    "model.gradient_checkpointing": True, "data.batch_size": 2, "focus.mask": "none", "optim.lr": 0.01,
    "max_steps": 2,
}  # fmt: skip


@pytest.fixture
def config(config, uno_file):
    return dataclasses.replace(config, model=dataclasses.replace(config.model, base_lora=str(uno_file)))


@pytest.mark.parametrize("form", ["UNO's", "diffusers'", "another", "double blocks", "some blocks"])
def test_samples_are_made_as_uno_makes_them(config, uno_file, tmp_path, form):
    """Guidance 4 and the mu of UNO's own schedule, 0.459 at 512 px, whatever the format of its LoRA; else FLUX.1's."""
    if form == "double blocks":  # as other trainers for the original FLUX code have it, under the same names
        save_file({name: value for name, value in uno_lora().items() if "double" in name}, uno_file)
    elif form == "some blocks":
        save_file(uno_lora(blocks=((1,), (0, 1))), uno_file)
    elif form != "UNO's":
        convert(uno_file, tmp_path / "converted")
        config.model.base_lora = str(tmp_path / "converted")
    if form == "another":
        file = tmp_path / "converted" / "pytorch_lora_weights.safetensors"
        save_file({name: value for name, value in load_file(file).items() if "proj_out" not in name}, file)
    model = Trainer(config).backbone
    width = height = 512
    tokens = (width // 8) * (height // 8) // (16 * 16)  # as UNO's pipeline counts
    mu = 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)
    assert mu == pytest.approx(0.459, abs=1e-3)
    expected = (4.0, mu) if form in ("UNO's", "diffusers'") else (3.5, 0.5 + (1024 - 256) * 0.65 / 3840)
    assert model.default_scales() == (expected[0], 1.0)
    assert model.time_shift(1024, 25) == pytest.approx(expected[1])
    model.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    assert model.training_shift(1024) == pytest.approx(math.exp(0.63), rel=1e-3), "trained as UNO was"
    seen = []
    predict = model.predict
    model.predict = lambda tokens, t, *rest: seen.append((model.guidance, float(t[0]))) or predict(tokens, t, *rest)
    layout = TokenLayout((32, 32), ())
    model.sample(torch.randn(1, 1024, 16), model.encode_prompts(["a"]), torch.zeros(1, 0, 16), layout, steps=2, guidance=4.0)
    shift = math.exp(expected[1])
    other = Kontext(model.pipeline)
    other.merged_layers = model.merged_layers
    assert other.default_scales() == (3.5, 1.0), "another layout is not UNO's, whatever the LoRA"
    assert seen == [(4.0, 1.0), (4.0, pytest.approx(shift * 0.5 / (1 + (shift - 1) * 0.5), rel=1e-5))]


def test_training_on_top(config, tiny_flux, uno_file, tmp_path):
    """The reference is the pipeline with UNO's LoRA; the policy is it with the saved adapter loaded beside."""
    convert(uno_file, tmp_path / "converted")
    trainer = Trainer(config)
    batch = collate([trainer.train_set[0]])
    noised = trainer.step.noise(batch, torch.Generator().manual_seed(0))
    arguments = (noised.tokens, noised.t, noised.prompts, noised.references, noised.layout)
    start = trainer.step.compare(noised, batch).output

    beside = backbone_of(tiny_flux)
    bare = beside.predict(*arguments)
    beside.pipeline.load_lora_weights(tmp_path / "converted", adapter_name="uno")
    with torch.no_grad():
        expected = beside.predict(*arguments)
        assert (expected - bare).abs().max() > 0.1
        with reference_model(trainer.module):
            reference = trainer.backbone.predict(*arguments)
    torch.testing.assert_close(reference, expected, rtol=0, atol=1e-5)
    error = (expected - noised.target).square().mean((1, 2))
    torch.testing.assert_close(start.reference_win, error[:1])
    torch.testing.assert_close(start.reference_lose, error[1:])

    trainer.train()
    with torch.no_grad(), reference_model(trainer.module):
        assert torch.equal(trainer.backbone.predict(*arguments), reference), "the reference stays"
    beside.pipeline.load_lora_weights(Path(config.output_dir) / "lora", adapter_name="focus")
    beside.pipeline.set_adapters(["uno", "focus"])
    trainer.module.eval()
    with torch.no_grad():
        policy = trainer.backbone.predict(*arguments)
        assert (policy - reference).abs().max() > 1e-3
        torch.testing.assert_close(beside.predict(*arguments), policy, rtol=0, atol=1e-5)


def test_resume_compares_the_lora_itself(config, uno_file, tmp_path):
    Trainer(dataclasses.replace(config, max_steps=1)).train()
    AcceleratorState._reset_state(reset_partial_state=True)

    def resumed(**model):
        AcceleratorState._reset_state(reset_partial_state=True)
        return Trainer(dataclasses.replace(config, resume="latest", model=dataclasses.replace(config.model, **model)))

    moved = uno_file.rename(tmp_path / "moved.safetensors")
    assert resumed(base_lora=str(moved)).progress.step == 1
    with pytest.raises(ValueError, match="model.base_lora_scale: the checkpoint has 1.0, got 0.5"):
        resumed(base_lora=str(moved), base_lora_scale=0.5)
    with pytest.raises(ValueError, match=r"model.base_lora \(its content\): the checkpoint has '\w+', got None"):
        resumed(base_lora=None)
    save_file(uno_lora(seed=2), moved)
    with pytest.raises(ValueError, match=r"model.base_lora \(its content\): the checkpoint has '\w+', got '\w+'"):
        resumed(base_lora=str(moved))


def test_refused_before_the_model_is_loaded(config, tmp_path, monkeypatch):
    monkeypatch.setattr("focusdpo.training.prepared_run.load_backbone", lambda *_, **__: pytest.fail("the model was loaded"))
    (tmp_path / "empty").mkdir()
    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    for path, kind, message in (
        ("nobody/uno", FileNotFoundError, "model.base_lora: no such file or folder: nobody/uno; download it first"),
        (str(tmp_path / "empty"), FileNotFoundError, "model.base_lora: .*empty holds 0 .safetensors files"),
        (str(tmp_path / "other.safetensors"), ValueError, "model.base_lora: .* holds no LoRA"),
    ):
        with pytest.raises(kind, match=message):
            Trainer(dataclasses.replace(config, model=dataclasses.replace(config.model, base_lora=path)))


def test_scale_is_checked():
    for scale in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="model.base_lora_scale: got .*; expected a finite number other than 0"):
            ModelConfig("x", base_lora="lora", base_lora_scale=scale)
    with pytest.raises(ValueError, match="model.base_lora_scale: got 0.5; expected 1 without model.base_lora"):
        ModelConfig("x", base_lora_scale=0.5)
