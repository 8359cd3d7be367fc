"""Runs our kernels once within the profiler's range, for a tool that reads hardware counters.

ncu --profile-from-start off python -m benchmarks.profiled --shape uno-1024
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.cases import GROUPS
from benchmarks.inputs import NAMED, Shape
from benchmarks.results import OURS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profiled", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(NAMED), default="uno-1024")
    options = parser.parse_args()
    device = torch.device("cuda")
    for group in GROUPS:
        if group.name == "focus step":  # the sum of the others
            continue
        for batch in group.batches:
            inputs = group.inputs(Shape(options.shape, NAMED[options.shape], batch), device)
            for _ in range(2):  # compiled, and the caches of the host filled
                group.providers[OURS](inputs)
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            group.providers[OURS](inputs)
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
