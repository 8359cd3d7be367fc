"""What the focus costs in a training step, and how many pairs a second a trainer makes of the same hardware.

    python -m benchmarks.step --backbone flux1 --device cuda                        # plain DPO and FocusDPO in turn
    python -m benchmarks.step --backbone flux1 --device cuda --measure throughput   # a plain loop against our settings
    python -m benchmarks.step --backbone flux1 --flops                              # counts operations; needs no GPU

The transformer has its full size and random weights, a LoRA of rank 32, and gradient checkpointing; text and pixels are encoded
already. One pair a step. With --result every timed step is appended to a file as it ends, and what has ended there is left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

import focusdpo.training.step
from benchmarks.machine import BROKEN_DEVICE, commit_id, device_is_broken, machine_info
from benchmarks.models import MODELS, Setting
from benchmarks.records import Recorder
from benchmarks.results import PLAIN_STEP, Step, Timed
from benchmarks.timing import kernels, synchronize
from benchmarks.workload import FOCUS, KEEPING, PLAIN, Variant, Workload, throughput_variants
from focusdpo.training.config import LoraConfig, ModelConfig
from focusdpo.training.memory import estimate
from focusdpo_kernels import SimilarityAccumulator
from focusdpo_kernels.tools.inspect import FAMILIES

OUR_KERNELS = {name for family in FAMILIES for name in vars(family) if name.endswith("_kernel")}
WARM_UP = 2  # rounds that are run and not measured
MEASURES = ("overhead", "parts", "keeping", "throughput", "compiled")
# Of two variants: the focus against none, and what one would write first against no focus; a case of its own, as that leaves
# the allocator in another state.
IN_TURN = {"overhead": (PLAIN, FOCUS), "keeping": (PLAIN, KEEPING)}


def take_step(variant: Variant, work: Workload, optimizer: torch.optim.Optimizer) -> None:
    with work.autocast():
        loss = variant.loss(work)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(work.parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def timed_step(variant: Variant, work: Workload, optimizer: torch.optim.Optimizer) -> tuple[float, int | None]:
    """Seconds and peak memory of a step."""
    synchronize(work.device)
    if work.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    take_step(variant, work, optimizer)
    synchronize(work.device)
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated() if work.device.type == "cuda" else None


class Measurement:
    """Measures a workload at one setting; every record goes to the file at once, and into `step` for printing."""

    def __init__(self, work: Workload, setting: Setting, recorder: Recorder, steps: int) -> None:
        self.work, self.setting, self.recorder, self.steps = work, setting, recorder, steps
        self.step = Step(work.name, setting.label, "")
        self.case = ""

    def tell(self, **facts: Any) -> None:
        self.step.facts |= facts
        self.recorder.append("workload", backbone=self.work.name, setting=self.setting.label, **facts)

    def take(self, variant: Variant, round_: int, optimizer: torch.optim.Optimizer) -> None:
        seconds, peak = timed_step(variant, self.work, optimizer)
        if round_ < WARM_UP:
            self.recorder.append("warm-up", case=self.case, variant=variant.name)  # who watches sees that it goes on
            return
        self.step.variants.setdefault(variant.name, Timed(variant.name)).add(self.case, round_, seconds, peak)
        where = {"case": self.case, "backbone": self.work.name, "setting": self.setting.label, "measure": self.step.measure}
        self.recorder.append("step", **where, variant=variant.name, round=round_, seconds=seconds, peak_memory=peak)

    def in_turn(self, *variants: Variant) -> None:
        """Variants on the same data, step by step in turn, and which of them is first changes: drift meets all alike."""
        with variants[0].applied(self.work) as optimizer:
            for i in tqdm(range(self.steps + WARM_UP), desc=f"{self.work.name}, {self.setting.target} px", unit="round"):
                for variant in variants if i % 2 == 0 else reversed(variants):
                    self.take(variant, i, optimizer)

    def parts(self) -> None:
        """Where the focus's time goes, what it launches, and the memory estimate."""
        work = self.work
        part = MODELS[work.name].architecture()
        size = estimate(
            dataclasses.replace(part, companions=0),
            ModelConfig("", dtype="fp32" if work.dtype == torch.float32 else "bf16", max_sequence_length=work.text),
            LoraConfig(rank=32),
            "no" if work.dtype == torch.float32 else "bf16",
            self.setting.layout,
            pairs=1,
        )
        self.tell(estimated_memory=size.total)
        with FOCUS.applied(work) as optimizer:
            take_step(FOCUS, work, optimizer)
            self.tell(focus_part=time_focus(lambda: take_step(FOCUS, work, optimizer), 3, work.device))
            if work.device.type == "cuda":
                launches = {v.name: self._launches(v, optimizer) for v in (PLAIN, FOCUS)}
                self.tell(launches=launches)

    def _launches(self, variant: Variant, optimizer: torch.optim.Optimizer) -> dict[str, int]:
        names = [kernel.name for kernel in kernels(lambda: take_step(variant, self.work, optimizer))]
        ours = Counter(name for name in names if name in OUR_KERNELS)
        return {"all": len(names), "ours": sum(ours.values()), **ours}


def time_focus(step: Callable[[], None], steps: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """Calls, host and device seconds a step of the focus within training steps, by function.

    Device time is between two events on the stream: it holds where the host queues ahead of the device, as it does in a large
    model.
    """
    cuda = device.type == "cuda"
    host: dict[str, list[float]] = defaultdict(list)
    events: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            before, after = (torch.cuda.Event(enable_timing=True) if cuda else None for _ in range(2))
            start = time.perf_counter()
            if before is not None:
                before.record()
            result = function(*args, **kwargs)
            if after is not None:
                after.record()
                events[name].append((before, after))
            host[name].append(time.perf_counter() - start)
            return result

        return run

    with ExitStack() as patches:
        for owner, name in (
            (SimilarityAccumulator, "update"),
            (SimilarityAccumulator, "result"),
            (focusdpo.training.step, "focus_mask"),
        ):
            patches.enter_context(mock.patch.object(owner, name, timed(name, getattr(owner, name))))
        for _ in range(steps):
            step()
    synchronize(device)
    return {
        name: {
            "calls": len(seconds) / steps,
            "host_seconds": sum(seconds) / steps,
            "device_seconds": sum(a.elapsed_time(b) for a, b in events[name]) / 1e3 / steps if cuda else None,
        }
        for name, seconds in host.items()
    }


def print_flops(work: Workload, setting: Setting) -> None:
    """Operations of a step's parts, in forward passes of one batch: what recomputation costs, and what no setting can save."""
    with FlopCounterMode(display=False) as forward, torch.no_grad(), work.autocast():
        work.predict()
    with FlopCounterMode(display=False) as both, work.autocast():
        work.predict().sum().backward()
    unit = forward.get_total_flops()
    backward = both.get_total_flops() / unit - 1
    full, least = 3 + backward, 2 + backward
    print(f"{setting.label}: a forward pass of winner and loser takes {unit / 1e12:.1f} TFLOP; in such passes,")
    print(f"  reference 1, policy 1, recomputation 1, backward {backward:.2f}: {full:.2f} with full checkpointing,")
    print(f"  {least:.2f} without: checkpointing costs {full / least:.2f}x in operations")


def measurements(
    work: Workload, settings: list[Setting], options: argparse.Namespace, recorder: Recorder
) -> Iterator[tuple[str, Measurement, Callable[[], None]]]:
    """What was asked for, case by case: its name, where its numbers go, and what to run."""
    for kind in options.measure:
        for setting in settings:
            m = Measurement(work, setting, recorder, options.steps)
            m.step.measure = "throughput" if kind == "compiled" else kind
            where = f"step-{work.name}-{setting.target}"
            if kind == "parts":
                yield f"{where}-{kind}", m, m.parts
            elif kind in IN_TURN:
                yield f"{where}-{kind}", m, partial(m.in_turn, *IN_TURN[kind])
            else:
                for variant in throughput_variants(options.budget or [0.2]):
                    if variant.compiled == (kind == "compiled"):
                        yield f"{where}-{variant.name}", m, partial(m.in_turn, variant)


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[Setting]]:
    """The options, and the settings that they choose."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", choices=list(MODELS), required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="needed unless --flops is given")
    parser.add_argument("--flops", action="store_true", help="count operations instead of measuring")
    parser.add_argument(
        "--measure",
        action="append",
        choices=MEASURES,
        help="may be repeated, in the order given: overhead (plain Diffusion-DPO and FocusDPO in turn), parts (the focus's own "
        "time, launches, memory estimate), keeping (FocusDPO in eager PyTorch that keeps hidden states), throughput (a plain "
        "loop against our settings), compiled (the settings that compile). Default: overhead, parts, keeping",
    )
    parser.add_argument("--budget", type=float, action="append", help="activation budgets to try compiled (default: 0.2)")
    parser.add_argument("--target", type=int, action="append", help="only settings with targets of so many pixels")
    parser.add_argument("--steps", type=int, default=12, help="measured steps of each variant")
    parser.add_argument("--result", type=Path, help="result file to append to")
    options = parser.parse_args(argv)
    if options.device is None and not options.flops:
        parser.error("--device: give cuda or cpu, or --flops to count operations without one")
    settings = [s for s in MODELS[options.backbone].settings if not options.target or s.target in options.target]
    if not settings:
        known = ", ".join(str(s.target) for s in MODELS[options.backbone].settings)
        parser.error(f"--target: got {options.target}; {options.backbone} is measured at {known}")
    if options.steps < 1:
        parser.error(f"--steps: got {options.steps}; expected at least 1")
    options.measure = options.measure or ["overhead", "parts", "keeping"]
    return options, settings


def main(argv: list[str] | None = None) -> None:
    options, settings = parse(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmarks.step: error: --device cuda: PyTorch sees no GPU here")
    device = torch.device("meta" if options.flops else options.device)
    recorder = Recorder(options.result)
    if not options.flops:
        try:
            recorder.open_run(machine_info(device), commit_id())
        except (OSError, ValueError) as error:
            sys.exit(f"benchmarks.step: error: --result: {error}")
    model = f"step-{options.backbone}-model"
    try:
        work = Workload(options.backbone, device)
    except Exception as error:
        recorder.append("failed", case=model, why=f"{type(error).__name__}: {error}"[:2000])
        raise
    if model in recorder.ended():  # it failed before
        recorder.append("done", case=model)
    if options.flops:
        for setting in settings:
            work.at(setting)
            print_flops(work, setting)
    else:
        run(work, settings, options, recorder)


def run(work: Workload, settings: list[Setting], options: argparse.Namespace, recorder: Recorder) -> None:
    """Every measurement that has not ended; one that fails leaves the others alone, unless the device is lost."""
    ended, told, failed = recorder.ended(), set(), False
    for case, m, measure in measurements(work, settings, options, recorder):
        if case in ended:
            continue
        recorder.append("begin", case=case)
        m.case = case
        try:
            work.at(m.setting)
            if m.setting not in told:
                told.add(m.setting)
                trained = sum(p.numel() for p in work.parameters)
                every = sum(p.numel() for p in work.module.parameters())
                m.tell(parameters=every, lora_parameters=trained, dtype=str(work.dtype))
            measure()
        except Exception as error:
            failed = True
            recorder.append("failed", case=case, why=f"{type(error).__name__}: {error}"[:2000])
            print(f"benchmarks.step: {case}: {type(error).__name__}: {error}", file=sys.stderr)
            if work.device.type == "cuda" and device_is_broken():
                sys.exit(BROKEN_DEVICE)
            for parameter in work.parameters:
                parameter.grad = None
            torch.cuda.empty_cache()
        else:
            recorder.append("done", case=case)
            print_step(m.step, work.device)
    sys.exit(1 if failed else 0)


def print_step(step: Step, device: torch.device) -> None:
    print(f"{step.backbone}, {step.setting}, on {machine_info(device)['device']}")
    for timed in step.variants.values():
        memory = "" if timed.peak_memory is None else f"  {timed.peak_memory / 2**30:8.3f} GiB"
        print(f"  {timed.name:60} {timed.median:9.4f} s  {1 / timed.median:8.3f} pairs/s{memory}")
        overhead = step.overhead(timed.name)
        if overhead and timed.name != PLAIN_STEP:
            middle, low, high = overhead.percent_of(step.variants[PLAIN_STEP].median)
            pairs = f"{overhead.pairs} paired steps, at {100 * overhead.confidence:.1f} %"
            print(f"    {middle:+.3f} % [{low:+.3f}, {high:+.3f}] of a plain step, by {pairs}")
    for name, value in step.facts.items():
        print(f"  {name}: {value}")


if __name__ == "__main__":
    main()
