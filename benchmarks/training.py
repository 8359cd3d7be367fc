"""`focusdpo train` as a user runs it, on a pipeline of a released model's size with random weights.

    python -m benchmarks.training --backbone flux2-klein-4b --device cuda
    python -m benchmarks.training --backbone tiny --device cpu                # half a minute, for a rehearsal

A folder, which is deleted in the end, gets the pipeline (its transformer full-size; text encoder and VAE with the real shapes
of what they give, and little inside), pairs of composed photographs and two runs: one in one go, and one killed half-way
and resumed. Reported are pairs a second, the peak of memory beside the estimate of `focusdpo models`, and whether both runs end
with the same numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.machine import commit_id, machine_info
from benchmarks.records import Recorder
from focusdpo.data.images import PATCH_SIZE
from focusdpo.foundation.journals import read_metrics

PAIRS, RANK = 8, 32
# Of a model: side of the images and of the references in pixels, text tokens.
SIZES = {"flux2-klein-4b": (512, 512, 512), "tiny": (96, 48, 64)}
CLOCK = ("pairs_per_second", "peak_memory_mib")


def write_pipeline(folder: Path, backbone: str, device: torch.device) -> None:
    from tests.tiny_flux2 import write_tiny_flux2

    if backbone == "tiny":
        write_tiny_flux2(folder)
        return
    from focusdpo.models.sizes import RELEASED

    architecture = RELEASED["FLUX.2 klein 4B"]
    write_tiny_flux2(folder, text_width=architecture.config["joint_attention_dim"] // 3, latent_channels=32)
    transformer = architecture.build(torch.bfloat16, SIZES[backbone][2], device).transformer
    transformer.save_pretrained(folder / "transformer")
    del transformer
    torch.cuda.empty_cache()


def train(folder: Path, name: str, backbone: str, device: torch.device, steps: int, *options: str) -> subprocess.Popen[bytes]:
    """Starts `focusdpo train` in folder/name."""
    resolution, reference, text = SIZES[backbone]
    precision = "bf16" if device.type == "cuda" else "no"
    settings: dict[str, Any] = {
        "model.path": folder / "model",
        "model.backbone": "flux2",
        "model.dtype": "bf16" if device.type == "cuda" else "fp32",
        "model.max_sequence_length": text,
        "data.train": folder / "pairs",
        "data.resolution": resolution,
        "data.reference_resolution": reference,
        "output_dir": folder / name,
        "lora.rank": RANK,
        "mixed_precision": precision,
        "max_steps": steps,
        "checkpoint_every": max(steps // 4, 1),
        "trackers": "[]",
    }
    command = [sys.executable, "-m", "focusdpo", "train", *options]
    for option, value in settings.items():
        command += [f"--{option}", str(value)]
    return subprocess.Popen(command)


def killed_and_resumed(folder: Path, backbone: str, device: torch.device, steps: int) -> int:
    """A run that is killed once half of its steps are in its metrics, then resumed to the end: the step it was killed after."""
    metrics = folder / "killed" / "metrics.jsonl"
    process = train(folder, "killed", backbone, device, steps)
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > steps // 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        raise RuntimeError(f"the run that was to be killed ended by itself with {process.returncode}")
    after = len(read_metrics(metrics))
    finish(train(folder, "killed", backbone, device, steps, "--resume", "latest"), "resumed")
    return after


def finish(process: subprocess.Popen[bytes], what: str) -> None:
    if process.wait():
        raise RuntimeError(f"focusdpo train ({what}): exit status {process.returncode}")


def differences(folder: Path) -> list[str]:
    """Where the killed run's numbers and adapter are not the other's, bit by bit."""
    from safetensors.torch import load_file

    found = []
    runs = [read_metrics(folder / name / "metrics.jsonl") for name in ("whole", "killed")]
    if len(runs[0]) != len(runs[1]):
        found.append(f"{len(runs[0])} and {len(runs[1])} rows")
    for one, other in zip(*runs, strict=False):
        found += [
            f"step {one['step']} {key}: {value} and {other.get(key)}"
            for key, value in one.items()
            if key not in CLOCK and value != other.get(key)
        ]
    lora, resumed = (load_file(folder / name / "lora" / "pytorch_lora_weights.safetensors") for name in ("whole", "killed"))
    found += [f"adapter {name}" for name, value in lora.items() if not torch.equal(value, resumed[name])]
    return found


def estimated_memory(folder: Path, backbone: str, device: torch.device) -> int:
    """Bytes that `focusdpo models` would estimate for this pipeline, with the references of the largest pair."""
    from focusdpo.data import LongestSide
    from focusdpo.models import Flux2, TokenLayout
    from focusdpo.models.sizes import Architecture
    from focusdpo.training.config import LoraConfig, ModelConfig
    from focusdpo.training.memory import estimate

    resolution, longest, text = SIZES[backbone]
    grid, half = resolution // PATCH_SIZE, device.type == "cuda"
    model = ModelConfig("", backbone="flux2", dtype="bf16" if half else "fp32", max_sequence_length=text)
    layouts = []
    for line in (folder / "pairs" / "pairs.jsonl").read_text().splitlines():
        photos = [Image.open(folder / "pairs" / reference["image"]).size for reference in json.loads(line)["references"]]
        placed = [LongestSide(longest).place(photo, len(photos)).size for photo in photos]
        layouts.append(TokenLayout((grid, grid), tuple((h // PATCH_SIZE, w // PATCH_SIZE) for w, h in placed)))
    layout = max(layouts, key=lambda one: one.num_reference)
    architecture = Architecture.of_folder(Flux2, folder / "model")
    return estimate(architecture, model, LoraConfig(rank=RANK), "bf16" if half else "no", layout, pairs=1).total


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", choices=list(SIZES), required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--result", type=Path, help="result file to append to")
    options = parser.parse_args(argv)
    device, case = torch.device(options.device), f"training-{options.backbone}"
    recorder = Recorder(options.result)
    recorder.open_run(machine_info(device), commit_id())
    if case in recorder.ended():
        return
    recorder.append("begin", case=case)
    try:
        with tempfile.TemporaryDirectory() as folder:  # 8 GB at full size
            facts = measure(Path(folder), options.backbone, device, options.steps, recorder, case)
    except (OSError, RuntimeError) as error:
        recorder.append("failed", case=case, why=f"{type(error).__name__}: {error}"[:2000])
        sys.exit(f"benchmarks.training: error: {error}")
    recorder.append("done", case=case)
    for name, value in facts.items():
        print(f"{name}: {value}")


def measure(folder: Path, backbone: str, device: torch.device, steps: int, recorder: Recorder, case: str) -> dict[str, Any]:
    from focusdpo.demo.scenes import write_dataset

    os.environ["HF_HUB_OFFLINE"] = "1"
    write_pipeline(folder / "model", backbone, device)
    write_dataset(folder / "pairs", PAIRS, SIZES[backbone][0], seed=0)
    started = time.perf_counter()
    finish(train(folder, "whole", backbone, device, steps), "in one go")
    rows = read_metrics(folder / "whole" / "metrics.jsonl")
    resolution, reference, _ = SIZES[backbone]
    facts: dict[str, Any] = {
        "steps": len(rows),
        "seconds": time.perf_counter() - started,
        "pairs_per_second": statistics.median(row["pairs_per_second"] for row in rows[len(rows) // 4 :]),
        "peak_memory": round(max(row["peak_memory_mib"] for row in rows) * 2**20),
        "estimated_memory": estimated_memory(folder, backbone, device),
        "margins": [row["margin"] for row in rows],
    }
    where = {"backbone": backbone, "setting": f"one pair at {resolution} px, 2 references of {reference} px"}
    recorder.append("training", case=case, **where, **facts)  # before what may fail
    facts["killed_after"] = killed_and_resumed(folder, backbone, device, steps)
    facts["differences"] = differences(folder)[:20]
    recorder.append("training", case=case, **where, **facts)
    return facts


if __name__ == "__main__":
    main()
