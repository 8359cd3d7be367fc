"""How a kernel reaches the hidden states of N layers in one launch: through a table of pointers in device memory.

The layers are separate tensors, often slices of a longer sequence; stacking them would cost more than the kernels. A row of the
table describes one layer. Where there is one layer only, it is passed as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from focusdpo_kernels.backend import INTERPRETED
from focusdpo_kernels.launch import TRITON_DTYPES

# Columns of a row: pointer and three strides of the target, and the same of the reference.
TARGET = tl.constexpr(0)
REFERENCE = tl.constexpr(4)
COLUMNS = tl.constexpr(8)
# Types, numbers of subjects and CONTIGUOUS for which the kernels are compiled ahead of time.
SHIPPED = (
    *((dtype, subjects, True) for dtype in (torch.bfloat16, torch.float32) for subjects in (1, 2, 4, 6)),
    *((dtype, 2, False) for dtype in (torch.bfloat16, torch.float32)),
    (torch.float16, 2, True),
)


@triton.jit
def direct_rows(direct_ptr, stride_b, stride_t, stride_d, b, CONTIGUOUS: tl.constexpr):
    """Of a layer that is passed as it is: what `table_rows` returns."""
    stride = tl.cast(stride_t, tl.int64)
    width = tl.cast(stride_d, tl.int64)
    if CONTIGUOUS:
        width = 1
    return direct_ptr + b * stride_b, stride, width


@triton.jit
def table_rows(table_ptr, n, b, SIDE: tl.constexpr, DTYPE: tl.constexpr, CONTIGUOUS: tl.constexpr):
    """Base pointer of layer n's sample b, and its strides along tokens and width (both 64-bit).

    CONTIGUOUS promises unit stride along the width and rows that start on 16 bytes.
    """
    row = table_ptr + n * COLUMNS + SIDE
    base = tl.load(row).to(tl.pointer_type(DTYPE)) + tl.load(row + 1) * b
    stride = tl.load(row + 2)
    width = tl.load(row + 3)
    if CONTIGUOUS:
        base = tl.multiple_of(base, 16)
        stride = tl.multiple_of(stride, 8)
        width = 1
    return base, stride, width


def hidden_constants(dtype: torch.dtype, contiguous: bool) -> dict[str, Any]:
    """Constants of a kernel that multiplies hidden states."""
    # The interpreter's dot takes the bits of bf16 for integers; products of bf16 are exact in fp32 as well.
    upcast = INTERPRETED and dtype == torch.bfloat16
    return {"DTYPE": TRITON_DTYPES[dtype], "CONTIGUOUS": contiguous, "UPCAST": upcast}


def is_vectorizable(layers: Sequence[Tensor]) -> bool:
    """Unit stride along the width, and rows that start on 16 bytes."""
    lanes = 16 // layers[0].element_size()
    return all(
        h.stride(2) == 1 and h.data_ptr() % 16 == 0 and h.stride(0) % lanes == 0 and h.stride(1) % 8 == 0 for h in layers
    )


def pointer_table(target: Sequence[Tensor], reference: Sequence[Tensor]) -> Tensor:
    """[N, COLUMNS] int64 on the layers' device, without waiting for it.

    Args:
        target, reference: N tensors each, of one shape, dtype and device.
    """
    pairs = zip(target, reference, strict=True)
    rows = [[number for h in pair for number in (h.data_ptr(), *h.stride())] for pair in pairs]
    device = target[0].device
    if device.type == "cpu":
        return torch.tensor(rows, dtype=torch.int64, device=device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return written_table(rows, device)
    pinned = torch.tensor(rows, dtype=torch.int64, device="cpu").pin_memory()  # a pageable copy would make the host wait
    return pinned.to(device, non_blocking=True)


def written_table(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """The same table without a copy of host memory, which a CUDA graph would read again at every replay.

    The numbers are arguments of a few launches and so part of the graph: nothing has to be kept alive for it.
    """
    table = torch.zeros((len(rows), len(rows[0])), dtype=torch.int64, device=device)
    torch._foreach_add_(list(table.view(-1).unbind()), [number for row in rows for number in row])
    return table
