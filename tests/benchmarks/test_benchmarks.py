"""The benchmark suite: it measures what is right and nothing else, and its results can be drawn and compared."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import scipy.stats
import torch

from benchmarks import compare, conftest, dry_run, gpu, timing
from benchmarks.cases import COMPILED, GROUPS, _compiled, cases, relative_error
from benchmarks.inputs import TINY, Shape
from benchmarks.machine import BROKEN_DEVICE, machine_info
from benchmarks.records import Recorder, read_records
from benchmarks.report import markdown, write_report
from benchmarks.results import COMPILE, EAGER, FOCUS_STEP, OURS, PLAIN_STEP, Step, Timed, paired_interval, read_result
from benchmarks.supervise import Part, run_part
from benchmarks.test_variants import VARIANTS
from benchmarks.timing import Clock, plan
from focusdpo_kernels import cross_layer_similarity, preference_residual, residual_kernels
from focusdpo_kernels.launch import Launch
from focusdpo_kernels.tools.disassembly import _bytes_ahead, _instructions, resident_blocks
from tests import PATIENCE, ROOT
from tests.conftest import LONG

CPU = torch.device("cpu")


def run(*arguments, interpret=False, code=0):
    # A worker's variables would tell the inner pytest that it is one of several, and it would measure nothing.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {name: value for name, value in kept.items() if name != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


SUITE = ("-m", "pytest", "benchmarks/test_kernels.py", "-q", "-rs", "--shape", "tiny", "-p", "no:cacheprovider")
STEPS = ("-m", "benchmarks.step", "--backbone", "tiny", "--device", "cpu", "--steps", "6")


@pytest.fixture(scope="module")
def result_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "result.jsonl"
    run(*SUITE, "-k", "not compile", "--result", str(path))
    run(*STEPS, "--measure", "overhead", "--measure", "parts", "--measure", "throughput", "--result", str(path))
    return path


def test_every_group_is_measured_and_drawn(result_file, tmp_path):
    result = read_result(result_file)
    assert result.machine["device"] and result.machine["date"] and result.copy_bandwidth > 1e8
    assert "node" not in result.machine, "the name of the machine is nobody's business"
    for group in GROUPS:
        rows = result.times(group.name, "tiny")
        assert {OURS, EAGER} <= set(rows)
        assert all(row.median > 0 and row.error <= group.tolerance_of(name, Shape("tiny", TINY)) for name, row in rows.items())
    expected = 2 * 3 * (64 + 40) * 64 + 2 * 40 + 4 * 2 * 64  # 2 N (P + Q) D + R Q + 4 R P
    assert result.times("similarity", "tiny")[EAGER].bytes == expected
    step, throughput = result.steps
    assert (step.measure, throughput.measure) == ("overhead", "throughput")
    assert (len(step.variants), len(throughput.variants)) == (2, 4)
    assert all(len(v.seconds) == 6 and v.median > 0 for s in result.steps for v in s.variants.values())
    assert step.facts["focus_part"].keys() == {"update", "result", "focus_mask"}
    assert step.facts["focus_part"]["update"]["calls"] == 4 and step.facts["estimated_memory"] > 0
    overhead = step.overhead()
    assert overhead.pairs == 6 and overhead.low <= overhead.median <= overhead.high
    written = {path.name for path in write_report(result, tmp_path)}
    assert written == {"report.md", "summary.png", "roofline.png", "peers.png", "steps.png"}
    text = (tmp_path / "report.md").read_text()
    assert all(f"## {group.name}" in text for group in GROUPS) and "## Step, overhead: tiny" in text
    assert text.count("in turn") == 1, "throughput is measured one after the other"
    assert ("Times of a CPU" in text) != torch.cuda.is_available()
    assert "| time (lower is better) |" in text and "GB/s (higher is better)" in text
    if not torch.cuda.is_available():
        assert "| launches |" not in text and "| extra memory |" not in text, "columns where something was measured"


def test_a_run_goes_on_where_it_was(result_file, tmp_path):
    """What has ended is not measured again, what was begun is."""
    lines = result_file.read_text().splitlines(keepends=True)
    cut = next(i for i, line in enumerate(lines) if '"entropy-tiny-eager"' in line and '"kernel"' in line)
    path = tmp_path / "result.jsonl"
    path.write_text("".join(lines[:cut]) + lines[cut][:40])  # killed while it wrote
    assert Recorder(path).unfinished() == ["entropy-tiny-eager"]
    run(*SUITE, "-k", "(entropy-tiny or similarity) and not compile", "--result", str(path))
    records = read_records(path)
    assert [r["case"] for r in records if r["kind"] == "kernel"].count("similarity-tiny-eager") == 1
    assert len([r for r in records if r["kind"] == "begin" and r["case"] == "entropy-tiny-eager"]) == 2
    assert "entropy-tiny-eager" in Recorder(path).ended() and read_result(path).times("entropy", "tiny")[EAGER].median > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels are measured")
def test_kernels_pass_the_gate_and_interpreted_ones_are_not_timed(tmp_path):
    path = tmp_path / "result.jsonl"
    output = run(*SUITE, "-k", "focusdpo", "--result", str(path), interpret=True)
    cases = sum(len(group.batches) for group in GROUPS)
    assert f"[{cases}] benchmarks/test_kernels.py" in output and "the interpreter's time says nothing" in output
    assert read_result(path).rows == []


@pytest.mark.parametrize("right_at_first", [False, True], ids=["wrong", "wrong when it is timed"])
def test_a_red_gate_reports_no_time(tmp_path, right_at_first):
    path = tmp_path / "result.jsonl"
    wrong = (
        f"import sys, pytest; from benchmarks import pieces; right, calls = pieces.structure, [{int(right_at_first)}]\n"
        "def wrong(*args):\n"
        "    calls[0] -= 1\n"
        "    return tuple(x + 1e-3 * (calls[0] < 0) for x in right(*args))\n"
        "pieces.structure = wrong\n"
        f"sys.exit(pytest.main([*{SUITE[2:]!r}, '-k', 'structure and (pieces or eager)', '--result', {str(path)!r}]))"
    )
    assert "structure field by pieces at tiny: error" in run("-c", wrong, code=1)
    result = read_result(path)
    assert [row.provider for row in result.rows] == [EAGER]
    (failed,) = result.failed
    assert failed["case"] == "structure field-tiny-pieces" and "error" in failed["why"]
    assert "## Gave no number" in markdown(result)


def test_every_group_is_compiled_at_every_named_shape():
    compiled = [(group.name, shape.name) for group, shape, provider in cases(CPU) if provider == COMPILE]
    assert set(compiled) == {(group.name, name) for group in GROUPS for name in ("tiny", "uno-512")}, "what fits a CPU"


def test_shapes_to_compile_can_be_chosen():
    output = run("-m", "pytest", "benchmarks", "--collect-only", "-q", "-k", "similarity", "--compile-shape", "uno-512")
    compiled = {line.split("[")[1] for line in output.splitlines() if "torch.compile" in line}
    assert compiled == {f"similarity-uno-512-{provider}]" for provider in COMPILED}
    assert "similarity-tiny-eager]" in output and "similarity-P=1024-eager]" in output


@pytest.fixture
def traced(monkeypatch):
    """torch.compile stops after tracing; the names of what it traced."""
    names, compile_ = [], torch.compile

    def trace(function, mode, **options):
        names.append(function.__name__)
        return compile_(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", trace)
    _compiled.cache_clear()
    yield names
    _compiled.cache_clear()
    torch.compiler.reset()


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.name)
def test_compiled_providers_pass_the_gate(group, traced):
    shape = Shape("tiny", TINY)
    inputs = group.inputs(shape, CPU)
    for provider in COMPILED:
        error = group.error(group.providers[provider](inputs), group.exact(inputs))
        assert error <= group.tolerance_of(provider, shape)
    parts = ["layer_similarity", "_focus_loss"] if group.name == "focus step" else traced[:1]
    assert traced and traced == parts * len(COMPILED)


def test_relative_error():
    exact = torch.tensor([1.0, float("-inf"), 2.0])
    assert relative_error(exact, exact, exact) == 0
    assert relative_error(torch.tensor([1.0, float("-inf"), 2.1]), exact, exact) == pytest.approx(0.1 / 5**0.5, rel=1e-5)
    assert relative_error(torch.tensor([1.0, float("-inf"), 2.1]), exact, 10 * exact) == pytest.approx(0.01 / 5**0.5, rel=1e-5)
    for wrong in ([1.0, 0.0, 2.0], [1.0, float("-inf"), float("nan")]):
        assert not relative_error(torch.tensor(wrong), exact, exact) <= 1e9


def test_a_plan_repeats_short_calls():
    calls = []
    how = plan([lambda: calls.append(0), lambda: calls.append(1)], CPU)
    calls.clear()
    how.round_()
    assert len(calls) == how.calls >= 100 and calls[:4] == [0, 1, 0, 1], "inputs take turns"
    assert how.result() is None and how.method == "host clock" and timing.ROUNDS[0] <= how.rounds <= timing.ROUNDS[1]


def test_the_clock_reads_device_time_per_call(monkeypatch):
    now = {"ms": 1e9}  # differences of large times would have no digits left in fp32

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now["ms"]

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return other.at - self.at

    def busy(cycles):
        now["ms"] += 1

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", busy)
    clock = Clock()
    clock.begin(10)
    for _ in range(3):
        start = clock()
        now["ms"] += 50
        assert clock() - start == pytest.approx(5e-3), "ten calls took 50 ms, and the wait before does not count"
        now["ms"] += 7


@pytest.fixture
def make_result(tmp_path):
    def make(name, seconds, device="some GPU"):
        path = tmp_path / f"{name}.jsonl"
        recorder = Recorder(path)
        recorder.open_run({"device": device, "device_type": "cuda", "torch": "2", "triton": "3"}, "abc")
        recorder.append(
            "kernel",
            case="similarity-uno-512-focusdpo",
            group="similarity",
            shape="uno-512",
            sweep=None,
            sizes={"P": 1024},
            provider=OURS,
            median=seconds,
            spread=0.0,
            bytes=10,
            formula="10",
            launches=4,
            extra_memory=0,
            error=0.0,
            method="events",
            cold=True,
        )
        return str(path)

    return make


@pytest.mark.parametrize(("seconds", "code"), [(1.04e-3, 0), (1.06e-3, 1), (0.5e-3, 0)])
def test_compare_flags_a_loss(make_result, capsys, seconds, code):
    with pytest.raises(SystemExit) as exit_:
        compare.main([make_result("old", 1e-3), make_result("new", seconds)])
    assert exit_.value.code == code
    assert ("LOST" in capsys.readouterr().out) == bool(code)


def test_compare_refuses_other_devices_and_files(make_result, tmp_path):
    with pytest.raises(SystemExit, match="not comparable"):
        compare.main([make_result("old", 1e-3), make_result("new", 1e-3, device="another")])
    other = tmp_path / "other.json"
    other.write_text("{}")
    with pytest.raises(SystemExit, match="names no run"):
        compare.main([make_result("old", 1e-3), str(other)])
    with pytest.raises(SystemExit, match="no such file"):
        compare.main([make_result("old", 1e-3), str(tmp_path / "none.jsonl")])


def test_one_file_is_for_one_run(tmp_path):
    path = tmp_path / "result.jsonl"
    Recorder(path).open_run(machine_info(CPU), "abc")
    Recorder(path).open_run(machine_info(CPU), "abc")
    assert len(read_records(path)) == 1
    for machine, commit, named in ((machine_info(CPU), "def", "commit 'abc'"), ({"device": "another"}, "abc", "device ")):
        with pytest.raises(ValueError, match=named):
            Recorder(path).open_run(machine, commit)


def test_paired_differences():
    """Against scipy's quantiles of the binomial distribution, and on data whose drift is larger than the difference."""
    for n in (6, 10, 12, 25):
        values = [float(i) for i in range(n)]
        k = next(k for k in range(n) if 2 * scipy.stats.binom.cdf(k, n, 0.5) > 0.05)  # so many may lie outside on a side
        interval = paired_interval(values)
        assert (interval.low, interval.high) == (values[k - 1], values[n - k]) and interval.pairs == n
        assert interval.confidence == pytest.approx(1 - 2 * scipy.stats.binom.cdf(k - 1, n, 0.5)) and interval.confidence > 0.95
    assert paired_interval([1.0] * 5) is None, "five of a kind hold the median with 0.94"
    drift = [1 + 0.1 * i for i in range(12)]
    plain, focus = Timed(PLAIN_STEP), Timed(FOCUS_STEP)
    for i, seconds in enumerate(drift):
        plain.add("overhead", i, seconds, 100 + i)
        focus.add("overhead", i, seconds + 1e-3 * (1 + i % 2), 107 + i)
        plain.add("keeping", i, 99.0, 10**6)  # of another case, which took turns with something else
    plain.add("keeping", 0, 98.0, 10**6)
    assert len(plain.seconds) == 24, "the same turn twice is one"
    step = Step("x", "y", "overhead", variants={PLAIN_STEP: plain, FOCUS_STEP: focus})
    overhead = step.overhead()
    assert step.extra_memory() == 7
    alone = Timed("alone")
    for i in range(12):
        alone.add("throughput", i, 5.0, None)
    assert Step("x", "y", "overhead", variants={PLAIN_STEP: plain, "alone": alone}).overhead("alone") is None, (
        "they never took turns"
    )
    assert overhead.pairs == 12, "paired by round"
    assert (overhead.low, overhead.median, overhead.high) == pytest.approx((1e-3, 1.5e-3, 2e-3))


WORKER = """
import os, signal, subprocess, sys, time
from benchmarks.records import Recorder
recorder = Recorder(sys.argv[1])
for case in "abcd":
    if case in recorder.ended():
        continue
    recorder.append("begin", case=case)
    if case == "b":
        {fault}
    recorder.append("done", case=case)
"""
SLEEP = f"97.{os.getpid()}"  # a command line that nobody else has
FAULTS = {
    "hang": (f"subprocess.Popen(['sleep', '{SLEEP}']); time.sleep(97)", "silent for 5 s"),
    "crash": ("os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
    "lost device": ("recorder.append('failed', case='b', why='CUDA error'); sys.exit(70)", "CUDA error"),
    "odd exit": ("os._exit(3)", "exit status 3"),
}


def part(tmp_path, program, seconds=60.0, **options):
    return Part("some", "part", (sys.executable, "-c", program, str(tmp_path / "result.jsonl")), seconds, **options)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_one_case_alone(tmp_path, fault):
    statement, why = FAULTS[fault]
    recorder = Recorder(tmp_path / "result.jsonl")
    some = part(tmp_path, WORKER.format(fault=statement), silence=5.0)
    assert run_part(some, recorder, time.monotonic() + 60) == "done, with failures"
    records = read_records(recorder.path)
    assert [r["case"] for r in records if r["kind"] == "done"] == ["a", "c", "d"]
    assert [(r["case"], r["why"]) for r in records if r["kind"] == "failed"] == [("b", why)]
    if fault == "hang":
        assert not subprocess.run(["pgrep", "-f", f"sleep {SLEEP}"], capture_output=True).stdout, (
            "nothing of it is left running"
        )


def test_parts_that_cannot_go_on(tmp_path):
    recorder = Recorder(tmp_path / "result.jsonl")

    def ended(program, seconds=60, **options):
        return run_part(part(tmp_path, program, **options), recorder, time.monotonic() + seconds)

    assert ended("raise SystemExit(5)", silence=5.0) == "failed: exit status 5", "no case was begun: it would go on for ever"
    assert ended("raise SystemExit(1)") == "done, with failures"
    assert ended("raise SystemExit(4)") == "failed: exit status 4"
    assert ended("", needs=("torch", "no_such_module")) == "left out: needs no_such_module"
    assert ended(WORKER.format(fault="time.sleep(97)"), seconds=6, silence=60.0) == "out of time, in b"
    assert [p["ended"] for p in read_records(recorder.path) if p["kind"] == "part"][-1] == "out of time, in b"
    assert recorder.unfinished() == ["b"] and "b" not in recorder.ended(), "another run takes it up"
    assert ended("", silence=5.0) == "done" and recorder.unfinished() == ["b"], "a part leaves another's case alone"
    assert ended(WORKER.format(fault="sys.exit(1)"), silence=5.0) == "done, with failures", "what ends within a case"
    assert [(r["case"], r["why"]) for r in read_records(recorder.path) if r["kind"] == "failed"] == [("b", "exit status 1")]


def test_a_lost_device_ends_the_process(monkeypatch):
    monkeypatch.setattr(conftest, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    monkeypatch.setattr(conftest, "device_is_broken", lambda: False)
    conftest.pytest_runtest_logfinish("x", None)
    monkeypatch.setattr(conftest, "device_is_broken", lambda: True)
    with pytest.raises(pytest.exit.Exception) as exit_:
        conftest.pytest_runtest_logfinish("x", None)
    assert exit_.value.returncode == BROKEN_DEVICE


LOSING = """
import pytest, torch
from benchmarks import record_tests

record_tests.DEVICE, record_tests.device_is_broken = torch.device("cuda"), lambda: bool(lost)
lost = []

def test_before(): pass

def test_loses_the_device():
    lost.append(1)
    assert False, "an illegal memory access"

@pytest.mark.parametrize("i", range(3))
def test_after(i):
    assert not lost, "in a fresh process"
"""


def test_tests_after_a_lost_device_run_in_a_fresh_process(tmp_path):
    (tmp_path / "test_losing.py").write_text(LOSING)
    path = tmp_path / "result.jsonl"
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    command = (sys.executable, "-m", "pytest", "-n", "1", "-p", "benchmarks.record_tests", "--record", str(path), "-q")
    subprocess.run([*command, str(tmp_path / "test_losing.py")], cwd=ROOT, env=kept, capture_output=True, timeout=PATIENCE)
    tests = [(r["case"].split("::")[1], r["outcome"]) for r in read_records(path) if r["kind"] == "test"]
    after = [f"test_after[{i}]" for i in range(3)]
    assert {name for name, outcome in tests if outcome == "passed"} == {"test_before", *after}
    assert {name for name, outcome in tests if outcome == "failed"} == {"test_loses_the_device"}
    result = read_result(path)
    assert len(result.tests["passed"]) == 4 and "an illegal memory access" in result.tests["failed"][0]["why"]


def kinds(path):
    return [record["kind"] for record in read_records(path)]


def test_a_run_that_is_killed_leaves_what_it_has(tmp_path):
    """The whole script on a CPU, killed in its last part, or in each; then it goes on to the end, and again."""
    path = tmp_path / "out" / "result.jsonl"
    command = ["bash", "benchmarks/gpu.sh", "rehearsal", str(path.parent)]
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_") and k != "TRITON_INTERPRET"}
    kept["PYTHON"] = sys.executable
    parts = (("run", 1), ("test", 1), ("kernel", 2), ("step", 3))
    for kind, count in parts if LONG else parts[3:]:
        before = kinds(path).count(kind)
        process = subprocess.Popen(command, cwd=ROOT, env=kept, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and kinds(path).count(kind) < before + count:
            time.sleep(0.02)
        assert process.poll() is None, "it ended before it was killed"
        process.send_signal(signal.SIGKILL)  # the script has become its Python
        process.wait()
        time.sleep(0.3)  # its processes end with it
        size = path.stat().st_size
        time.sleep(0.5)
        assert path.stat().st_size == size, "nobody goes on writing"
        assert "report.md" in run("-m", "benchmarks.report", str(path), "--out", str(tmp_path / "report"))
    kernels = [r["case"] for r in read_records(path) if r["kind"] == "kernel"]
    assert kernels and Recorder(path).unfinished()[-1].startswith("step-tiny-128")
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stdout + done.stderr
        result = read_result(path)
        assert [p["ended"] for p in result.parts] == ["done"] * 4 and not result.failed
        assert result.tests["passed"] and [step.measure for step in result.steps] == ["overhead", "keeping"]
        assert result.steps[0].overhead().pairs == 6
        measured = [r["case"] for r in read_records(path) if r["kind"] == "kernel"]
        assert kernels == measured[: len(kernels)] and len(measured) == len(set(measured)), "none is measured twice"
        assert kinds(path).count("done") == 4, "limits, overhead, parts, keeping"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_ends_it_and_says_how_to_go_on(tmp_path, number):
    """From another folder, with an interpreter named from there."""
    (tmp_path / "python").symlink_to(sys.executable)
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "rehearsal", "out folder"]
    environment = {**os.environ, "PYTHON": "./python", "PYTHONPATH": os.pathsep.join(sys.path)}
    # A shell's background job ignores Ctrl-C, and Python with it.
    begin = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, **begin)
    while process.poll() is None and "plan" not in kinds(tmp_path / "out folder" / "result.jsonl"):
        time.sleep(0.02)
    time.sleep(1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and "the same command goes on" in errors and "Traceback" not in errors


def test_plans_fit_their_time(capsys, monkeypatch):
    assert dry_run.check_plans() == []
    printed = capsys.readouterr().out
    assert all(f"plan {name}: at most" in printed for name in ("first", "steps", "training", "deep"))
    monkeypatch.setitem(gpu.PLANS, "first", gpu.Plan(250, gpu.PLANS["first"].parts))
    assert ["first" in fault for fault in dry_run.check_plans()] == [True]


def test_the_dry_run_finds_what_would_fail(tmp_path, monkeypatch):
    def plan_of(name):
        command = (sys.executable, "-m", name)
        return gpu.Plan(10, lambda result: [Part(name, "", command, 10, needs=())])

    monkeypatch.setattr(
        dry_run,
        "PLANS",
        {"first": plan_of("benchmarks.step"), "steps": plan_of("benchmarks.timing")}
        | {"deep": gpu.Plan(10, lambda result: [])},
    )
    (fault,) = dry_run.check_imports()
    assert "benchmarks.step" in fault and "No module named 'diffusers'" in fault
    option = (sys.executable, "-m", "benchmarks.step", "--backbone", "flux9")
    plan = gpu.Plan(10, lambda result: [Part("steps", "", option, 10, needs=("diffusers",))])
    monkeypatch.setattr(dry_run, "PLANS", dict.fromkeys(("first", "steps", "deep"), plan))
    (fault,) = dry_run.check_imports()
    assert "invalid choice: 'flux9'" in fault


STUBBED = """
import torch
from focusdpo_kernels import fusion, topk_mask

def test_fine():
    assert topk_mask(torch.rand(3, 50), 4).sum() == -1, "what it compares means nothing"

def test_refused():
    fusion._fuse_launch()((1,), torch.rand(3))
"""


def test_what_the_stub_driver_refuses_is_red(tmp_path):
    (tmp_path / "test_stubbed.py").write_text(STUBBED)
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.stub_tests", str(tmp_path), "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, timeout=PATIENCE)
    assert "1 failed, 1 passed" in done.stdout and "test_refused" in done.stdout, done.stdout + done.stderr
    assert "stub driver: 1 launches" in done.stdout
    (tmp_path / "test_stubbed.py").write_text("def test_nothing(): pass")
    done = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, timeout=PATIENCE)
    assert "stub driver: 0 launches" in done.stdout and done.returncode == 1, "nothing launched is nothing tried"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["first", "steps", "deep"])
def test_gpu_script_says_that_there_is_no_gpu(tmp_path, name):
    script = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), name, str(tmp_path)]
    done = subprocess.run(
        script, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 1 and "PyTorch sees no GPU here" in done.stderr


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    for name, content in (("thesis.txt", "mine"), ("result.jsonl", "not JSON")):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        (folder / name).write_text(content)
        with pytest.raises(SystemExit) as exit_:
            gpu.main(["rehearsal", str(folder)])
        assert exit_.value.code == 2 and [p.name for p in folder.iterdir()] == [name]
        assert (folder / name).read_text() == content
    with pytest.raises(ValueError, match="is not a result of these benchmarks"):
        Recorder(folder / "result.jsonl").open_run(machine_info(CPU), "abc")


def test_what_was_begun_is_no_other_file(tmp_path):
    """A disk that was full, or a kill, leaves nothing, or half a line."""
    path = tmp_path / "result.jsonl"
    for content in ("", '{"ki', '{"kind": "run", "device": "so'):
        path.write_text(content)
        Recorder(path).open_run(machine_info(CPU), "abc")
        assert kinds(path) == ["run"]


def step_record(case, measure, variant, round_, seconds):
    named = {"backbone": "tiny", "setting": "small", "measure": measure, "variant": variant}
    return {"kind": "step", "case": case, **named, "round": round_, "seconds": seconds, "peak_memory": None}


def test_each_measurement_stands_for_itself(make_result, tmp_path):
    """The plain step of one case is not the plain step of another, nor what a killed process measured of the same."""
    path = Path(make_result("steps", 1e-3))
    recorder = Recorder(path)
    recorder.append("begin", case="o")
    recorder.append(**step_record("o", "overhead", PLAIN_STEP, 0, 9.0))
    recorder.append("begin", case="o")  # anew, after a kill
    for i in range(8):
        recorder.append(**step_record("o", "overhead", PLAIN_STEP, i, 1.0))
        recorder.append(**step_record("o", "overhead", FOCUS_STEP, i, 1.1))
    short = tmp_path / "short.jsonl"
    short.write_bytes(path.read_bytes())
    for i in range(8):
        recorder.append(**step_record("k", "keeping", PLAIN_STEP, i, 5.0))
    overhead, keeping = read_result(path).steps
    assert overhead.variants[PLAIN_STEP].seconds == [1.0] * 8 and keeping.variants[PLAIN_STEP].median == 5.0
    assert "+10.00 %" in markdown(read_result(path)) and overhead.overhead().median == pytest.approx(0.1)
    with pytest.raises(SystemExit) as exit_:
        compare.main([str(short), str(path)])
    assert exit_.value.code == 0, "a run is not slower than its own beginning"


def test_odd_records_are_passed_over(make_result, tmp_path):
    path = Path(make_result("odd", 1e-3))
    good = path.read_text()
    kernel = good.splitlines()[1]
    for odd in (
        '{"kind": "kernel", "case": "x"}',
        '{"kind": "step", "case": "x"}',
        '{"kind": "test", "outcome": "failed"}',
        '{"kind": "failed", "case": "x"}',
        kernel.replace("0.001", "NaN"),
        kernel.replace("0.001", "0"),
        '{"kind": "of another version", "case": "x"}',
        "[" * 100_000,
        "9" * 5000,
    ):
        path.write_text(good + odd + "\n")
        assert [row.median for row in read_result(path).rows] == [1e-3]
        write_report(read_result(path), tmp_path / "report")
    path.write_text(good + kernel.replace("focusdpo", "another") + '\n{"kind": "failed", "case": "x", "why": ""}\n')
    write_report(read_result(path), tmp_path / "report")
    assert "x: no reason is recorded" in (tmp_path / "report" / "report.md").read_text()


def test_limits_that_fail_leave_the_cases_alone(tmp_path):
    path = tmp_path / "result.jsonl"
    broken = (
        "import sys, pytest; from benchmarks import timing\n"
        "def measure_limits(device): raise RuntimeError('no memory')\n"
        "timing.measure_limits = measure_limits\n"
        f"sys.exit(pytest.main([*{SUITE[2:]!r}, '-k', 'structure and eager', '--result', {str(path)!r}]))"
    )
    run("-c", broken)
    result = read_result(path)
    assert [row.provider for row in result.rows] == [EAGER] and result.copy_bandwidth is None
    assert [(f["case"], f["why"]) for f in result.failed] == [("limits", "RuntimeError: no memory")]


def test_what_cannot_be_measured_is_refused(tmp_path):
    path = tmp_path / "result.jsonl"
    for options, message, code in (
        (("--shape", "typo"), "--shape: got typo", 2),
        (("--shape", "uno-1024", "--provider", "kornia", "--no-sweep"), "no case that fits this device", 2),
        (("--benchmark-disable", "--result", str(path)), "need one process", 4),
        (("-n", "2", "--result", str(path)), "need one process", 4),
    ):
        command = ("-m", "pytest", "benchmarks/test_kernels.py", "-q", "-p", "no:cacheprovider")
        assert message in run(*command, *options, code=code)
    assert not path.exists()


def test_two_runs_do_not_share_a_folder(tmp_path):
    path = tmp_path / "result.jsonl"
    with path.open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit) as exit_:
            gpu.main(["rehearsal", str(tmp_path)])
    assert exit_.value.code == 2 and path.read_bytes() == b""
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"gpu.sh: error: .*file"):
        gpu.main(["rehearsal", str(tmp_path / "file" / "inside")])


def test_another_runs_folder_is_refused_at_once(tmp_path):
    path = tmp_path / "result.jsonl"
    Recorder(path).open_run(machine_info(CPU) | {"device": "some GPU"}, "abc")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "rehearsal", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 1 and "holds a run of device 'some GPU'" in done.stderr
    assert kinds(path) == ["run"], "not a line is added to it"


def test_gpu_script_says_how_it_is_used(tmp_path):
    for arguments in ([], ["first"], ["somewhere"]):
        done = subprocess.run(["bash", str(ROOT / "benchmarks" / "gpu.sh"), *arguments], capture_output=True, text=True)
        assert done.returncode == 2 and "gpu.sh first OUTDIR" in done.stderr


def test_resident_blocks():
    assert resident_blocks("sm_90", registers=161, threads=256, shared=32) == 1, "168 x 256 registers of 65536"
    assert resident_blocks("sm_90", registers=80, threads=256, shared=32) == 3
    assert resident_blocks("sm_90", registers=32, threads=128, shared=0) == 16, "2048 threads"
    assert resident_blocks("sm_80", registers=32, threads=128, shared=40 * 1024) == 4, "164 KiB, and one more for each"
    assert resident_blocks("sm_90", registers=32, threads=32, shared=0) == 32


def test_bytes_ahead_of_the_busiest_inner_loop():
    code = """
        /*0000*/                   LDG.E R1, desc[UR4][R2.64] ;
.L_x_2:
        /*0010*/                   LDG.E.64 R1, desc[UR4][R2.64] ;
.L_x_1:
        /*0020*/                   LDGSTS.E.BYPASS.LTC128B.128 [R1], desc[UR4][R2.64] ;
        /*0030*/                   LDG.E.U8 R1, desc[UR4][R2.64] ;
        /*0040*/              @P0  BRA `(.L_x_1) ;
        /*0050*/              @P1  BRA `(.L_x_2) ;
    """
    _, (inner,) = _instructions(code)
    assert [text.split(".")[0] for text in inner] == ["LDGSTS", "LDG", "@P0  BRA `("]
    assert _bytes_ahead(*_instructions(code), num_stages=4) == 3 * 16 + 1
    straight = _instructions(code.replace("BRA", "NOP"))
    assert _bytes_ahead(*straight, num_stages=4) == 4 + 8 + 3 * 16 + 1, "straight code counts as a whole"


def test_reading_is_timed():
    output = run("-m", "benchmarks.data", "--pairs", "4", "--stored", "96", "--workers", "1", "--pace", "50")
    rows = [line.split() for line in output.splitlines() if line.startswith(("files", "shards"))]
    assert [row[0] for row in rows] == ["files", "shards"]
    for row in rows:
        rate, times, work, mean, longest = (float(cell) for cell in row[1:] if cell != "ms")
        assert rate > 0 and abs(times - rate / 50) < 0.1 and work > 0 and 0 <= mean <= longest


def test_a_whole_run_is_killed_and_goes_on(tmp_path):
    """`benchmarks.training` on a CPU, at its smallest size: what a GPU run records, and what the report makes of it."""
    result = tmp_path / "result.jsonl"
    command = [sys.executable, "-m", "benchmarks.training", "--backbone", "tiny", "--device", "cpu", "--steps", "12"]
    done = subprocess.run([*command, "--result", str(result)], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = read_result(result).training
    assert run["steps"] == 12 and run["pairs_per_second"] > 0 and 6 < run["killed_after"] <= 12
    assert run["differences"] == [] and len(set(run["margins"])) == 12
    assert run["peak_memory"] > 0 and run["estimated_memory"] > 0
    text = markdown(read_result(result))
    assert f"Killed after step {run['killed_after']} and resumed: the same numbers and the same adapter, bit by bit." in text


@pytest.mark.parametrize("kernel", ["compare", "pool", "residual forward"])
def test_a_variant_is_launched_in_place_of_what_is_shipped(kernel, monkeypatch):
    variant = next(each for each in VARIANTS if each.kernel == kernel and each.constants)
    target, reference = [torch.randn(1, 64, 64) for _ in range(2)], [torch.randn(1, 48, 64) for _ in range(2)]
    mask = torch.arange(48)[None, None] // 24 == torch.arange(2)[None, :, None]
    predictions = torch.randn(6, 2, 16, 4).unbind()
    launched, call = [], Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda launch, *args: (launched.append(launch.constants), call(launch, *args))[1])

    def run():
        if kernel == "residual forward":
            return preference_residual(*predictions, backend="triton").margin
        return cross_layer_similarity(target, reference, mask, backend="triton")

    residual_kernels.forward_launch.cache_clear()
    with variant.applied():
        changed = run()
    assert any(variant.constants.items() <= constants.items() for constants in launched)
    launched.clear()
    torch.testing.assert_close(changed, run(), rtol=1e-5, atol=1e-5)
    assert not any(variant.constants.items() <= constants.items() for constants in launched), "nothing of it is left"
