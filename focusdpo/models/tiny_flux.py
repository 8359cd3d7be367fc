"""A FLUX checkpoint of a few hundred thousand random weights, in the real format, for the demo and the tests.

It goes through the same `from_pretrained` as a real one; its images mean nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from focusdpo.foundation.packages import libraries_silenced

TRANSFORMER: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 16,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 4, 8),
    "guidance_embeds": True,
}
VAE: dict[str, Any] = {"block_out_channels": (8, 8, 8, 8), "latent_channels": 4, "norm_num_groups": 1}


def write_tiny_flux(folder: str | Path, *, seed: int = 0, layers: tuple[int, int] = (2, 2), kontext: bool = False) -> Path:
    """Writes a tiny random FLUX.1 pipeline.

    Args:
        folder: where to; created.
        seed: of the weights.
        layers: numbers of double and single blocks.
        kontext: write a FluxKontextPipeline instead of a FluxPipeline.
    """
    pipeline = build_flux(seed, transformer_config(layers), VAE, kontext=kontext)
    with libraries_silenced():  # saving imports DeepSpeed where it is installed
        pipeline.save_pretrained(folder)
    return Path(folder)


def transformer_config(layers: tuple[int, int] = (2, 2)) -> dict[str, Any]:
    """Arguments of the tiny FluxTransformer2DModel."""
    return {**TRANSFORMER, "num_layers": layers[0], "num_single_layers": layers[1]}


@torch.random.fork_rng()
def build_flux(
    seed: int, transformer: Mapping[str, Any], vae: Mapping[str, Any], words: Sequence[str] = (), kontext: bool = False
) -> FluxPipeline | FluxKontextPipeline:
    """A random FLUX.1 pipeline with text encoders of two layers.

    Args:
        seed: of the weights.
        transformer: arguments of FluxTransformer2DModel; text is 32 wide.
        vae: arguments of AutoencoderKL that decide its size.
        words: those that are one token; others are spelt.
        kontext: make a FluxKontextPipeline instead of a FluxPipeline.
    """
    torch.manual_seed(seed)
    flux = FluxTransformer2DModel(**transformer)
    # Four stages keep the real factor of 8 between pixels and latents.
    autoencoder = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5035,
        sample_size=64,
        **vae,
    )
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    clip_vocab = {
        token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)])
    }
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_vocab),
            hidden_size=32,
            intermediate_size=37,
            projection_dim=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    t5_vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in letters)]
    t5_vocab += [(f"▁{word}", -1.0) for word in words]
    t5 = T5EncoderModel(T5Config(vocab_size=len(t5_vocab), d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4))
    pipeline_class = FluxKontextPipeline if kontext else FluxPipeline
    return pipeline_class(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder,
        text_encoder=clip,
        tokenizer=CLIPTokenizer(vocab=clip_vocab, merges=[], model_max_length=77),
        text_encoder_2=t5,
        tokenizer_2=T5TokenizerFast(vocab=t5_vocab, extra_ids=0, model_max_length=512),
        transformer=flux,
    )
