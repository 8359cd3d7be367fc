"""The released models' sizes: enough to count their parameters and to run their shapes, without their weights.

Transformers are built by the libraries' own classes from the numbers in the released configs, by default on the meta device,
where a tensor has a shape and takes no memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel, QwenImageTransformer2DModel
from torch import nn

from focusdpo.models.base import Backbone, encoders
from focusdpo.models.flux import Flux1, Kontext
from focusdpo.models.flux2 import Flux2
from focusdpo.models.qwen import QwenEditPlus

META = torch.device("meta")


@dataclass(frozen=True)
class Architecture:
    """What decides the shapes of a backbone.

    Args:
        backbone: its class.
        transformer: its transformer's class.
        config: that class's arguments.
        companions: parameters of the pipeline's other parts, which are frozen and stay on the device.
    """

    backbone: type[Backbone]
    transformer: type[Any]
    config: Mapping[str, Any]
    companions: int

    @staticmethod
    def of(backbone: Backbone) -> Architecture:
        """That of a loaded backbone, with or without adapter."""
        parts = [part for part in backbone.pipeline.components.values() if isinstance(part, nn.Module)]
        transformer = backbone.pipeline.transformer
        others = sum(parameters(part) for part in parts if part is not transformer)
        return Architecture(type(backbone), type(transformer), dict(transformer.config), others)

    @staticmethod
    def of_folder(backbone: type[Backbone], pipeline: Path) -> Architecture:
        """That of a pipeline's local folder, from its configs alone."""
        index = diffusers.DiffusionPipeline.load_config(pipeline)
        transformer = getattr(diffusers, index["transformer"][1])
        with META:
            others = [_part(pipeline / part, *index[part]) for part in encoders(index)]
        return Architecture(backbone, transformer, transformer.load_config(pipeline / "transformer"), parameters(*others))

    def build(self, dtype: torch.dtype, max_sequence_length: int, device: torch.device = META) -> Backbone:
        """The backbone without its companions, with random weights made on the device: a full size does not fit twice."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with device:
                transformer = self.transformer.from_config(self.config)
        finally:
            torch.set_default_dtype(before)
        pipeline = SimpleNamespace(transformer=transformer, components={"transformer": transformer})
        return self.backbone(pipeline, max_sequence_length=max_sequence_length)


def parameters(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def _part(folder: Path, library: str, name: str) -> nn.Module:
    if library == "diffusers":
        part = getattr(diffusers, name)
        return part.from_config(part.load_config(folder))
    part = getattr(transformers, name)
    return part(part.config_class.from_pretrained(folder))


# companions: CLIP and T5, Mistral 3, Qwen 3 or Qwen 2.5 VL, and the VAE, as tests/models/test_sizes.py counts them.
_FLUX2 = {"num_layers": 8, "num_single_layers": 48, "num_attention_heads": 48, "joint_attention_dim": 15360}
_KLEIN_4B = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}
_KLEIN_9B = {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288}

RELEASED = {
    "FLUX.1 dev": Architecture(Flux1, FluxTransformer2DModel, {"guidance_embeds": True}, 4_969_190_819),
    "FLUX.1 Kontext dev": Architecture(Kontext, FluxTransformer2DModel, {"guidance_embeds": True}, 4_969_190_819),
    "FLUX.2 dev": Architecture(Flux2, Flux2Transformer2DModel, _FLUX2, 24_095_407_395),
    "FLUX.2 klein 4B": Architecture(Flux2, Flux2Transformer2DModel, _KLEIN_4B | {"guidance_embeds": False}, 4_106_514_211),
    "FLUX.2 klein 9B": Architecture(Flux2, Flux2Transformer2DModel, _KLEIN_9B | {"guidance_embeds": False}, 8_274_781_475),
    "Qwen-Image-Edit 2509": Architecture(QwenEditPlus, QwenImageTransformer2DModel, {}, 8_419_059_187),
}
