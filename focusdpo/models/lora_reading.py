"""Reads a LoRA of FLUX.1, FLUX.2 or Qwen-Image from any of the forms that it goes about in.

Which form it is is read off its names: `transformer.` (diffusers) or `base_model.model.` (PEFT) before diffusers' names, or
`diffusion_model.` (ComfyUI) or `lora_unet_` (kohya, with underscores for dots) before the original code's, or UNO's. diffusers
has converters of its own, but they are no base for a round trip: version 0.42 takes FLUX.1's single blocks at full size alone,
loses FLUX.1's embedders, does not swap the halves of FLUX.2's norm_out, and leaves names out with a warning.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from focusdpo.foundation.files import tensor_shapes
from focusdpo.foundation.text import counted, first_of
from focusdpo.models.lora_fusion import Update, split
from focusdpo.models.lora_keys import PEFT_PREFIX, check_backbone, families_of, inner, layer_keys
from focusdpo.models.lora_names import Family, Module, family_of
from focusdpo.models.lora_settings import Settings, check_alpha, folder_settings, metadata_settings, scale_of
from focusdpo.models.uno_lora import is_uno, uno_to_diffusers

LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name for it

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# The largest number of fp16, in which models are run as well. Weights of these models are well below 100.
MAX_UPDATE = 65504.0


@dataclass(frozen=True)
class Lora:
    """The updates of a transformer's layers by diffusers' names, without a prefix, and the families that have such layers."""

    layers: Mapping[str, Update]
    families: tuple[Family, ...]


def find_lora_file(name: str, path: str) -> Path:
    """The safetensors file that a path names: a file, or a folder that holds one.

    Args:
        name: the setting, for errors.
        path: file or folder.

    Raises:
        FileNotFoundError: there is none, or a folder holds several and none has diffusers' name.
    """
    if not path:
        raise FileNotFoundError(f"{name}: got an empty path; expected a file, or a folder that holds one")
    found = Path(path)
    try:
        if found.is_file():
            return found
    except OSError as error:  # a name that is too long
        raise FileNotFoundError(f"{name}: {path} cannot be a file ({error.strerror})") from error
    if not found.is_dir():
        raise FileNotFoundError(f"{name}: no such file or folder: {path}; download it first if it is on the hub")
    files = sorted(found.glob("*.safetensors"))
    if found / LORA_FILE in files:
        return found / LORA_FILE
    if len(files) != 1:
        raise FileNotFoundError(
            f"{name}: {path} holds {counted(len(files), '.safetensors file')} and no {LORA_FILE}; name the LoRA's file itself"
        )
    return files[0]


def lora_shapes(name: str, file: Path) -> dict[str, list[int]]:
    """Shapes by name of a file's matrices; only the header is read.

    Raises:
        ValueError: the file is damaged or of another kind, or holds no LoRA.
    """
    try:
        shapes = tensor_shapes(file)
    except SafetensorError as error:
        raise ValueError(f"{name}: {file} is no safetensors file, or it is damaged ({error})") from error
    if not any(re.search("lora|hada|lokr", key) for key in shapes):
        raise ValueError(
            f"{name}: {file} holds no LoRA, none of its names has 'lora' in it; it has {first_of(sorted(shapes)) or 'nothing'}"
        )
    return shapes


def read_lora(name: str, path: str, backbone: str | None = None) -> Lora:
    """Reads a LoRA, whatever its form, and refuses what cannot be one.

    Args:
        name: the setting, for errors.
        path: file or folder.
        backbone: setting of `model.backbone` that it has to be for; None takes all.

    Raises:
        FileNotFoundError: as `find_lora_file`.
        ValueError: what is wrong with the file, by its name and the tensors'.
    """
    file = find_lora_file(name, path)
    shapes = lora_shapes(name, file)
    try:
        with safe_open(file, framework="pt") as content:
            tensors = {key: content.get_tensor(key) for key in list(content.keys())}
            metadata = content.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{name}: {file} cannot be read ({error})") from error
    try:
        return _read_uno(tensors, backbone) if is_uno(shapes) else _read(tensors, metadata, file.parent, backbone)
    except ValueError as error:
        raise ValueError(f"{name}: {file}: {error}") from error


def _read_uno(tensors: Mapping[str, Tensor], backbone: str | None) -> Lora:
    families = check_backbone((family_of("flux"),), backbone)
    state = uno_to_diffusers(tensors)
    _check_values(tensors)
    return Lora(_updates(state, layer_keys(state), None, families[0]), families)


def _read(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], folder: Path, backbone: str | None) -> Lora:
    stems = layer_keys(tensors)
    is_peft = any(stem.startswith(PEFT_PREFIX) for stem in stems)
    settings = folder_settings(folder) if is_peft else metadata_settings(metadata)
    for stem, keys in stems.items():
        a, b = (tensors[keys[side]] for side in "ab")
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.numel() or not b.numel():
            raise ValueError(
                f"{stem}: lora_A is {list(a.shape)} and lora_B {list(b.shape)}; expected [rank, inputs] and [outputs, rank]"
            )
    families = families_of(stems, {key: value.shape for key, value in tensors.items()}, metadata, settings, backbone)
    _check_values({keys[side]: tensors[keys[side]] for keys in stems.values() for side in "ab"})
    return Lora(_updates(tensors, stems, settings, families[0]), families)


def _updates(
    tensors: Mapping[str, Tensor], stems: Mapping[str, Mapping[str, str]], settings: Settings | None, family: Family
) -> dict[str, Update]:
    """The updates by diffusers' layers; ValueError where one is too large, said twice, or its alpha is none."""
    layers: dict[str, Update] = {}
    for stem, keys in stems.items():
        a, b = (tensors[keys[side]] for side in "ab")
        # Where nothing is said, every loader takes 1.
        scale = 1.0 if settings is None else scale_of(settings, inner(stem), a.shape[0])
        if "alpha" in keys:
            alpha = tensors[keys["alpha"]]
            if alpha.numel() != 1:
                raise ValueError(f"{keys['alpha']}: shape {list(alpha.shape)}; expected one number")
            own = check_alpha(keys["alpha"], alpha.item()) / a.shape[0]
            if settings is not None and not math.isclose(own, scale, rel_tol=1e-6):
                raise ValueError(f"{keys['alpha']} makes its scale {own:g}, but the settings make it {scale:g}; remove one")
            scale = own
        update = Update(a, b, scale)
        _check_size(stem, update)
        module = family.find(inner(stem))
        assert module is not None  # or it would not be the family's
        for layer, part in _by_layer(stem, update, module).items():
            if layer in layers:
                raise ValueError(f"{stem}: {layer} has another update already, under another name")
            layers[layer] = part
    return layers


def _by_layer(stem: str, update: Update, module: Module) -> dict[str, Update]:
    """The update of a module by diffusers' layers; ValueError where its outputs are not theirs."""
    if len(module.layers) == 1:
        return {module.layers[0]: swap_halves(update) if module.swapped else update}
    try:
        parts = split(update, module.rows)
    except ValueError as error:
        raise ValueError(f"{stem}: {error}") from error
    return {layer: part for layer, part in zip(module.layers, parts, strict=True) if part is not None}


def swap_halves(update: Update) -> Update:
    """The update of a layer whose outputs' halves stand the other way round."""
    return update._replace(b=update.b.roll(update.b.shape[0] // 2, dims=0))


def _check_values(tensors: Mapping[str, Tensor]) -> None:
    for key, value in tensors.items():
        if value.dtype not in _DTYPES:
            raise ValueError(f"{key}: {value.dtype}; expected float32, bfloat16 or float16")
        wrong = int((~value.isfinite()).sum())
        if wrong:
            raise ValueError(f"{key}: {wrong} of its values are NaN or infinite; the file, or its training, is broken")


def _check_size(stem: str, update: Update) -> None:
    # |(b a)_ij| is at most the product of the norms of row i and column j.
    rows, columns = (torch.linalg.vector_norm(v.float(), dim=dim).max().item() for v, dim in ((update.b, 1), (update.a, 0)))
    size = update.scale * rows * columns
    if not size <= MAX_UPDATE:
        raise ValueError(
            f"{stem}: values of its update may reach {size:.3g}; expected at most {MAX_UPDATE:g}, the largest number of fp16; "
            "the file, its training, or its alpha is broken"
        )
    if update.scale * update.b.abs().max().item() > torch.finfo(update.b.dtype).max:
        raise ValueError(f"{stem}: with its scale {update.scale:g} in lora_B, values are too large for {update.b.dtype}")
