"""Dtypes of the frozen weights, and fewer bits: of the linear layers in the transformer's blocks, where nearly all of them are.

Embedders and output layers keep their dtype. Quantised is what is in memory, after a base LoRA was merged, so that it works
with every checkpoint.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import nn

from focusdpo.foundation.packages import require_package
from focusdpo.models.base import Backbone

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PACKAGES = {"nf4": "bitsandbytes", "fp8": "torchao"}
# nf4 has one fp32 scale for 64 weights, which is itself kept in 8 bits, with one fp32 scale for 256 of them.
BITS = {"nf4": 4 + (8 + 32 / 256) / 64, "fp8": 8}


def check_quantization(kind: str) -> None:
    """ModuleNotFoundError where the package is missing that does it."""
    require_package(PACKAGES[kind], f"model.quantization: {kind}", "quantization", load=False)


def quantized_layers(backbone: Backbone) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Each linear layer that is quantised: its parent module, its name in there, and itself."""
    for path in backbone.tap_paths():
        for parent in backbone.transformer.get_submodule(path).modules():
            for name, child in parent.named_children():
                if isinstance(child, nn.Linear):
                    yield parent, name, child


@torch.no_grad()
def quantize(backbone: Backbone, kind: str, device: torch.device) -> None:
    """Quantises the blocks of a transformer without adapter, in place, layer by layer on the device.

    "nf4": 4-bit NormalFloat with quantised scales (QLoRA, arXiv 2305.14314). "fp8": float8_e4m3fn with one scale a row. Both
    are multiplied in the dtype that the weights had.

    Args:
        backbone: whose transformer is changed.
        kind: "nf4" or "fp8".
        device: where it is going to run; the quantised weights go there.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchao's CUDA libraries beside a CPU build of PyTorch
        if kind == "nf4":
            _to_nf4(backbone, device)
        else:
            _to_fp8(backbone, device)


def _to_nf4(backbone: Backbone, device: torch.device) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    for parent, name, layer in list(quantized_layers(backbone)):
        new = Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=layer.weight.dtype,
            quant_type="nf4",
            compress_statistics=True,
            device="meta",
        )
        new.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True).to(device)
        new.bias = None if layer.bias is None else nn.Parameter(layer.bias.data.to(device), requires_grad=False)
        setattr(parent, name, new)
    backbone.transformer.is_loaded_in_4bit = True  # which peft looks at


def _to_fp8(backbone: Backbone, device: torch.device) -> None:
    from torchao.quantization import Float8WeightOnlyConfig, quantize_

    for _, _, layer in list(quantized_layers(backbone)):
        quantize_(layer.to(device), Float8WeightOnlyConfig())
