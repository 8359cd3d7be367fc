"""The demo, on a cut-down size: everything it promises is there, and the kernels give the same losses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from focusdpo.data import load_pairs
from focusdpo.demo.scenes import write_dataset
from focusdpo.foundation.journals import read_metrics
from tests import PATIENCE

SMALL = ["--pairs", "6", "--held_out", "3", "--steps", "3", "--batch_size", "2", "--resolution", "96", "--overlays", "1"]


def demo(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FOCUSDPO_BACKEND")}
    command = [sys.executable, "-m", "focusdpo", "demo", "--out", str(folder), *SMALL, *arguments]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, timeout=PATIENCE)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "out"
    done = demo(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout, done.stderr


def test_everything_is_there(finished):
    folder, output, _ = finished
    for name in (
        "data/train/pairs.jsonl",
        "model/model_index.json",
        "train.yaml",
        "run/metrics.jsonl",
        "run/lora/pytorch_lora_weights.safetensors",
        "curves.png",
        "overlays/pair0.png",
        "sample.png",
        "report.html",
    ):
        assert (folder / name).is_file(), name
        assert str(folder / name) in output or str((folder / name).parent) in output
    assert "implicit accuracy  0.50 before" in output
    assert Image.open(folder / "curves.png").width > 1000
    page = (folder / "report.html").read_text()
    assert "finished" in page and page.count('class="shot"') == 3, "one pair, at steps 0, 2 and 3"


def test_nobody_else_speaks(finished):
    """No library warns of what is not installed, no bar leaves its states in a pipe, and all is said in one block each."""
    _, output, said = finished
    lines = said.splitlines()
    assert [line for line in lines if not line.startswith(("INFO: ", "WARNING: ", "  "))] == []
    ours = ("INFO: training begins", "INFO: training is done, at step 3 of 3")
    assert all(sum(line.startswith(start) for line in lines) == 1 for start in ours)
    assert output.startswith("\nheld-out pairs (3; 3 steps on 6 others):\n")


def test_triton_gives_the_same_losses(finished, tmp_path):
    # Pictures are left out: only the losses are compared.
    done = demo(tmp_path / "out", "--overlays", "0", TRITON_INTERPRET="1", FOCUSDPO_BACKEND="triton")
    assert done.returncode == 0, done.stderr[-3000:]
    for file in ("metrics.jsonl", "validation.jsonl"):
        rows = [read_metrics(folder / "run" / file) for folder in (finished[0], tmp_path / "out")]
        assert len(rows[0]) == len(rows[1]) > 0
        for expected, actual in zip(*rows, strict=True):
            assert actual["loss"] == pytest.approx(expected["loss"], abs=1e-4)
            assert actual["focus/coverage"] == pytest.approx(expected["focus/coverage"], abs=1e-6)


def test_its_settings_file_trains(finished, tmp_path):
    """What the demo prints as the next command works."""
    folder = finished[0]
    command = [sys.executable, "-m", "focusdpo", "train", "--config", str(folder / "train.yaml"), "--max_steps", "1"]
    done = subprocess.run([*command, "--output_dir", str(tmp_path / "run")], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 1


def test_an_earlier_demo_is_protected(finished):
    folder = finished[0]
    done = demo(folder)
    assert done.returncode == 1 and "holds an earlier run" in done.stderr and "--overwrite true" in done.stderr
    assert (folder / "sample.png").is_file()


def test_losers_change_every_subject(tmp_path):
    for record in load_pairs(str(write_dataset(tmp_path, 6, 96, seed=0, per_subject=True))):
        winner, loser, *priors = (np.asarray(Image.open(path)) for path in (record.winner, record.loser, *record.prior))
        differs = (winner != loser).any(-1)
        assert len(priors) == 2 and all(differs[prior > 0].mean() > 0.2 for prior in priors)
        assert not differs[np.maximum(*priors) == 0].any()


@pytest.mark.parametrize("resolution", [64, 80, 144])
def test_references_show_their_subject_from_end_to_end(tmp_path, resolution):
    """Also where half of the resolution is no whole number of tokens."""
    for record in load_pairs(str(write_dataset(tmp_path, 6, resolution, seed=0))):
        for reference in record.references:
            inside = np.asarray(Image.open(reference.mask)) > 0
            longer = int(np.argmax(inside.shape))
            ends = inside.take([0, -1], axis=longer)
            assert not ends.any(), "the subject is cut off"
