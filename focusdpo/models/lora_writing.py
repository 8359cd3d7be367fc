"""Writes a LoRA so that every tool applies its trained strength.

What scales the update is multiplied into lora_B, and alpha is the rank wherever it is said: tools that read alpha beside the
weights, in metadata or not at all then agree.

    diffusers   transformer.<diffusers' name>.lora_A.weight, lora_B; settings in the metadata
    peft        base_model.model.<diffusers' name>.lora_A.weight, lora_B; settings in adapter_config.json
    comfyui     diffusion_model.<original name>.lora_A.weight, lora_B; of FLUX.1 lora_down, lora_up
    kohya       lora_unet_<original name with underscores>.lora_down.weight, lora_up, alpha
    uno         as `uno_lora` says; FLUX.1 alone

ComfyUI knows the original names of every layer (`model_lora_keys_unet`: "generic lora format"), but diffusers' of some alone:
not those of FLUX.2's embedders and modulations. ai-toolkit and musubi-tuner (`--target other`) write original names as well.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from torch import Tensor

from focusdpo.foundation.choices import LoraForm
from focusdpo.foundation.files import write_bytes
from focusdpo.models.lora_fusion import Update, fuse
from focusdpo.models.lora_keys import FAMILY_KEY, PEFT_PREFIX, name_backbone
from focusdpo.models.lora_names import Family
from focusdpo.models.lora_reading import LORA_FILE, Lora, swap_halves
from focusdpo.models.lora_settings import CONFIG_FILE, PREFIX
from focusdpo.models.uno_lora import UNO_FILE, diffusers_to_uno

PEFT_FILE = "adapter_model.safetensors"  # PEFT's name for it
FILES: dict[LoraForm, tuple[str, ...]] = {
    "diffusers": (LORA_FILE,),
    "peft": (PEFT_FILE, CONFIG_FILE),
    "comfyui": ("lora_comfyui.safetensors",),
    "kohya": ("lora_kohya.safetensors",),
    "uno": (UNO_FILE,),
}


def lora_files(lora: Lora, form: LoraForm) -> dict[str, bytes]:
    """The files of a form by name, the same bytes whenever and wherever they are made.

    Raises:
        ValueError: the form cannot say it, or which family it is for cannot be told and would make a difference.
    """
    layers = {name: update.folded() for name, update in sorted(lora.layers.items())}
    metadata = {"format": "pt"} | ({FAMILY_KEY: lora.families[0].name} if len(lora.families) == 1 else {})
    file = FILES[form][0]
    if form == "peft":
        return {
            file: _serialized(_named(layers, PEFT_PREFIX), metadata),
            CONFIG_FILE: (json.dumps(_adapter_config(layers, lora.families), indent=2, sort_keys=True) + "\n").encode(),
        }
    if form == "diffusers":
        settings = {f"{PREFIX}{key}": value for key, value in _settings(layers).items()}
        metadata[LORA_ADAPTER_METADATA_KEY] = json.dumps(settings, indent=2, sort_keys=True)
        return {file: _serialized(_named(layers, PREFIX), metadata)}
    if form == "uno":
        return {file: _serialized(diffusers_to_uno(_named(layers, PREFIX)), {"format": "pt"})}
    states = [_original(layers, family, form) for family in lora.families]
    if any(state.keys() != states[0].keys() for state in states):
        names = " and of ".join(family.name for family in lora.families)
        raise ValueError(f"its layers are of {names}, which differ in this form; {name_backbone(lora.families)}")
    return {file: _serialized(states[0], metadata)}


def write_lora(folder: Path, lora: Lora, form: LoraForm) -> None:
    """Writes the files of a form into a folder, which is made; each at once or not at all. Errors as `lora_files`."""
    files = lora_files(lora, form)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_bytes(folder / name, content)


def _named(layers: Mapping[str, Update], prefix: str) -> dict[str, Tensor]:
    lower = {f"{prefix}{name}.lora_A.weight": update.a for name, update in layers.items()}
    return lower | {f"{prefix}{name}.lora_B.weight": update.b for name, update in layers.items()}


def _settings(layers: Mapping[str, Update]) -> dict[str, Any]:
    ranks = {name: update.a.shape[0] for name, update in layers.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    # PEFT takes these as ends of names; `^` makes them whole ones.
    others = {f"^{name}": other for name, other in ranks.items() if other != rank}
    return {
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,  # layers added to a model in evaluation mode are in training mode
        "target_modules": sorted(layers),
        "rank_pattern": others,
        "alpha_pattern": others,
    }


def _adapter_config(layers: Mapping[str, Update], families: tuple[Family, ...]) -> dict[str, Any]:
    known = {"base_model_class": families[0].transformer, "parent_library": "diffusers"} if len(families) == 1 else None
    return {
        **_settings(layers),
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "auto_mapping": known,
        "bias": "none",
        "inference_mode": True,
    }


def _original(layers: Mapping[str, Update], family: Family, form: LoraForm) -> dict[str, Tensor]:
    """The state dict under the original code's names."""
    state: dict[str, Tensor] = {}
    for name, module in sorted(dict(map(family.original, layers)).items()):
        try:
            update = fuse([layers.get(layer) for layer in module.layers], module.rows)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        update = swap_halves(update) if module.swapped else update
        stem = f"lora_unet_{name.replace('.', '_')}" if form == "kohya" else f"diffusion_model.{name}"
        down, up = ("lora_down", "lora_up") if form == "kohya" else family.comfyui_sides
        state |= {f"{stem}.{down}.weight": update.a, f"{stem}.{up}.weight": update.b}
        if form == "kohya":
            state[f"{stem}.alpha"] = torch.tensor(float(update.a.shape[0]))  # bf16 does not have every rank
    return state


def _serialized(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with its metadata sorted: safetensors' own order is another one in every process."""
    content = safetensors.torch.save({name: value.contiguous() for name, value in tensors.items()}, dict(metadata))
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors start at multiples of 8
    return struct.pack("<Q", len(text)) + text + content[8 + size :]
