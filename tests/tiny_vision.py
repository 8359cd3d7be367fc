"""Vision models of a few thousand random weights, written as real local folders; what they say means nothing."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    Dinov2Config,
    Dinov2Model,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoProcessor,
    PreTrainedTokenizerFast,
    SamConfig,
    SamModel,
    SamProcessor,
    SwinConfig,
    ViTConfig,
    ViTModel,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "[DEC]", "a", "cat", "cup", "dog", "of", "photo")


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def write(folder: Path, model: torch.nn.Module, processor) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_tiny_sam(folder: Path) -> Path:
    vision = {
        "hidden_size": 16,
        "output_channels": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 8,
        "num_pos_feats": 4,
        "mlp_dim": 16,
        "window_size": 0,
        "global_attn_indexes": [0],
    }
    prompt = {"hidden_size": 8, "image_size": 64, "patch_size": 8, "mask_input_channels": 4}
    decoder = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 16, "iou_head_hidden_dim": 8}
    model = SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder))
    images = SamImageProcessorPil(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})
    return write(folder, model, SamProcessor(images))


def write_tiny_detector(folder: Path) -> Path:
    backbone = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=2,
        out_features=["stage2", "stage3", "stage4"],
    )
    text = BertConfig(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config = GroundingDinoConfig(
        backbone_config=backbone,
        text_config=text,
        d_model=32,  # GroundingDINO normalises in 32 groups
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=10,
        num_feature_levels=4,
    )
    images = GroundingDinoImageProcessorPil(size={"shortest_edge": 128, "longest_edge": 128})
    return write(folder, GroundingDinoForObjectDetection(config), GroundingDinoProcessor(images, tokenizer()))


def write_tiny_captioner(folder: Path) -> Path:
    text = {
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "encoder_hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "bos_token_id": 7,
        "sep_token_id": 3,
        "eos_token_id": 3,
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=16))
    return write(folder, model, BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer()))


def write_tiny_features(folder: Path) -> Path:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "image_size": 32, "patch_size": 8}
    config = ViTConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    return write(folder, ViTModel(config), ViTImageProcessorPil(size={"height": 32, "width": 32}))


def write_tiny_clip(folder: Path) -> Path:
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    text = {**tower, **special, "vocab_size": len(WORDS), "max_position_embeddings": 12}
    config = CLIPConfig(text_config=text, vision_config={**tower, "image_size": 32, "patch_size": 8}, projection_dim=8)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return write(folder, CLIPModel(config), CLIPProcessor(images, tokenizer()))


def write_tiny_dinov2(folder: Path) -> Path:
    sizes = {"hidden_size": 16, "image_size": 28, "patch_size": 14, "mlp_ratio": 1}
    images = BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28})
    return write(folder, Dinov2Model(Dinov2Config(**sizes, num_hidden_layers=1, num_attention_heads=2)), images)
