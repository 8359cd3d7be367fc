"""From photos to numbers through the command line: compose, validate, train, sample, evaluate, on a tiny model and CLIP."""

from __future__ import annotations

import json

import pytest
import yaml

pytest.importorskip("cv2", reason="needs the extra build: pip install 'focusdpo[build]'")
pytest.importorskip("imagehash", reason="needs the extra build: pip install 'focusdpo[build]'")
pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra build: pip install 'focusdpo[build]'")
pytest.importorskip("torchmetrics", reason="needs the extra evaluation: pip install 'focusdpo[evaluation]'")

from focusdpo.commands.cli import main
from tests.photo_folder import KNOWN, write_photos
from tests.sampling.studies import pixels
from tests.tiny_vision import write_tiny_clip


@pytest.fixture
def pairs(tmp_path):
    """Pairs composed of a folder of photos: two cups, and nothing said but where the photos are."""
    shown = {"cup": KNOWN["espresso cup"], "cup2": KNOWN["espresso cup"].recoloured(0.5)}
    photos = write_photos(tmp_path / "photos", shown, 4, 128)
    count = ("--pairs", 9, "--held_out_pairs", 2, "--resolution", 96, "--reference_resolution", 96)
    focusdpo("data", "compose", "--photos", photos, "--output_dir", tmp_path / "pairs", *count)
    return tmp_path / "pairs" / "train"


def focusdpo(*words):
    main([*map(str, words), "--quiet"])


def test_the_chain(pairs, tiny_flux, tmp_path, capsys):
    count = (pairs / "pairs.jsonl").read_text().count("\n")
    assert 6 <= count <= 9
    focusdpo("data", "validate", pairs)
    assert "training may start" in capsys.readouterr().out

    settings = {
        "model": {"path": str(tiny_flux), "dtype": "fp32", "max_sequence_length": 16},
        "data": {"train": str(pairs), "validation": str(pairs.with_name("held_out")), "resolution": 96, "num_workers": 0},
        "lora": {"rank": 4, "alpha": 8.0},
        "optim": {"lr": 0.05},
        "samples": {"every": 1, "steps": 2, "manifest": str(pairs / "pairs.jsonl")},
        "output_dir": str(tmp_path / "run"),
        "max_steps": 2,
        "mixed_precision": "no",
        "cpu": True,
        "trackers": [],
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(settings))
    focusdpo("train", "--config", tmp_path / "train.yaml")

    sampled = ("--config", tmp_path / "run", "--manifest", pairs / "pairs.jsonl", "--steps", 2)
    focusdpo("sample", *sampled, "--images_per_prompt", 2, "--compare", "true", "--output_dir", tmp_path / "images")
    while_training = pixels(tmp_path / "run" / "samples" / "step-000002" / "line-1_sample.png")
    assert abs(pixels(tmp_path / "images" / "images" / "0001_0.png") - while_training).max() <= 1, "of the same noise"

    generated = ("--images", tmp_path / "images" / "images", "--images_per_prompt", 2)
    clip = write_tiny_clip(tmp_path / "clip")
    manifest = ("--manifest", pairs / "pairs.jsonl", "--output_dir", tmp_path / "evaluation", "--resamples", 100)
    focusdpo("evaluate", *generated, *manifest, "--clip", clip)
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert len(results["images"]) == 2 * count and {row["line"] for row in results["images"]} == set(range(1, count + 1))
