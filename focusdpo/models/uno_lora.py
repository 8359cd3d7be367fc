"""UNO's LoRA in diffusers' FLUX format, and back.

UNO (bytedance/UNO) names its LoRA by the processors of the original FLUX code, whose blocks have one projection for query, key
and value; diffusers' blocks have three. With A the down and B the up matrix, qkv + B A x splits by rows of B:

    double_blocks.{i}.processor.qkv_lora{1,2}   [q | k | v] of the image stream (1) and of the text stream (2)
    double_blocks.{i}.processor.proj_lora{1,2}  out of the attention, image (1) and text (2)
    single_blocks.{i}.processor.qkv_lora        [q | k | v]
    single_blocks.{i}.processor.proj_lora       out of [attention | MLP]: A has 5 times the width as input

Each with `.down.weight` and `.up.weight`, all of one rank and not scaled: alpha is the rank. A file may leave blocks out (UNO
trains any choice of them), but nothing of a block.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from focusdpo.foundation.text import first_of

UNO_FILE = "dit_lora.safetensors"  # UNO's own name for it

MLP_RATIO = 4


@dataclass(frozen=True)
class _Part:
    """One low-rank update of UNO's, the layers of diffusers that share it, and its input's size in widths."""

    uno: str
    layers: tuple[str, ...]
    inputs: int = 1


_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_PARTS = {
    "double_blocks": (
        _Part("qkv_lora1", _QKV),
        _Part("proj_lora1", ("attn.to_out.0",)),
        _Part("qkv_lora2", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
        _Part("proj_lora2", ("attn.to_add_out",)),
    ),
    "single_blocks": (_Part("qkv_lora", _QKV), _Part("proj_lora", ("proj_out",), inputs=1 + MLP_RATIO)),
}
_DIFFUSERS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}
_UNO = {name: kind for kind, name in _DIFFUSERS.items()}
_UNO_BLOCK = re.compile(r"(double_blocks|single_blocks)\.(\d+)\.processor\.")
_DIFFUSERS_BLOCK = re.compile(r"transformer\.(transformer_blocks|single_transformer_blocks)\.(\d+)\.")

_Block = tuple[str, int]  # kind and number


def is_uno(names: Iterable[str]) -> bool:
    """Whether a LoRA's names are UNO's."""
    return any(_UNO_BLOCK.match(name) for name in names)


def unos_layers(blocks: Iterable[str]) -> set[str]:
    """The layers that UNO trains in blocks, by diffusers' names."""
    parts = [(block, part) for block in blocks for part in _PARTS[_UNO[block.split(".")[0]]]]
    return {f"{block}.{layer}" for block, part in parts for layer in part.layers}


def uno_to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """UNO's matrices under diffusers' names, `transformer.` in front; same dtypes, and no two share memory.

    Args:
        state: matrices by UNO's names: down [rank, inputs], up [outputs, rank].

    Raises:
        ValueError: lists names that are unknown or missing, and shapes that do not fit.
    """
    parts = _parts_of(state, _UNO_BLOCK)
    pairs = {_uno_keys(block, part): (part.inputs, len(part.layers)) for block, part in parts}
    _check(state, pairs, "UNO's", "double_blocks.0.processor.qkv_lora1.down.weight")
    converted = {}
    for block, part in parts:
        down, up = (state[key] for key in _uno_keys(block, part))
        for layer, rows in zip(part.layers, up.chunk(len(part.layers)), strict=True):
            a, b = _diffusers_keys(block, layer)
            converted[a], converted[b] = down.clone(), rows.clone()
    return converted


def diffusers_to_uno(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The exact inverse of `uno_to_diffusers`.

    Args:
        state: matrices by diffusers' names: lora_A [rank, inputs], lora_B [outputs, rank].

    Raises:
        ValueError: as there, where it has not just the layers of UNO's; or query, key and value have lora_A of their own, where
            UNO's have one in common.
    """
    parts = _parts_of(state, _DIFFUSERS_BLOCK)
    pairs = {_diffusers_keys(block, layer): (part.inputs, 1) for block, part in parts for layer in part.layers}
    _check(state, pairs, "diffusers'", "transformer.transformer_blocks.0.attn.to_q.lora_A.weight")
    converted, differing = {}, []
    for block, part in parts:
        names = [_diffusers_keys(block, layer) for layer in part.layers]
        downs, ups = [state[a] for a, _ in names], [state[b] for _, b in names]
        same = all(x.dtype == downs[0].dtype and torch.equal(x, downs[0]) for x in downs)
        if not same or len({x.dtype for x in ups}) > 1:
            differing.append(", ".join(a for a, _ in names))
            continue
        down, up = _uno_keys(block, part)
        converted[down], converted[up] = downs[0].clone(), torch.cat(ups)
    if differing:
        raise ValueError(
            "this LoRA cannot be written in UNO's format, where query, key and value share one lora_A; these differ:\n  "
            + first_of(differing, separator="\n  ")
        )
    return converted


def _uno_keys(block: _Block, part: _Part) -> tuple[str, str]:
    stem = f"{block[0]}.{block[1]}.processor.{part.uno}"
    return f"{stem}.down.weight", f"{stem}.up.weight"


def _diffusers_keys(block: _Block, layer: str) -> tuple[str, str]:
    stem = f"transformer.{_DIFFUSERS[block[0]]}.{block[1]}.{layer}"
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def _parts_of(names: Iterable[str], pattern: re.Pattern[str]) -> list[tuple[_Block, _Part]]:
    found = {(_UNO.get(m[1], m[1]), int(m[2])) for m in map(pattern.match, names) if m}
    return [(block, part) for block in sorted(found) for part in _PARTS[block[0]]]


def _check(state: Mapping[str, Tensor], pairs: Mapping[tuple[str, str], tuple[int, int]], owner: str, example: str) -> None:
    """ValueError unless every (down, up) pair is there with its (inputs, outputs) in widths, and nothing else is."""
    shapes = {name: list(value.shape) for name, value in state.items()}
    known = {key for pair in pairs for key in pair}
    problems = [f"{name}: unknown" for name in shapes if name not in known]
    problems += [f"{name}: missing" for name in known if name not in shapes]
    # What most matrices agree on, so that the odd one is named and not all others.
    sizes = Counter(
        (shapes[down][0], shapes[down][1] // inputs)
        for (down, _), (inputs, _) in pairs.items()
        if len(shapes.get(down, ())) == 2
    )
    rank, width = sizes.most_common(1)[0][0] if sizes else (0, 0)
    for (down, up), (inputs, outputs) in pairs.items():
        for name, expected in ((down, [rank, inputs * width]), (up, [outputs * width, rank])):
            if name in shapes and shapes[name] != expected:
                problems.append(f"{name}: shape {shapes[name]}, expected {expected}")
    if problems or not pairs:
        found = f"{len(problems)} of its matrices are wrong" if pairs else "it has no matrix of such a name"
        listed = first_of(sorted(problems), separator="\n  ")
        raise ValueError(
            f"not a LoRA in {owner} format with UNO's layers, {found}:\n  {listed}\nexpected for every "
            f"block in it all of UNO's layers ({example} and so on), of one rank and width, and nothing else"
        )
