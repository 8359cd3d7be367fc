"""What a machine with a GPU can say, in parts that keep every number: python -m benchmarks.gpu PLAN OUTDIR.

Start it by `bash benchmarks/gpu.sh`. A plan is printed first and kept: every part has its limit, and all together theirs. The
most valuable numbers come first. OUTDIR/result.jsonl has each of them the moment it is measured; started again with the same
OUTDIR, what has ended is left out.
"""

from __future__ import annotations

import argparse
import fcntl
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.records import Recorder, is_foreign
from benchmarks.supervise import Part, run_part

PYTHON = sys.executable
ENVIRONMENT = "environment"
KERNEL_TESTS = (
    *(
        f"tests/kernels/test_{name}.py"
        for name in ("similarity", "matching", "entropy", "residual", "fusion", "accuracy", "ops")
    ),
    "tests/test_loss.py",
    "tests/test_mask.py",
)
STEPS_NEED = ("diffusers", "accelerate", "peft", "transformers")
TRAINING_NEEDS = (*STEPS_NEED, "jsonargparse", "docstring_parser")


@dataclass(frozen=True)
class Plan:
    """Parts in their order, and the seconds that all may take together: what each may take adds up to no more."""

    seconds: float
    parts: Callable[[Path], list[Part]]


def _environment(result: Path, *options: str, seconds: float = 20) -> Part:
    command = (PYTHON, "-m", "benchmarks.machine", str(result), *options)
    return Part(ENVIRONMENT, "versions and devices, and whose result this is", command, seconds)


def _report(result: Path) -> Part:
    command = (PYTHON, "-m", "benchmarks.report", str(result), "--out", str(result.parent))
    return Part("report", "tables and figures", command, 15)


def _tests(name: str, what: str, seconds: float, processes: int, files: tuple[str, ...], result: Path, each: int) -> Part:
    pytest = (PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.record_tests", "--tb=short")
    # The thread method ends a worker that hangs in the driver, where no signal reaches it; another takes its place.
    limits = ("-n", str(processes), "--timeout", str(each), "--timeout-method", "thread", "--benchmark-disable")
    return Part(name, what, (*pytest, *limits, "--record", str(result), *files), seconds, log="tests.log")


def _kernels(
    name: str, what: str, seconds: float, silence: float, result: Path, *options: str, file: str = "test_kernels.py"
) -> Part:
    pytest = (PYTHON, "-m", "pytest", f"benchmarks/{file}", "-q", "-p", "no:cacheprovider", "--tb=short")
    columns = ("--benchmark-columns=median,iqr,rounds", "--timeout", "0")
    return Part(name, what, (*pytest, *columns, "--result", str(result), *options), seconds, silence, log="kernels.log")


def _steps(
    name: str, what: str, seconds: float, silence: float, result: Path, backbone: str, *options: str, device: str = "cuda"
) -> Part:
    command = (PYTHON, "-m", "benchmarks.step", "--backbone", backbone, "--device", device, "--result", str(result), *options)
    return Part(name, what, command, seconds, silence, needs=STEPS_NEED, log="steps.log")


def _each(option: str, *values: str) -> tuple[str, ...]:
    return tuple(part for value in values for part in (option, value))


def _first(result: Path) -> list[Part]:
    plain = _each("--provider", "focusdpo", "eager", "pieces")
    shapes = _each("--shape", "uno-1024", "flux2-klein-4b", "uno-512")
    compiled = (*_each("--shape", "uno-1024"), *_each("--provider", "torch.compile"))
    tests, device = KERNEL_TESTS, ("tests/test_gpu.py", "-k")
    return [
        _environment(result, "--gpu"),
        _tests("device tests", "what only a GPU can show", 48, 4, (*device, "not killed and not attention"), result, each=40),
        _tests("kernel tests", "every kernel against float64 and the reference", 62, 8, tests, result, each=50),
        _kernels("kernels", "ours, eager and pieces at three shapes", 72, 30, result, "--no-sweep", *shapes, *plain),
        _kernels("compiled kernels", "torch.compile at uno-1024", 72, 60, result, "--no-sweep", *compiled),
        _report(result),
    ]


def _steps_plan(result: Path) -> list[Part]:
    flux, klein, target = "flux1", "flux2-klein-4b", _each("--target", "512")
    overhead, steps = _each("--measure", "overhead", "parts"), ("--steps", "10")
    return [
        _environment(result, "--gpu"),
        _steps("FLUX.1 overhead", "plain DPO and FocusDPO in turn, 512 and 1024 px", 150, 60, result, flux, *overhead, *steps),
        _steps("klein-4B overhead", "the same at 512 px", 55, 45, result, klein, *target, *overhead, *steps),
        _report(result),
    ]


def _training(result: Path) -> list[Part]:
    model, log = _each("--backbone", "flux2-klein-4b"), "training.log"
    command = (PYTHON, "-m", "benchmarks.training", *model, "--device", "cuda", "--result", str(result))
    speed = (*_each("--target", "512"), *_each("--measure", "throughput", "compiled"), "--steps", "10")
    return [
        _environment(result, "--gpu"),
        Part("klein-4B training", "focusdpo train, killed and resumed", command, 190, needs=TRAINING_NEEDS, log=log),
        _tests("training tests", "the same, tiny", 75, 2, ("tests/test_gpu.py", "-k", "killed or attention"), result, each=70),
        _steps("throughput", "settings one by one, compiled ones last", 120, 110, result, "flux1", *speed),
        _report(result),
    ]


def _deep(result: Path) -> list[Part]:
    profiled = (PYTHON, "-m", "benchmarks.profiled", "--shape", "uno-1024")
    counters = ("ncu", *NCU, str(result.parent / "counters.csv"), *profiled)
    compiled = (*_each("--shape", "uno-1024"), *_each("--provider", "torch.compile max-autotune"))
    ours, keeping = _each("--provider", "focusdpo", "eager"), (*_each("--target", "512"), *_each("--measure", "keeping"))
    return [
        _environment(result, "--gpu"),
        _kernels("variants", "block sizes and stages of the streaming kernels", 100, 60, result, file="test_variants.py"),
        Part("counters", "hardware counters of the kernels at uno-1024", counters, 60, needs=("ncu",), log="counters.log"),
        _kernels("sweeps", "over N, P and R", 95, 40, result, "--only-sweep", *ours),
        _steps("FLUX.1 keeping", "hidden states kept, in eager PyTorch", 65, 60, result, "flux1", *keeping, "--steps", "10"),
        _kernels("max-autotune", "torch.compile max-autotune at uno-1024", 185, 150, result, "--no-sweep", *compiled),
        _report(result),
    ]


NCU = (
    "--clock-control",
    "none",  # leave the machine's clocks as they are
    "--profile-from-start",
    "off",
    "--csv",
    "--page",
    "raw",
    "--metrics",
    "gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,"
    "sm__warps_active.avg.pct_of_peak_sustained_active,smsp__issue_active.avg.pct_of_peak_sustained_active,"
    "launch__registers_per_thread,launch__occupancy_limit_registers,launch__grid_size,launch__waves_per_multiprocessor",
    "--log-file",
)


def _rehearsal(result: Path) -> list[Part]:
    """The same machinery on a CPU and the smallest sizes: nothing of it says anything about a GPU."""
    tests, tiny = (
        ("tests/kernels/test_entropy.py", "-k", "flat or scikit"),
        ("--no-sweep", "--shape", "tiny", "-k", "not compile"),
    )
    return [
        _environment(result, seconds=60),
        _tests("kernel tests", "a few, in the interpreter", 120, 2, tests, result, each=60),
        _kernels("kernels", "eager and pieces, tiny", 120, 60, result, *tiny),
        _steps("steps", "the tiny model", 240, 120, result, "tiny", "--steps", "6", device="cpu"),
        _report(result),
    ]


PLANS = {
    "first": Plan(290, _first),
    "steps": Plan(240, _steps_plan),
    "training": Plan(420, _training),
    "deep": Plan(540, _deep),
    "rehearsal": Plan(560, _rehearsal),
}


def describe(name: str, plan: Plan, parts: list[Part]) -> str:
    lines = [f"plan {name}: at most {plan.seconds:.0f} s, in this order"]
    lines += [f"  {part.name:20} {part.seconds:4.0f} s at most   {part.what}" for part in parts]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bash benchmarks/gpu.sh", description=__doc__.splitlines()[0])
    parser.add_argument(
        "plan", choices=list(PLANS), help="first: correctness and kernels; steps: their cost; training: whole runs; deep: why"
    )
    parser.add_argument("outdir", type=Path, help="folder for result.jsonl, logs, report and figures")
    options = parser.parse_args(argv)
    try:
        run(options, parser)
    except OSError as error:  # a full disk, or a folder that is not to be written to
        sys.exit(f"gpu.sh: error: {error}")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Checks the folder, then runs the plan's parts."""
    plan, result = PLANS[options.plan], options.outdir / "result.jsonl"
    if options.outdir.exists() and not result.exists() and any(options.outdir.iterdir()):
        parser.error(
            f"OUTDIR: {options.outdir} holds other files and no result.jsonl; name a new folder, or that of an earlier run"
        )
    if is_foreign(result):
        parser.error(f"OUTDIR: {result} is not a result of these benchmarks; name another folder")
    options.outdir.mkdir(parents=True, exist_ok=True)
    with result.open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with this process, however it ends
        except BlockingIOError:
            parser.error(f"OUTDIR: another run is writing to {result}; wait for it, or name another folder")
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler)  # as Ctrl-C: what runs is ended with it
        started = time.monotonic()
        parts, recorder = plan.parts(result), Recorder(result)
        print(describe(options.plan, plan, parts), flush=True)
        clean, until = True, started
        for part in parts:
            print(f"== {part.name}", flush=True)
            until += part.seconds  # what earlier parts have left over is this one's
            first = part.name == ENVIRONMENT  # it says whether the result may be written to at all
            if not first:
                recorder.append("plan", name=part.name, what=part.what, limit=part.seconds)
            try:
                ended = run_part(part, Recorder(None) if first else recorder, until)
            except KeyboardInterrupt:
                print(f"\ngpu.sh: interrupted; {result} has what was measured, and the same command goes on", file=sys.stderr)
                sys.exit(130)
            print(f"   {ended}; {time.monotonic() - started:.0f} s of {plan.seconds:.0f} s", flush=True)
            if first and ended != "done":
                sys.exit(1)
            clean &= ended == "done"
        sys.exit(0 if clean else 1)


if __name__ == "__main__":
    main()
