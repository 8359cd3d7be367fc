"""Processes of `data build` and `data dreambench`: begun whatever ran before, ended with their parent, told of when lost."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest

from tests import PATIENCE, ROOT

pytest.importorskip("cv2", reason="needs the extra build: pip install 'focusdpo[build]'")
pytest.importorskip("imagehash", reason="needs the extra build: pip install 'focusdpo[build]'")

import cv2

from focusdpo.building.candidate import Candidate
from focusdpo.building.config import BuildConfig
from focusdpo.building.engines import run_plain, steps
from focusdpo.building.scenes import load_scenes
from focusdpo.commands.data_build import prepare as prepare_build
from focusdpo.data import load_pairs
from focusdpo.foundation import workers
from focusdpo.foundation.journals import Journal
from tests.demo_scenes import write_scenes
from tests.hostile.killing import make_photos
from tests.processes import assert_gone, started, workers_of


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes") / "scenes", 4, 256, seed=1)


@pytest.fixture
def command(scenes, tmp_path):
    """Of a build and of DreamBench, each with two workers and many candidates."""
    make_photos(tmp_path)
    build = ["build", "--scenes", str(scenes), "--output_dir", str(tmp_path / "build")]
    dreambench = ["dreambench", "--root", str(tmp_path / "photos"), "--output_dir", str(tmp_path / "dreambench")]
    start = [sys.executable, "-m", "focusdpo", "data"]
    build += ["--resolution", "256", "--pairs_per_scene", "500"]
    dreambench += ["--resolution", "96", "--pairs", "60", "--held_out_pairs", "0"]
    return {words[0]: [*start, *words, "--workers", "2"] for words in (build, dreambench)}


def begun(parent, manifest):
    """The workers of a command, once it builds."""
    until = time.monotonic() + PATIENCE
    while not (manifest.exists() and manifest.read_bytes().count(b"\n") > 3):
        assert parent.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    processes = workers_of(parent.pid)
    assert len(processes) == 2
    return processes


@pytest.mark.parametrize(
    ("name", "number"),
    [(name, number) for name in ("build", "dreambench") for number in (signal.SIGTERM, signal.SIGKILL)],
)
def test_workers_end_with_their_parent(command, tmp_path, name, number):
    manifest = tmp_path / "build" / "manifest.jsonl"
    if name == "dreambench":  # which has used OpenCV's threads to compose its scenes
        manifest = tmp_path / "dreambench" / "pairs" / "train" / "manifest.jsonl"
    with started(command[name], cwd=ROOT) as parent:
        processes = begun(parent, manifest)
        parent.send_signal(number)
        parent.wait(PATIENCE)
    assert parent.returncode == -number
    assert_gone(processes)
    done = manifest.read_bytes()
    time.sleep(0.2)
    assert manifest.read_bytes() == done
    if (name, number) == ("dreambench", signal.SIGKILL):  # the same command goes on, and comes through
        ended = subprocess.run(command[name], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
        assert ended.returncode == 0 and "done before: " in ended.stderr, ended.stderr[-3000:]
        assert load_pairs(manifest.parent, progress=False)


def test_a_killed_worker_is_one_line(command, tmp_path):
    with started(command["build"], cwd=ROOT, stderr=subprocess.PIPE) as parent:
        processes = begun(parent, tmp_path / "build" / "manifest.jsonl")
        processes[0].kill()
        said = parent.communicate(timeout=PATIENCE)[1]
    assert parent.returncode == 1
    message = (
        f"focusdpo data build: error: workers: process {processes[0].pid} was killed by SIGKILL while it worked at 0000000-"
    )
    assert message in said and "fewer workers need less; the same command goes on from what is there" in said
    assert "Traceback" not in said
    assert_gone(processes)


def test_an_interrupted_build_has_no_workers_left(scenes, tmp_path, monkeypatch):
    """Also where its traceback is kept, as a notebook does."""
    config = BuildConfig(str(scenes), str(tmp_path / "out"), resolution=64, reference_resolution=64, workers=2)
    work = prepare_build(config)

    def interrupted(*arguments, **options):
        assert workers_of(os.getpid())
        raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "write", interrupted)
    with pytest.raises(KeyboardInterrupt) as error:
        work()
    assert error.tb and not workers_of(os.getpid())


@pytest.fixture
def pipeline(scenes, tmp_path):
    config = BuildConfig(str(scenes), str(tmp_path / "out"), resolution=128, reference_resolution=128)
    records = load_scenes(scenes, progress=False)
    candidates = [Candidate(i, v, 0, record) for i, record in enumerate(records) for v in range(2)]
    return steps(config, records), candidates


def test_begun_after_opencvs_threads_and_told_of_when_they_stand_still(pipeline, monkeypatch, caplog):
    before = cv2.getNumThreads()
    cv2.setNumThreads(4)  # which do not come along into a fork: it would wait for them without end
    cv2.GaussianBlur(np.zeros((2000, 2000, 3), np.uint8), (0, 0), 5)
    monkeypatch.setattr(workers, "SILENCE", 0.5)
    outcomes = run_plain(*pipeline, workers=2)
    first = next(outcomes)
    cv2.setNumThreads(before)
    stopped = workers_of(os.getpid())
    assert len(stopped) == 2
    for process in stopped:
        process.suspend()
    threading.Timer(1.3, lambda: [process.resume() for process in stopped]).start()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "focusdpo"):
        left = list(outcomes)
    assert sorted(outcome["name"] for outcome in [first, *left]) == sorted(candidate.name for candidate in pipeline[1])
    told = [record.getMessage() for record in caplog.records if "no worker has given a result" in record.getMessage()]
    assert told and all("at work on: 000000" in message for message in told)
    assert not [process for process in stopped if psutil.pid_exists(process.pid)]
