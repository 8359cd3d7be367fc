"""A finished LoRA as an adapter of a model, to be switched on and off while sampling."""

from __future__ import annotations

import re
from typing import Any

import peft

from focusdpo.models.base_lora import matching_layers
from focusdpo.models.lora_reading import Lora


def add_lora(transformer: Any, lora: Lora, scale: float, where: str) -> None:
    """Adds a LoRA to a transformer without adapters, at strength `scale`.

    Its matrices are in fp32, as those that are trained: in the bf16 of the frozen weights small updates would be rounded away.

    Args:
        transformer: a diffusers model.
        lora: its updates, whatever form they came in.
        scale: factor of the whole update.
        where: the LoRA came from, for messages.

    Raises:
        ValueError: names what fits no layer of the transformer.
    """
    matching_layers(transformer, lora, where)
    ranks = {name: update.a.shape[0] for name, update in lora.layers.items()}
    names = {f"^{name}": rank for name, rank in ranks.items()}  # PEFT takes these as ends of names; `^` makes them whole ones
    settings = peft.LoraConfig(
        target_modules="|".join(map(re.escape, ranks)),
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        rank_pattern=names,
        alpha_pattern=names,
    )
    transformer.add_adapter(settings)
    for name, update in lora.layers.items():
        layer = transformer.get_submodule(name)
        scaled = (update.b.double() * (update.scale * scale)).float()
        for side, value in ((layer.lora_A, update.a.float()), (layer.lora_B, scaled)):
            weight = side["default"].weight
            weight.data = value.contiguous().to(weight.device)
    transformer.requires_grad_(False).eval()
