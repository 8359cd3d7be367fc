"""Prints what a bug report needs: versions, devices, and which backend runs where and why.

python -m focusdpo_kernels.tools.env
"""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch

from focusdpo_kernels.backend import ACCELERATORS, INTERPRETED, resolve_backend

PACKAGES = ("focusdpo", "torch", "triton", "numpy", "accelerate", "diffusers", "peft", "transformers")
VARIABLES = ("FOCUSDPO_BACKEND", "TRITON_INTERPRET", "TRITON_CACHE_DIR", "TRITON_DEFAULT_FP_FUSION", "CUDA_VISIBLE_DEVICES")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    devices = [f"cpu: {platform.machine()}, {os.cpu_count()} cores"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        arch = getattr(properties, "gcnArchName", f"sm_{properties.major}{properties.minor}")
        units = f"{properties.multi_processor_count} multiprocessors"
        devices.append(f"cuda:{index}: {properties.name}, {arch}, {units}, {memory:.0f} GiB")
    return devices


def _choice(device: str) -> str:
    """Which backend tensors on a device get, and why."""
    chosen = os.environ.get("FOCUSDPO_BACKEND")
    try:
        backend = resolve_backend(None, torch.empty(0, device=device))
    except ValueError as error:
        return f"refused: {error}"
    if chosen:
        return f"{backend}, by FOCUSDPO_BACKEND"
    if device.split(":")[0] in ACCELERATORS:
        return f"{backend}, the automatic choice on an accelerator"
    extra = "; backend='triton' would run in the interpreter" if INTERPRETED else ""
    return f"{backend}, the automatic choice on {device}{extra}"


def report(backends: bool = True) -> str:
    """The text that the command prints.

    Args:
        backends: also say which backend runs on each device. Asking takes a little memory on all of them, which belongs to the
            other processes where each has a device of its own.
    """
    lines = [f"python {platform.python_version()} on {platform.platform()}"]
    lines += [f"{package} {_version(package)}" for package in PACKAGES]
    lines.append(f"torch built for CUDA {torch.version.cuda or '-'}, ROCm {torch.version.hip or '-'}")
    lines += _devices()
    lines += [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    lines.append(f"interpreter: {'on' if INTERPRETED else 'off'}")
    for line in _devices() if backends else []:
        device = line.split(": ")[0]
        lines.append(f"backend for {device} tensors: {_choice(device)}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
