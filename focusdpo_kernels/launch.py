"""How a kernel is launched, in a form that can also be compiled ahead of time.

A launcher and the static checks (tests, `python -m focusdpo_kernels.inspect`) use the same `Launch`, so what is proven
without a GPU is what runs on one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl

TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.uint8: tl.uint8,
}
POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Launch:
    """One compiled variant of a kernel.

    Args:
        kernel: the @triton.jit function.
        constants: its tl.constexpr arguments.
        num_warps, num_stages: warps per program and depth of software pipelining.
        types: Triton types of the arguments that are not 32-bit integers, for ahead-of-time compilation.
        aligned: integer arguments that are multiples of 16 at the named shapes (Triton specialises on that).
    """

    kernel: Any
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int = 2
    types: Mapping[str, str] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()

    def __call__(self, grid: tuple[int, ...], *args: Any) -> None:
        self.kernel[grid](*args, **self.constants, num_warps=self.num_warps, num_stages=self.num_stages)

    @property
    def label(self) -> str:
        constants = ", ".join(f"{name}={value}" for name, value in self.constants.items())
        return f"{self.kernel.__name__}[{constants}; warps={self.num_warps}, stages={self.num_stages}]"


def next_power_of_2(n: int) -> int:
    return int(triton.next_power_of_2(max(n, 1)))
