"""Every group of cases.py, at every shape, by every provider: first the correctness gate, then the time.

make bench                                        # all that fits this machine, with a report
python -m pytest benchmarks/test_kernels.py --shape uno-512 -k "similarity and eager"
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.cases import Group, cases, unavailable
from benchmarks.inputs import NAMED, FocusInputs, Shape
from benchmarks.machine import DEVICE
from benchmarks.records import Recorder
from benchmarks.results import OURS
from benchmarks.timing import Clock, cache_bytes, count_launches, extra_memory, plan
from focusdpo_kernels.backend import INTERPRETED

clock = Clock()
pytestmark = pytest.mark.benchmark(timer=clock)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    shapes, providers, compiled = option("--shape"), option("--provider"), option("--compile-shape") or NAMED
    chosen = [
        (group, shape, provider)
        for group, shape, provider in cases(DEVICE, compiled)
        if (not shapes or shape.name in shapes)
        and (not providers or provider in providers)
        and not (option("--no-sweep") and shape.sweep)
        and not (option("--only-sweep") and not shape.sweep)
    ]
    known = {*NAMED, *(shape.name for _, shape, _ in cases(DEVICE, compiled))}
    if unknown := [name for name in shapes or () if name not in known]:
        raise pytest.UsageError(f"--shape: got {', '.join(unknown)}; expected some of {', '.join(sorted(known))}")
    if not chosen and not metafunc.config.option.collectonly:
        raise pytest.UsageError("these shapes and providers have no case that fits this device")
    if shapes:
        chosen.sort(key=lambda case: shapes.index(case[1].name))  # stable: what takes long to compile stays last of a shape
    ids = [f"{group.name}-{shape.label}-{provider}" for group, shape, provider in chosen]
    metafunc.parametrize(("group", "shape", "provider"), chosen, ids=ids)


_last: dict[str, Any] = {}


def _inputs(group: Group, shape: Shape) -> tuple[list[FocusInputs], tuple[torch.Tensor, ...]]:
    """Several sets of inputs and the first one's exact result; kept while the providers of one shape follow each other."""
    key = (group.name, shape.label)
    if _last.get("key") != key:
        _last.clear()
        inputs = group.inputs_in_turn(shape, DEVICE)
        _last.update(key=key, inputs=inputs, exact=group.exact(inputs[0]))
    return _last["inputs"], _last["exact"]


def test_speed(benchmark: Any, recorder: Recorder, case: str, group: Group, shape: Shape, provider: str) -> None:
    reason = unavailable(provider, shape, DEVICE)
    if reason:
        pytest.skip(reason)
    torch.compiler.reset()  # shapes and modes that add up would pass its limit of compilations of a function
    inputs, exact = _inputs(group, shape)
    run = group.providers[provider]
    tolerance = group.tolerance_of(provider, shape)

    def gate(actual: tuple[torch.Tensor, ...]) -> float:
        """The error, if it is small enough: a red gate reports no time."""
        error = group.error(actual, exact)
        # Also false for NaN.
        assert error <= tolerance, f"{group.name} by {provider} at {shape.label}: error {error:.1e} against float64"
        return error

    error = gate(run(inputs[0]))
    if provider == OURS and INTERPRETED:
        pytest.skip("correct; but the interpreter's time says nothing")
    how = plan([lambda x=x: run(x) for x in inputs], DEVICE)
    benchmark.group = f"{group.name}, {shape.label}"
    clock.begin(how.calls)
    benchmark.pedantic(how.round_, rounds=how.rounds)
    try:
        gate(how.result())  # what was timed
    except AssertionError:
        benchmark.has_error = True  # leaves it out of pytest-benchmark's own files
        raise
    stats = benchmark.stats.stats
    recorder.append(
        "kernel",
        case=case,
        group=group.name,
        shape=shape.label,
        sizes={**shape.sizes, "B": shape.batch},
        sweep=shape.sweep,
        provider=provider,
        median=stats.median,
        spread=stats.iqr,
        rounds=how.rounds,
        bytes=group.bytes_of(shape),
        formula=group.formula,
        launches=count_launches(lambda: run(inputs[0]), DEVICE),
        extra_memory=extra_memory(lambda: run(inputs[0]), DEVICE),
        error=error,
        method=how.method,
        calls=how.calls,
        cold=DEVICE.type == "cuda" and inputs[0].bytes * len(inputs) > 2 * cache_bytes(DEVICE),
    )
