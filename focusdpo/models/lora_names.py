"""What a LoRA's layers are called: diffusers' names, and those of the models' original code, for every family of models.

ComfyUI, sd-scripts and musubi-tuner build FLUX.1 and FLUX.2 as Black Forest Labs published them, where query, key and value are
one layer; all of them take Qwen-Image's layers by diffusers' names. Read off ComfyUI's `flux_to_diffusers` (comfy/utils.py) and
`model_lora_keys_unet` (comfy/lora.py), sd-scripts' library/flux_models.py and networks/convert_flux_lora.py, musubi-tuner's
flux_2/flux2_models.py and convert_lora.py, and diffusers' single-file conversions, which all agree.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

_NUMBER = re.compile(r"(?<=blocks[._])\d+(?=[._])")  # of a block; `#` stands for it in the tables


@dataclass(frozen=True)
class Module:
    """One linear layer of the original code, and diffusers' layers that are its rows, from top to bottom.

    Args:
        layers: diffusers' names.
        rows: outputs of each of `layers`, relative to one another.
        shape: outputs and inputs relative to each other, where that tells families apart.
        swapped: whether the halves of its outputs (shift and scale) stand the other way round in diffusers.
    """

    layers: tuple[str, ...]
    rows: tuple[int, ...] = (1,)
    shape: tuple[int, int] | None = None
    swapped: bool = False

    def at(self, number: str) -> Module:
        return replace(self, layers=tuple(layer.replace("#", number) for layer in self.layers))


@dataclass(frozen=True, eq=False)
class Family:
    """Models that share their layers' names.

    Args:
        name: for people, and in the metadata of files.
        backbones: settings of `model.backbone` that are of it.
        transformer: diffusers' class.
        modules: by the original code's names.
        blocks: numbers of blocks of the largest released model, by diffusers' names.
        comfyui_sides: what the lower and the upper matrix are called in the form for ComfyUI.
    """

    name: str
    backbones: tuple[str, ...]
    transformer: str
    modules: Mapping[str, Module]
    blocks: Mapping[str, int]
    comfyui_sides: tuple[str, str] = ("lora_A", "lora_B")

    def find(self, name: str) -> Module | None:
        """The module that a name of the original code or of diffusers means, with dots or, as in kohya's files, underscores."""
        number = _NUMBER.search(name)
        found = self._by_name.get(_NUMBER.sub("#", name, count=1))
        return found.at(number[0]) if found and number else found

    def original(self, layer: str) -> tuple[str, Module]:
        """The original code's name for the module that a layer of diffusers is (part of), and that module."""
        number = _NUMBER.search(layer)
        name = self._by_layer[_NUMBER.sub("#", layer, count=1)]
        module = self.modules[name]
        return (name.replace("#", number[0]), module.at(number[0])) if number else (name, module)

    @cached_property
    def _by_layer(self) -> dict[str, str]:
        return {layer: name for name, module in self.modules.items() for layer in module.layers}

    @cached_property
    def _by_name(self) -> dict[str, Module]:
        dotted = {layer: Module((layer,)) for layer in self._by_layer} | dict(self.modules)
        return {name.replace(".", "_"): module for name, module in dotted.items()} | dotted


_STREAMS = {"img": ("to_q", "to_k", "to_v", "to_out.0"), "txt": ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")}


def _attention() -> dict[str, Module]:
    """Of the double blocks of FLUX.1 and FLUX.2."""
    modules = {}
    for stream, layers in _STREAMS.items():
        *qkv, out = (f"transformer_blocks.#.attn.{layer}" for layer in layers)
        modules[f"double_blocks.#.{stream}_attn.qkv"] = Module(tuple(qkv), rows=(1, 1, 1))
        modules[f"double_blocks.#.{stream}_attn.proj"] = Module((out,))
    return modules


def _embedder(original: str, diffusers: str) -> dict[str, Module]:
    layers = {"in_layer": "linear_1", "out_layer": "linear_2"}
    return {f"{original}.{name}": Module((f"{diffusers}.{layer}",)) for name, layer in layers.items()}


_ENDS = {
    "img_in": Module(("x_embedder",)),
    "txt_in": Module(("context_embedder",)),
    "final_layer.linear": Module(("proj_out",)),
    "final_layer.adaLN_modulation.1": Module(("norm_out.linear",), swapped=True),
}
_SINGLE = "single_transformer_blocks.#"

FLUX_1 = Family(
    "FLUX.1",
    ("flux", "kontext"),
    "FluxTransformer2DModel",
    {
        **_attention(),
        "double_blocks.#.img_mlp.0": Module(("transformer_blocks.#.ff.net.0.proj",), shape=(4, 1)),
        "double_blocks.#.img_mlp.2": Module(("transformer_blocks.#.ff.net.2",), shape=(1, 4)),
        "double_blocks.#.txt_mlp.0": Module(("transformer_blocks.#.ff_context.net.0.proj",), shape=(4, 1)),
        "double_blocks.#.txt_mlp.2": Module(("transformer_blocks.#.ff_context.net.2",), shape=(1, 4)),
        "double_blocks.#.img_mod.lin": Module(("transformer_blocks.#.norm1.linear",)),
        "double_blocks.#.txt_mod.lin": Module(("transformer_blocks.#.norm1_context.linear",)),
        "single_blocks.#.linear1": Module(
            (*(f"{_SINGLE}.attn.{layer}" for layer in ("to_q", "to_k", "to_v")), f"{_SINGLE}.proj_mlp"),
            rows=(1, 1, 1, 4),
            shape=(7, 1),
        ),
        "single_blocks.#.linear2": Module((f"{_SINGLE}.proj_out",), shape=(1, 5)),
        "single_blocks.#.modulation.lin": Module((f"{_SINGLE}.norm.linear",)),
        **_ENDS,
        **_embedder("time_in", "time_text_embed.timestep_embedder"),
        **_embedder("vector_in", "time_text_embed.text_embedder"),
        **_embedder("guidance_in", "time_text_embed.guidance_embedder"),
    },
    {"transformer_blocks": 19, "single_transformer_blocks": 38},
    # ComfyUI takes both spellings; diffusers reads original names of FLUX.1 in this one alone.
    comfyui_sides=("lora_down", "lora_up"),
)

FLUX_2 = Family(
    "FLUX.2",
    ("flux2",),
    "Flux2Transformer2DModel",
    {
        **_attention(),
        "double_blocks.#.img_mlp.0": Module(("transformer_blocks.#.ff.linear_in",), shape=(6, 1)),
        "double_blocks.#.img_mlp.2": Module(("transformer_blocks.#.ff.linear_out",), shape=(1, 3)),
        "double_blocks.#.txt_mlp.0": Module(("transformer_blocks.#.ff_context.linear_in",), shape=(6, 1)),
        "double_blocks.#.txt_mlp.2": Module(("transformer_blocks.#.ff_context.linear_out",), shape=(1, 3)),
        "single_blocks.#.linear1": Module((f"{_SINGLE}.attn.to_qkv_mlp_proj",), shape=(9, 1)),
        "single_blocks.#.linear2": Module((f"{_SINGLE}.attn.to_out",), shape=(1, 4)),
        **{
            f"{name}.lin": Module((f"{name}.linear",))
            for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
        },
        **_ENDS,
        **_embedder("time_in", "time_guidance_embed.timestep_embedder"),
        **_embedder("guidance_in", "time_guidance_embed.guidance_embedder"),
    },
    {"transformer_blocks": 8, "single_transformer_blocks": 48},
)

_QWEN_LAYERS = (
    *(f"transformer_blocks.#.attn.{layer}" for layers in _STREAMS.values() for layer in layers),
    *(f"transformer_blocks.#.{s}_{layer}" for s in _STREAMS for layer in ("mod.1", "mlp.net.0.proj", "mlp.net.2")),
    *("img_in", "txt_in", "proj_out", "norm_out.linear"),
    *(f"time_text_embed.timestep_embedder.linear_{i}" for i in (1, 2)),
)
QWEN_IMAGE = Family(
    "Qwen-Image",
    ("qwen-edit-plus",),
    "QwenImageTransformer2DModel",
    {layer: Module((layer,)) for layer in _QWEN_LAYERS},
    {"transformer_blocks": 60},
)

FAMILIES = (FLUX_1, FLUX_2, QWEN_IMAGE)


def family_of(backbone: str) -> Family:
    """The family of a setting of `model.backbone`."""
    return next(family for family in FAMILIES if backbone in family.backbones)
