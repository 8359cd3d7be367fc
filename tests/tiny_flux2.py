"""A FLUX.2 checkpoint of a few ten thousand random weights, in the real format, for the tests.

It goes through the same `from_pretrained` as a real one; its images mean nothing.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)

WIDTH = 16  # of the text encoder
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "[IMG]")
QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Mistral's turns are lists of parts. The system's is left out: with a token per byte it would leave no room for the prompt.
MISTRAL_TEMPLATE = (
    "{% for m in messages if m.role == 'user' %}<|im_start|>{% for part in m.content %}{{ part.text }}{% endfor %}<|im_end|>"
    "{% endfor %}"
)


def write_tiny_flux2(
    folder: str | Path,
    *,
    seed: int = 0,
    layers: tuple[int, int] = (1, 2),
    klein: bool = True,
    text_width: int = WIDTH,
    latent_channels: int = 4,
) -> Path:
    """Writes a tiny random FLUX.2 pipeline.

    Dev's tokenizer stands alone, without the processor of a real one: that asks for torchvision, and text needs none of it.

    Args:
        folder: where to; created.
        seed: of the weights.
        layers: numbers of double and single blocks.
        klein: write a Flux2KleinPipeline; else a Flux2Pipeline, as of dev.
        text_width, latent_channels: widths of what text encoder and VAE give.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = _pipeline(layers, klein, text_width, latent_channels)
    pipeline.save_pretrained(folder)
    return Path(folder)


def _pipeline(layers: tuple[int, int], klein: bool, width: int, latent_channels: int) -> Flux2Pipeline | Flux2KleinPipeline:
    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4 * latent_channels,
        num_layers=layers[0],
        num_single_layers=layers[1],
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * width,  # three layers of the text encoder side by side
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=not klein,
    )
    # Four stages keep the real factor of 8 between pixels and latents.
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=1,
        sample_size=64,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    parts = {"scheduler": FlowMatchEulerDiscreteScheduler(), "vae": vae, "transformer": transformer}
    if klein:
        return Flux2KleinPipeline(text_encoder=_qwen3(width), tokenizer=_tokenizer(QWEN_TEMPLATE), **parts)
    return Flux2Pipeline(text_encoder=_mistral3(width), tokenizer=_tokenizer(MISTRAL_TEMPLATE), **parts)


def _vocabulary() -> list[str]:
    return [*SPECIAL_TOKENS, *sorted(ByteLevel.alphabet())]


def _tokenizer(template: str) -> Qwen2Tokenizer:
    vocabulary = {token: i for i, token in enumerate(_vocabulary())}
    return Qwen2Tokenizer(
        vocab=vocabulary, merges=[], extra_special_tokens=list(SPECIAL_TOKENS[1:]), chat_template=template, model_max_length=512
    )


def _decoder(layers: int, width: int) -> dict[str, int]:
    return {
        "vocab_size": len(_vocabulary()),
        "hidden_size": width,
        "intermediate_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 512,
    }


def _qwen3(width: int) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(**_decoder(27, width)))  # the pipeline reads layers 9, 18 and 27


def _mistral3(width: int) -> Mistral3ForConditionalGeneration:
    vision = PixtralVisionConfig(
        hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    text = MistralConfig(**_decoder(30, width))  # the pipeline reads layers 10, 20 and 30
    image_token = _vocabulary().index("[IMG]")
    return Mistral3ForConditionalGeneration(
        Mistral3Config(text_config=text, vision_config=vision, image_token_index=image_token)
    )
