"""The saved LoRA in other tools: each layer's update as every loader makes it, names as they publish them, and back again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import peft
import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from focusdpo.commands import cli
from focusdpo.models import BACKBONES
from focusdpo.models.base_lora import NAME, lora_checksum, merge_base_lora
from focusdpo.models.lora_fusion import Update, fuse, split
from focusdpo.models.lora_reading import read_lora
from focusdpo.models.tiny_flux import write_tiny_flux
from focusdpo.training.adapter import add_adapter
from focusdpo.training.config import LoraConfig
from tests.models.test_uno_lora import uno_lora
from tests.tiny_flux2 import write_tiny_flux2
from tests.tiny_qwen import write_tiny_qwen

WEIGHTS = "pytorch_lora_weights.safetensors"
FILES = {
    "diffusers": WEIGHTS,
    "peft": "adapter_model.safetensors",
    "comfyui": "lora_comfyui.safetensors",
    "kohya": "lora_kohya.safetensors",
}
NAMES = ["flux", "kontext", "flux2", "qwen-edit-plus"]
# Attention as by default, and every linear layer there is; 7 / 5 is no power of 2.
SETS = {"default": (None, 4, 8.0), "all": ("all", 5, 7.0)}
CASES = [(name, which) for name in NAMES for which in SETS]

# What the original code and the tools call the layers of a block, and diffusers' layers that are its rows.
ATTENTION = {
    "double_blocks.0.img_attn.qkv": [
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.attn.to_k",
        "transformer_blocks.0.attn.to_v",
    ],
    "double_blocks.0.img_attn.proj": ["transformer_blocks.0.attn.to_out.0"],
    "double_blocks.0.txt_attn.qkv": [
        "transformer_blocks.0.attn.add_q_proj",
        "transformer_blocks.0.attn.add_k_proj",
        "transformer_blocks.0.attn.add_v_proj",
    ],
    "double_blocks.0.txt_attn.proj": ["transformer_blocks.0.attn.to_add_out"],
}
ENDS = {
    "img_in": ["x_embedder"],
    "txt_in": ["context_embedder"],
    "final_layer.linear": ["proj_out"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
}
FLUX_1 = {
    **ATTENTION,
    "double_blocks.0.img_mlp.0": ["transformer_blocks.0.ff.net.0.proj"],
    "double_blocks.0.img_mlp.2": ["transformer_blocks.0.ff.net.2"],
    "double_blocks.0.txt_mlp.0": ["transformer_blocks.0.ff_context.net.0.proj"],
    "double_blocks.0.txt_mlp.2": ["transformer_blocks.0.ff_context.net.2"],
    "double_blocks.0.img_mod.lin": ["transformer_blocks.0.norm1.linear"],
    "double_blocks.0.txt_mod.lin": ["transformer_blocks.0.norm1_context.linear"],
    "single_blocks.0.linear1": [
        "single_transformer_blocks.0.attn.to_q",
        "single_transformer_blocks.0.attn.to_k",
        "single_transformer_blocks.0.attn.to_v",
        "single_transformer_blocks.0.proj_mlp",
    ],
    "single_blocks.0.linear2": ["single_transformer_blocks.0.proj_out"],
    "single_blocks.0.modulation.lin": ["single_transformer_blocks.0.norm.linear"],
    **ENDS,
    "time_in.in_layer": ["time_text_embed.timestep_embedder.linear_1"],
    "time_in.out_layer": ["time_text_embed.timestep_embedder.linear_2"],
    "vector_in.in_layer": ["time_text_embed.text_embedder.linear_1"],
    "vector_in.out_layer": ["time_text_embed.text_embedder.linear_2"],
    "guidance_in.in_layer": ["time_text_embed.guidance_embedder.linear_1"],
    "guidance_in.out_layer": ["time_text_embed.guidance_embedder.linear_2"],
}
FLUX_2 = {
    **ATTENTION,
    "double_blocks.0.img_mlp.0": ["transformer_blocks.0.ff.linear_in"],
    "double_blocks.0.img_mlp.2": ["transformer_blocks.0.ff.linear_out"],
    "double_blocks.0.txt_mlp.0": ["transformer_blocks.0.ff_context.linear_in"],
    "double_blocks.0.txt_mlp.2": ["transformer_blocks.0.ff_context.linear_out"],
    "single_blocks.0.linear1": ["single_transformer_blocks.0.attn.to_qkv_mlp_proj"],
    "single_blocks.0.linear2": ["single_transformer_blocks.0.attn.to_out"],
    "double_stream_modulation_img.lin": ["double_stream_modulation_img.linear"],
    "double_stream_modulation_txt.lin": ["double_stream_modulation_txt.linear"],
    "single_stream_modulation.lin": ["single_stream_modulation.linear"],
    **ENDS,
    "time_in.in_layer": ["time_guidance_embed.timestep_embedder.linear_1"],
    "time_in.out_layer": ["time_guidance_embed.timestep_embedder.linear_2"],
    "guidance_in.in_layer": ["time_guidance_embed.guidance_embedder.linear_1"],
    "guidance_in.out_layer": ["time_guidance_embed.guidance_embedder.linear_2"],
}
# musubi-tuner's QWEN_IMAGE_KEYS, the linear ones of them.
QWEN = {
    "time_text_embed.timestep_embedder": ["linear_1", "linear_2"],
    "transformer_blocks.0": ["img_mod.1", "txt_mod.1"],
    "transformer_blocks.0.attn": [
        *("to_q", "to_k", "to_v", "add_k_proj", "add_v_proj", "add_q_proj", "to_out.0", "to_add_out"),
    ],
    "transformer_blocks.0.img_mlp": ["net.0.proj", "net.2"],
    "transformer_blocks.0.txt_mlp": ["net.0.proj", "net.2"],
}
QWEN = [*(f"{stem}.{end}" for stem, ends in QWEN.items() for end in ends), "img_in", "txt_in", "norm_out.linear", "proj_out"]
PUBLISHED = {"flux": FLUX_1, "kontext": FLUX_1, "flux2": FLUX_2, "qwen-edit-plus": {name: [name] for name in QWEN}}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "flux": write_tiny_flux(folder / "flux"),
        "kontext": write_tiny_flux(folder / "kontext", kontext=True),
        "flux2": write_tiny_flux2(folder / "flux2", klein=False),
        "qwen-edit-plus": write_tiny_qwen(folder / "qwen"),
    }


@pytest.fixture(scope="module")
def load(models):
    return lambda name: BACKBONES[name].from_pretrained(str(models[name]), dtype=torch.float32, parts="transformer")


def linear_layers(transformer):
    return [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]


def updates(transformer, adapter="default"):
    """Each layer's update in float64, as PEFT applies it: scaling * B A."""
    found = {}
    for name, module in transformer.named_modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_A:
            a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            assert module.lora_dropout[adapter](torch.ones(99)).eq(1).all(), "dropout is off even where layers train"
            found[name] = module.scaling[adapter] * (b.double() @ a.double()).detach()
    return found


def train(backbone, targets, rank, alpha):
    if targets == "all":
        targets = linear_layers(backbone.transformer)
    config = LoraConfig(rank=rank, alpha=alpha, target_modules=targets, dropout=0.3)
    generator = torch.Generator().manual_seed(0)
    for parameter in add_adapter(backbone, config, seed=0):
        parameter.data = torch.randn(parameter.shape, generator=generator) / 5
    for module in backbone.transformer.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout.eval()
    return updates(backbone.transformer)


@pytest.fixture(scope="module")
def trained(load, tmp_path_factory):
    """Folder and true updates of a saved LoRA by backbone and set."""
    made = {}

    def get(name, which):
        if (name, which) not in made:
            backbone, folder = load(name), tmp_path_factory.mktemp("lora")
            expected = train(backbone, *SETS[which])
            backbone.save_lora(folder)
            made[name, which] = folder, expected
        return made[name, which]

    return get


def convert(source, out, to, *options):
    cli.main(["convert-lora", str(source), str(out), "--to", to, *options])
    return load_file(out / FILES[to]) if to in FILES else None


def check(found, expected, case=""):
    assert found.keys() == expected.keys(), case
    for name, value in expected.items():
        assert value.abs().max() > 0.01
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{case} {name}: {m}")


def plain(state, prefix, sides=("lora_A", "lora_B")):
    """Updates of a file by its own names, at the scale that it says beside the weights, or 1."""
    found = {}
    for key, a in state.items():
        if key.endswith(f".{sides[0]}.weight"):
            stem = key.removesuffix(f".{sides[0]}.weight")
            scale = float(state.get(f"{stem}.alpha", a.shape[0])) / a.shape[0]
            found[stem.removeprefix(prefix)] = scale * (state[f"{stem}.{sides[1]}.weight"].double() @ a.double())
    per_layer = 3 if any(key.endswith(".alpha") for key in state) else 2
    assert len(state) == per_layer * len(found) and all(key.startswith(prefix) for key in state)
    return found


def published(name, transformer, separator="."):
    """Original names of all linear layers of a model, and diffusers' of their rows."""
    found = {}
    for original, layers in PUBLISHED[name].items():
        for number in range(len(transformer.transformer_blocks) + len(getattr(transformer, "single_transformer_blocks", []))):
            rows = [layer.replace("blocks.0.", f"blocks.{number}.") for layer in layers]
            if rows[0] in linear_layers(transformer):
                found[original.replace("blocks.0.", f"blocks.{number}.").replace(".", separator)] = rows
    return found


@pytest.mark.parametrize(("name", "which"), CASES)
def test_each_loader_applies_what_was_trained(load, trained, name, which):
    folder, expected = trained(name, which)
    backbone = load(name)
    assert expected.keys() == set(linear_layers(backbone.transformer)) or which == "default"
    backbone.pipeline.load_lora_weights(folder, adapter_name="file")
    check(updates(backbone.transformer, "file"), expected, "diffusers, file")
    backbone.pipeline.unload_lora_weights()
    backbone.pipeline.load_lora_weights(load_file(folder / WEIGHTS), adapter_name="dict")
    check(updates(backbone.transformer, "dict"), expected, "diffusers, state dict")
    check(plain(load_file(folder / WEIGHTS), "transformer."), expected, "no alpha")
    for source, where in ((folder / "peft", {}), (folder, {"subfolder": "peft"})):
        model = PeftModel.from_pretrained(load(name).transformer, str(source), **where)
        check(updates(model.base_model.model), expected, "peft")
    check(plain(load_file(folder / "peft" / "adapter_model.safetensors"), "base_model.model."), expected, "peft, no alpha")


@pytest.mark.parametrize("form", ["kohya", "comfyui"])
@pytest.mark.parametrize(("name", "which"), CASES)
def test_names_and_updates_of_the_original_code(load, trained, tmp_path, name, which, form):
    folder, expected = trained(name, which)
    state = convert(folder, tmp_path / "out", form)
    if form == "kohya":
        found = plain(state, "lora_unet_", ("lora_down", "lora_up"))
        assert all(
            state[key].item() == state[key.replace(".alpha", ".lora_down.weight")].shape[0] for key in state if ".alpha" in key
        )
    else:
        assert not any(key.endswith("alpha") for key in state), "diffusers refuses FLUX.2's with them"
        found = plain(
            state, "diffusion_model.", ("lora_down", "lora_up") if PUBLISHED[name] is FLUX_1 else ("lora_A", "lora_B")
        )
    transformer = load(name).transformer
    rows = published(name, transformer, "_" if form == "kohya" else ".")
    rows = {original: layers for original, layers in rows.items() if any(layer in expected for layer in layers)}
    assert sum(layer in expected for layers in rows.values() for layer in layers) == len(expected)
    sizes = {layer: tuple(transformer.get_submodule(layer).weight.shape) for layers in rows.values() for layer in layers}
    original = {
        original: torch.cat([expected.get(layer, torch.zeros(sizes[layer], dtype=torch.float64)) for layer in layers])
        for original, layers in rows.items()
    }
    for key in original:
        if "adaLN" in key:  # shift before scale, as in the original
            original[key] = torch.cat(original[key].chunk(2)[::-1])
    check(found, original, form)


@pytest.mark.parametrize("form", FILES)
@pytest.mark.parametrize(("name", "which"), CASES)
def test_there_and_back_to_the_bit(trained, tmp_path, name, which, form):
    folder, _ = trained(name, which)
    convert(folder, tmp_path / "there", form)
    convert(tmp_path / "there", tmp_path / "back", "diffusers")
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    convert(tmp_path / "there", tmp_path / "peft", "peft")
    for file in (folder / "peft").iterdir():
        assert (tmp_path / "peft" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("targets", [["attn.to_q", "attn.to_v"], ["attn.to_k", "proj_mlp"], ["proj_mlp"], ["add_v_proj"]])
def test_some_of_a_fused_layers_parts(load, tmp_path, targets, dtype):
    """What is not trained is zero rows, and no layer of its own on the way back; dtypes stay, with the scale in as well."""
    backbone = load("flux")
    train(backbone, targets, 4, 6.0)
    state = {k: v.to(dtype) for k, v in get_peft_model_state_dict(backbone.transformer).items()}
    backbone.save_lora(tmp_path / "lora", state)
    saved = load_file(tmp_path / "lora" / WEIGHTS)
    for key, value in state.items():
        expected = value if "lora_A" in key else (1.5 * value.double()).to(dtype)
        assert saved[f"transformer.{key}"].dtype == dtype and torch.equal(saved[f"transformer.{key}"], expected)
    there = convert(tmp_path / "lora", tmp_path / "there", "kohya")
    assert all(value.dtype == (torch.float32 if "alpha" in key else dtype) for key, value in there.items())
    back = convert(tmp_path / "there", tmp_path / "back", "diffusers")
    assert back.keys() == saved.keys() and len(back) == len(state)
    assert all(back[key].dtype == dtype and torch.equal(back[key], value) for key, value in saved.items())


@pytest.mark.parametrize("form", ["kohya", "comfyui"])
@pytest.mark.parametrize(
    ("name", "targets"), [("flux2", None), ("qwen-edit-plus", None), ("flux", ["add_q_proj", "to_add_out"])]
)
def test_diffusers_reads_these_forms_alike(load, tmp_path, name, targets, form):
    """Where its converters are right; of FLUX.1's single blocks at full size alone."""
    backbone = load(name)
    expected = train(backbone, targets, 6, 9.0)
    backbone.save_lora(tmp_path / "lora")
    convert(tmp_path / "lora", tmp_path / "out", form)
    other = load(name)
    other.pipeline.load_lora_weights(tmp_path / "out" / FILES[form], adapter_name="it")
    check({k: v for k, v in updates(other.transformer, "it").items() if v.any()}, expected, form)


def test_a_single_block_of_full_size_is_what_kohyas_readers_take(tmp_path):
    generator = torch.Generator().manual_seed(0)
    width, layers = 3072, [f"single_transformer_blocks.7.attn.to_{x}" for x in "qkv"]
    state = {}
    for layer in layers:
        state[f"transformer.{layer}.lora_A.weight"] = torch.randn(2, width, generator=generator)
        state[f"transformer.{layer}.lora_B.weight"] = torch.randn(width, 2, generator=generator)
    save_file(state, tmp_path / "lora.safetensors")
    kohya = convert(tmp_path / "lora.safetensors", tmp_path / "out", "kohya")
    assert {key: list(value.shape) for key, value in kohya.items()} == {
        "lora_unet_single_blocks_7_linear1.lora_down.weight": [6, width],
        "lora_unet_single_blocks_7_linear1.lora_up.weight": [7 * width, 6],
        "lora_unet_single_blocks_7_linear1.alpha": [],
    }
    read = _convert_kohya_flux_lora_to_diffusers(dict(kohya))
    x = torch.randn(width, generator=generator)
    for layer in layers:
        here, there = (
            s[f"transformer.{layer}.lora_B.weight"] @ (s[f"transformer.{layer}.lora_A.weight"] @ x) for s in (state, read)
        )
        torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-3)
    assert not read["transformer.single_transformer_blocks.7.proj_mlp.lora_B.weight"].any()


def test_a_common_lora_a_is_kept_as_one(tmp_path):
    """As UNO's has: ranks do not grow, and UNO's file comes back."""
    lora = uno_lora()
    save_file(lora, tmp_path / "dit_lora.safetensors")
    for form in ("kohya", "comfyui", "diffusers", "peft"):
        state = convert(tmp_path / "dit_lora.safetensors", tmp_path / form, form)
        assert {v.shape[0] for k, v in state.items() if k.endswith((".lora_down.weight", "lora_A.weight"))} == {4}
        convert(tmp_path / form, tmp_path / f"{form}-uno", "uno")
        back = load_file(tmp_path / f"{form}-uno" / "dit_lora.safetensors")
        assert back.keys() == lora.keys() and all(torch.equal(back[k], v) for k, v in lora.items())


def test_blocks_are_found_whatever_their_ranks():
    generator = torch.Generator().manual_seed(0)

    def update(rank, outputs):
        return Update(torch.randn(rank, 8, generator=generator), torch.randn(outputs, rank, generator=generator))

    def same(found, expected):
        for one, other in zip(found, expected, strict=True):
            assert (one is None) == (other is None)
            assert one is None or (torch.equal(one.a, other.a) and torch.equal(one.b, other.b))

    rows = (1, 1, 1, 4)
    parts = [update(2, 6), update(3, 6), None, update(1, 24)]
    fused = fuse(parts, rows)
    assert fused.a.shape == (6, 8) and fused.b.shape == (42, 6)
    dense = torch.zeros(42, 8)
    for start, part in ((0, parts[0]), (6, parts[1]), (18, parts[3])):
        dense[start : start + part.b.shape[0]] = part.b @ part.a
    torch.testing.assert_close(fused.b @ fused.a, dense)
    same(split(fused, rows), parts)
    zero = [update(2, 6), Update(torch.randn(2, 8), torch.zeros(6, 2)), update(2, 6), update(2, 24)]
    same(split(fuse(zero, rows), rows), zero)  # a layer that never learned, among others that did
    common = torch.randn(3, 8)
    one = [Update(common, torch.randn(6, 3)), Update(common, torch.zeros(6, 3)), Update(common, torch.randn(6, 3)), None]
    same(split(fuse(one, rows), rows), one)
    with pytest.raises(ValueError, match="cannot stand in one layer"):
        fuse([update(2, 6), update(2, 5)], (1, 1))
    with pytest.raises(ValueError, match="7 outputs cannot be divided"):
        split(update(2, 7), (1, 1, 1))


def old_file(backbone, folder):
    """As this project saved it before: matrices as trained, alpha in the metadata alone, and layers in a set's order."""
    transformer = backbone.transformer
    backbone.pipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict() | {"lora_dropout": 0.0},
    )


@pytest.mark.parametrize("name", NAMES)
def test_old_files_are_still_read_at_their_strength(load, tmp_path, name):
    backbone = load(name)
    expected = train(backbone, None, 5, 7.0)
    old_file(backbone, tmp_path / "old")
    wrong = plain(load_file(tmp_path / "old" / WEIGHTS), "transformer.")
    assert not torch.allclose(next(iter(wrong.values())), expected[next(iter(wrong))], rtol=0.1)
    check(plain(convert(tmp_path / "old", tmp_path / "new", "diffusers"), "transformer."), expected)
    check(merged(load(name), tmp_path / "old"), expected)


def merged(backbone, path, scale=1.0):
    before = {name: value.double().clone() for name, value in backbone.transformer.state_dict().items()}
    merge_base_lora(backbone.pipeline, str(path), scale)
    after = backbone.transformer.state_dict()
    changes = {
        name: after[name].double() - value for name, value in before.items() if not torch.equal(after[name].double(), value)
    }
    return {name.removesuffix(".weight"): value for name, value in changes.items()}


@pytest.mark.parametrize("form", FILES)
@pytest.mark.parametrize("name", NAMES)
def test_a_base_lora_of_any_form(load, trained, tmp_path, name, form):
    folder, expected = trained(name, "all")
    convert(folder, tmp_path / "out", form)
    check(merged(load(name), tmp_path / "out", 0.5), {name: 0.5 * value for name, value in expected.items()})


def test_peft_says_ranks_and_alphas_by_layer(load, tmp_path):
    """Its patterns and rslora, as PEFT itself applies them."""
    backbone = load("flux")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q", "to_out.0", "proj_out"],
        rank_pattern={"attn.to_q": 3, "^proj_out": 2},  # the last layer's, not the single blocks'
        alpha_pattern={r"single_transformer_blocks\.1\.attn\.to_q": 5},
        use_rslora=True,
        init_lora_weights=False,
    )
    model = peft.get_peft_model(backbone.transformer, config)
    model.save_pretrained(tmp_path / "adapter")
    expected = updates(model.base_model.model)
    scales = {m.scaling["default"] for m in model.modules() if isinstance(m, LoraLayer)}
    assert scales == {6 / 4**0.5, 6 / 3**0.5, 5 / 3**0.5, 6 / 2**0.5}
    check(merged(load("flux"), tmp_path / "adapter"), expected)
    check(plain(convert(tmp_path / "adapter", tmp_path / "out", "diffusers"), "transformer."), expected)
    back = load("flux")
    back.pipeline.load_lora_weights(tmp_path / "out", adapter_name="back")
    check(updates(back.transformer, "back"), expected)
    convert(tmp_path / "adapter", tmp_path / "peft", "peft")
    check(updates(PeftModel.from_pretrained(load("flux").transformer, str(tmp_path / "peft")).base_model.model), expected)


SAVE = """
import sys, torch
from pathlib import Path
from focusdpo.models import BACKBONES
from focusdpo.training.adapter import add_adapter
from focusdpo.training.config import LoraConfig
backbone = BACKBONES["flux"].from_pretrained(sys.argv[1], dtype=torch.float32, parts="transformer")
add_adapter(backbone, LoraConfig(rank=4, alpha=6, target_modules=["to_q", "to_k", "to_v", "proj_out", "add_q_proj"]), seed=0)
backbone.save_lora(Path(sys.argv[2]))
"""


def test_the_same_bytes_in_every_process_and_the_usual_mode(models, tmp_path):
    contents = set()
    for seed in range(3):
        folder = tmp_path / str(seed)
        environment = os.environ | {"PYTHONHASHSEED": str(seed)}
        subprocess.run([sys.executable, "-c", SAVE, str(models["flux"]), str(folder)], env=environment, check=True)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        assert [str(path.relative_to(folder)) for path in files] == [
            "peft/adapter_config.json",
            "peft/adapter_model.safetensors",
            WEIGHTS,
        ]
        contents.add(tuple(path.read_bytes() for path in files))
        (folder / "other").write_text("")
        assert {path.stat().st_mode for path in files} == {(folder / "other").stat().st_mode}
    assert len(contents) == 1


def test_a_run_that_diverged_is_saved_all_the_same(load, tmp_path):
    """Nothing of a run may be lost at its end; reading it is refused."""
    backbone = load("flux")
    train(backbone, None, 4, 8.0)
    state = get_peft_model_state_dict(backbone.transformer)
    name = "transformer_blocks.0.attn.to_q.lora_B.weight"
    state[name] = torch.full_like(state[name], float("nan"))
    backbone.save_lora(tmp_path / "lora", state)
    assert load_file(tmp_path / "lora" / WEIGHTS)[f"transformer.{name}"].isnan().all()
    with pytest.raises(SystemExit, match=f"transformer.{name}: 256 of its values are NaN"):
        convert(tmp_path / "lora", tmp_path / "out", "kohya")


def test_which_model_is_asked_for_only_where_names_cannot_tell(load, trained, tmp_path):
    state = load_file(trained("qwen-edit-plus", "default")[0] / WEIGHTS)
    file = tmp_path / "lora.safetensors"
    save_file(state, file)  # without metadata
    convert(file, tmp_path / "peft", "peft")
    with pytest.raises(
        SystemExit, match=r"layers are of FLUX.1 and of FLUX.2 and of Qwen-Image, .*--backbone: flux or flux2 or qwen"
    ):
        convert(file, tmp_path / "kohya", "kohya")
    assert not (tmp_path / "kohya").exists()
    qwen = convert(file, tmp_path / "kohya", "kohya", "--backbone", "qwen-edit-plus")
    assert "lora_unet_transformer_blocks_0_attn_to_q.alpha" in qwen
    flux = convert(file, tmp_path / "flux", "kohya", "--backbone", "kontext")
    assert "lora_unet_double_blocks_0_img_attn_qkv.alpha" in flux
    # Its 60 blocks are more than the others have.
    save_file({k.replace("blocks.1.", "blocks.59."): v for k, v in state.items()}, file)
    assert "lora_unet_transformer_blocks_59_attn_to_q.alpha" in convert(file, tmp_path / "many", "kohya")
    with pytest.raises(SystemExit, match="it is for Qwen-Image, but backbone 'flux2' is FLUX.2"):
        convert(file, tmp_path / "no", "kohya", "--backbone", "flux2")
    # FLUX.1 and FLUX.2 share original names, and are told apart by shape.
    for name in ("flux", "flux2"):
        convert(trained(name, "default")[0], tmp_path / f"{name}-kohya", "kohya")
        save_file(load_file(tmp_path / f"{name}-kohya" / FILES["kohya"]), file)
        back = convert(file, tmp_path / f"{name}-back", "diffusers")
        assert back.keys() == load_file(trained(name, "default")[0] / WEIGHTS).keys()
    embedder = {f"lora_unet_time_in_in_layer.lora_{side}.weight": torch.ones(4, 4) for side in ("down", "up")}
    save_file(embedder, file)
    with pytest.raises(
        SystemExit, match="FLUX.1 or FLUX.2 has such names, for different layers; say which with --backbone: flux or flux2"
    ):
        convert(file, tmp_path / "time", "diffusers")
    assert "transformer.time_guidance_embed.timestep_embedder.linear_1.lora_A.weight" in convert(
        file, tmp_path / "time", "diffusers", "--backbone", "flux2"
    )


def test_only_what_the_program_wrote_is_overwritten(trained, tmp_path):
    folder, out = trained("flux", "default")[0], tmp_path / "out"
    convert(folder, out, "peft")
    with pytest.raises(SystemExit, match="out_dir: .* holds an earlier run .*; replace it with --overwrite true"):
        convert(folder, out, "peft")
    convert(folder, out, "peft", "--overwrite", "true")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "adapter_config.json").write_text("precious")
    with pytest.raises(SystemExit, match="which this command did not write"):
        convert(folder, tmp_path / "mine", "peft", "--overwrite", "true")
    assert (tmp_path / "mine" / "adapter_config.json").read_text() == "precious"


def test_a_lora_of_another_backbone_is_seen_before_the_model_is_loaded(trained):
    read_lora("model.base_lora", str(trained("flux", "default")[0]), "kontext")
    with pytest.raises(ValueError, match="it is for FLUX.2, but backbone 'flux' is FLUX.1"):
        read_lora("model.base_lora", str(trained("flux2", "default")[0]), "flux")


def test_the_base_loras_checksum_has_pefts_settings(trained, tmp_path):
    folder = trained("flux", "default")[0]
    convert(folder, tmp_path / "peft", "peft")
    before = lora_checksum(NAME, str(tmp_path / "peft"))
    config = tmp_path / "peft" / "adapter_config.json"
    config.write_text(re.sub('"lora_alpha": 4', '"lora_alpha": 2', config.read_text()))
    assert lora_checksum(NAME, str(tmp_path / "peft")) != before
    # Beside a LoRA that is not PEFT's it is somebody else's.
    convert(folder, tmp_path / "both", "diffusers")
    before = lora_checksum(NAME, str(tmp_path / "both"))
    (tmp_path / "both" / "adapter_config.json").write_text(config.read_text())
    assert lora_checksum(NAME, str(tmp_path / "both")) == before


def test_a_models_own_file_has_its_strength(trained, tmp_path):
    """diffusers' `save_lora_adapter` writes its settings without a prefix."""
    backbone = BACKBONES["flux"].from_pretrained(str(write_tiny_flux(tmp_path / "model")), dtype=torch.float32)
    for parameter in add_adapter(backbone, LoraConfig(rank=4, alpha=12), seed=0):
        nn.init.normal_(parameter, std=0.1)
    backbone.transformer.save_lora_adapter(tmp_path / "own", adapter_name="default")
    lora = read_lora("source", str(tmp_path / "own"))
    assert len(lora.layers) > 8 and {update.scale for update in lora.layers.values()} == {3.0}


def test_alphas_that_agree_to_rounding(tmp_path):
    """As a tensor in fp32, and as a number in the metadata."""
    stem = "transformer.transformer_blocks.0.attn.to_q"
    state = {
        f"{stem}.lora_A.weight": torch.ones(4, 8),
        f"{stem}.lora_B.weight": torch.ones(8, 4),
        f"{stem}.alpha": torch.tensor(0.1),
    }
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 0.1})}
    save_file(state, tmp_path / "lora.safetensors", metadata)
    (update,) = read_lora("source", str(tmp_path / "lora.safetensors")).layers.values()
    assert update.scale == pytest.approx(0.025)


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_half_precision_survives_a_small_scale(tmp_path, to):
    """Alpha 1 at rank 128 would take most of lora_B to fp16's subnormal numbers."""
    stem, generator = "lora_unet_double_blocks_0_img_attn_qkv", torch.Generator().manual_seed(0)
    a, b = torch.randn(128, 64, generator=generator).half(), (1e-4 * torch.randn(192, 128, generator=generator)).half()
    state = {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b, f"{stem}.alpha": torch.tensor(1.0)}
    save_file(state, tmp_path / "lora.safetensors")
    convert(tmp_path / "lora.safetensors", tmp_path / "out", to, "--backbone", "flux")
    layers = read_lora("source", str(tmp_path / "out"), "flux").layers
    names = [f"transformer_blocks.0.attn.to_{side}" for side in "qkv"]
    found = torch.cat([layers[name].scale * layers[name].b.double() @ layers[name].a.double() for name in names])
    expected = b.double() @ a.double() / 128
    assert (found - expected).norm() < 1e-6 * expected.norm()
