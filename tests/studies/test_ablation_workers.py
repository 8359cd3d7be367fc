"""How the workers of an ablation share the GPUs of a machine, tried without one."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from focusdpo.foundation import workers
from focusdpo.studies.ablation import jobs as ablation_jobs
from tests import PATIENCE


def test_a_worker_imports_nothing_that_asks_for_gpus_before_it_has_its_own():
    """Such as bitsandbytes and torchao, which peft and diffusers import: CUDA keeps the GPUs that it was first asked for."""
    code = """
import sys, torch
def asked(*arguments): raise AssertionError("CUDA was asked for")
for name in ("is_available", "init", "_lazy_init", "current_device"): setattr(torch.cuda, name, asked)
import focusdpo.commands.cli, focusdpo.foundation.workers
print(sorted({"peft", "diffusers", "transformers", "bitsandbytes", "torchao", "accelerate"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("visible", "expected"), [(None, ["0", "1", "0"]), ("5,GPU-7a", ["5", "GPU-7a", "5"])])
def test_workers_share_the_gpus(visible, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    found = []
    for place in range(3):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        workers.take_gpu(place, devices=2)
        found.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert found == expected
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ChildProcessError, match="a worker sees several GPUs"):
        workers.take_gpu(0, devices=2)


def test_a_worker_for_each_gpu(monkeypatch):
    jobs = [SimpleNamespace(config=SimpleNamespace(cpu=False), is_done=number == 4) for number in range(5)]
    spread = []

    def note(jobs, count, devices, bar):
        spread.append((len(jobs), count, devices))
        raise KeyboardInterrupt

    monkeypatch.setattr(ablation_jobs, "_spread", note)
    for devices in (3, 8):
        monkeypatch.setattr(torch.cuda, "device_count", lambda devices=devices: devices)
        with pytest.raises(KeyboardInterrupt):
            ablation_jobs.run_jobs(jobs, None)
    assert spread == [(4, 3, 3), (4, 4, 8)], "no more than there are runs left"
