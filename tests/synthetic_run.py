"""Writes the folder of a run that nobody trained, of any length, with the metrics of a real one.

python -m tests.synthetic_run FOLDER STEPS; then `focusdpo report FOLDER` shows how long its page takes.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import yaml
from PIL import Image, ImageDraw

SPIKE, NOT_A_NUMBER = 0.4, 0.7  # where in the run a loss of one step is 9, and where it is NaN
DISTINCT = 10_000  # rows that differ; in a longer run neighbours are alike, which is written faster


def write_run(folder: Path, steps: int, max_steps: int | None = None, distinct: int = DISTINCT) -> Path:
    """Metrics, held-out metrics and alarms."""
    folder.mkdir(parents=True)
    settings = {"model": {"path": "models/synthetic"}, "data": {"train": "pairs/<train>"}, "output_dir": str(folder)}
    (folder / "config.yaml").write_text(yaml.safe_dump({**settings, "max_steps": max_steps or steps}))
    rng = np.random.default_rng(0)
    spike, bad = 1 + int(steps * SPIKE), 1 + int(steps * NOT_A_NUMBER)
    distinct = min(distinct, steps)
    columns = _columns(np.arange(distinct) / distinct, rng)
    bodies = [{name: values[i] for name, values in columns.items()} for i in range(distinct)]
    texts = [json.dumps(body)[1:] for body in bodies]
    with (folder / "metrics.jsonl").open("w") as stream:
        for step in range(1, steps + 1):
            index = (step - 1) * distinct // steps
            odd = {spike: 9.0, bad: math.nan}.get(step)
            text = texts[index] if odd is None else json.dumps({**bodies[index], "loss": odd})[1:]
            stream.write(f'{{"step": {step}, {text}\n')
    held_out = [max(1, round(steps * i / 10)) if i else 0 for i in range(11)]
    columns = _columns(np.array(held_out) / steps, rng)
    rows = [{"step": step, **{name: values[i] for name, values in columns.items()}} for i, step in enumerate(held_out)]
    (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    alarm = {"name": "errors_rising", "step": spike, "message": "over 50 steps <both> errors rise"}
    (folder / "alarms.jsonl").write_text(json.dumps(alarm) + "\n")
    return folder


def write_samples(folder: Path, steps: list[int], pairs: int) -> None:
    """Pictures under the names that a run gives them, of the sizes that it makes."""
    for step in steps:
        made = folder / "samples" / f"step-{step:06d}"
        made.mkdir(parents=True)
        for pair in range(pairs):
            for name, size in ((f"{pair}", (1340, 420)), (f"{pair}_sample", (192, 192)), (f"{pair}_masks", (1100, 1160))):
                image = Image.new("RGB", size, (40 * pair % 256, step % 256, 120))
                ImageDraw.Draw(image).text((10, 10), f"{name} step {step}", "white")
                image.save(made / f"{name}.png")


def _columns(done: np.ndarray, rng: np.random.Generator) -> dict[str, list[float]]:
    """Metrics by name over the share of the run that is done, with noise."""

    def noisy(values: np.ndarray | float, scale: float) -> list[float]:
        return (values + scale * rng.standard_normal(len(done))).tolist()

    shares = np.clip(0.5 + 0.25 * done + 0.2 * rng.standard_normal(len(done)), 0, 1)
    columns = {
        "loss": noisy(math.log(2) - 0.1 * done, 0.05),
        "margin": noisy(-2e-4 * done, 1e-4),
        "logit": noisy(0.2 * done, 0.1),
        "accuracy": shares.tolist(),
        "error/policy_win": noisy(0.4 - 0.01 * done, 0.01),
        "error/policy_lose": noisy(0.4 + 0.01 * done, 0.01),
        "error/reference_win": noisy(0.4, 0.01),
        "error/reference_lose": noisy(0.4, 0.01),
        "gradient_factor": noisy(1 - 0.3 * done, 0.05),
        "time": noisy(0.5, 0.1),
        "focus/coverage": (1 - shares).tolist(),
        "focus/detail_share": (shares > 0.9).astype(float).tolist(),
        "focus/coverage_floor": noisy(0.05, 0.001),
        "focus/coverage_chance": noisy(0.6, 0.001),
        "drift/inside": noisy(1e-4 * done, 1e-5),
        "drift/outside": noisy(2e-5 * done, 2e-6),
        "focus/detail_unreachable": [0.0] * len(done),
        "focus/all_matched": [0.0] * len(done),
        "gradient_norm": np.exp(rng.standard_normal(len(done)) - 1).tolist(),
        "learning_rate": (1e-5 * (1 + np.cos(np.pi * done)) / 2).tolist(),
        "beta": [2000.0] * len(done),
        "skipped_in_a_row": [0] * len(done),
        "pairs": [4.0] * len(done),
        "pairs_per_second": noisy(8.0, 0.1),
        "peak_memory_mib": [40960.0] * len(done),
    }
    for i in range(10):
        columns[f"focus/coverage_histogram/{i / 10:.1f}"] = ((1 - shares) * 10 // 1 == i).astype(float).tolist()
    for i in range(4):
        for name, scale in (("margin", 1e-4), ("accuracy", 0.1), ("error/policy_win", 0.01), ("error/policy_lose", 0.01)):
            columns[f"by_time/{i / 4:.2f}/{name}"] = noisy((i + 1) / 4 * (0.5 if scale > 1e-3 else -2e-4) * (1 + done), scale)
        columns[f"by_time/{i / 4:.2f}/focus/coverage"] = noisy(0.2 + 0.2 * i - 0.1 * done, 0.05)
        columns[f"by_time/{i / 4:.2f}/share"] = noisy(0.25, 0.05)
    return columns


if __name__ == "__main__":
    made = write_run(Path(sys.argv[1]), int(sys.argv[2]))
    write_samples(made, [round(int(sys.argv[2]) * i / 40) for i in range(41)], 4)
