"""The FLUX.2 backbone on tiny checkpoints in the real format, against the pipelines themselves."""

from __future__ import annotations

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from safetensors.torch import load_file
from torch.utils.checkpoint import set_checkpoint_early_stop

from focusdpo.models import Flux2, PromptEmbeddings, TokenLayout
from focusdpo.models.flux2 import position_ids
from focusdpo.training.adapter import add_adapter
from focusdpo.training.config import LoraConfig, ModelConfig
from focusdpo_kernels import cross_layer_similarity
from tests.backbones import (
    check_first_step,
    check_saved_lora,
    check_training_run,
    image_streams,
    photos,
    recorded_call,
    tapped_scores,
)
from tests.tiny_flux2 import write_tiny_flux2

TEXT = 24  # tokens
LAYOUT = TokenLayout((4, 6), ((2, 3), (3, 2)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux2")
    return {kind: write_tiny_flux2(folder / kind, klein=kind == "klein") for kind in ("klein", "dev")}


@pytest.fixture
def load(folders):
    def load(kind, dtype=torch.float32):
        return Flux2.from_pretrained(str(folders[kind]), dtype=dtype, guidance=2.5, max_sequence_length=TEXT)

    return load


@pytest.fixture
def backbone(load):
    return load("klein")


def inputs(batch=2, layout=LAYOUT):
    return (
        torch.randn(batch, layout.num_target, 16),
        torch.rand(batch),
        PromptEmbeddings({"prompt_embeds": torch.randn(batch, TEXT, 48)}),
        torch.randn(batch, layout.num_reference, 16),
        layout,
    )


def test_position_ids():
    expected = [(0, row, column, 0) for row in range(4) for column in range(6)]
    expected += [(10, row, column, 0) for row in range(2) for column in range(3)]
    expected += [(20, row, column, 0) for row in range(3) for column in range(2)]
    assert list(map(tuple, position_ids(LAYOUT).tolist())) == expected


@pytest.mark.parametrize("sizes", [[], [(96, 64)], [(64, 80), (96, 64), (64, 64)]], ids=len)
@pytest.mark.parametrize(
    ("kind", "dtype"), [("klein", torch.float32), ("dev", torch.float32), ("dev", torch.bfloat16)], ids=str
)
def test_it_is_the_pipelines_own_step(load, kind, dtype, sizes):
    """One denoising step of the pipeline, whose transformer call is recorded, and the same from pixels and prompt."""
    backbone = load(kind, dtype)
    assert isinstance(backbone.pipeline, {"klein": Flux2KleinPipeline, "dev": Flux2Pipeline}[kind])
    images, pixels = photos(*sizes)
    theirs = recorded_call(
        backbone.transformer,
        lambda: backbone.pipeline(
            image=images or None,
            prompt="a cat and a cup",
            height=64,
            width=96,
            sigmas=[0.6],
            num_inference_steps=1,
            guidance_scale=2.5 if kind == "dev" else 1.0,  # klein has none: more than 1 would be a second call
            max_sequence_length=TEXT,
            output_type="latent",
        ),
    )
    layout = TokenLayout((4, 6), tuple((height // 16, width // 16) for height, width in sizes))
    references = [torch.zeros(1, 0, 16), *(backbone.encode_images(image) for image in pixels)]
    ours = recorded_call(
        backbone.transformer,
        lambda: backbone.predict(
            theirs["hidden_states"][:, :24],
            theirs["timestep"],
            backbone.encode_prompts(["a cat and a cup"]),
            torch.cat([part.to(dtype) for part in references], dim=1),
            layout,
        ),
    )
    assert theirs["timestep"].item() == pytest.approx(0.6, rel=1e-2)
    for name in ("hidden_states", "encoder_hidden_states", "timestep", "output"):
        torch.testing.assert_close(ours[name], theirs[name], msg=lambda text, name=name: f"{name}: {text}")
    for name in ("img_ids", "txt_ids"):
        assert torch.equal(ours[name], theirs[name][0]), name
    assert torch.equal(ours["result"], ours["output"][:, :24])
    if kind == "dev":
        assert ours["guidance"].tolist() == theirs["guidance"].tolist() == [2.5]
    else:
        assert ours["guidance"] is None and theirs["guidance"] is None


def test_images_to_tokens_and_back(backbone):
    images = torch.rand(2, 3, 64, 96)
    tokens = backbone.encode_images(images)
    assert tokens.shape == (2, 24, 16)
    pipeline, vae = backbone.pipeline, backbone.pipeline.vae
    for image, mine in zip(images, tokens, strict=True):
        theirs, _ = pipeline.prepare_image_latents([image[None] * 2 - 1], 1, None, "cpu", torch.float32)
        torch.testing.assert_close(mine, theirs[0])
    latents = vae.encode(images * 2 - 1).latent_dist.mode()  # [2, 4, 8, 12]
    patch = latents[1, :, 4:6, 2:4].reshape(-1)  # row 2, column 1 of the grid
    expected = (patch - vae.bn.running_mean) / (vae.bn.running_var + 1e-4).sqrt()
    torch.testing.assert_close(tokens[1, 2 * 6 + 1], expected)
    decoded = backbone.decode_images(tokens, (4, 6))
    torch.testing.assert_close(decoded, ((vae.decode(latents).sample + 1) / 2).clamp(0, 1))


@pytest.mark.parametrize("kind", ["klein", "dev"])
def test_prompts(load, kind):
    backbone = load(kind)
    both = backbone.encode_prompts(["a cat", "two dogs"]).tensors["prompt_embeds"]
    assert both.shape == (2, TEXT, 48) and not torch.allclose(both[0], both[1])
    torch.testing.assert_close(both[1:], backbone.encode_prompts(["two dogs"]).tensors["prompt_embeds"])


def test_prompts_of_another_length_are_refused(backbone):
    noisy, t, prompts, references, layout = inputs()
    short = PromptEmbeddings({"prompt_embeds": prompts.tensors["prompt_embeds"][:, 1:]})
    with pytest.raises(ValueError, match="prompts: got 23 text tokens; expected max_sequence_length=24, to which"):
        backbone.predict(noisy, t, short, references, layout)


def test_another_pipeline_is_refused(tiny_flux):
    message = "holds a FluxPipeline; backbone 'flux2' takes Flux2Pipeline or Flux2KleinPipeline"
    with pytest.raises(ValueError, match=message):
        Flux2.from_pretrained(str(tiny_flux), dtype=torch.float32)


def test_transformer_alone(backbone):
    arguments = inputs()
    alone = Flux2KleinPipeline(None, None, None, None, backbone.transformer.requires_grad_(True).train())
    prediction = Flux2(alone, guidance=1.0, max_sequence_length=TEXT).predict(*arguments)
    assert not prediction.requires_grad and not alone.transformer.training
    assert torch.equal(prediction, backbone.predict(*arguments))


def hidden_states(backbone, arguments):
    """Image streams after each block."""
    double, single = backbone.transformer.transformer_blocks, backbone.transformer.single_transformer_blocks
    streams = image_streams(backbone.transformer, [*double, *single], lambda: backbone.predict(*arguments))
    between = len(double) - 1
    # Single blocks are given the text in front; norm_out is given images alone.
    return [*streams[:between], *(stream[:, TEXT:] for stream in streams[between:-1]), streams[-1]]


@pytest.mark.parametrize("layers", [(1, 2), (2, 1)])
def test_taps(tmp_path, layers):
    folder = write_tiny_flux2(tmp_path, layers=layers)
    backbone = Flux2.from_pretrained(str(folder), dtype=torch.float32, max_sequence_length=TEXT)
    paths = [f"transformer_blocks.{i}" for i in range(layers[0])]
    paths += [f"single_transformer_blocks.{i}" for i in range(layers[1])]
    assert backbone.tap_paths() == paths and Flux2.count_tapped(folder) == 3
    outputs = []
    for path in paths:
        backbone.transformer.get_submodule(path).register_forward_hook(
            lambda module, args, output: outputs.append(backbone.image_tokens(output))
        )
    arguments = inputs()
    backbone.predict(*arguments)
    found = list(outputs)
    expected = hidden_states(backbone, arguments)
    assert [x.shape for x in found] == [(2, LAYOUT.num_target + LAYOUT.num_reference, 32)] * 3
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("run", ["eager", "checkpointed", "compiled"])
def test_similarity_of_the_taps(backbone, run):
    arguments = inputs()
    mask = torch.rand(2, 2, LAYOUT.num_reference) > 0.3
    layers = hidden_states(backbone, arguments)
    expected = cross_layer_similarity([h[:, :24] for h in layers], [h[:, 24:] for h in layers], mask)
    torch.testing.assert_close(tapped_scores(backbone, arguments, mask, run), expected, rtol=1e-5, atol=1e-6)


def test_recomputed_blocks_give_the_same_tokens(backbone):
    """The backward pass of one prediction recomputes its blocks after another prediction, of another layout, has run."""
    add_adapter(backbone, LoraConfig(rank=4, alpha=4), seed=0)
    backbone.transformer.enable_gradient_checkpointing()
    seen = {path: [] for path in backbone.tap_paths()}
    for path, tokens in seen.items():
        backbone.transformer.get_submodule(path).register_forward_hook(
            lambda module, args, output, tokens=tokens: tokens.append(backbone.image_tokens(output).detach())
        )
    with set_checkpoint_early_stop(False):  # a block that is cut short calls no hook
        first = backbone.predict(*inputs())
        backbone.predict(*inputs(layout=TokenLayout((2, 2), ((3, 5),))))
        first.sum().backward()
    for tokens in seen.values():
        assert len(tokens) == 3, "forward, the other forward, recomputed"
        assert tokens[1].shape == (2, 4 + 15, 32)
        assert torch.equal(tokens[2], tokens[0])


def test_lora_loads_into_the_pipeline_with_its_alpha(backbone, load, tmp_path):
    lora = LoraConfig(rank=4, alpha=16.0, target_modules=["to_q", "to_out.0", "to_qkv_mlp_proj"])
    check_saved_lora(backbone, lambda: load("klein"), inputs(), lora, tmp_path)


def test_every_block_is_adapted(backbone):
    """By default; `to_out` is a linear layer in single blocks and a list of modules in double ones."""
    add_adapter(backbone, LoraConfig(rank=4), seed=0)
    adapted = {name.split(".attn.")[0] for name, _ in backbone.transformer.named_parameters() if "lora_A" in name}
    assert adapted == set(backbone.tap_paths())


def test_a_target_that_is_not_linear_is_refused(backbone):
    with pytest.raises(ValueError) as error:
        add_adapter(backbone, LoraConfig(target_modules=["to_out"]), seed=0)
    assert str(error.value) == (
        "lora.target_modules: 'to_out' also names transformer_blocks.0.attn.to_out, a ModuleList; an adapter fits linear "
        "layers alone, so write more of the names that are meant, such as transformer_blocks.0.attn.to_out.0, "
        "single_transformer_blocks.0.attn.to_out, single_transformer_blocks.1.attn.to_out"
    )
    named = ["transformer_blocks.0.attn.to_out.0", "single_transformer_blocks.0.attn.to_out"]
    assert len(add_adapter(backbone, LoraConfig(target_modules=named), seed=0)) == 4


@pytest.mark.parametrize("kind", ["klein", "dev"])
def test_preference_step(load, kind, tiny_pairs):
    check_first_step(load(kind), tiny_pairs)


def test_training_run(folders, tiny_pairs, tmp_path):
    model = ModelConfig(path=str(folders["klein"]), backbone="flux2", dtype="fp32", max_sequence_length=TEXT)
    check_training_run(model, tiny_pairs, tmp_path / "run", target_modules=["to_q", "to_qkv_mlp_proj"])
    lora = load_file(tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors")
    assert len(lora) == 6 and all(value.any() for value in lora.values())
