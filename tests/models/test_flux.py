"""The FLUX.1 backbone on a tiny checkpoint in the real format."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxKontextPipeline, FluxPipeline

from focusdpo.models import Flux1, TokenLayout
from focusdpo.models.flux import position_ids
from focusdpo.models.tiny_flux import write_tiny_flux
from focusdpo.training.adapter import adapter_state, add_adapter, load_adapter_state, reference_model
from focusdpo.training.config import LoraConfig

LAYOUT = TokenLayout((4, 6), ((2, 3), (3, 2)))


@pytest.fixture
def backbone(tiny_flux):
    return Flux1.from_pretrained(str(tiny_flux), dtype=torch.float32, max_sequence_length=16)


def inputs(backbone, batch=2):
    return (
        torch.randn(batch, LAYOUT.num_target, 16),
        torch.rand(batch),
        backbone.encode_prompts(["a cat and a cup", "two dogs"][:batch]),
        torch.randn(batch, LAYOUT.num_reference, 16),
        LAYOUT,
    )


def test_attention_is_not_cudnns(tiny_flux):
    torch.backends.cuda.enable_cudnn_sdp(True)
    Flux1.from_pretrained(str(tiny_flux), dtype=torch.float32)
    assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()


def test_position_ids_are_unos():
    expected = [(0, row, column) for row in range(4) for column in range(6)]
    expected += [(0, 4 + row, 6 + column) for row in range(2) for column in range(3)]
    expected += [(0, 4 + 2 + row, 6 + 3 + column) for row in range(3) for column in range(2)]
    assert position_ids(LAYOUT).tolist() == [list(map(float, ids)) for ids in expected]


def test_images_to_tokens_and_back(backbone):
    images = torch.rand(2, 3, 64, 96)
    tokens = backbone.encode_images(images)
    assert tokens.shape == (2, 24, 16)
    vae = backbone.pipeline.vae
    latents = (vae.encode(images * 2 - 1).latent_dist.mode() - 0.0609) * 1.5035  # [2, 4, 8, 12]
    token = latents[1, :, 4:6, 2:4]  # row 2, column 1 of the grid
    torch.testing.assert_close(tokens[1, 2 * 6 + 1], token.reshape(-1))
    decoded = backbone.decode_images(tokens, (4, 6))
    expected = vae.decode(latents / 1.5035 + 0.0609).sample
    torch.testing.assert_close(decoded, ((expected + 1) / 2).clamp(0, 1))


def test_prediction_is_the_targets_part(backbone):
    noisy, t, prompts, references, layout = inputs(backbone)
    prediction = backbone.predict(noisy, t, prompts, references, layout)
    assert prediction.shape == noisy.shape
    whole = backbone.transformer(
        hidden_states=torch.cat([noisy, references], 1),
        encoder_hidden_states=prompts.tensors["prompt_embeds"],
        pooled_projections=prompts.tensors["pooled_prompt_embeds"],
        timestep=t,
        img_ids=position_ids(layout),
        txt_ids=torch.zeros(16, 3),
        guidance=torch.ones(2),
    ).sample
    assert torch.equal(prediction, whole[:, :24])
    moved = backbone.predict(noisy, t, prompts, references.flip(1), layout)
    assert not torch.allclose(prediction, moved), "the prediction looks at the references"


def test_without_references_it_is_the_pipelines_own_step(backbone):
    """One denoising step of FluxPipeline, whose transformer call is recorded."""
    recorded = {}
    handle = backbone.transformer.register_forward_hook(
        lambda module, args, kwargs, output: recorded.update(kwargs, output=output[0]), with_kwargs=True
    )
    backbone.pipeline(
        "a cat", height=64, width=96, num_inference_steps=1, guidance_scale=1.0, max_sequence_length=16, output_type="latent"
    )
    handle.remove()
    layout = TokenLayout((4, 6), ())
    prediction = backbone.predict(
        recorded["hidden_states"], recorded["timestep"], backbone.encode_prompts(["a cat"]), torch.zeros(1, 0, 16), layout
    )
    torch.testing.assert_close(prediction, recorded["output"])


def test_taps(backbone):
    assert backbone.tap_paths() == [
        "transformer_blocks.0",
        "transformer_blocks.1",
        "single_transformer_blocks.0",
        "single_transformer_blocks.1",
    ]
    outputs = {}
    for path in backbone.tap_paths():
        backbone.transformer.get_submodule(path).register_forward_hook(
            lambda module, args, output, path=path: outputs.update({path: backbone.image_tokens(output)})
        )
    backbone.predict(*inputs(backbone))
    assert [x.shape for x in outputs.values()] == [(2, LAYOUT.num_target + LAYOUT.num_reference, 64)] * 4


def test_kontext_folder(tmp_path):
    folder = write_tiny_flux(tmp_path / "kontext", kontext=True)
    backbone = Flux1.from_pretrained(str(folder), dtype=torch.bfloat16, max_sequence_length=16)
    assert isinstance(backbone.pipeline, FluxKontextPipeline) and backbone.dtype == torch.bfloat16
    assert backbone.predict(*inputs(backbone)).shape == (2, 24, 16)


def test_another_pipeline_is_refused(tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a DDPMPipeline; backbone 'flux' takes FluxPipeline or FluxKontextPipeline"):
        Flux1.from_pretrained(str(tmp_path), dtype=torch.float32)


def trained(backbone, alpha=16.0):
    """A backbone with an adapter that does something."""
    for parameter in add_adapter(backbone, LoraConfig(rank=4, alpha=alpha), seed=0):
        torch.nn.init.normal_(parameter, std=0.1)
    return backbone


def test_adapter_off_is_the_reference(backbone):
    arguments = inputs(backbone)
    base = backbone.predict(*arguments)
    add_adapter(backbone, LoraConfig(rank=4, alpha=16.0), seed=0)
    assert torch.equal(backbone.predict(*arguments), base), "a fresh adapter changes nothing"
    for parameter in backbone.transformer.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    policy = backbone.predict(*arguments)
    assert not torch.allclose(policy, base)
    with reference_model(backbone.transformer):
        assert torch.equal(backbone.predict(*arguments), base)
    with pytest.raises(RuntimeError, match="stop"), reference_model(backbone.transformer):
        raise RuntimeError("stop")
    assert torch.equal(backbone.predict(*arguments), policy), "the adapter is back on after an error"


def test_lora_loads_into_the_pipeline_with_its_alpha(backbone, tiny_flux, tmp_path):
    arguments = inputs(backbone)
    trained(backbone)
    expected = backbone.predict(*arguments)
    backbone.save_lora(tmp_path)
    pipeline = FluxPipeline.from_pretrained(tiny_flux)
    pipeline.load_lora_weights(tmp_path)
    loaded = Flux1(pipeline, guidance=1.0, max_sequence_length=16)
    torch.testing.assert_close(loaded.predict(*arguments), expected, rtol=0, atol=1e-6)


def test_adapter_state_round_trip(backbone, tiny_flux):
    state = {name: value.clone() for name, value in adapter_state(trained(backbone).transformer).items()}
    other = Flux1.from_pretrained(str(tiny_flux), dtype=torch.float32)
    add_adapter(other, LoraConfig(rank=4, alpha=16.0), seed=1)
    load_adapter_state(other.transformer, state)
    assert all(torch.equal(value, state[name]) for name, value in adapter_state(other.transformer).items())
    narrow = Flux1.from_pretrained(str(tiny_flux), dtype=torch.float32)
    add_adapter(narrow, LoraConfig(rank=2, alpha=16.0), seed=1)
    with pytest.raises(ValueError, match=r"lora_A.*use the run's lora.rank"):
        load_adapter_state(narrow.transformer, state)


def test_unknown_target_module(backbone):
    with pytest.raises(ValueError, match="lora.target_modules: the model has no linear layer 'to_z'; it has .*to_q"):
        add_adapter(backbone, LoraConfig(target_modules=["to_z"]), seed=0)
