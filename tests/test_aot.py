"""Every launch configuration compiles for every architecture, without a GPU, and does not spill."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from focusdpo_kernels.inspect import FAMILIES, TARGETS, launches


@pytest.mark.parametrize("arch", TARGETS)
def test_compiles_without_spills(arch):
    # A process of its own: kernels that were imported for the interpreter cannot be compiled.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "focusdpo_kernels.inspect", "--arch", arch, "--json"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-3000:]
    compiled = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(compiled) == len(list(launches()))
    assert {c["arch"] for c in compiled} == {arch}
    defined = {name for family in FAMILIES for name in vars(family) if name.endswith("_kernel")}
    assert {c["kernel"] for c in compiled} == defined, "every kernel has a launch configuration that is compiled"
    assert [c for c in compiled if c["spills"]] == []
    assert [c for c in compiled if c["fp64"]] == []
    assert [c for c in compiled if c["registers"] > c["budget"]] == []
    half = [c for c in compiled if "DTYPE=bf16" in c["configuration"] or "DTYPE=fp16" in c["configuration"]]
    products = [c for c in half if c["kernel"] in ("_dense_kernel", "_pool_kernel", "_compare_kernel")]
    assert products and all(c["tensor_cores"] for c in products), "fp16 and bf16 products run on tensor cores"
    if arch != "gfx942":  # which has matrix instructions for fp32 proper
        single = [c for c in compiled if "DTYPE=fp32" in c["configuration"]]
        assert single and not any(c["tensor_cores"] for c in single), "fp32 is not rounded to tf32"
    streaming = [c for c in compiled if c["kernel"] in ("_pool_kernel", "_compare_kernel")]
    streaming = [c for c in streaming if "CONTIGUOUS=True" in c["configuration"]]
    streaming += [c for c in compiled if c["kernel"] in ("_forward_kernel", "_backward_kernel")]
    assert [c for c in streaming if not c["wide_loads"]] == [], "16-byte loads in the streaming loops"
    # What memory delivers in the time of one access, for each multiprocessor: 4.8 TB/s x 0.8 us / 132 on an H200.
    needed = {"sm_80": 16, "sm_90": 32, "sm_100": 48, "gfx942": 0}[arch] * 1024
    fast = [c for c in streaming if "DTYPE=fp32" not in c["configuration"]]
    assert [c for c in fast if (c["in_flight"] or 0) < needed] == [], "enough bytes asked for ahead of their use"
