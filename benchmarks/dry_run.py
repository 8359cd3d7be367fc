"""Everything of the GPU plans but the device: bash benchmarks/gpu.sh --dry-run.

It fails when a run would: an import that is missing where only the libraries of a bare GPU machine are, a launch that Triton's
real launcher refuses or that does not compile for sm_90, a part that can never have its time.

    plans     every part's limit fits its plan
    imports   every part is collected or imported without the packages that such a machine lacks, which are blocked
    kernels   ours at every shape and in every variant that the plans measure, through the stub driver
    steps     the shapes of full-size models as their blocks hand them to the taps, through the stub driver
    tests     the kernel tests, through the stub driver: what they compare means nothing there, what they launch does
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._pytree import tree_map

from benchmarks.gpu import KERNEL_TESTS, PLANS, describe
from benchmarks.supervise import Part

# What a bare GPU machine with PyTorch lacks, and of it what the parts with training steps cannot do without.
ABSENT = ("diffusers", "jsonargparse", "docstring_parser", "typeshed_client", "plotly", "hypothesis")
CARRIED = ("diffusers",)
# Absent as well, and needed by nothing that the plans run.
ALSO_ABSENT = (
    *("braceexpand", "datasets", "webdataset", "imagehash", "ray", "bitsandbytes", "torchao", "prodigyopt", "deepspeed"),
    *("wandb", "kornia"),
)
ROOT = Path(__file__).parent.parent
# Read by Python as it starts: packages that are installed look as if they were not.
BLOCK = """
import os
from importlib.machinery import PathFinder

find, names = PathFinder.find_spec, set(os.environ.get("BLOCKED_MODULES", "").split())
PathFinder.find_spec = classmethod(lambda cls, name, *rest: None if name.partition(".")[0] in names else find(name, *rest))
"""


def check_plans() -> list[str]:
    faults = []
    for name, plan in PLANS.items():
        parts = plan.parts(Path("OUTDIR") / "result.jsonl")
        print(describe(name, plan, parts))
        total = sum(part.seconds for part in parts)
        if total > plan.seconds:
            faults.append(f"plan {name}: its parts may take {total:.0f} s, which is more than its {plan.seconds:.0f} s")
    return faults


def check_imports() -> list[str]:
    """Collects or imports what the parts run, with their own options, in processes in which packages are blocked."""
    plans = [plan for name, plan in PLANS.items() if name != "rehearsal"]
    parts = [part for plan in plans for part in plan.parts(Path("OUTDIR") / "result.jsonl")]
    commands: dict[tuple[tuple[str, ...], bool], list[str]] = {}
    for part in parts:
        commands.setdefault((_only_imports(part), "diffusers" in part.needs), []).append(part.name)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        (Path(folder) / "sitecustomize.py").write_text(BLOCK)

        def check(item: tuple[tuple[tuple[str, ...], bool], list[str]]) -> str | None:
            (command, carries), names = item
            blocked = [name for name in (*ABSENT, *ALSO_ABSENT) if not (carries and name in CARRIED)]
            environment = {**os.environ, "BLOCKED_MODULES": " ".join(blocked)}
            environment["PYTHONPATH"] = os.pathsep.join([folder, str(ROOT)])
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
            which = f"imports and options of {', '.join(dict.fromkeys(names))}"
            print(f"{which}: {'ok' if done.returncode == 0 else 'FAILED'}", flush=True)
            if done.returncode == 0:
                return None
            return f"{which}, without {', '.join(blocked)}:\n{(done.stdout + done.stderr)[-3000:]}"

        return [fault for fault in pool.map(check, commands.items()) if fault]


def _only_imports(part: Part) -> tuple[str, ...]:
    """Imports what a part's process would, reads its options, and runs nothing."""
    command = part.command[part.command.index(sys.executable) :]  # without a profiler before it
    module, options = command[2], command[3:]
    if module == "pytest":
        # Plugins are found by what is installed, also where it cannot be imported.
        return (*command, "--collect-only", "-p", "no:hypothesispytest")
    reads = "from benchmarks.step import parse; import sys; parse(sys.argv[1:])" if module == "benchmarks.step" else ""
    return (sys.executable, "-c", f"import {module}, benchmarks.report; {reads}", *options)


def check_launches(what: str) -> list[str]:
    """Runs one of the checks below in a process of its own, where the stub driver is."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}  # also where there is a GPU
    command = [sys.executable, "-m", "benchmarks.dry_run", "--launch", what]
    if what == "tests":
        pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.stub_tests", "--tb=short")
        files = list(KERNEL_TESTS)
        command = [*pytest, "-n", str(os.cpu_count() or 1), *files]
        environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print("\n".join(done.stdout.splitlines()[-1 if done.returncode == 0 else -40 :]), flush=True)
    return [f"launches of {what}: see above"] if done.returncode else []


def empty(value: Any) -> Any:
    """Meta tensors as CPU tensors of the same sizes, strides and alignment, whose memory nobody touches."""
    if not isinstance(value, torch.Tensor) or value.device.type != "meta":
        return value
    made = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="cpu")
    return made.requires_grad_() if value.requires_grad else made


def on_empty(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: function(*tree_map(empty, args), **tree_map(empty, kwargs))


def launch_kernels() -> None:
    """Ours at every shape that the plans measure, in the device tests, and in every variant."""
    from benchmarks import timing
    from benchmarks.cases import GROUPS
    from benchmarks.inputs import NAMED, FocusInputs, Shape, shapes
    from benchmarks.results import OURS
    from benchmarks.test_variants import SHAPE, VARIANTS
    from tests import test_gpu

    meta, cuda = torch.device("meta"), torch.device("cuda")
    source, target = torch.empty(5000), torch.empty(5000)
    for limit in (*timing.copies(source, target).values(), partial(timing.read_once, source)):
        limit()
    timing.launch_nothing(source)

    def run(group: Any, shape: Shape) -> None:
        made = vars(group.inputs(shape, meta))
        group.providers[OURS](FocusInputs(**{name: tree_map(empty, value) for name, value in made.items()}))

    for shape in shapes(cuda):
        for group in GROUPS:
            for batch in group.batches if shape.sweep is None else (1,):
                run(group, Shape(shape.name, shape.sizes, batch, shape.sweep))
    with mock.patch.object(test_gpu, "DEVICE", "cpu"):
        for pooling in ("reference", "max"):
            for sizes in ({}, {"batch": 3, "patches": 256, "tokens": 190, "width": 1024, "subjects": 3}):
                test_gpu.step(test_gpu.inputs(**sizes), pooling)
    for variant in VARIANTS:
        with variant.applied():
            run(variant.group, Shape(SHAPE, NAMED[SHAPE], variant.batch))


def launch_steps() -> None:
    """The focus of full-size steps: blocks run on the meta device, and what they give reaches the kernels."""
    import focusdpo.training.step as module
    from benchmarks.models import MODELS
    from benchmarks.workload import Workload, our_loss
    from focusdpo.features import SimilarityAccumulator

    update = SimilarityAccumulator.update

    def updated(self: SimilarityAccumulator, target: Any, reference: Any) -> None:
        self._mask = empty(self._mask)
        update(self, empty(target), empty(reference))

    for name, targets in (("flux1", (512, 1024)), ("flux2-klein-4b", (512,))):
        work = Workload(name, torch.device("meta"))
        for setting in MODELS[name].settings:
            if setting.target in targets:
                work.at(setting)
                with (
                    mock.patch.object(SimilarityAccumulator, "update", updated),
                    mock.patch.object(module, "focus_mask", on_empty(module.focus_mask)),
                    mock.patch.object(module, "focus_dpo_loss", on_empty(module.focus_dpo_loss)),
                    work.autocast(),
                ):
                    our_loss("focus")(work).backward()


def launch(what: str) -> None:
    from focusdpo_kernels.tools import stub_driver

    stub_driver.install()
    started = time.perf_counter()
    with stub_driver.launches() as names:
        {"kernels": launch_kernels, "steps": launch_steps}[what]()
    seconds = time.perf_counter() - started
    print(f"launches of {what}: {len(names)} of {len(set(names))} kernels compiled and launched in {seconds:.0f} s")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bash benchmarks/gpu.sh --dry-run", description=__doc__.splitlines()[0])
    parser.add_argument("--launch", choices=("kernels", "steps"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.launch:
        launch(options.launch)
        return
    faults = [*check_plans(), *check_imports()]
    for what in ("kernels", "steps", "tests"):
        faults += check_launches(what)
    for fault in faults:
        print(f"dry run: {fault}", file=sys.stderr)
    sys.exit(f"dry run: {len(faults)} faults: a run on a GPU would fail" if faults else 0)


if __name__ == "__main__":
    main()
