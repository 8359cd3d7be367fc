"""The device that is measured, and what a result says of it."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch
import triton
from pytest_benchmark.utils import get_commit_info

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads ({platform.machine()})"


def machine_info(device: torch.device = DEVICE) -> dict[str, Any]:
    """What a reader needs, without the names of a machine."""
    info = {
        "device": device_name(device),
        "device_type": device.type,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        info |= {
            "multiprocessors": properties.multi_processor_count,
            "l2_mib": properties.L2_cache_size / 2**20,
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }
    return info


def commit_info() -> dict[str, Any]:
    """The commit that is measured; BENCH_COMMIT names it where there is no repository."""
    return {"id": os.environ.get("BENCH_COMMIT") or get_commit_info().get("id")}
