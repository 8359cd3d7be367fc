"""A LoRA that becomes part of the frozen base before training, such as UNO's: the reference model is then base + LoRA."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from focusdpo.foundation.files import checksum, hash_of, remembered_checksum
from focusdpo.foundation.text import first_of
from focusdpo.models.lora_keys import PEFT_PREFIX
from focusdpo.models.lora_names import FAMILIES
from focusdpo.models.lora_reading import Lora, find_lora_file, lora_shapes, read_lora
from focusdpo.models.lora_settings import CONFIG_FILE

NAME = "model.base_lora"


def lora_checksum(name: str, path: str) -> str:
    """A hash of what decides the update of the LoRA that a path names; `name` is the setting, for errors."""
    file = find_lora_file(name, path)
    config = file.parent / CONFIG_FILE  # has alpha, where the LoRA is PEFT's
    is_peft = config.is_file() and any(key.startswith(PEFT_PREFIX) for key in lora_shapes(name, file))
    return hash_of(remembered_checksum(file), checksum(config)) if is_peft else remembered_checksum(file)


@torch.no_grad()
def merge_base_lora(pipeline: Any, path: str, scale: float) -> list[str]:
    """Adds a LoRA to the transformer's weights: W + scale * alpha / rank * B A.

    The sum is formed in fp32 and rounded once, to the weights' dtype: adapters loaded under bf16 weights are rounded to bf16
    themselves, as is their product, and small updates would be lost.

    Args:
        pipeline: a diffusers pipeline without adapters; its transformer is changed in place.
        path: file or folder, in any form that `read_lora` knows.
        scale: factor of the whole update.

    Returns:
        Names of the layers that it changed.

    Raises:
        ValueError: names what fits no layer of the transformer, or is no plain LoRA.
    """
    kind = type(pipeline.transformer).__name__
    lora = read_lora(NAME, path, next((family.backbones[0] for family in FAMILIES if family.transformer == kind), None))
    layers = matching_layers(pipeline.transformer, lora, f"{NAME}: {find_lora_file(NAME, path)}")
    for name, layer in layers.items():
        if layer.weight.is_meta:  # of a process that gets its weights from another
            continue
        update = lora.layers[name]
        # On the CPU wherever the layer is: another device may sum in another order, and a run may go on on another one.
        a, b = (value.to("cpu", torch.float32) for value in (update.a, update.b))
        layer.weight.copy_(layer.weight.cpu().float() + scale * update.scale * (b @ a))
    return list(layers)


def matching_layers(transformer: nn.Module, lora: Lora, where: str) -> dict[str, nn.Linear]:
    """The linear layers, by name, that a LoRA updates; ValueError says where it came from and what of it fits none."""
    linear = {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    unmatched = [
        f"transformer.{name}.lora_{side}.weight" for name in sorted(lora.layers.keys() - linear.keys()) for side in "AB"
    ]
    if unmatched:
        raise ValueError(
            f"{where}: {len(unmatched)} of {2 * len(lora.layers)} names are no pair of lora_A and lora_B for a linear layer of "
            f"{type(transformer).__name__}: {first_of(unmatched)}; is it for another model?"
        )
    for name, update in lora.layers.items():
        a, b, weight = (list(value.shape) for value in (update.a, update.b, linear[name].weight))
        if [b[0], a[1]] != weight:
            raise ValueError(
                f"{where}: transformer.{name}: lora_A is {a} and lora_B {b}, but the layer's weight is {weight}; is it for a "
                "model of another size?"
            )
    return {name: linear[name] for name in lora.layers}
