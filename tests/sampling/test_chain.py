"""From pairs to numbers through the command line: validate, train, sample, evaluate, on a tiny model and a tiny CLIP."""

from __future__ import annotations

import json

import pytest
import yaml

pytest.importorskip("torchmetrics", reason="needs the extra evaluation: pip install 'focusdpo[evaluation]'")

from focusdpo.commands.cli import main
from tests.sampling.studies import pixels
from tests.tiny_vision import write_tiny_clip


@pytest.fixture
def pairs(tiny_pairs):
    """The chain's head: a folder of pairs with its pairs.jsonl, here composed by the demo."""
    return tiny_pairs.parent


def focusdpo(*words):
    main([*map(str, words), "--quiet"])


def test_the_chain(pairs, tiny_flux, tmp_path, capsys):
    focusdpo("data", "validate", pairs)
    assert "training may start" in capsys.readouterr().out

    settings = {
        "model": {"path": str(tiny_flux), "dtype": "fp32", "max_sequence_length": 16},
        "data": {"train": str(pairs), "resolution": 96, "num_workers": 0},
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
    assert len(results["images"]) == 16 and {row["line"] for row in results["images"]} == set(range(1, 9))
