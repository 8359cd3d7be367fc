"""Started by tests/training/test_several_processes.py as processes of a launch: `focusdpo train`, spoilt as CASE says.

CASE is "nan" (a pair of rank 1 has no finite loss), "hangs" (rank 1 does not come to its second step), "dies" (rank 1 is killed
there), "slow" (every batch and evaluation takes long), "counts" (what each process decodes and hashes
is noted, every state of a bar is a line, and rank 0 loads its encoders for longer than a collective waits), or nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import os
import signal
import sys
import time
from pathlib import Path

import torch

from focusdpo.commands.cli import main
from focusdpo.data import validation
from focusdpo.foundation import files, progress_bars
from focusdpo.training import cache, prepared_run, step, trainer

gc.freeze()  # as the commands do with what they import
case, rank = os.environ.get("CASE", ""), int(os.environ["RANK"])
compare = step.PreferenceStep.compare
optimizer_step, compute_loss = trainer.Trainer._optimizer_step, trainer.Trainer._compute_loss

files.COMES = 1.0


def note(name: str) -> None:
    with Path(os.environ["NOTES"], f"{name}-{rank}").open("a") as file:
        file.write(".")


if case == "nan":

    def spoilt(self, noised, batch, reference=None):
        result = compare(self, noised, batch, reference)
        if rank == 1 and torch.is_grad_enabled():
            spoilt_loss = result.output.loss * torch.nan
            logits = result.output.logits * torch.nan
            output = result.output._replace(loss=spoilt_loss, logits=logits)
            result = dataclasses.replace(result, output=output)
        return result

    step.PreferenceStep.compare = spoilt
elif case in ("hangs", "dies"):

    def missing(self, batches):
        if rank == 1 and self.progress.step == 1:
            if case == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(1000)
        return optimizer_step(self, batches)

    trainer.Trainer._optimizer_step = missing
elif case == "slow":

    def slow(self, batch):
        time.sleep(0.2)
        return compute_loss(self, batch)

    trainer.Trainer._compute_loss = slow
elif case == "counts":
    check_pair, checksum = validation.check_pair, cache.checksum
    validation.check_pair = lambda *args: (note("checked"), check_pair(*args))[1]
    cache.checksum = functools.wraps(checksum)(lambda file: (note("hashed"), checksum(file))[1])
    load_backbone = prepared_run.load_backbone

    def late(config, parts, *args, **kwargs):
        if parts == "encoders" and rank == 0:
            time.sleep(1.2 * config.collective_timeout)
        return load_backbone(config, parts, *args, **kwargs)

    prepared_run.load_backbone = late
    progress_bars.EVERY = 0.0

main(["train", *sys.argv[1:]])
