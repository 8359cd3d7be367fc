"""A Qwen-Image-Edit-Plus checkpoint of a few hundred thousand random weights, in the real format, for the tests.

It goes through the same `from_pretrained` as a real one; its images mean nothing.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

WIDTH = 16  # of the text encoder
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tiny_qwen(folder: str | Path, *, seed: int = 0, layers: int = 2, zero_cond_t: bool = False) -> Path:
    """Writes a tiny random QwenImageEditPlusPipeline.

    The processor's part for videos is left out: it asks for torchvision, and the pipeline shows it no video.

    Args:
        folder: where to; created.
        seed: of the weights.
        layers: number of blocks.
        zero_cond_t: modulate the references as at time 0, as 2511 does and 2509 does not.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = _pipeline(layers, zero_cond_t)
    folder = Path(folder)
    pipeline.save_pretrained(folder)
    # The processor is written part by part: as a whole it cannot be made without torchvision.
    for part in (Qwen2VLImageProcessorPil(), pipeline.tokenizer):
        part.save_pretrained(folder / "processor")
    index = json.loads((folder / "model_index.json").read_text())
    index["processor"] = ["transformers", "Qwen2VLProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def _pipeline(layers: int, zero_cond_t: bool) -> QwenImageEditPlusPipeline:
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
        zero_cond_t=zero_cond_t,
    )
    # Three halvings, the real factor of 8 between pixels and latents.
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[-0.7571, -0.7089, -0.9113, 0.1075],
        latents_std=[2.8184, 1.4541, 2.3275, 2.6558],
    )
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *sorted(ByteLevel.alphabet())])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
        chat_template=TEMPLATE,
        model_max_length=4096,
    )
    return QwenImageEditPlusPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=_text_encoder(vocabulary),
        tokenizer=tokenizer,
        processor=None,
        transformer=transformer,
    )


def _text_encoder(vocabulary: dict[str, int]) -> Qwen2_5_VLForConditionalGeneration:
    text = {
        "vocab_size": len(vocabulary),
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    vision = {
        "depth": 2,
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [1],
    }
    tokens = {f"{name}_token_id": vocabulary[f"<|{name}|>"] for name in ("vision_start", "vision_end")}
    tokens |= {f"{name}_token_id": vocabulary[f"<|{name}_pad|>"] for name in ("image", "video")}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens))
