"""What PEFT's settings say of a LoRA's strength, in adapter_config.json or in the metadata of diffusers' file."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft.utils.other import get_pattern_key

CONFIG_FILE = "adapter_config.json"  # PEFT's name for it
PREFIX = "transformer."  # of the transformer's settings, and of its layers, in diffusers' files
# Others change the frozen weights as well when PEFT loads the adapter.
INITIALISATIONS = ("gaussian", "eva", "orthogonal")

Settings = Mapping[str, Any]


def metadata_settings(metadata: Mapping[str, str]) -> Settings | None:
    """The transformer's settings in the metadata of diffusers' file; None where there are none.

    Raises:
        ValueError: they are malformed, or no plain LoRA's.
    """
    text = metadata.get(LORA_ADAPTER_METADATA_KEY)
    if text is None:
        return None
    parsed = _parsed(text, f"its metadata {LORA_ADAPTER_METADATA_KEY}")
    # A model's own `save_lora_adapter` writes no prefix, as the file is of that model alone.
    settings = {key.removeprefix(PREFIX): value for key, value in parsed.items() if key.startswith(PREFIX)} or parsed
    _check(settings, f"its metadata {LORA_ADAPTER_METADATA_KEY}")
    return settings


def folder_settings(folder: Path) -> Settings:
    """Those of a PEFT adapter's folder.

    Raises:
        ValueError: there are none, they are malformed, or no plain LoRA's.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise ValueError(
            f"its names are PEFT's, but no {CONFIG_FILE} lies beside it, which has alpha; keep the adapter's files together"
        )
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8 ({error})") from error
    settings = _parsed(text, str(file))
    if settings.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{file}: peft_type is {settings['peft_type']!r}; expected 'LORA'")
    _check(settings, str(file))
    return settings


def scale_of(settings: Settings, layer: str, rank: int) -> float:
    """The factor of a layer's update: alpha / rank, or alpha / sqrt(rank) with `use_rslora`.

    Args:
        settings: PEFT's.
        layer: its name in the model.
        rank: of its matrices.

    Raises:
        ValueError: the settings have another rank for it, or its alpha is no positive number.
    """
    ranks, alphas = (settings.get(f"{kind}_pattern") or {} for kind in ("rank", "alpha"))
    expected = ranks.get(get_pattern_key(ranks, layer), settings["r"])
    if expected != rank:
        raise ValueError(f"{layer}: its rank is {rank}, but the settings say {expected}")
    alpha = alphas.get(get_pattern_key(alphas, layer), settings["lora_alpha"])
    return check_alpha(f"{layer}: alpha", alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def check_alpha(name: str, value: object) -> float:
    """The value as a number; ValueError where it is none that an alpha can be."""
    # 0 is no scaling to kohya's tools and no update to others.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        shown = f"a number of {value.bit_length()} bits" if isinstance(value, int) and value.bit_length() > 1024 else value
        raise ValueError(f"{name} is {shown}; expected a positive finite number")
    return float(value)


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:  # a number may be too long, and brackets too deep
        raise ValueError(f"{where} is no JSON that can be read ({error})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{where} is a {type(settings).__name__}; expected an object with r and lora_alpha")
    return settings


def _check(settings: Settings, where: str) -> None:
    for key in ("r", "lora_alpha"):
        if key not in settings:
            raise ValueError(f"{where} has no {key}")
    ranks, alphas = (settings.get(f"{kind}_pattern") or {} for kind in ("rank", "alpha"))
    if not isinstance(ranks, dict) or not isinstance(alphas, dict):
        raise ValueError(f"{where}: rank_pattern and alpha_pattern have to be objects")
    for pattern in (*ranks, *alphas):
        try:
            get_pattern_key([pattern], "")  # compiled as PEFT does
        except (re.error, OverflowError) as error:
            raise ValueError(f"{where}: {pattern!r} in a pattern is no regular expression ({error})") from error
    for key, value in {"r": settings["r"], **{f"rank_pattern, {key}": value for key, value in ranks.items()}}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{where}: {key} is {value!r}; expected a whole number from 1 up")
    for key, value in {"lora_alpha": settings["lora_alpha"], **alphas}.items():
        check_alpha(f"{where}: {key}", value)
    for key in ("use_dora", "lora_bias", "fan_in_fan_out", "use_bdlora", "use_qalora", "alora_invocation_tokens"):
        if settings.get(key):
            raise ValueError(f"{where}: {key} is {settings[key]!r}, and a plain LoRA alone is taken")
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start not in INITIALISATIONS:
        raise ValueError(
            f"{where}: init_lora_weights is {start!r}, which changes the model's own weights too; convert it to a plain LoRA "
            "with PEFT first (save_pretrained with path_initial_model_for_weight_conversion)"
        )
