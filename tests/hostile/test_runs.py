"""Runs that are stopped, damaged or beyond help: what they say, and what is left."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import save_file

from focusdpo.building.config import BuildConfig
from focusdpo.commands import cli
from focusdpo.commands.data_build import prepare as prepare_build
from focusdpo.demo.scenes import write_dataset
from focusdpo.foundation.files import _hash_parts, checksum, fingerprint
from focusdpo.foundation.journals import read_metrics
from focusdpo.training.checkpoints import complete_checkpoints, damage, find_checkpoint
from focusdpo.training.config import OptimConfig
from focusdpo.training.trainer import Trainer
from tests import PATIENCE, ROOT
from tests.demo_scenes import write_scenes
from tests.hostile import SMALL
from tests.runs import train

SETTINGS = SMALL


# Whatever these tests are run under.
HEARS = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL); from focusdpo.commands import cli; cli.main()"


def wait_for_the_end_of(group, seconds=120):
    """Whether no process of a group is left after some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_to_the_whole_process_group(config, tmp_path, number):
    """As a scheduler or a closing terminal sends it: to loader processes as well, in the middle of an accumulation."""
    # An epoch that outlasts what the loaders have read ahead: without them the step cannot end.
    config.data.train = str(write_dataset(tmp_path / "pairs", 40, 64, seed=0))
    config.data.num_workers, config.gradient_accumulation = 2, 24
    config = dataclasses.replace(config, max_steps=60, checkpoint_every=0)
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump(dataclasses.asdict(config)))
    command = [sys.executable, "-c", HEARS, "train", "--config", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and len(read_metrics(metrics)) < 1:
        time.sleep(0.01)
    os.killpg(process.pid, number)
    errors = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 128 + number, errors[-3000:]
    assert f"{number.name}: stopping after this batch, with all steps saved" in errors and "Traceback" not in errors
    (checkpoint,) = complete_checkpoints(tmp_path / "run" / "checkpoints")
    assert damage(checkpoint) is None and checkpoint.name == f"step-{len(read_metrics(metrics)):06d}"
    assert wait_for_the_end_of(process.pid), "its loaders are gone as well"


def test_under_nohup_a_closing_terminal_changes_nothing():
    from focusdpo.foundation.launch import Launch
    from focusdpo.training.signals import StopSignals

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals(Launch()) as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.received == signal.SIGTERM
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("harmed", [False, True])
def test_ten_steps_without_a_finite_gradient(config, harmed):
    """What is said of the adapter is so."""
    trainer = Trainer(dataclasses.replace(config, max_steps=20))
    if harmed:
        trainer.parameters[0].data.view(-1)[0] = math.inf
    else:
        for parameter in trainer.parameters:
            parameter.register_hook(lambda gradient: gradient * math.nan)
    said = "the adapter is as step 0 left it, which is not finite either" if harmed else "as step 0 left it. Start anew with"
    with pytest.raises(FloatingPointError, match=said):
        trainer.train()


DAMAGES = {
    "no UTF-8": lambda file: file.write_bytes(b"\xff\xfe"),
    "half": lambda file: file.write_bytes(file.read_bytes()[:40]),
    "empty": lambda file: file.write_bytes(b""),
    "a list": lambda file: file.write_text("[]"),
    "nothing in it": lambda file: file.write_text("{}"),
    "a number for a hash": lambda file: file.write_text(json.dumps(dict.fromkeys(json.loads(file.read_text()), 3))),
    "deep": lambda file: file.write_text("[" * 100_000),
    "gone": lambda file: file.unlink(),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


def test_damaged_checksums_go_back_to_the_checkpoint_before(config, tmp_path, caplog):
    train(config)
    folder = tmp_path / "run" / "checkpoints"
    file = folder / "step-000004" / "checksums.json"
    written = file.read_bytes()
    for case, spoil in DAMAGES.items():
        spoil(file)
        assert find_checkpoint("latest", folder) == folder / "step-000002", case
        assert "step-000004 is damaged" in caplog.text, case
        caplog.clear()
        if file.is_dir():
            file.rmdir()
        file.write_bytes(written)
    assert find_checkpoint("latest", folder) == folder / "step-000004"
    DAMAGES["half"](file)
    assert train(config, resume="latest", max_steps=5).progress.step == 5


def test_a_report_does_not_call_a_damaged_lora_finished(config, tmp_path):
    train(config)
    lora = tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors"
    whole = lora.read_bytes()

    def state():
        cli.main(["report", str(tmp_path / "run")])
        text = (tmp_path / "run" / "report.html").read_text()
        return "its LoRA is damaged" in text

    assert not state()
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    for content in (whole[:1000], whole + b"0", bytes(flipped), b""):
        lora.write_bytes(content)
        assert state(), len(content)
    lora.write_bytes(whole)
    assert not state()


def test_newly_trained_tokens_are_another_text_encoder(tmp_path):
    """One row of a large table, in any place, and any byte of any file."""
    part = tmp_path / "text_encoder"
    part.mkdir()
    table, bias = torch.randn(1000, 64), torch.zeros(64)
    seen = set()
    for number, row in enumerate((None, 1, 500, 999)):
        changed = table.clone()
        if row is not None:
            changed[row] += 0.1
        save_file({"shared.weight": changed, "bias": bias}, part / "model.safetensors")
        os.utime(part / "model.safetensors", (number, number))  # the clock of files may be coarse
        seen.add(fingerprint(tmp_path, ["text_encoder"]))
    (part / "config.json").write_text("{}")
    seen.add(fingerprint(tmp_path, ["text_encoder"]))
    assert len(seen) == 5
    (part / "model.safetensors").rename(part / "model-2.safetensors")
    assert fingerprint(tmp_path, ["text_encoder"]) not in seen


def test_a_checkpoint_of_an_earlier_version_goes_on(config, tmp_path, caplog):
    """It knows the model by another hash, and its folder has a marker instead of lists."""
    train(config, max_steps=2)
    run = tmp_path / "run"
    settings = run / "checkpoints" / "step-000002" / "settings.json"
    values = {name.replace("all of it", "its content"): value for name, value in json.loads(settings.read_text()).items()}
    assert "model.path (transformer, its content)" in values
    settings.write_text(json.dumps({**values, "model.path (transformer, its content)": "0123456789abcdef"}))
    checksums = settings.with_name("checksums.json")
    digests = json.loads(checksums.read_text()) | {"settings.json": checksum(settings)}
    checksums.write_text(json.dumps(digests))
    shutil.rmtree(run / ".focusdpo")
    (run / ".focusdpo").write_text("Made by focusdpo; --overwrite may delete its files.\n")
    assert train(config, resume="latest", max_steps=3).progress.step == 3
    assert "knows the model by a hash of an earlier version" in caplog.text
    with pytest.raises(ValueError, match="optim.lr: the checkpoint has 0.001, got 0.5"):
        Trainer(dataclasses.replace(config, resume="latest", max_steps=4, optim=OptimConfig(lr=0.5)))


def test_large_files_are_hashed_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("focusdpo.foundation.files.PART", 1000)
    (tmp_path / "vae").mkdir()
    file = tmp_path / "vae" / "weights.bin"
    content = bytearray(os.urandom(4500))
    seen = set()
    for place in (0, 999, 1000, 4499):
        content[place] ^= 1
        file.write_bytes(content)
        os.utime(file, (place, place))  # the clock of files may be coarse
        seen.add(fingerprint(tmp_path, ["vae"]))
    assert len(seen) == 4
    assert _hash_parts(file) != checksum(file), "it is more than one part"


def test_a_build_that_lost_images_says_so_and_makes_them_again(tmp_path, caplog):
    pytest.importorskip("cv2", reason="needs the extra build: pip install 'focusdpo[build]'")
    scenes = write_scenes(tmp_path / "scenes", 4, 96, seed=1)
    config = BuildConfig(str(scenes), str(tmp_path / "pairs"), resolution=96, reference_resolution=64)
    prepare_build(config)()
    images = {path: path.read_bytes() for path in (tmp_path / "pairs" / "images").rglob("*.png")}
    first = min(images)
    other = next(path for path in sorted(images) if path.parent != first.parent)
    first.unlink()
    other.write_bytes(images[other][:-20])
    manifest = tmp_path / "pairs" / "manifest.jsonl"
    lines = manifest.read_bytes().splitlines(keepends=True)
    manifest.write_bytes(b"".join([*lines[:-1], b"\x00\xff\n"]))
    prepare_build(config)()
    assert f"images of 2 pairs are lost (of {first.parent.name} first), and are built again" in caplog.text
    assert "manifest.jsonl:4: left out" in caplog.text
    assert {path: path.read_bytes() for path in (tmp_path / "pairs" / "images").rglob("*.png")} == images
    (tmp_path / "pairs" / "build.json").write_text("{")
    with pytest.raises(ValueError, match="output_dir: .*build.json is damaged .* start anew with --overwrite true"):
        prepare_build(config)
    (tmp_path / "pairs" / "build.json").unlink()
    (tmp_path / "pairs" / "pairs.jsonl").write_text("edited")
    with pytest.raises(FileExistsError, match="holds pairs.jsonl, which this command did not write"):
        prepare_build(dataclasses.replace(config, overwrite=True))


def test_edited_pairs_of_a_build_are_kept(tmp_path):
    pytest.importorskip("cv2", reason="needs the extra build: pip install 'focusdpo[build]'")
    scenes = write_scenes(tmp_path / "scenes", 2, 96, seed=1)
    config = BuildConfig(str(scenes), str(tmp_path / "pairs"), resolution=96, reference_resolution=64)
    prepare_build(config)()
    pairs = tmp_path / "pairs" / "pairs.jsonl"
    whole = pairs.read_text()
    pairs.write_text(whole.splitlines()[0] + "\n")
    prepare_build(config)()
    assert pairs.read_text() == whole
    assert (tmp_path / "pairs" / "pairs.jsonl.edited").read_text() == whole.splitlines()[0] + "\n"
