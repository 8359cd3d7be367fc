"""How a kernel is launched, in a form that can also be compiled ahead of time.

A launcher and the static checks (tests, `python -m focusdpo_kernels.tools.inspect`) use the same `Launch`, so what is proven
without a GPU is what runs on one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton.language as tl

TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}
POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
}

WARP_SIZE = 64 if torch.version.hip else 32


class Registers(NamedTuple):
    """Registers per thread by architecture (AMD: vector registers), at most so many in every supported version of Triton."""

    sm_80: int
    sm_90: int
    sm_100: int
    gfx942: int


@dataclass(frozen=True)
class Launch:
    """One compiled variant of a kernel.

    Args:
        kernel: the @triton.jit function.
        constants: its tl.constexpr arguments.
        threads: per program; a power of two. So many warps of 32 or 64, by device, that a thread has the same work.
        registers: budget, at most so many per thread on each architecture.
        num_stages: depth of software pipelining.
        types: Triton types of the arguments that are not 32-bit integers, for ahead-of-time compilation; None where None is
            passed, and a NamedTuple of types for a NamedTuple.
        aligned, ones: integer arguments that are multiples of 16, or 1, at the named shapes (Triton specialises on both); a
            NamedTuple's as "argument.field", or all of them by the argument's name.
        programs: so many at least are to fit a multiprocessor of NVIDIA's by their registers; the compiler has to keep to that.
        fp_fusion: whether a * b + c may become one rounding. Stated for every kernel, because Triton's default changes.
    """

    kernel: Any
    constants: Mapping[str, Any]
    threads: int
    registers: Registers
    num_stages: int = 2
    programs: int = 1
    types: Mapping[str, str | tuple[Any, ...] | None] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    ones: tuple[str, ...] = ()
    fp_fusion: bool = True

    def __call__(self, grid: tuple[int, ...], *args: Any) -> Any:
        """Returns Triton's compiled kernel; None from the interpreter."""
        return self.kernel[grid](*args, **self.constants, **self.options(WARP_SIZE))

    def options(self, warp_size: int) -> dict[str, Any]:
        """What the compiler is told, for warps of 32 (NVIDIA) or 64 (AMD) threads."""
        options = {
            "num_warps": max(self.threads // warp_size, 1),
            "num_stages": self.num_stages,
            "enable_fp_fusion": self.fp_fusion,
        }
        if warp_size == 32:
            # Left alone, ptxas aims at an occupancy and spills a few registers for it.
            options["maxnreg"] = min(255, 65536 // (self.threads * self.programs))
        return options

    @property
    def label(self) -> str:
        constants = ", ".join(f"{name}={value}" for name, value in self.constants.items())
        return f"{self.kernel.__name__}[{constants}; threads={self.threads}, stages={self.num_stages}]"


class Relaunch:
    """A launch that comes again and again: Triton looks for the compiled kernel only where `key` differs from the last call's.

    That search takes Triton some 10 us of host time, more than all the rest. Which compiled kernel serves a call depends on its
    device, the types of its arguments, whether a pointer is a multiple of 16, and of integers that are specialised on, whether
    they are 1 or a multiple of 16.

    Args:
        launch: its kernel takes the constants last.
    """

    def __init__(self, launch: Launch) -> None:
        names = launch.kernel.arg_names
        assert set(names[-len(launch.constants) :]) == set(launch.constants)
        self._launch = launch
        self._constants = [launch.constants[name] for name in names if name in launch.constants]
        self._key: object = None
        self._compiled: Any = None

    def __call__(self, key: object, grid: tuple[int, int, int], *args: Any) -> None:
        """`key` differs wherever anything does on which the choice of the compiled kernel depends."""
        if self._compiled is not None and key == self._key:
            self._compiled[grid](*args, *self._constants)
            return
        compiled = self._launch(grid, *args)
        # On AMD the choice depends on the size of a tensor's memory as well.
        self._compiled = compiled if compiled is not None and compiled.metadata.target.backend == "cuda" else None
        self._key = key


def by_sample(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor [B, ...] whose samples are contiguous each, as they are in a slice of a batch; otherwise a copy."""
    return tensor if tensor.numel() == 0 or tensor[0].is_contiguous() else tensor.contiguous()


# Triton has both, wrapped for use in kernels: on the host they cost microseconds.
def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
