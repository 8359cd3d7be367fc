"""Compiles every shipped launch configuration ahead of time, without a GPU, and reads what the compiler made of it.

    python -m focusdpo_kernels.tools.inspect                    # table for all architectures
    python -m focusdpo_kernels.tools.inspect --arch sm_90 --json

The table explains its columns, and ends in a verdict: what `faults` finds in a configuration, the tests refuse as well. What a
GPU needs of these figures is in docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from focusdpo_kernels import (
    dense_similarity,
    entropy,
    estimate,
    fusion,
    matching,
    pooled_similarity,
    residual_kernels,
    streamed_similarity,
)
from focusdpo_kernels.backend import INTERPRETED
from focusdpo_kernels.launch import Launch
from focusdpo_kernels.shapes import SHAPES, bytes_moved
from focusdpo_kernels.tools.disassembly import Figures, amd_figures, nvidia_figures

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SIMILARITY = ("_pool_kernel", "_compare_kernel", "_pool_layer_kernel", "_compare_layer_kernel")
PRODUCTS = ("_dense_kernel", *SIMILARITY)
STREAMING = (*SIMILARITY, "_forward_kernel", "_backward_kernel")
# What memory delivers in the time of one access, for each multiprocessor: 4.8 TB/s x 0.8 us / 132 on an H200.
KIB_AHEAD = {"sm_80": 16, "sm_90": 32, "sm_100": 48, "gfx942": 0}
FAMILIES = (pooled_similarity, streamed_similarity, dense_similarity, matching, entropy, estimate, fusion, residual_kernels)


@dataclass(frozen=True)
class Compiled:
    """What one launch configuration became on one architecture."""

    arch: str
    kernel: str
    configuration: str
    types: str
    dtype: str | None  # of the hidden states, for kernels that take one: "fp16", "bf16" or "fp32"
    contiguous: bool  # rows that allow wide loads
    budget: int
    shared_bytes: int
    figures: Figures


def launches() -> Iterator[Launch]:
    """Every launch configuration of the library, each once."""
    every = (launch for family in FAMILIES for launch in family.launches())
    yield from {(launch.label, str(launch.types)): launch for launch in every}.values()


def _source(launch: Launch) -> ASTSource:
    names = launch.kernel.arg_names
    constants = {**launch.constants, **{name: None for name in names if name in launch.types and launch.types[name] is None}}
    signature: dict[str, Any] = {}
    attributes = {}
    for i, name in enumerate(names):
        leaves, paths = _leaves(name, "constexpr" if name in constants else launch.types.get(name, "i32"), i)
        for leaf, path in paths.items():
            if leaf in launch.ones:
                constants[path], leaves[leaf] = 1, "constexpr"
            elif leaves[leaf].startswith("*") or leaf in launch.aligned or name in launch.aligned:
                attributes[path] = [["tt.divisibility", 16]]
        kind = launch.types.get(name)
        signature[name] = type(kind)(*leaves.values()) if isinstance(kind, tuple) else leaves[name]
    return ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)


def _leaves(name: str, kind: Any, i: int) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """Types of an argument's fields by "name.field", and where they stand; of a plain argument by its name."""
    if isinstance(kind, str):
        return {name: kind}, {name: (i,)}
    fields = [f"{name}.{field}" for field in kind._fields]
    return dict(zip(fields, kind, strict=True)), {field: (i, j) for j, field in enumerate(fields)}


def _pointers(launch: Launch) -> str:
    """The types of a launch's pointers, each once."""
    types = [part for kind in launch.types.values() for part in (kind if isinstance(kind, tuple) else (kind,))]
    return " ".join(sorted({part for part in types if part is not None and part.startswith("*")}))


def compile_launch(launch: Launch, arch: str) -> Compiled:
    """Compiles one configuration for "sm_80", "sm_90", "sm_100" or "gfx942"."""
    target = TARGETS[arch]
    compiled: Any = triton.compile(_source(launch), target=target, options=launch.options(target.warp_size))
    shared = compiled.metadata.shared
    if target.backend == "cuda":
        figures = nvidia_figures(compiled.asm["cubin"], arch, launch.threads, shared, launch.num_stages)
    else:
        figures = amd_figures(compiled.asm["amdgcn"])
    return Compiled(
        arch=arch,
        kernel=launch.kernel.__name__,
        configuration=launch.label,
        types=_pointers(launch),
        dtype=str(launch.constants["DTYPE"]) if "DTYPE" in launch.constants else None,
        contiguous=launch.constants.get("CONTIGUOUS", True),
        budget=getattr(launch.registers, arch),
        shared_bytes=shared,
        figures=figures,
    )


def compile_all(archs: Iterable[str]) -> Iterator[Compiled]:
    """Compiles everything for the given architectures, several at once: most of the time goes to ptxas and the disassembler."""
    jobs = [(launch, arch) for launch in launches() for arch in archs]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(lambda job: compile_launch(*job), jobs)


def faults(c: Compiled) -> list[str]:
    """What is wrong with a compiled configuration; empty where nothing is."""
    f = c.figures
    found = []
    if f.registers > c.budget:
        found.append(f"{f.registers} registers, over its budget of {c.budget}")
    if f.spills:
        found.append(f"{f.spills} spills")
    if f.fp64:
        found.append(f"{f.fp64} fp64 instructions")
    if c.kernel in PRODUCTS and c.dtype in ("fp16", "bf16") and not f.tensor_cores:
        found.append(f"{c.dtype} products not on tensor cores")
    if c.dtype == "fp32" and f.tensor_cores and c.arch != "gfx942":  # which has matrix instructions for fp32 proper
        found.append("fp32 products rounded to tf32 on tensor cores")
    if c.kernel in STREAMING and c.contiguous:
        if not f.wide_loads:
            found.append("no 16-byte loads")
        needed = KIB_AHEAD[c.arch]
        if c.dtype != "fp32" and (f.in_flight or 0) < needed * 1024:
            found.append(f"{(f.in_flight or 0) / 1024:.0f} KiB asked for ahead of their use, {needed} needed")
    return found


def verdict(compiled: Sequence[Compiled]) -> tuple[bool, str]:
    """Whether every configuration is without fault, and a sentence that says so or names those that are not."""
    per_arch = Counter(c.arch for c in compiled)
    what = f"{max(per_arch.values(), default=0)} configurations on {len(per_arch)} architectures"
    bad = [(c, found) for c in compiled if (found := faults(c))]
    if not bad:
        return True, (
            f"{what}: all within their register budgets, no spills, no fp64, tensor cores, wide loads and enough bytes ahead "
            "where required"
        )
    lines = [f"  {c.arch} {c.configuration} {c.types}: {'; '.join(found)}" for c, found in bad]
    return False, "\n".join([f"{what}: {len(bad)} of {len(compiled)} compiled have faults", *lines])


LEGEND = """
registers     per thread (AMD: vector registers)
budget        at most so many, stated beside the launch configuration
shared        bytes of shared memory of a block
spills        local-memory instructions (AMD: spilled vector registers)
wide          16-byte loads from global memory
mma           tensor-core (matrix) instructions
fp64          double-precision instructions
barriers      of a block, as they stand in the code: one in a loop counts once
instructions  of the kernel, all
loop          those of its longest innermost loop (NVIDIA)
blocks        fit a multiprocessor at the same time, by registers, shared memory and threads (NVIDIA)
ahead         KiB that these blocks ask of memory before they use the first, at most (NVIDIA)
"""
HEADER = "registers  budget  shared  spills  wide   mma  fp64  barriers  instructions  loop  blocks   ahead"


def _columns(c: Compiled) -> str:
    f = c.figures
    ahead = "-" if f.in_flight is None else f"{f.in_flight / 1024:.0f}"
    code = (f.registers, c.budget, c.shared_bytes, f.spills, f.wide_loads, f.tensor_cores, f.fp64, f.barriers, f.instructions)
    loop = "-" if f.loop is None else f.loop
    widths = (9, 8, 8, 8, 6, 6, 6, 10, 14, 6, 8, 8)
    return "".join(f"{value:>{width}}" for value, width in zip((*code, loop, f.blocks or "-", ahead), widths, strict=True))


def _print_bytes() -> None:
    print("\nMiB that have to move per sample")
    moved = {name: bytes_moved(**sizes) for name, sizes in SHAPES.items()}
    print(f"{'':20}" + "".join(f"{name:>16}" for name in SHAPES))
    for kernel in moved["uno-512"]:
        print(f"{kernel:20}" + "".join(f"{sizes[kernel] / 2**20:16.2f}" for sizes in moved.values()))


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status, 1 where a configuration has a fault."""
    parser = argparse.ArgumentParser(prog="python -m focusdpo_kernels.tools.inspect", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", choices=list(TARGETS), help="architecture; may be repeated (default: all)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    arguments = parser.parse_args(argv)
    if INTERPRETED:
        parser.error("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    if not arguments.json:
        print(f"torch {torch.__version__}, triton {triton.__version__}\n{LEGEND}\n{'arch':8}{HEADER}  configuration")
    compiled = []
    for c in compile_all(arguments.arch or TARGETS):
        compiled.append(c)
        row = asdict(c)
        row = {**row, **row.pop("figures"), "faults": faults(c)}
        print(json.dumps(row) if arguments.json else f"{c.arch:8}{_columns(c)}  {c.configuration} {c.types}", flush=True)
    good, sentence = verdict(compiled)
    if not arguments.json:
        _print_bytes()
        print(f"\n{sentence}")
    elif not good:
        print(sentence, file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
