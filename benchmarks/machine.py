"""The device that is measured on, in a result's words.

python -m benchmarks.machine RESULT.jsonl     # prints what is there, and begins or continues a result of it
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from pytest_benchmark.utils import get_commit_info

from benchmarks.records import Recorder
from focusdpo_kernels.tools import env

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BROKEN_DEVICE = 70  # exit status of a process whose device is lost to it, while another process may still use it


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
            "driver": _driver(),
        }
    return info


@functools.cache
def _driver() -> str | None:
    """Version of the driver, where NVIDIA's library tells it."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:
        return None


def commit_id() -> str | None:
    """The commit that is measured; BENCH_COMMIT names it where there is no repository."""
    return os.environ.get("BENCH_COMMIT") or get_commit_info().get("id")


def device_is_broken() -> bool:
    """Whether this process can use its GPU no more: after an illegal access or a failed assertion every call fails."""
    try:
        torch.cuda.synchronize()
        return bool(torch.ones(1, device="cuda").item() != 1)
    except torch.OutOfMemoryError:
        return False
    except RuntimeError:
        return True


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.machine", description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, help="file to begin or to continue")
    parser.add_argument("--gpu", action="store_true", help="refuse to begin without one")
    options = parser.parse_args(argv)
    print(env.report(), flush=True)
    if options.gpu and DEVICE.type != "cuda":
        sys.exit("gpu.sh: PyTorch sees no GPU here")
    try:
        Recorder(options.result).open_run(machine_info(), commit_id())
    except ValueError as error:
        sys.exit(f"gpu.sh: error: {error}")


if __name__ == "__main__":
    main()
