"""How a kernel reaches the hidden states of N layers in one launch: through a table of pointers in device memory.

The layers are separate tensors, often slices of a longer sequence; stacking them would cost more than the kernels. A row of the
table describes one layer. A single layer is passed as it is, and no table is made.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Of a row: pointer and three strides of the target, the same of the reference, bits of the fp32 weight.
TARGET, REFERENCE, WEIGHT, COLUMNS = 0, 4, 8, 9

# Host tables that CUDA graphs copy again at each replay: their memory must not be given to anybody else.
_CAPTURED: list[Tensor] = []

# The arguments and constants that every kernel over layers takes, with their Triton types for ahead-of-time compilation.
TYPES = {"table_ptr": "*i64", "weight": "fp32"}


@triton.jit
def layer_rows(
    table_ptr,
    direct_ptr,
    stride_b,
    stride_t,
    stride_d,
    n,
    b,
    SIDE: tl.constexpr,
    DTYPE: tl.constexpr,
    TABLE: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Base pointer of layer n's sample b, and its strides along tokens and width (both 64-bit).

    CONTIGUOUS promises unit stride along the width and rows that start on 16 bytes.
    """
    if TABLE:
        row = table_ptr + n * COLUMNS + SIDE
        base = tl.load(row).to(tl.pointer_type(DTYPE)) + tl.load(row + 1) * b
        stride = tl.load(row + 2)
        width = tl.load(row + 3)
    else:
        base = direct_ptr + b * stride_b
        stride = tl.cast(stride_t, tl.int64)
        width = tl.cast(stride_d, tl.int64)
    if CONTIGUOUS:
        base = tl.multiple_of(base, 16)
        stride = tl.multiple_of(stride, 8)
        width = 1
    return base, stride, width


@triton.jit
def layer_weight(table_ptr, weight, n, TABLE: tl.constexpr, COLUMNS: tl.constexpr):
    """Layer n's weight in the average."""
    if TABLE:
        weight = tl.load(table_ptr + n * COLUMNS + 8).to(tl.int32).to(tl.float32, bitcast=True)
    return weight


def is_vectorizable(layers: Sequence[Tensor]) -> bool:
    """Unit stride along the width, and rows that start on 16 bytes."""
    lanes = 16 // layers[0].element_size()
    return all(
        h.stride(2) == 1 and h.data_ptr() % 16 == 0 and h.stride(0) % lanes == 0 and h.stride(1) % 8 == 0 for h in layers
    )


class LayerArguments:
    """The leading kernel arguments that describe N layers: `target` or `reference`, then the weight.

    Args:
        target, reference: N tensors each, of one shape, dtype and device.
        weights: N weights.
    """

    def __init__(self, target: Sequence[Tensor], reference: Sequence[Tensor], weights: Sequence[float]) -> None:
        self.single = len(target) == 1
        self.weight = float(weights[0])
        self._sides = (target[0], reference[0])
        self._table = target[0] if self.single else _pointer_table(target, reference, weights)

    def side(self, side: int) -> tuple[Any, ...]:
        """table_ptr, direct_ptr and its three strides."""
        direct = self._sides[0 if side == TARGET else 1]
        return (self._table, direct, *direct.stride())


def _pointer_table(target: Sequence[Tensor], reference: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """[N, COLUMNS] int64 on the layers' device, without waiting for it."""
    rows = []
    for h_tgt, h_ref, weight in zip(target, reference, weights, strict=True):
        bits = struct.unpack("<i", struct.pack("<f", weight))[0]
        rows.append([h_tgt.data_ptr(), *h_tgt.stride(), h_ref.data_ptr(), *h_ref.stride(), bits])
    table = torch.tensor(rows, dtype=torch.int64)
    device = target[0].device
    if device.type == "cpu":
        return table
    pinned = table.pin_memory()  # a pageable copy would make the host wait
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _CAPTURED.append(pinned)
    return pinned.to(device, non_blocking=True)
