"""Every launch configuration compiles for every architecture, without a GPU, and does not spill.

FOCUSDPO_LONG_TESTS=1 and `make inspect` compile all for each of them; otherwise each is compiled for one of NVIDIA's, and
a third for AMD's.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from focusdpo_kernels.tools import inspect
from focusdpo_kernels.tools.disassembly import Figures
from focusdpo_kernels.tools.inspect import FAMILIES, TARGETS, launches
from tests.conftest import LONG

# Of the configurations every COUNT-th from START on, and one of each kernel that is none of them.
PART = """
import sys
from focusdpo_kernels.tools import inspect
every = list(inspect.launches())
part = every[{start}::{count}]
first = {{launch.kernel.__name__: launch for launch in every[::-1] + part}}
part += [launch for launch in first.values() if launch not in part]
inspect.launches = lambda: part
sys.exit(inspect.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("arch", TARGETS)
def test_compiles_without_spills(arch):
    # A process of its own: kernels that were imported for the interpreter cannot be compiled.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    count = 1 if LONG else 3
    start = list(TARGETS).index(arch) % count
    command = [sys.executable, "-c", PART.format(start=start, count=count), "--arch", arch, "--json"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode in (0, 1), run.stderr[-3000:]  # 1: there are faults, which are named below
    compiled = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(compiled) >= len(list(launches())) / count
    assert {c["arch"] for c in compiled} == {arch}
    defined = {name for family in FAMILIES for name in vars(family) if name.endswith("_kernel")}
    assert {c["kernel"] for c in compiled} == defined, "every kernel has a launch configuration that is compiled"
    assert [(c["configuration"], c["faults"]) for c in compiled if c["faults"]] == []
    # The criteria look at something: there are products of either kind, and streaming kernels with rows for wide loads.
    assert {c["dtype"] for c in compiled if c["kernel"] in inspect.PRODUCTS} == {"fp16", "bf16", "fp32"}
    assert {c["kernel"] for c in compiled if c["contiguous"] and c["wide_loads"]} >= set(inspect.STREAMING)
    # The threads of a block meet where they add up, and what is counted by name is among all instructions.
    assert all(c["barriers"] for c in compiled if c["kernel"] in ("_structure_kernel", "_forward_kernel"))
    if arch != "gfx942":
        # A Gaussian is four instructions, and 32 of them with their pixels at most 220. Before there were 376 in the loop.
        kde = [c for c in compiled if "HISTOGRAM=False" in c["configuration"] and "CHANNELS=3" in c["configuration"]]
        rows = [c for c in kde if "*i64" not in c["types"]]  # without a selection
        assert len(rows) == 5 if count == 1 else rows
        for c in rows:
            pixels, bins = (int(re.search(rf"{name}=(\d+)", c["configuration"])[1]) for name in ENTROPY_TILE)
            values = pixels * bins // 32  # in a thread, as each patch has a warp
            assert 4 * values <= c["loop"] <= 220 * values / 32, c["configuration"]
            assert c["instructions"] - c["loop"] <= 200, "what begins and ends a program of four patches"
    named = ("wide_loads", "tensor_cores", "barriers")
    assert all(c["instructions"] > sum(c[name] for name in named) for c in compiled)


ENTROPY_TILE = ("\\bBLOCK", "BINS_PAD")


GOOD = inspect.Compiled(
    arch="sm_90",
    kernel="_pool_kernel",
    configuration="_pool_kernel[R=2]",
    types="*bf16",
    dtype="bf16",
    contiguous=True,
    budget=112,
    shared_bytes=0,
    figures=Figures(112, 0, 4, 8, 0, 2, 500, 5, 32 * 1024),
)


def with_figures(**changes: int) -> inspect.Compiled:
    return replace(GOOD, figures=replace(GOOD.figures, **changes))


@pytest.mark.parametrize(
    ("compiled", "found"),
    [
        (GOOD, []),
        (with_figures(registers=113), ["113 registers, over its budget of 112"]),
        (with_figures(spills=1), ["1 spills"]),
        (with_figures(fp64=2), ["2 fp64 instructions"]),
        (with_figures(tensor_cores=0), ["bf16 products not on tensor cores"]),
        (replace(GOOD, dtype="fp32"), ["fp32 products rounded to tf32 on tensor cores"]),
        (replace(GOOD, dtype="fp32", arch="gfx942"), []),
        (with_figures(wide_loads=0), ["no 16-byte loads"]),
        (replace(with_figures(wide_loads=0), contiguous=False), []),
        (with_figures(in_flight=31 * 1024), ["31 KiB asked for ahead of their use, 32 needed"]),
        (replace(GOOD, arch="sm_100"), ["32 KiB asked for ahead of their use, 48 needed"]),
        (replace(with_figures(wide_loads=0, in_flight=0), kernel="_unit_kernel"), []),
        (with_figures(registers=200, spills=3), ["200 registers, over its budget of 112", "3 spills"]),
    ],
)
def test_faults(compiled, found):
    assert inspect.faults(compiled) == found


@pytest.mark.parametrize("as_json", [False, True])
def test_the_verdict_names_what_fails(monkeypatch, capsys, as_json):
    spilling = replace(with_figures(spills=3), arch="sm_80", configuration="_pool_kernel[R=6]")
    rows = [GOOD]
    monkeypatch.setattr(inspect, "INTERPRETED", False)
    monkeypatch.setattr(inspect, "compile_all", lambda archs: iter(rows))
    options = ["--json"] if as_json else []
    assert inspect.main(options) == 0
    printed = capsys.readouterr()
    if not as_json:
        assert printed.out.splitlines()[-1].startswith("1 configurations on 1 architectures: all within their register budgets")
    rows.append(spilling)
    assert inspect.main(options) == 1
    printed = capsys.readouterr()
    verdict = (printed.err if as_json else printed.out).splitlines()[-2:]
    assert verdict == [
        "1 configurations on 2 architectures: 1 of 2 compiled have faults",
        "  sm_80 _pool_kernel[R=6] *bf16: 3 spills",
    ]


def test_the_table_explains_its_columns(monkeypatch, capsys):
    monkeypatch.setattr(inspect, "INTERPRETED", False)
    monkeypatch.setattr(inspect, "compile_all", lambda archs: iter([GOOD]))
    inspect.main([])
    explained = {line.split()[0] for line in inspect.LEGEND.split("\n") if line}
    assert explained == set(inspect.HEADER.split())
    lines = capsys.readouterr().out.splitlines()
    header = next(line for line in lines if line.startswith("arch"))
    row = next(line for line in lines if line.startswith("sm_90"))
    # Every number ends where its heading does.
    assert [len(row[: header.index(name) + len(name)].split()) for name in header.split()[1:-1]] == list(range(2, 14))
