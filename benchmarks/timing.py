"""Timing that can be trusted: device events, inputs that the cache does not hold, graphs where launches would dominate.

On a CPU the same functions use the host's clock.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd import DeviceType

Call = Callable[[], Any]

GRAPH_BELOW = 100e-3  # seconds on the device: shorter calls are replayed from a graph, or the host's launches would count
GRAPH_LENGTH = 2e-3  # seconds that one graph should last, at least
ROUND_LENGTH = 20e-3  # seconds, at least, between two readings of the host's clock
MEASURE = 0.1  # seconds to measure for
ROUNDS = (10, 200)  # at least, at most
IDLE_CYCLES = 2_000_000  # the device waits so long (about 1 ms) before a round, so that the host can queue work ahead
MOST_COPIES = 128  # of inputs: each is run for every estimate, and captured
COPY_BYTES = 2 << 30


@dataclass(frozen=True)
class Plan:
    """How a call is measured: `round_` runs it `calls` times, and there are `rounds` of them.

    `result` is what the first call gave in the last round: a graph writes the same memory at every replay.
    """

    round_: Call
    calls: int
    rounds: int
    method: str
    result: Call


class Clock:
    """A timer for pytest-benchmark: seconds per call, read before and after a round.

    On CUDA the first reading waits for the device and records an event, the second records another and waits for it.
    """

    def __init__(self) -> None:
        self._calls = 1
        self._seconds = 0.0
        self._start: Any = None
        self._cuda = torch.cuda.is_available()

    def begin(self, calls: int) -> None:
        """So many calls are in a round from now on."""
        self._calls, self._start = calls, None

    def __call__(self) -> float:
        if not self._cuda:
            return time.perf_counter() / self._calls
        event = torch.cuda.Event(enable_timing=True)
        if self._start is None:
            torch.cuda.synchronize()
            torch.cuda._sleep(IDLE_CYCLES)
            event.record()
            self._start = event
        else:
            event.record()
            event.synchronize()
            # Differences alone are added up: elapsed times since some origin would lose digits.
            self._seconds += self._start.elapsed_time(event) / 1e3 / self._calls
            self._start = None
        return self._seconds


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rotations(input_bytes: int, device: torch.device) -> int:
    """So many copies of the inputs are used in turn that none is still in the last-level cache when it comes again."""
    if device.type != "cuda":
        return 2
    return min(max(math.ceil(3 * cache_bytes(device) / max(input_bytes, 1)), 1), MOST_COPIES)


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache."""
    return torch.cuda.get_device_properties(device).L2_cache_size


def plan(calls: Sequence[Call], device: torch.device) -> Plan:
    """Decides how to measure calls that do the same on different inputs, and warms them up."""
    for call in calls:
        call()
    synchronize(device)
    seconds = _estimate(calls, device)
    first: list[Any] = [None]
    if device.type == "cuda" and seconds < GRAPH_BELOW:
        repeats = max(math.ceil(GRAPH_LENGTH / max(seconds, 1e-6) / len(calls)), 1)
        graph, first[0] = _graph([*calls] * repeats)
        round_, method = graph.replay, "CUDA graph"
    else:
        repeats = 1 if device.type == "cuda" else max(math.ceil(ROUND_LENGTH / max(seconds, 1e-9) / len(calls)), 1)
        method = "events" if device.type == "cuda" else "host clock"

        def round_() -> None:
            for _ in range(repeats):
                first[0] = calls[0]()
                for call in calls[1:]:
                    call()

    calls_in_round = len(calls) * repeats
    rounds = min(max(math.ceil(MEASURE / (seconds * calls_in_round)), ROUNDS[0]), ROUNDS[1])
    return Plan(round_, calls_in_round, rounds, method, lambda: first[0])


def _estimate(calls: Sequence[Call], device: torch.device) -> float:
    """Seconds of a call, roughly; short ones by their launches."""
    start = time.perf_counter()
    for call in calls:
        call()
    synchronize(device)
    host = (time.perf_counter() - start) / len(calls)
    if device.type != "cuda":
        return host
    # Launching can take longer than the work: the kernels' own time decides.
    return sum(e.time_range.elapsed_us() for e in kernels(calls[0])) / 1e6 or host


def _graph(calls: Sequence[Call]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of all calls, and what it writes for the first."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    gc.collect()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = calls[0]()
        for call in calls[1:]:
            call()
    graph.replay()
    return graph, first


def kernels(call: Call) -> list[Any]:
    """The profiler's events of the kernels that a call launches; needs a GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type == DeviceType.CUDA]
    # Nor ranges that somebody named, such as an optimiser's step, which are drawn on the device as well.
    found = [e for e in events if not getattr(e, "is_user_annotation", False)]
    return [e for e in found if not e.name.startswith(("Memcpy", "Memset"))]


def count_launches(call: Call, device: torch.device) -> int | None:
    """Kernels that a call launches, counted by the profiler; None without a GPU."""
    return len(kernels(call)) if device.type == "cuda" else None


def extra_memory(call: Call, device: torch.device) -> int | None:
    """Bytes that a call allocates at its peak, its results among them; None without a GPU."""
    if device.type != "cuda":
        return None
    call()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(device) - before


@triton.jit
def _empty_kernel(x_ptr):
    pass


@triton.jit
def _copy_kernel(source_ptr, target_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target_ptr + offs, tl.load(source_ptr + offs, mask=offs < N), mask=offs < N)


@triton.jit
def _read_kernel(source_ptr, out_ptr, N, SPAN, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * SPAN
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(0, SPAN, BLOCK):
        offs = start + i + tl.arange(0, BLOCK)
        total += tl.load(source_ptr + offs, mask=offs < N, other=0.0)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, axis=0))


def measure_limits(device: torch.device) -> dict[str, Any]:
    """What this device can do, measured in the same run.

    One way to copy is no limit: on an H200 the driver's own copy within a graph reached 2.8 TB/s where kernels read 3.9.

    Returns:
        copy_bytes_per_second: bytes read plus written, by the fastest of several ways, which `copies` names.
        read_bytes_per_second: of a kernel that reads and writes next to nothing; None on a CPU.
        empty_launch_seconds: of a kernel that does nothing, within a graph; None on a CPU.
    """
    size = (COPY_BYTES if device.type == "cuda" else COPY_BYTES // 16) // 4
    source = torch.rand(size, device=device)
    target = torch.empty_like(source)
    on_gpu = device.type == "cuda"
    ways = copies(source, target) if on_gpu else {"copy_": lambda: target.copy_(source)}
    rates = {name: 8 * size / measured(plan([call], device))[0] for name, call in ways.items()}
    return {
        "copy_bytes_per_second": max(rates.values()),
        "read_bytes_per_second": 4 * size / measured(plan([lambda: read_once(source)], device))[0] if on_gpu else None,
        "empty_launch_seconds": measured(plan([lambda: launch_nothing(source)], device))[0] if on_gpu else None,
        "copies": rates,
    }


def copies(source: torch.Tensor, target: torch.Tensor) -> dict[str, Call]:
    """Ways to copy fp32, by name."""

    def copy(block: int) -> None:
        grid = (triton.cdiv(source.numel(), block),)
        _copy_kernel[grid](source, target, source.numel(), BLOCK=block, num_warps=block // 256)

    return {
        "copy_": lambda: target.copy_(source),
        "elementwise": lambda: torch.mul(source, 2.0, out=target),
        "Triton, blocks of 1024": lambda: copy(1024),
        "Triton, blocks of 4096": lambda: copy(4096),
    }


def read_once(source: torch.Tensor) -> torch.Tensor:
    """Sums of equal parts of fp32, which are read as a stream."""
    programs, block = 8192, 4096
    span = triton.cdiv(triton.cdiv(source.numel(), programs), block) * block
    sums = torch.empty(programs, device=source.device)
    _read_kernel[(programs,)](source, sums, source.numel(), span, BLOCK=block, num_warps=8)
    return sums


def launch_nothing(argument: torch.Tensor) -> None:
    _empty_kernel[(1,)](argument)


def measured(how: Plan) -> tuple[float, float]:
    """Median seconds of a call and what lies between the quartiles."""
    clock = Clock()
    clock.begin(how.calls)
    seconds = []
    for _ in range(how.rounds):
        start = clock()
        how.round_()
        seconds.append(clock() - start)
    low, median, high = statistics.quantiles(seconds, n=4)
    return median, high - low
