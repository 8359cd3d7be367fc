"""Trains in a child process and kills it, again and again, until it may finish: killed_worker.py CONFIG.yaml KILLS.

A fork spares every child the seconds that importing takes; the parent itself never trains.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from focusdpo.commands.cli import parse_config
from focusdpo.training.trainer import Trainer

FEW = 3  # steps between two kills


def train(file: str) -> None:
    Trainer(parse_config(["train", "--config", file, "--resume", "latest"])[1]).train()


def lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def wait_for_a_moment(draw: random.Random, folder: Path, child: int) -> str:
    """Sleeps until a random moment of the child's run: while it starts, steps, or writes a checkpoint."""
    kind = draw.choice(["start", "step", "step", "checkpoint"])
    metrics, before = folder / "metrics.jsonl", lines(folder / "metrics.jsonl")

    def sleep(seconds: float) -> str:
        # A fast machine would make so many steps in the time that the run ended before it was killed often enough.
        latest = time.monotonic() + seconds
        while time.monotonic() < latest and lines(metrics) < before + FEW:
            time.sleep(0.001)
        return kind

    if kind == "start":
        return sleep(draw.uniform(0, 1))
    steps = draw.randint(1, FEW)
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if kind == "step" and lines(metrics) >= before + steps:
            return sleep(draw.uniform(0, 0.1))
        if kind == "checkpoint" and any((folder / "checkpoints").glob("*.partial")):
            return sleep(draw.uniform(0, 0.02))
        time.sleep(0.001)
    raise SystemExit("the run ended before it was killed")


def main(file: str, kills: int) -> None:
    torch.set_num_threads(1)
    draw = random.Random(0)
    folder = Path(parse_config(["train", "--config", file])[1].output_dir)
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            train(file)
            os._exit(0)
        kind = wait_for_a_moment(draw, folder, child)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            raise SystemExit("the run ended before it was killed")
        print("killed at", kind, flush=True)
    train(file)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
