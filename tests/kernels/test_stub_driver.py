"""The stub driver: Triton's own host path on CPU tensors, in processes of its own, because the other tests interpret."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from focusdpo_kernels.tools import stub_driver
from tests import PATIENCE

SETUP = """
import torch
import focusdpo_kernels
from focusdpo_kernels.tools import stub_driver
"""


def run_python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a process where kernels are compiled; conftest.py has chosen the interpreter for this one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # A GPU machine has its own launches to count; here the stub is what is tested.
    environment |= {"CUDA_VISIBLE_DEVICES": "", **variables}
    command = [sys.executable, "-c", SETUP + textwrap.dedent(code)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)


def run_stub(code: str, **variables: str) -> str:
    run = run_python("stub_driver.install()\n" + textwrap.dedent(code), **variables)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


@pytest.fixture(scope="module")
def public_launches() -> list[str]:
    output = run_stub("""
        from focusdpo_kernels import *

        B, P, Q, D, R, C = 2, 64, 48, 64, 2, 16
        hidden = [torch.randn(B, P + Q, D, dtype=torch.bfloat16) for _ in range(3)]
        target, reference = [h[:, :P] for h in hidden], [h[:, P:] for h in hidden]
        mask = torch.ones(B, R, Q, dtype=torch.bool)
        prior = torch.ones(B, P, dtype=torch.bool)
        images = torch.rand(B, 3, 128, 128)
        scores = torch.randn(B, R, P)
        field = torch.rand(B, P)
        predictions = [torch.randn(B, P, C, requires_grad=i < 2) for i in range(6)]
        streamed = SimilarityAccumulator(mask)

        latents = [torch.randn(B, P, C) for _ in range(4)]

        def residual(weight):
            preference_residual(*predictions, weight).margin.sum().backward()

        calls = {
            "cross_layer_similarity": lambda: cross_layer_similarity(target, reference, mask),
            "cross_layer_similarity max": lambda: cross_layer_similarity(target, reference, mask, pooling="max"),
            "SimilarityAccumulator": lambda: streamed.update(target[0], reference[0]),
            "topk_mask": lambda: topk_mask(scores, 3),
            "structure_field": lambda: structure_field(scores, mask.sum(-1), prior),
            "patch_entropy": lambda: patch_entropy(images, normalize=True),
            "fuse_focus": lambda: fuse_focus(field, torch.rand(B), field, prior),
            "focus_field": lambda: focus_field(scores, mask.sum(-1), prior, field),
            "focus_field_of_images": lambda: focus_field_of_images(scores, mask.sum(-1), prior, images),
            "preference_residual": lambda: residual(field),
            "estimate_alignment": lambda: estimate_alignment(*latents, torch.ones(B)),
        }
        for name, call in calls.items():
            with stub_driver.launches() as names:
                call()
            print(f"{name}: {' '.join(names)}")
        types = {"FocusField", "PreferenceResidual"}
        assert {call.split()[0] for call in calls} | types == set(focusdpo_kernels.__all__)
    """)
    return output.splitlines()


def test_every_public_function_launches(public_launches):
    residual = "_forward_kernel _finish_kernel _backward_kernel"
    assert public_launches == [
        "cross_layer_similarity: _pool_kernel _unit_kernel _compare_kernel _average_kernel",
        "cross_layer_similarity max: _norm_kernel _norm_kernel _dense_kernel",
        "SimilarityAccumulator: _pool_layer_kernel _compare_layer_kernel",
        "topk_mask: _topk_kernel",
        "structure_field: _topk_kernel _structure_kernel",
        "patch_entropy: _entropy_kernel _normalize_kernel",
        "fuse_focus: _fuse_kernel",
        "focus_field: _topk_kernel _field_kernel",
        "focus_field_of_images: _entropy_kernel _field_kernel",
        f"preference_residual: {residual}",
        "estimate_alignment: _estimate_kernel",
    ]


STREAM = """
    from unittest import mock
    from focusdpo_kernels import SimilarityAccumulator, launch, similarity, streamed_similarity

    asked, checked, made = [], [], []
    call, check, make = launch.Launch.__call__, similarity.check_similarity, launch.Launch.__init__

    def watched(self, grid, *args):
        asked.append(self.kernel.__name__)
        return call(self, grid, *args)

    launch.Launch.__call__ = watched
    similarity.check_similarity = lambda *args: checked.append(1) or check(*args)
    hidden = [torch.randn(1, 40, 64, dtype=torch.bfloat16) for _ in range(6)]
    mask = torch.ones(1, 2, 16, dtype=torch.bool)

    def stream(layers):
        asked.clear(), checked.clear()
        accumulator = SimilarityAccumulator(mask)
        with stub_driver.launches() as names:
            for h in layers:
                accumulator.update(h[:, :24], h[:, 24:])
        print(len(names), len(asked), len(checked))
"""


def test_layers_alike_are_checked_and_looked_up_once():
    """Of six layers one is checked and its kernels are looked up; the launches are the same as always."""
    output = run_stub(
        STREAM
        + """
    stream(hidden)
    stream(hidden)
    with mock.patch.object(launch.Launch, "__init__", lambda *args, **kwargs: made.append(1) or make(*args, **kwargs)):
        stream(hidden)
    print(len(made))
    """
    )
    # A new accumulator is a new stream; what its launches are is known to the process.
    assert output.splitlines() == ["12 2 1", "12 2 1", "12 2 1", "0"]


def test_a_layer_unlike_the_last_is_looked_up():
    """Alignment and strides decide which compiled kernel may run: one for 16-byte rows would fault on others."""
    output = run_stub(
        STREAM
        + """
    between = torch.randn(1, 40, 65, dtype=torch.bfloat16)[..., 1:]  # rows that start between 16 bytes
    longer = torch.randn(1, 40, 128, dtype=torch.bfloat16)[..., :64]  # another stride of tokens
    stream([hidden[0], between, hidden[1]])
    stream([hidden[0], hidden[1], longer, longer, hidden[2]])
    stream([hidden[0], hidden[1].float(), hidden[2]])
    """
    )
    # Each kind has launches of its own to go back to; within a kind, other strides are looked up again.
    assert output.splitlines() == ["6 4 1", "10 6 1", "6 4 3"]


def test_a_launch_again_is_of_the_kernel_that_would_be_chosen():
    """What `Relaunch` runs is what Triton's own lookup finds for the same arguments."""
    output = run_stub("""
        from focusdpo_kernels import launch, streamed_similarity

        seen = []
        again = launch.Relaunch.__call__

        def compared(self, key, grid, *args):
            again(self, key, grid, *args)
            seen.append((self._compiled.hash, self._launch(grid, *args).hash))

        launch.Relaunch.__call__ = compared
        from focusdpo_kernels import SimilarityAccumulator

        half, full = torch.bfloat16, torch.float32
        for width, offset, dtype in ((64, 0, half), (64, 1, torch.float16), (50, 0, full), (1, 0, half), (200, 0, half)):
            accumulator = SimilarityAccumulator(torch.ones(1, 2, 16))
            for n in range(3):
                h = torch.randn(1, 40, width + offset + 16 * n).to(dtype)[..., offset : width + offset]
                accumulator.update(h[:, :24], h[:, 24:])
        accumulator = SimilarityAccumulator(torch.ones(1, 2, 16))
        for offset in (0, 1, 0):  # nothing differs but where rows start
            h = torch.randn(1, 40, 66).bfloat16()[..., offset : 64 + offset]
            accumulator.update(h[:, :24], h[:, 24:])
        assert len(seen) == 36 and all(one == other for one, other in seen)
        print(len({one for one, _ in seen}))
    """)
    assert int(output) >= 6


def test_nothing_is_executed():
    output = run_stub("""
        from focusdpo_kernels import fusion, matching

        out = torch.full((1, 8), 7.0)
        ones = torch.ones(1, 8)
        arguments = (ones, ones[:, 0], ones, matching.row_arguments(ones.bool()), out, 8, 1, 0.1, 0.3)
        with stub_driver.launches() as names:
            fusion._fuse_launch()((1, 1), *arguments)
        print(names, out.unique().tolist())
    """)
    assert output.strip() == "['_fuse_kernel'] [7.0]"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("arguments[4] = 'out'", "TypeError .*type: str"),
        ("del arguments[-1]", "TypeError .*missing .*'gamma'"),
        ("arguments[4] = 1.0", "CompilationError .*Unsupported ptr type .*fp32"),
        ("arguments[5] = 2**70", "OverflowError .*too large"),
    ],
)
def test_a_wrong_argument_raises(change, message):
    """What only the host path notices: the interpreter takes some of these as they are."""
    run = run_python(f"""
        import re
        from focusdpo_kernels import fusion, matching

        stub_driver.install()
        out, ones = torch.empty(1, 8), torch.ones(1, 8)
        arguments = [ones, ones[:, 0], ones, matching.row_arguments(ones.bool()), out, 8, 1, 0.1, 0.3]
        {change}
        with stub_driver.launches() as names:
            try:
                fusion._fuse_launch()((1, 1), *arguments)
            except Exception as error:
                text = f"{{type(error).__name__}} {{error}}"
                assert re.search({message!r}, text, re.DOTALL), text
            else:
                raise SystemExit("launched")
        assert names == [], names
    """)
    assert run.returncode == 0, run.stderr[-3000:]


def test_an_empty_grid_reaches_no_driver():
    output = run_stub("""
        from focusdpo_kernels import fusion, matching

        ones = torch.ones(1, 8)
        arguments = (ones, ones[:, 0], ones, matching.row_arguments(ones.bool()), ones, 8, 1, 0.1, 0.3)
        with stub_driver.launches() as names:
            fusion._fuse_launch()((0, 1), *arguments)
        print(names)
    """)
    assert output.strip() == "[]"


def test_a_launch_that_is_not_seen_is_noticed():
    """The list is compared with what the driver counted: a launch past it must not be lost."""
    run = run_python("""
        stub_driver.install()
        with stub_driver.launches():
            stub_driver._library.cuLaunchKernelEx()
    """)
    assert run.returncode != 0
    assert "0 launches were seen ([]), but 1 reached the driver" in run.stderr


def test_launches_of_other_threads_and_nested_lists():
    output = run_stub("""
        import threading
        from focusdpo_kernels import topk_mask

        scores = torch.randn(2, 64)
        with stub_driver.launches() as outer:
            topk_mask(scores, 3)
            with stub_driver.launches() as inner:
                threads = [threading.Thread(target=topk_mask, args=(scores, 3)) for _ in range(8)]
                [thread.start() for thread in threads]
                [thread.join() for thread in threads]
            topk_mask(scores, 3)
        print(len(outer), len(inner))
    """)
    assert output.split() == ["10", "8"]


def test_two_processes_build_at_once(tmp_path):
    code = SETUP + f"from pathlib import Path\nprint(stub_driver._build(Path({str(tmp_path)!r})))"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    both = [subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) for _ in range(2)]
    assert len({process.communicate(timeout=PATIENCE)[0] for process in both}) == 1
    assert [process.returncode for process in both] == [0, 0]
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["libcuda.so.1"], "no scratch is left"


def test_no_cache_is_shared_by_default(tmp_path):
    code = """
        import os
        print(os.environ["TRITON_CACHE_DIR"])
    """
    chosen = {name: value for name, value in os.environ.items() if name != "TRITON_CACHE_DIR"}
    assert "TRITON_CACHE_DIR" not in chosen
    output = run_stub(code, TRITON_HOME=str(tmp_path), TRITON_CACHE_DIR=str(tmp_path / "mine"))
    assert output.strip() == str(tmp_path / "mine")
    if "TRITON_CACHE_DIR" not in os.environ:
        assert run_stub(code, TRITON_HOME=str(tmp_path)).strip() == str(tmp_path / ".triton" / "stub-driver")


def test_refuses_the_interpreter():
    run = run_python("stub_driver.install()", TRITON_INTERPRET="1")
    assert run.returncode != 0
    assert "RuntimeError: stub driver: TRITON_INTERPRET is set" in run.stderr


def test_refuses_without_a_compiler(tmp_path):
    run = run_python("stub_driver.install()", TRITON_CACHE_DIR=str(tmp_path), PATH=str(tmp_path), CC="")
    assert run.returncode != 0
    assert "RuntimeError: stub driver: found no C compiler" in run.stderr


def test_refuses_a_gpu(monkeypatch):
    monkeypatch.setattr(stub_driver.backend, "INTERPRETED", False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(stub_driver.torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RuntimeError, match="a GPU is present"):
        stub_driver.install()


def test_refuses_beside_another_driver(tmp_path):
    """Triton would find the first of that name, and launch into it."""
    run = run_python(
        """
        import ctypes, os
        from pathlib import Path

        ctypes.CDLL(str(stub_driver._build(Path(os.environ["OTHER"]))))
        stub_driver.install()
    """,
        OTHER=str(tmp_path),
    )
    assert run.returncode != 0
    assert "RuntimeError: stub driver: this process has loaded another libcuda.so.1" in run.stderr


def test_counting_needs_the_driver():
    with pytest.raises(RuntimeError, match="call install"), stub_driver.launches():
        pass
