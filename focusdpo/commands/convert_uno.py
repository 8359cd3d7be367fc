"""`focusdpo convert-uno`: UNO's LoRA to diffusers' format, and back."""

from __future__ import annotations

from collections.abc import Callable

from focusdpo.commands import convert_lora
from focusdpo.commands.config import ConvertLoraConfig, ConvertUnoConfig
from focusdpo.foundation.choices import LoraForm
from focusdpo.models.lora_reading import find_lora_file, lora_shapes
from focusdpo.models.uno_lora import is_uno


def prepare(config: ConvertUnoConfig) -> Callable[[], None]:
    """As `convert-lora`, from UNO's form to diffusers' or back; ValueError where the source is of another."""
    source = find_lora_file("source", config.source)
    if is_uno(lora_shapes("source", source)) == config.reverse:
        has, fix = (
            ("UNO's", "leave --reverse out") if config.reverse else ("another", "if it is diffusers', say --reverse true")
        )
        raise ValueError(f"source: {source} is in {has} format; {fix}")
    to: LoraForm = "uno" if config.reverse else "diffusers"
    return convert_lora.prepare(ConvertLoraConfig(config.source, config.out_dir, to, overwrite=config.overwrite))
