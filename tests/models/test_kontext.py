"""FLUX.1 Kontext with its own position ids on a tiny checkpoint in the real format, against the pipeline itself."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxKontextPipeline

from focusdpo.models import Flux1, Kontext, PromptEmbeddings, TokenLayout
from focusdpo.models.flux import kontext_position_ids, position_ids
from focusdpo.models.tiny_flux import write_tiny_flux
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

TEXT = 16  # tokens
LAYOUT = TokenLayout((4, 6), ((2, 3), (3, 2), (2, 2)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_flux(tmp_path_factory.mktemp("kontext") / "model", kontext=True)


@pytest.fixture
def load(folder):
    def load(dtype=torch.float32, backbone=Kontext):
        return backbone.from_pretrained(str(folder), dtype=dtype, guidance=2.5, max_sequence_length=TEXT)

    return load


@pytest.fixture
def backbone(load):
    return load()


def inputs(batch=2, layout=LAYOUT):
    prompts = {"prompt_embeds": torch.randn(batch, TEXT, 32), "pooled_prompt_embeds": torch.randn(batch, 32)}
    return (
        torch.randn(batch, layout.num_target, 16),
        torch.rand(batch),
        PromptEmbeddings(prompts),
        torch.randn(batch, layout.num_reference, 16),
        layout,
    )


def test_position_ids():
    expected = [(0, row, column) for row in range(4) for column in range(6)]
    expected += [(1, row, column) for row in range(2) for column in range(3)]
    # Below, so that 5 x 3 are covered; then on the right, where 7 x 3 would have been the other choice.
    expected += [(1, 2 + row, column) for row in range(3) for column in range(2)]
    expected += [(1, row, 3 + column) for row in range(2) for column in range(2)]
    assert list(map(tuple, kontext_position_ids(LAYOUT).tolist())) == expected


@pytest.mark.parametrize("layout", [((2, 2),) * 6, ((20, 13), (9, 20), (20, 20), (1, 30), (30, 1))], ids=len)
def test_references_never_share_a_position(layout):
    ids = kontext_position_ids(TokenLayout((4, 6), layout))
    assert len(ids.unique(dim=0)) == len(ids)


@pytest.mark.parametrize("size", [None, (64, 80), (96, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_the_pipelines_own_step(load, dtype, size):
    """One denoising step of the pipeline, whose transformer call is recorded, and the same from pixels and prompt."""
    backbone = load(dtype)
    images, pixels = photos(*[size] if size else [])
    theirs = recorded_call(
        backbone.transformer,
        lambda: backbone.pipeline(
            image=images[0] if images else None,
            prompt="a cat and a cup",
            height=64,
            width=96,
            max_area=64 * 96,
            sigmas=[0.6],
            num_inference_steps=1,
            guidance_scale=2.5,
            max_sequence_length=TEXT,
            output_type="latent",
            _auto_resize=False,
        ),
    )
    layout = TokenLayout((4, 6), tuple((image.shape[2] // 16, image.shape[3] // 16) for image in pixels))
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
    assert len(theirs["img_ids"]) == layout.num_target + layout.num_reference
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids", "output")
    for name in names:
        torch.testing.assert_close(
            ours[name], theirs[name], msg=lambda text, name=name: f"{name}: {text}", check_dtype="ids" not in name
        )
    assert ours["guidance"].tolist() == theirs["guidance"].tolist() == [2.5]
    assert torch.equal(ours["result"], ours["output"][:, :24])


def test_flux_keeps_unos_layout(load):
    arguments = inputs()
    kontext, uno = load(), load(backbone=Flux1)
    assert isinstance(uno.pipeline, FluxKontextPipeline)
    calls = [recorded_call(model.transformer, lambda model=model: model.predict(*arguments)) for model in (kontext, uno)]
    assert torch.equal(calls[0]["img_ids"], kontext_position_ids(LAYOUT))
    assert torch.equal(calls[1]["img_ids"], position_ids(LAYOUT))
    assert not torch.allclose(calls[0]["output"], calls[1]["output"], rtol=0, atol=1e-4)


def test_images_to_tokens_and_back(backbone):
    images = torch.rand(2, 3, 64, 96)
    tokens = backbone.encode_images(images)
    pipeline, vae = backbone.pipeline, backbone.pipeline.vae
    _, theirs, _, _ = pipeline.prepare_latents(images * 2 - 1, 2, 4, 64, 96, torch.float32, "cpu", None)
    torch.testing.assert_close(tokens, theirs)
    decoded = backbone.decode_images(tokens, (4, 6))
    expected = vae.decode(vae.encode(images * 2 - 1).latent_dist.mode()).sample
    torch.testing.assert_close(decoded, ((expected + 1) / 2).clamp(0, 1))


def test_another_pipeline_is_refused(tiny_flux):
    with pytest.raises(ValueError, match="holds a FluxPipeline; backbone 'kontext' takes FluxKontextPipeline"):
        Kontext.from_pretrained(str(tiny_flux), dtype=torch.float32)


@pytest.mark.parametrize("run", ["eager", "checkpointed"])
def test_taps(backbone, run):
    arguments = inputs()
    mask = torch.rand(2, 3, LAYOUT.num_reference) > 0.3
    transformer = backbone.transformer
    blocks = [transformer.get_submodule(path) for path in backbone.tap_paths()]
    assert blocks == [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    layers = image_streams(transformer, blocks, lambda: backbone.predict(*arguments))
    assert [x.shape for x in layers] == [(2, LAYOUT.num_target + LAYOUT.num_reference, 64)] * 4
    expected = cross_layer_similarity([h[:, :24] for h in layers], [h[:, 24:] for h in layers], mask)
    torch.testing.assert_close(tapped_scores(backbone, arguments, mask, run), expected, rtol=1e-5, atol=1e-6)


def test_lora_loads_into_the_pipeline_with_its_alpha(backbone, load, tmp_path):
    check_saved_lora(backbone, load, inputs(), LoraConfig(rank=4, alpha=16.0), tmp_path)


def test_preference_step(backbone, tiny_pairs):
    check_first_step(backbone, tiny_pairs)


def test_training_run(folder, tiny_pairs, tmp_path):
    model = ModelConfig(path=str(folder), backbone="kontext", dtype="fp32", max_sequence_length=TEXT)
    assert type(check_training_run(model, tiny_pairs, tmp_path / "run")) is Kontext
