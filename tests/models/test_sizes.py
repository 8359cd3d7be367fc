"""Parameters of what stands beside the released transformers: text encoders and VAE, built from the released configs."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import transformers
from torch import nn

from focusdpo.models.sizes import META, RELEASED, parameters


def flux1() -> list[nn.Module]:
    clip = transformers.CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
    )
    t5 = transformers.T5Config(
        d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, vocab_size=32128, feed_forward_proj="gated-gelu"
    )
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return [transformers.CLIPTextModel(clip), transformers.T5EncoderModel(t5), vae]


def flux2_dev() -> list[nn.Module]:
    text = {
        "model_type": "mistral",
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 131072,
        "tie_word_embeddings": False,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 1540,
        "patch_size": 14,
    }
    mistral = transformers.Mistral3Config(text_config=text, vision_config=vision, tie_word_embeddings=False)
    return [transformers.Mistral3ForConditionalGeneration(mistral), diffusers.AutoencoderKLFlux2()]


def klein(**sizes: Any) -> list[nn.Module]:
    qwen = transformers.Qwen3Config(
        num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=151936, **sizes
    )
    return [transformers.Qwen3ForCausalLM(qwen), diffusers.AutoencoderKLFlux2()]


def klein_4b() -> list[nn.Module]:
    return klein(hidden_size=2560, intermediate_size=9728, tie_word_embeddings=True)


def klein_9b() -> list[nn.Module]:
    return klein(hidden_size=4096, intermediate_size=12288, tie_word_embeddings=False)


def qwen_edit_plus() -> list[nn.Module]:
    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    }
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    qwen = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    return [transformers.Qwen2_5_VLForConditionalGeneration(qwen), diffusers.AutoencoderKLQwenImage()]


COMPANIONS = {
    "FLUX.1 dev": flux1,
    "FLUX.1 Kontext dev": flux1,
    "FLUX.2 dev": flux2_dev,
    "FLUX.2 klein 4B": klein_4b,
    "FLUX.2 klein 9B": klein_9b,
    "Qwen-Image-Edit 2509": qwen_edit_plus,
}


@pytest.mark.parametrize("name", RELEASED)
def test_companions_have_the_parameters_of_the_released_configs(name):
    with META:
        assert RELEASED[name].companions == parameters(*COMPANIONS[name]())
