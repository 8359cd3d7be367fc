"""What a compiler made of a kernel, read from its machine code: registers, spills, loads, and the occupancy that follows.

NVIDIA figures come from the cubin with the cuobjdump and nvdisasm that ship inside the triton wheel, AMD figures from the
assembly.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

# Shared memory of a multiprocessor in KiB, of which each resident block takes one more for the system.
SHARED_KIB = {"sm_80": 164, "sm_90": 228, "sm_100": 228}
MAX_THREADS, MAX_BLOCKS, REGISTER_FILE = 2048, 32, 65536  # of a multiprocessor, on all three

_LOAD = re.compile(r"\b(?:LDG|LDGSTS)\.E\S*")
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@dataclass(frozen=True)
class Figures:
    """Of one compiled kernel.

    registers: per thread (AMD: vector registers). spills: local-memory instructions (AMD: spilled vector registers).
    wide_loads: 16-byte global loads. tensor_cores, fp64: instructions. barriers: of a block, as they stand in the code, not as
    often as they run. instructions: all. loop: instructions of the longest innermost loop, 0 without one. blocks: of a
    multiprocessor at the same time. in_flight: bytes that these blocks ask of memory before they use the first, at most. The
    last three are None on AMD.
    """

    registers: int
    spills: int
    wide_loads: int
    tensor_cores: int
    fp64: int
    barriers: int
    instructions: int
    blocks: int | None = None
    in_flight: int | None = None
    loop: int | None = None


def nvidia_figures(cubin: bytes, arch: str, threads: int, shared: int, num_stages: int) -> Figures:
    """Figures of a cubin for "sm_80", "sm_90" or "sm_100", launched with so many threads and bytes of shared memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([_tool("cuobjdump"), "-res-usage", file.name], check=True, capture_output=True, text=True)
        assembly = subprocess.run([_tool("nvdisasm"), "-c", file.name], check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+)", usage.stdout + usage.stderr)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage reports no register count: {usage.stdout}{usage.stderr}")
    registers = int(found[1])
    blocks = resident_blocks(arch, registers, threads, shared)
    instructions, loops = _instructions(assembly)
    return Figures(
        registers=registers,
        spills=len(re.findall(r"\b(?:LDL|STL)\b", assembly)),
        wide_loads=len(re.findall(r"\b(?:LDG|LDGSTS)\.E(?:\.\w+)*\.128\b", assembly)),
        tensor_cores=len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA|UTCQMMA)\b", assembly)),
        fp64=len(re.findall(r"\b(?:DADD|DMUL|DFMA|DSETP|F2F\.F64\S*|I2F\.F64\S*)", assembly)),
        barriers=len(re.findall(r"\bBAR\.(?:SYNC|RED|ARV)\b", assembly)),
        instructions=_size(instructions),
        blocks=blocks,
        in_flight=blocks * threads * _bytes_ahead(instructions, loops, num_stages),
        loop=max(map(_size, loops), default=0),
    )


def resident_blocks(arch: str, registers: int, threads: int, shared: int) -> int:
    """Blocks that fit a multiprocessor at the same time, by registers, shared memory and threads."""
    per_warp = -(-registers * 32 // 256) * 256  # registers are given out to warps in units of 256
    warps = REGISTER_FILE // 4 // per_warp * 4  # each of four schedulers has its own part of the file
    by_registers = warps * 32 // threads
    by_shared = SHARED_KIB[arch] * 1024 // (shared + 1024)
    return min(by_registers, by_shared, MAX_THREADS // threads, MAX_BLOCKS)


def _instructions(assembly: str) -> tuple[list[str], list[list[str]]]:
    """Instructions in order, and those of each loop that has none within: from a label to a branch back to it."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in assembly.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(instruction[1])
    loops = []
    for end, text in enumerate(instructions):
        branch = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", text)
        if branch and labels.get(branch[1], end) < end:
            loops.append((labels[branch[1]], end))
    inner = [(a, b) for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]
    return instructions, [instructions[a : b + 1] for a, b in inner]


def _size(instructions: list[str]) -> int:
    return sum(not text.startswith("NOP") for text in instructions)  # NOPs fill lines


def _bytes_ahead(instructions: list[str], loops: list[list[str]], num_stages: int) -> int:
    """Bytes that a thread asks for ahead of their use: one pass of the busiest innermost loop, or all without a loop.

    Asynchronous copies run num_stages - 1 passes ahead.
    """
    return max(_loaded_bytes(part, num_stages) for part in loops or [instructions])


def _loaded_bytes(instructions: list[str], num_stages: int) -> int:
    total = 0
    for instruction in instructions:
        if load := _LOAD.search(instruction):
            modifiers = load[0].split(".")
            width = next((_WIDTHS[m] for m in modifiers if m in _WIDTHS), 4)
            total += width * (num_stages - 1 if modifiers[0] == "LDGSTS" else 1)
    return total


def amd_figures(assembly: str) -> Figures:
    """Figures of AMD assembly."""

    def count(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        if found is None:
            raise RuntimeError(f"the AMD assembly has no .{name}")
        return int(found[1])

    return Figures(
        registers=count("vgpr_count"),
        spills=count("vgpr_spill_count"),
        wide_loads=len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", assembly)),
        tensor_cores=len(re.findall(r"\bv_mfma_f32_\w+", assembly)),
        fp64=len(re.findall(r"\bv_(?:add|mul|fma)_f64\b", assembly)),
        barriers=len(re.findall(r"^\s+s_barrier\b", assembly, re.MULTILINE)),
        instructions=len(re.findall(r"^\s+(?:s|v|ds|global|buffer|flat|scratch)_\w+", assembly, re.MULTILINE)),
    )


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)
