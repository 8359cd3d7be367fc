"""What is no plain LoRA, or cannot be one, is refused by file and tensor: by convert-lora, and before a model is loaded."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from focusdpo.commands import cli
from focusdpo.models.lora_reading import read_lora
from tests.models.test_uno_lora import uno_lora

LAYER = "transformer.transformer_blocks.0.attn.to_q"
A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"
KOHYA = "lora_unet_double_blocks_0_img_attn_proj"


def pair(rank=4, a=None, b=None):
    return {A: torch.ones(rank, 64) if a is None else a, B: torch.ones(64, rank) if b is None else b}


def kohya(alpha):
    return {
        f"{KOHYA}.lora_down.weight": torch.ones(4, 64),
        f"{KOHYA}.lora_up.weight": torch.ones(64, 4),
        f"{KOHYA}.alpha": alpha,
    }


def settings(**changes):
    values = {"r": 4, "lora_alpha": 4} | changes
    return {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in values.items()})}


NAN, INF = float("nan"), float("inf")
BROKEN = {
    "NaN": (pair(b=torch.tensor([[NAN] * 4] * 64)), None, rf"{B}: 256 of its values are NaN or infinite"),
    "infinite": (pair(a=torch.full((4, 64), INF)), None, rf"{A}: 256 of its values are NaN or infinite"),
    "integers": (pair(a=torch.ones(4, 64, dtype=torch.int8)), None, rf"{A}: torch.int8; expected float32, bfloat16 or float16"),
    "too large": (
        pair(b=torch.full((64, 4), 1e5)),
        None,
        rf"{LAYER}: values of its update may reach 4e\+05; expected at most 65504",
    ),
    "no matrix": (
        {
            "lora_unet_double_blocks_0_img_mlp_0.lora_down.weight": torch.ones(4, 64),
            "lora_unet_double_blocks_0_img_mlp_0.lora_up.weight": torch.ones(()),
        },
        None,
        r"lora_A is \[4, 64\] and lora_B \[\]; expected \[rank, inputs\] and \[outputs, rank\]",
    ),
    "overflow": (pair(b=torch.full((64, 4), 3e38)), None, rf"{LAYER}: values of its update may reach inf"),
    "too large by alpha": (kohya(torch.tensor(1e9)), None, rf"{KOHYA}: values of its update may reach 1e\+09"),
    "too large for its dtype": (
        pair(a=torch.full((4, 64), 1e-4), b=torch.full((64, 4), 6e4, dtype=torch.float16)),
        settings(lora_alpha=8),
        rf"{LAYER}: with its scale 2 in lora_B, values are too large for torch.float16",
    ),
    "alpha NaN": (kohya(torch.tensor(NAN)), None, rf"{KOHYA}.alpha is nan; expected a positive finite number"),
    "alpha infinite": (kohya(torch.tensor(INF)), None, rf"{KOHYA}.alpha is inf"),
    "alpha 0": (kohya(torch.tensor(0)), None, rf"{KOHYA}.alpha is 0"),
    "alpha negative": (kohya(torch.tensor(-4.0)), None, rf"{KOHYA}.alpha is -4.0"),
    "alpha of many": (kohya(torch.ones(3)), None, rf"{KOHYA}.alpha: shape \[3\]; expected one number"),
    "ranks differ": (
        pair(b=torch.ones(64, 3)),
        None,
        rf"{LAYER}: lora_A is \[4, 64\] and lora_B \[64, 3\]; expected \[rank, inputs\]",
    ),
    "rank of the settings": (pair(), settings(r=8), "attn.to_q: its rank is 4, but the settings say 8"),
    "alpha of the settings": (
        pair(),
        settings(lora_alpha="much"),
        "lora_adapter_metadata: lora_alpha is much; expected a positive",
    ),
    "settings without r": (
        pair(),
        {"lora_adapter_metadata": '{"transformer.lora_alpha": 4}'},
        "lora_adapter_metadata has no r",
    ),
    "settings no JSON": (pair(), {"lora_adapter_metadata": "{"}, "its metadata lora_adapter_metadata is no JSON"),
    "settings a list": (pair(), {"lora_adapter_metadata": "[]"}, "lora_adapter_metadata is a list; expected an object"),
    "two alphas": (
        pair() | {f"{LAYER}.alpha": torch.tensor(2.0)},
        settings(),
        "makes its scale 0.5, but the settings make it 1",
    ),
    "dora in settings": (pair(), settings(use_dora=True), "use_dora is True, and a plain LoRA alone is taken"),
    "DoRA": (pair() | {f"{LAYER}.dora_scale": torch.ones(64)}, None, rf"it is a DoRA, .*\({LAYER}.dora_scale\)"),
    "DoRA of PEFT": (pair() | {f"{LAYER}.lora_magnitude_vector": torch.ones(64)}, None, "it is a DoRA"),
    "LoHa": ({"lora_unet_double_blocks_0_img_attn_qkv.hada_w1_a": torch.ones(4, 4)}, None, r"it is a LoHa \(lora_unet"),
    "LoKr": ({f"{LAYER}.lokr_w1": torch.ones(4, 4)}, None, "it is a LoKr"),
    "text encoder": (
        pair() | {"lora_te1_text_model_fc1.lora_up.weight": torch.ones(4, 4)},
        None,
        "it also updates a text encoder",
    ),
    "text encoder of diffusers": (
        pair() | {"text_encoder.x.lora_A.weight": torch.ones(4, 4)},
        None,
        "also updates a text encoder",
    ),
    "bias": (
        pair() | {f"{LAYER}.lora_B.bias": torch.ones(64)},
        None,
        rf"also updates biases or whole weights \({LAYER}.lora_B.bias\)",
    ),
    "one side": ({A: torch.ones(4, 64)}, None, rf"1 of 1 names are no pair of lora_A and lora_B: {A}"),
    "both spellings": (
        pair() | {f"{LAYER}.lora_up.weight": torch.ones(64, 4)},
        None,
        "1 of 3 names are no pair .*to_q.lora_up.weight",
    ),
    "two prefixes": (
        pair() | {k.replace("transformer.", "diffusion_model.", 1): v for k, v in pair().items()},
        None,
        "transformer_blocks.0.attn.to_q has another update already, under another name",
    ),
    "another model": (
        {k.replace(LAYER, "transformer.blocks.0.self_attn.q"): v for k, v in pair().items()},
        None,
        "2 of 2 names are no pair of matrices for a layer of FLUX.1 or FLUX.2 or Qwen-Image: .*is it for another model",
    ),
    "outputs no multiple": (
        {k.replace("attn_proj", "attn_qkv"): v for k, v in kohya(torch.tensor(4.0)).items()},
        None,
        "double_blocks_0_img_attn_qkv: 64 outputs cannot be divided as",
    ),
    "empty": ({}, None, "holds no LoRA, none of its names has 'lora' in it; it has nothing"),
    "no config": (
        {k.replace("transformer.", "base_model.model.", 1): v for k, v in pair().items()},
        None,
        "no adapter_config.json lies beside",
    ),
}


def refused(file, message, tmp_path):
    with pytest.raises(SystemExit, match=f"(?s)convert-lora: error: source: {file}.*{message}"):
        cli.main(["convert-lora", str(file), str(tmp_path / "out"), "--to", "kohya"])
    with pytest.raises(ValueError, match=f"(?s)model.base_lora: {file}.*{message}"):
        read_lora("model.base_lora", str(file), "flux")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_lora_is_refused_by_name(tmp_path, case):
    state, metadata, message = BROKEN[case]
    save_file(state, tmp_path / "lora.safetensors", metadata)
    refused(tmp_path / "lora.safetensors", message, tmp_path)


def test_places_that_cannot_be_are_refused(tmp_path):
    save_file(pair(), tmp_path / "lora.safetensors")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for source, out in (
        *(("lora.safetensors", out) for out in ("x" * 300, "loop/out", "loop", "lora.safetensors", "lora.safetensors/out")),
        ("", "out"),
        ("x" * 300, "out"),
    ):
        with pytest.raises(SystemExit, match="^focusdpo convert-lora: error: (source|out_dir): "):
            cli.main(["convert-lora", str(tmp_path / source) if source else "", str(tmp_path / out)])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["loop", "lora.safetensors"]


def test_a_folder_with_other_files_stays_somebody_elses(tmp_path):
    """Converted into it: what else is in it stays, whatever is overwritten later."""
    save_file(pair(), tmp_path / "lora.safetensors")
    mine = tmp_path / "mine"
    (mine / "lora").mkdir(parents=True)
    (mine / "lora" / "best.safetensors").write_text("precious")
    cli.main(["convert-lora", str(tmp_path / "lora.safetensors"), str(mine)])
    cli.main(["convert-lora", str(tmp_path / "lora.safetensors"), str(mine), "--overwrite", "true"])
    assert (mine / "lora" / "best.safetensors").read_text() == "precious"
    (mine / "pytorch_lora_weights.safetensors").write_text("trained meanwhile")
    with pytest.raises(SystemExit, match="which this command did not write, or which was changed since"):
        cli.main(["convert-lora", str(tmp_path / "lora.safetensors"), str(mine), "--overwrite", "true"])
    assert (mine / "pytorch_lora_weights.safetensors").read_text() == "trained meanwhile"


def test_damaged_files_are_refused(tmp_path):
    save_file(pair(), tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    file = tmp_path / "lora.safetensors"
    for content in (b"", whole[:7], whole[:100], whole[:-1], b"PK\x03\x04" + whole):
        file.write_bytes(content)
        refused(file, "is no safetensors file, or it is damaged", tmp_path)
    uno = uno_lora()
    uno["single_blocks.1.processor.proj_lora.down.weight"][0, 0] = NAN
    save_file(uno, file)
    refused(file, "single_blocks.1.processor.proj_lora.down.weight: 1 of its values are NaN", tmp_path)
    with pytest.raises(SystemExit, match="convert-uno: error: source: .*proj_lora.down.weight: 1 of its values are NaN"):
        cli.main(["convert-uno", str(file), str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "adapter_config.json is no JSON"),
        ("[" * 200000, "adapter_config.json is no JSON that can be read"),
        ('{"r": 4, "lora_alpha": 1%s}' % ("0" * 400), "lora_alpha is a number of 1329 bits; expected a positive finite number"),
        ('{"r": 4, "lora_alpha": 1%s}' % ("0" * 5000), "adapter_config.json is no JSON that can be read"),
        ('{"r": 4, "lora_alpha": 4, "alpha_pattern": {"(?i)to_q": 2}}', "in a pattern is no regular expression"),
        ('{"r": 4, "lora_alpha": 4, "rank_pattern": {"a{99999999999}": 2}}', "in a pattern is no regular expression"),
        ('{"r": 4, "lora_alpha": 4, "alora_invocation_tokens": [1]}', "alora_invocation_tokens is .1., and a plain LoRA alone"),
        ('{"r": 8, "lora_alpha": 4, "auto_mapping": {"base_model_class": ["A"]}}', "its rank is 4, but the settings say 8"),
        ("\xff", "adapter_config.json is no text in UTF-8"),
        ('{"r": 4}', "adapter_config.json has no lora_alpha"),
        ('{"r": 0, "lora_alpha": 4}', "r is 0; expected a whole number from 1 up"),
        ('{"r": 4, "lora_alpha": NaN}', "lora_alpha is nan; expected a positive finite number"),
        ('{"r": 4, "lora_alpha": 4, "peft_type": "LOHA"}', "peft_type is 'LOHA'; expected 'LORA'"),
        ('{"r": 4, "lora_alpha": 4, "rank_pattern": [1]}', "rank_pattern and alpha_pattern have to be objects"),
        ('{"r": 4, "lora_alpha": 4, "rank_pattern": {"to_q": 2.5}}', "rank_pattern, to_q is 2.5; expected a whole number"),
        ('{"r": 4, "lora_alpha": 4, "alpha_pattern": {"to_(": 2}}', "'to_\\(' in a pattern is no regular expression"),
        ('{"r": 4, "lora_alpha": 4, "init_lora_weights": "pissa_niter_4"}', "'pissa_niter_4', which changes the model's own"),
        ('{"r": 8, "lora_alpha": 4}', "transformer_blocks.0.attn.to_q: its rank is 4, but the settings say 8"),
    ],
)
def test_a_malformed_adapter_config_is_refused(tmp_path, text, message):
    save_file(
        {k.replace("transformer.", "base_model.model.", 1): v for k, v in pair().items()},
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_bytes(text.encode("latin-1"))
    refused(tmp_path / "adapter_model.safetensors", message, tmp_path)
