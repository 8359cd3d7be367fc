"""Numbers that would say what is not so: those of pairs that are no numbers, and of held-out pairs that are not held out."""

from __future__ import annotations

import json
import logging
import math
import shutil
from contextlib import redirect_stderr
from io import StringIO
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from focusdpo.loss import Drift, FocusDPOOutput
from focusdpo.training import batches
from focusdpo.training.batches import load_records
from focusdpo.training.callbacks import ProgressBar
from focusdpo.training.config import DataConfig, ModelConfig, TrainConfig
from focusdpo.training.step_metrics import Averager, step_metrics

NAN = math.nan
TIMES = [0.1, 0.3, 0.35, 0.9]  # in the bins 0.00, 0.25, 0.25 and 0.75


def result_of(margins, coverage=(0.05, 0.15, 0.95, 1.0), floor=(0.0, 0.3, 0.0, 0.0)) -> Any:
    margin = torch.tensor(margins)
    output = FocusDPOOutput(
        loss=margin.mean(),
        margin=margin,
        logits=margin,
        accuracy=margin.mean(),
        policy_win=margin + 1,
        policy_lose=margin + 2,
        reference_win=margin + 3,
        reference_lose=margin + 4,
    )
    focus = SimpleNamespace(
        coverage=torch.tensor(coverage),
        coverage_floor=torch.tensor(floor),
        uses_detail=torch.tensor([True, False, True, True]),
        all_matched=torch.tensor([True, True, False, True]),
        coverage_chance=torch.tensor(floor),
        source="features",
        tau=0.1,
    )
    return SimpleNamespace(output=output, focus=focus, t=torch.tensor(TIMES), drift=Drift(margin, margin, margin))


def averaged(*results: Any) -> dict[str, float]:
    averager = Averager(SimpleNamespace(device=torch.device("cpu"), reduce=lambda values, reduction: values))
    for each in results:
        averager.add(step_metrics(each), 4)
    return averager.result()


def of_bin(metrics, place):
    return {name: value for name, value in metrics.items() if name.startswith(f"by_time/{place}/")}


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_a_pair_that_is_no_number_stays_in_its_bin(bad):
    sound, damaged = averaged(result_of([0.5, 1.0, 3.0, -1.0])), averaged(result_of([bad, 1.0, 3.0, -1.0]))
    for place in ("0.25", "0.75"):
        assert of_bin(damaged, place) == of_bin(sound, place) != {}
    assert damaged["by_time/0.25/margin"] == pytest.approx(2.0)
    assert not math.isfinite(damaged["by_time/0.00/margin"]) and not math.isfinite(damaged["margin"])
    assert damaged["by_time/0.00/share"] == 0.25 and "by_time/0.50/share" not in damaged


def test_a_batch_with_such_a_pair_leaves_the_other_bins_of_the_step_alone():
    metrics = averaged(result_of([NAN, 1.0, 3.0, -1.0]), result_of([0.5, 2.0, 2.0, -3.0]))
    assert metrics["by_time/0.25/margin"] == pytest.approx(2.0) and metrics["by_time/0.75/margin"] == pytest.approx(-2.0)
    assert math.isnan(metrics["by_time/0.00/margin"])


def test_coverage_that_is_no_number_is_in_no_bar_and_reaches_nothing():
    metrics = averaged(result_of([0.0] * 4, coverage=(NAN, 0.15, 0.95, 1.0), floor=(NAN, 0.3, 0.0, 0.0)))
    bars = {name[-3:]: value for name, value in metrics.items() if name.startswith("focus/coverage_histogram/")}
    assert {name: value for name, value in bars.items() if value} == {"0.1": 0.25, "0.9": 0.5}, "not in the bar of 0"
    assert math.isnan(metrics["focus/coverage"]) and math.isnan(metrics["focus/detail_unreachable"])
    assert metrics["by_time/0.25/focus/coverage"] == pytest.approx(0.55) and math.isnan(metrics["by_time/0.00/focus/coverage"])
    assert metrics["focus/detail_share"] == 0.75 and metrics["focus/all_matched"] == 0.75
    sound = averaged(result_of([0.0] * 4))
    assert sound["focus/detail_unreachable"] == 0.25 and sound["focus/coverage_histogram/0.0"] == 0.25


@settings(deadline=None)
@given(st.lists(st.floats(0, 1) | st.sampled_from([NAN, math.inf, -math.inf]), min_size=1, max_size=60))
def test_the_bar_shows_the_weighted_mean_of_the_finite_values(values):
    progress = ProgressBar()
    trainer: Any = SimpleNamespace(config=SimpleNamespace(max_steps=100), progress=SimpleNamespace(step=0))
    with redirect_stderr(StringIO()):
        progress.on_train_begin(trainer)
        for value in values:
            progress.on_step_end(trainer, {"loss": NAN, "accuracy": value})
        progress.on_train_end(trainer)
    shown = float(progress.bar.postfix.split("accuracy=")[1].split(",")[0])
    finite = [value for value in values if math.isfinite(value)]
    weights = [0.95 ** (len(finite) - 1 - i) for i in range(len(finite))]
    if not finite:
        assert math.isnan(shown)
        return
    expected = sum(w * x for w, x in zip(weights, finite, strict=True)) / sum(weights)
    assert shown == pytest.approx(expected, abs=0.00501)


# Held-out pairs.


def write_pairs(folder, count, seed, noise=True):
    """Pairs of images of their own; without noise those of all seeds have one size in bytes, as raw images have."""
    rng = np.random.default_rng(seed)
    (folder / "refs").mkdir(parents=True)
    lines = []
    for i in range(count):
        for name in (f"{i}_winner", f"{i}_loser", f"refs/{i}"):
            pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}.{'png' if noise else 'bmp'}")
        Image.fromarray(np.full((32, 32), 255, dtype=np.uint8)).save(folder / f"{i}_prior.png")
        end = "png" if noise else "bmp"
        names = {"winner": f"{i}_winner.{end}", "loser": f"{i}_loser.{end}", "prior": f"{i}_prior.png"}
        lines.append({"prompt": f"a cat {i}", "references": [{"image": f"refs/{i}.{end}"}], **names})
    write_lines(folder, lines)
    return folder, lines


def write_lines(folder, lines):
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(params=[True, False], ids=["png", "bmp"])
def data(tmp_path, caplog, request):
    train, _ = write_pairs(tmp_path / "train", 3, 0, request.param)
    held_out, lines = write_pairs(tmp_path / "held_out", 5, 1, request.param)

    def warning(validation=held_out, train=train):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            load_records(TrainConfig(ModelConfig("x"), DataConfig(str(train), str(validation)), "out"))
        found = [record.getMessage() for record in caplog.records if record.name == batches.__name__]
        assert len(found) <= 1
        return found[0] if found else ""

    return SimpleNamespace(train=train, held_out=held_out, lines=lines, warning=warning)


def test_held_out_pairs_of_their_own_are_not_warned_of(data):
    assert data.warning() == ""
    reference = data.lines[0]["references"][0]["image"]
    shutil.copy(data.train / reference, data.held_out / reference)
    assert data.warning() == "", "references of one subject may be alike"


@pytest.mark.parametrize("how", ["itself", "link", "pattern", "copy"])
def test_the_training_set_as_validation(data, how, tmp_path):
    other = tmp_path / "other"
    if how == "itself":
        other = data.train
    elif how == "link":
        other.symlink_to(data.train)
    elif how == "pattern":
        other = data.train / ".." / "train" / "pairs.jsonl"
    else:
        shutil.copytree(data.train, other)
    warning = data.warning(other)
    assert warning.startswith("data.validation: 3 of 3 held-out pairs have images of data.train, 3 of them as winner or loser")
    assert "it is the training set, or a part of it" in warning and "say nothing about new pairs" in warning
    assert f"pairs.jsonl:1: winner is winner of {data.train}" in warning


def test_shared_images_are_counted_with_examples(data):
    names = {field: data.lines[0][field] for field in ("winner", "loser")}
    shared = [dict(line) for line in data.lines]
    shared[0]["winner"] = f"../train/{names['loser']}"
    shared[1]["references"] = [{"image": f"../train/{data.lines[2]['references'][0]['image']}"}]
    shared[2]["loser"] = f"../train/{names['winner']}"
    write_lines(data.held_out, shared)
    warning = data.warning()
    assert "3 of 5 held-out pairs" in warning and "2 of them as winner or loser;" in warning and "training set" not in warning
    assert f"  {data.held_out / 'pairs.jsonl'}:1: winner is loser of {data.train / 'pairs.jsonl'}:1\n" in warning
    assert ":2: references[0].image is references[0].image of" in warning and f"{data.train / 'pairs.jsonl'}:3" in warning
    shared[3]["winner"] = f"../train/{data.lines[1]['winner']}"
    write_lines(data.held_out, shared)
    assert data.warning().endswith("\n  and 1 pair more")


def test_copies_are_seen_where_few_need_be_read(data, monkeypatch):
    name = data.lines[0]["winner"]
    shutil.copy(data.train / name, data.held_out / name)
    assert ":1: winner is winner of" in data.warning()
    monkeypatch.setattr(batches, "MAX_COMPARED", 0)
    assert data.warning() == ""
