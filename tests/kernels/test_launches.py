"""How many kernels a call launches, counted without a GPU.

Ours are counted by the stub driver: Triton's own launcher ran, and a driver that does nothing was called so often. PyTorch's
are the ATen operators that would launch a kernel or a copy on a GPU, each once (out-of-place `masked_fill` twice, since it
copies first). What counts: arithmetic, comparisons, reductions, casts and copies that happen, fills (`zeros`, `ones_like`), the
copy of the pointer table to the device. What does not: views, metadata, and memory that is only reserved (`empty`). The
operators run inside ours count as well. Nothing depends on sizes, so the sizes are small.

These numbers are properties of the code, and docs/performance.md and docs/kernels.md state them. A change that alters one
changes it here and there in the same commit, and says in its message why; `python -m
tests.kernels.launch_worker --names` (without TRITON_INTERPRET) lists the launches by name.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from tests import PATIENCE, ROOT

SIMILARITY = ["_pool_kernel", "_unit_kernel", "_compare_kernel", "_average_kernel"]
STREAMED = ["_pool_layer_kernel", "_compare_layer_kernel"]  # of a layer
AVERAGE = "_average_layers_kernel"
MASK = ["_entropy_kernel", "_field_kernel"]
FORWARD = ["_forward_kernel", "_finish_kernel"]
RESIDUAL = [*FORWARD, "_backward_kernel"]

# Ours by name and in order; PyTorch's by number.
EXPECTED = {
    "cross_layer_similarity": (SIMILARITY, 1),
    "cross_layer_similarity, 1 layer": ([*STREAMED, AVERAGE], 0),
    "cross_layer_similarity, max": (["_norm_kernel", "_norm_kernel", "_dense_kernel"], 1),
    "accumulator, first update": (STREAMED, 0),
    "accumulator, next update": (STREAMED, 0),
    "accumulator, result": ([AVERAGE], 0),
    "topk_mask": (["_topk_kernel"], 0),
    "topk_mask, k tensor": (["_topk_kernel"], 0),
    "structure_field": (["_topk_kernel", "_structure_kernel"], 0),
    "structure_field, k tensor": (["_topk_kernel", "_structure_kernel"], 0),
    "structure_field, float prior": (["_topk_kernel", "_structure_kernel"], 0),
    "patch_entropy": (["_entropy_kernel"], 0),
    "patch_entropy, normalized": (["_entropy_kernel", "_normalize_kernel"], 0),
    "fuse_focus": (["_fuse_kernel"], 0),
    "focus_mask": (MASK, 1),
    "estimate_alignment": (["_estimate_kernel"], 0),
    "focus_mask, estimate": (MASK, 4),
    "residual, forward": (FORWARD, 0),
    "residual of subjects, forward and backward": (RESIDUAL, 0),
    "residual, forward and backward": (RESIDUAL, 0),
    "loss, forward": (FORWARD, 8),
    "loss, forward and backward": (RESIDUAL, 13),
    "step at once, 3 layers": ([*SIMILARITY, *MASK, *RESIDUAL], 15),
    "step at once, 5 layers": ([*SIMILARITY, *MASK, *RESIDUAL], 15),
    "step streamed, 3 layers": ([*STREAMED * 3, AVERAGE, *MASK, *RESIDUAL], 14),
    "step streamed, 5 layers": ([*STREAMED * 5, AVERAGE, *MASK, *RESIDUAL], 14),
}


@pytest.fixture(scope="module")
def counted() -> dict[str, dict[str, list[str]]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # counted the same where there is a GPU
    command = [sys.executable, "-m", "tests.kernels.launch_worker"]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def test_every_case_is_expected(counted):
    assert list(counted) == list(EXPECTED)


@pytest.mark.parametrize("case", EXPECTED)
def test_launches(counted, case):
    ours, of_torch = EXPECTED[case]
    assert counted[case]["ours"] == ours
    assert len(counted[case]["torch"]) == of_torch, " ".join(counted[case]["torch"])


def test_the_documentation_states_these_numbers():
    """Where a document speaks of a step's launches, it has the numbers above."""
    performance = (ROOT / "docs" / "performance.md").read_text()
    kernels = (ROOT / "docs" / "kernels.md").read_text()
    (ours, of_torch), (streamed, of_torch_streamed) = EXPECTED["step at once, 3 layers"], EXPECTED["step streamed, 3 layers"]
    rest = len(streamed) - 3 * len(STREAMED)
    at_once = f"{len(ours)} of our own kernels and {of_torch} of PyTorch's at once"
    layer_by_layer = f"{len(STREAMED)} N + {rest} and {of_torch_streamed} streamed"
    for text in (performance, kernels):
        assert at_once in re.sub(r"\s+", " ", text)
        assert layer_by_layer in re.sub(r"\s+", " ", text)
