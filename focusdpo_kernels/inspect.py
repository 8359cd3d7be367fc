"""Compiles every shipped launch configuration ahead of time, without a GPU, and reads what the compiler made of it.

    python -m focusdpo_kernels.inspect                    # table for all architectures
    python -m focusdpo_kernels.inspect --arch sm_90 --json

Spills are local-memory instructions (NVIDIA) or spilled vector registers (AMD); wide loads are 16-byte global loads; mma are
tensor-core instructions; blocks fit a multiprocessor at the same time, by registers, shared memory and threads; ahead are the
KiB that they ask of memory before they use the first, at most. What a GPU needs of those is in docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from focusdpo_kernels import dense_similarity, entropy, fusion, matching, pooled_similarity, residual_kernels
from focusdpo_kernels.backend import INTERPRETED
from focusdpo_kernels.disassembly import Figures, amd_figures, nvidia_figures
from focusdpo_kernels.launch import Launch
from focusdpo_kernels.shapes import SHAPES, bytes_moved

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
FAMILIES = (pooled_similarity, dense_similarity, matching, entropy, fusion, residual_kernels)


@dataclass(frozen=True)
class Compiled:
    """What one launch configuration became on one architecture."""

    arch: str
    kernel: str
    configuration: str
    types: str
    budget: int
    shared_bytes: int
    figures: Figures


def launches() -> Iterator[Launch]:
    """Every launch configuration of the library, each once."""
    every = (launch for family in FAMILIES for launch in family.launches())
    yield from {(launch.label, str(launch.types)): launch for launch in every}.values()


def _source(launch: Launch) -> ASTSource:
    names = launch.kernel.arg_names
    constants = {**launch.constants, **dict.fromkeys(launch.ones, 1)}
    signature = {name: "constexpr" if name in constants else launch.types.get(name, "i32") for name in names}
    aligned = [name for name in names if signature[name].startswith("*") or name in launch.aligned]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    return ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)


def compile_launch(launch: Launch, arch: str) -> Compiled:
    """Compiles one configuration for "sm_80", "sm_90", "sm_100" or "gfx942"."""
    target = TARGETS[arch]
    compiled: Any = triton.compile(_source(launch), target=target, options=launch.options(target.warp_size))
    shared = compiled.metadata.shared
    if target.backend == "cuda":
        figures = nvidia_figures(compiled.asm["cubin"], arch, launch.threads, shared, launch.num_stages)
    else:
        figures = amd_figures(compiled.asm["amdgcn"])
    types = sorted({t for t in launch.types.values() if t.startswith("*")})
    return Compiled(
        arch=arch,
        kernel=launch.kernel.__name__,
        configuration=launch.label,
        types=" ".join(types),
        budget=getattr(launch.registers, arch),
        shared_bytes=shared,
        figures=figures,
    )


def compile_all(archs: Iterable[str]) -> Iterator[Compiled]:
    """Compiles everything for the given architectures, several at once: most of the time goes to ptxas and the disassembler."""
    jobs = [(launch, arch) for launch in launches() for arch in archs]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(lambda job: compile_launch(*job), jobs)


HEADER = "registers  budget  shared  spills  wide   mma  fp64  blocks   ahead"


def _columns(c: Compiled) -> str:
    f = c.figures
    ahead = "-" if f.in_flight is None else f"{f.in_flight / 1024:.0f}"
    values = (f.registers, c.budget, c.shared_bytes, f.spills, f.wide_loads, f.tensor_cores, f.fp64, f.blocks or "-", ahead)
    widths = (9, 8, 8, 8, 6, 6, 6, 8, 8)
    return "".join(f"{value:>{width}}" for value, width in zip(values, widths, strict=True))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m focusdpo_kernels.inspect", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", choices=list(TARGETS), help="architecture; may be repeated (default: all)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    arguments = parser.parse_args(argv)
    if INTERPRETED:
        parser.error("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    if not arguments.json:
        print(f"{'arch':8}{HEADER}  configuration")
    for c in compile_all(arguments.arch or TARGETS):
        row = asdict(c)
        row = {**row, **row.pop("figures")}
        print(json.dumps(row) if arguments.json else f"{c.arch:8}{_columns(c)}  {c.configuration} {c.types}", flush=True)
    if not arguments.json:
        print("\nMiB that have to move per sample")
        moved = {name: bytes_moved(**sizes) for name, sizes in SHAPES.items()}
        print(f"{'':20}" + "".join(f"{name:>16}" for name in SHAPES))
        for kernel in moved["uno-512"]:
            print(f"{kernel:20}" + "".join(f"{sizes[kernel] / 2**20:16.2f}" for sizes in moved.values()))


if __name__ == "__main__":
    main(sys.argv[1:])
