"""Compiles every shipped launch configuration ahead of time, without a GPU, and reads what the compiler made of it.

    python -m focusdpo_kernels.inspect                    # table for all architectures
    python -m focusdpo_kernels.inspect --arch sm_90 --json

NVIDIA figures come from the cubin with the cuobjdump and nvdisasm that ship inside the triton wheel, AMD figures from the
assembly. Spills are local-memory instructions (NVIDIA) or spilled vector registers (AMD); wide loads are 16-byte global
loads; mma are tensor-core instructions.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from focusdpo_kernels import dense_similarity, entropy, fusion, matching, pooled_similarity, residual_kernels
from focusdpo_kernels.backend import INTERPRETED
from focusdpo_kernels.launch import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
FAMILIES = (pooled_similarity, dense_similarity, matching, entropy, fusion, residual_kernels)


# Sizes of real models: layers N, target tokens P, reference tokens Q, width D, subjects R, channels C of a token.
SHAPES = {
    "uno-512": {"N": 19, "P": 1024, "Q": 800, "D": 3072, "R": 2, "C": 64},
    "uno-1024": {"N": 57, "P": 4096, "Q": 1600, "D": 3072, "R": 4, "C": 64},
    "flux2-klein-4b": {"N": 25, "P": 4096, "Q": 8192, "D": 3072, "R": 2, "C": 128},
    "flux2-dev": {"N": 56, "P": 4096, "Q": 8192, "D": 6144, "R": 2, "C": 128},
    "qwen-edit-plus": {"N": 60, "P": 4096, "Q": 8192, "D": 3072, "R": 2, "C": 64},
}


def bytes_moved(N: int, P: int, Q: int, D: int, R: int, C: int) -> dict[str, int]:
    """Bytes of one sample that have to move, each input read and each output written once.

    Hidden states and predictions are bf16, pixels fp32 RGB, scores and masks fp32, priors and reference masks one byte.
    """
    return {
        "similarity": 2 * N * (P + Q) * D + R * Q + 4 * R * P,
        "structure field": 4 * R * P + P + 4 * P,
        "entropy": 4 * 3 * 256 * P + 4 * P,
        "fusion": 4 * P + 4 * P + P + 4 * P,
        "residual forward": 6 * 2 * P * C + 4 * P,
        "residual backward": 4 * 2 * P * C + 4 * P + 2 * 2 * P * C,
    }


@dataclass(frozen=True)
class Compiled:
    """What one launch configuration became on one architecture."""

    arch: str
    kernel: str
    configuration: str
    types: str
    registers: int
    budget: int
    shared_bytes: int
    spills: int
    wide_loads: int
    tensor_cores: int
    fp64: int


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


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _nvidia_figures(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([_tool("cuobjdump"), "-res-usage", file.name], check=True, capture_output=True, text=True)
        assembly = subprocess.run([_tool("nvdisasm"), "-c", file.name], check=True, capture_output=True, text=True).stdout
    registers = re.search(r"REG:(\d+)", usage.stdout + usage.stderr)
    if registers is None:
        raise RuntimeError(f"cuobjdump -res-usage reports no register count: {usage.stdout}{usage.stderr}")
    return {
        "registers": int(registers[1]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", assembly)),
        "wide_loads": len(re.findall(r"\b(?:LDG|LDGSTS)\.E(?:\.\w+)*\.128\b", assembly)),
        "tensor_cores": len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA|UTCQMMA)\b", assembly)),
        "fp64": len(re.findall(r"\b(?:DADD|DMUL|DFMA|DSETP|F2F\.F64\S*|I2F\.F64\S*)", assembly)),
    }


def _amd_figures(assembly: str) -> dict[str, int]:
    def count(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        if found is None:
            raise RuntimeError(f"the AMD assembly has no .{name}")
        return int(found[1])

    return {
        "registers": count("vgpr_count"),
        "spills": count("vgpr_spill_count"),
        "wide_loads": len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", assembly)),
        "tensor_cores": len(re.findall(r"\bv_mfma_f32_\w+", assembly)),
        "fp64": len(re.findall(r"\bv_(?:add|mul|fma)_f64\b", assembly)),
    }


def compile_launch(launch: Launch, arch: str) -> Compiled:
    """Compiles one configuration for "sm_80", "sm_90", "sm_100" or "gfx942"."""
    target = TARGETS[arch]
    compiled: Any = triton.compile(_source(launch), target=target, options=launch.options(target.warp_size))
    figures = _nvidia_figures(compiled.asm["cubin"]) if target.backend == "cuda" else _amd_figures(compiled.asm["amdgcn"])
    types = sorted({t for t in launch.types.values() if t.startswith("*")})
    return Compiled(
        arch=arch,
        kernel=launch.kernel.__name__,
        configuration=launch.label,
        types=" ".join(types),
        budget=getattr(launch.registers, arch),
        shared_bytes=compiled.metadata.shared,
        **figures,
    )


def compile_all(archs: Iterable[str]) -> Iterator[Compiled]:
    """Compiles everything for the given architectures, several at once: most of the time goes to ptxas and the disassembler."""
    jobs = [(launch, arch) for launch in launches() for arch in archs]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(lambda job: compile_launch(*job), jobs)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m focusdpo_kernels.inspect", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", choices=list(TARGETS), help="architecture; may be repeated (default: all)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    arguments = parser.parse_args(argv)
    if INTERPRETED:
        parser.error("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    if not arguments.json:
        print(
            f"{'arch':8}{'registers':>10}{'budget':>8}{'shared':>8}{'spills':>8}{'wide':>6}{'mma':>5}{'fp64':>6}  configuration"
        )
    for c in compile_all(arguments.arch or TARGETS):
        if arguments.json:
            print(json.dumps(asdict(c)), flush=True)
        else:
            figures = (
                f"{c.registers:>10}{c.budget:>8}{c.shared_bytes:>8}{c.spills:>8}{c.wide_loads:>6}{c.tensor_cores:>5}{c.fp64:>6}"
            )
            print(f"{c.arch:8}{figures}  {c.configuration} {c.types}", flush=True)
    if not arguments.json:
        print("\nMiB that have to move per sample")
        moved = {name: bytes_moved(**sizes) for name, sizes in SHAPES.items()}
        print(f"{'':20}" + "".join(f"{name:>16}" for name in SHAPES))
        for kernel in moved["uno-512"]:
            print(f"{kernel:20}" + "".join(f"{sizes[kernel] / 2**20:16.2f}" for sizes in moved.values()))


if __name__ == "__main__":
    main(sys.argv[1:])
