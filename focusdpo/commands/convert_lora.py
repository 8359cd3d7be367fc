"""`focusdpo convert-lora`: a LoRA from any form that tools know to any other; `convert-uno`, the same for UNO's alone."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

logger = logging.getLogger(__name__)


@dataclass
class ConvertLoraConfig:
    """A LoRA of FLUX.1, FLUX.2 or Qwen-Image, and where the converted one goes.

    Its strength is multiplied into its weights: every tool applies it at scale 1.

    Args:
        source: The LoRA, a file or its folder, in any of the forms below; which one is seen from its names.
        out_dir: Folder for the converted one: pytorch_lora_weights.safetensors (diffusers), adapter_config.json and
            adapter_model.safetensors (peft), lora_comfyui.safetensors, lora_kohya.safetensors, or dit_lora.safetensors (uno).
        to: The form to convert to; kohya is that of sd-scripts and, for FLUX.2 and Qwen-Image, of musubi-tuner.
        backbone: What the LoRA is for, where its names fit several models that differ in the form.
        overwrite: Replace what an earlier conversion left in out_dir.
    """

    source: str
    out_dir: str
    to: Literal["diffusers", "peft", "comfyui", "kohya", "uno"] = "diffusers"
    backbone: Literal["flux", "kontext", "flux2", "qwen-edit-plus"] | None = None
    overwrite: bool = False


@dataclass
class ConvertUnoConfig:
    """UNO's LoRA and where the converted one goes.

    Args:
        source: UNO's LoRA, its dit_lora.safetensors; with reverse a LoRA in diffusers' format, a file or its folder.
        out_dir: Folder for pytorch_lora_weights.safetensors, which diffusers loads; with reverse for dit_lora.safetensors.
        reverse: Convert from diffusers' format to UNO's.
        overwrite: Replace what an earlier conversion left in out_dir.
    """

    source: str
    out_dir: str
    reverse: bool = False
    overwrite: bool = False


def prepare_conversion(config: ConvertLoraConfig) -> Callable[[], None]:
    """Converts in memory, and returns what writes the files.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it cannot be converted.
        FileExistsError, NotADirectoryError: the folder holds something that may not be replaced.
    """
    # Imports diffusers: seconds that --help need not wait for.
    from focusdpo.foundation.files import write_bytes
    from focusdpo.foundation.output_folder import OutputFolder
    from focusdpo.models.lora_reading import find_lora_file, read_lora
    from focusdpo.models.lora_writing import FILES, lora_files

    source, folder = find_lora_file("source", config.source), Path(config.out_dir)
    out = OutputFolder("out_dir", folder, f"convert-lora {config.to}", [re.escape(name) for name in FILES[config.to]])
    out.check(config.overwrite or out.is_unfinished, "replace it with --overwrite true, or name another folder")
    lora = read_lora("source", config.source, config.backbone)
    try:
        files = lora_files(lora, config.to)
    except ValueError as error:
        raise ValueError(f"source: {source}: {error}") from error

    def write() -> None:
        out.begin(clear=False)
        with out:
            for name, content in files.items():
                write_bytes(folder / name, content)
                logger.info("wrote %s", folder / name)

    return write


def prepare_uno_conversion(config: ConvertUnoConfig) -> Callable[[], None]:
    """As `prepare_conversion`, from UNO's form to diffusers' or back; ValueError where the source is of another."""
    from focusdpo.models.lora_reading import find_lora_file, lora_shapes
    from focusdpo.models.uno_lora import is_uno

    source = find_lora_file("source", config.source)
    if is_uno(lora_shapes("source", source)) == config.reverse:
        has, fix = (
            ("UNO's", "leave --reverse out") if config.reverse else ("another", "if it is diffusers', say --reverse true")
        )
        raise ValueError(f"source: {source} is in {has} format; {fix}")
    to: Literal["uno", "diffusers"] = "uno" if config.reverse else "diffusers"
    return prepare_conversion(ConvertLoraConfig(config.source, config.out_dir, to, overwrite=config.overwrite))
