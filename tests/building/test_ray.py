"""Builds on Ray: which cluster, with what it has, and what becomes of its actors."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from tests import PATIENCE, ROOT

pytest.importorskip("ray", reason="needs the extra ray: pip install 'focusdpo[ray]'")
pytest.importorskip("cv2", reason="needs the extra build: pip install 'focusdpo[build]'")
pytest.importorskip("imagehash", reason="needs the extra build: pip install 'focusdpo[build]'")

import ray

from focusdpo.building import ray_cluster, ray_engine
from focusdpo.building.candidate import Candidate
from focusdpo.building.config import BuildConfig, DreamBenchConfig, SegmentationConfig
from focusdpo.building.engines import Step
from focusdpo.building.ray_engine import run_ray
from focusdpo.commands.data_build import prepare as prepare_build
from focusdpo.commands.data_dreambench import prepare as prepare_dreambench
from focusdpo.foundation import workers
from tests.building.ray_stages import Broken, Killed, WaitFor
from tests.building.test_building import build, small, tree
from tests.demo_scenes import write_scenes
from tests.processes import assert_gone, started


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes") / "scenes", 3, 128, seed=1)


@pytest.fixture
def config(scenes, tmp_path):
    return dataclasses.replace(small(scenes, tmp_path / "pairs"), engine="ray", workers=3)


@pytest.fixture(scope="module")
def temporary():
    """A folder for Ray's files, apart from those of others; its name is short, as those of sockets have to be."""
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")
    before = os.environ.get("RAY_TMPDIR")
    os.environ["RAY_TMPDIR"] = folder
    yield Path(folder)
    os.environ.pop("RAY_TMPDIR") if before is None else os.environ.update(RAY_TMPDIR=before)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(temporary):
    """A cluster with a CPU and what it takes for a GPU, which this process has joined; its address."""
    ray.init(address="local", num_cpus=1, num_gpus=1, include_dashboard=False, log_to_driver=False)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture
def apart(monkeypatch):
    """As though this process had joined no cluster."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


def candidates(count):
    return [Candidate(index, 0, 0, SimpleNamespace(line=index + 1)) for index in range(count)]


# Which cluster.


@pytest.mark.parametrize(
    ("setting", "variable", "expected"),
    [
        (None, None, None),
        (None, "", None),
        (None, "host:1", ("RAY_ADDRESS", "host:1")),
        ("local", "host:1", None),
        ("auto", "host:1", ("ray_address", "auto")),
        (None, "local", None),
    ],
)
def test_what_names_the_cluster(monkeypatch, setting, variable, expected):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    assert ray_cluster.named_cluster(setting) == expected


def test_an_address_where_nothing_listens(config, apart, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    started = time.monotonic()
    with pytest.raises(ConnectionError, match=r"RAY_ADDRESS: got 127.0.0.1:1; no Ray cluster .*refused.*--ray_address local"):
        prepare_build(config)
    assert time.monotonic() - started < 60 and not Path(config.output_dir).exists()
    dreambench = DreamBenchConfig("nowhere", engine="ray", ray_address="ray://127.0.0.1:2")
    with pytest.raises(ConnectionError, match="ray_address: got ray://127.0.0.1:2; no Ray cluster"):
        prepare_dreambench(dreambench)


def test_an_address_where_something_else_listens(config, apart, monkeypatch):
    monkeypatch.setattr(ray_cluster, "ANSWER", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        config.ray_address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=r"ray_address: got .*\(no answer within 2 s\)"):
            prepare_build(config)


def test_a_cluster_that_answers(cluster, apart):
    ray_cluster.check_cluster(cluster)


@pytest.mark.parametrize("other", ["a stale address", "another cluster"])
def test_a_cluster_of_its_own(scenes, tmp_path, temporary, cluster, other):
    """Whatever the file says in which Ray keeps the address of the last cluster; and nothing of it stays behind."""
    (temporary / "ray" / "ray_current_cluster").write_text("127.0.0.1:1" if other == "a stale address" else cluster)
    manifest, log = tmp_path / "out" / "manifest.jsonl", tmp_path / "log"
    command = [sys.executable, "-m", "focusdpo", "data", "build", "--scenes", str(scenes), "--output_dir", str(manifest.parent)]
    command += ["--engine", "ray", "--workers", "2", "--resolution", "128", "--pairs_per_scene", "1000"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}

    def has_begun():
        if other == "another cluster":  # the first pair would take long
            return "Ray: on a cluster of its own, with " in log.read_text()
        return manifest.exists() and manifest.read_bytes()

    with log.open("w") as stream, started(command, cwd=ROOT, env=environment, stderr=stream) as parent:
        until = time.monotonic() + PATIENCE
        while not has_begun():
            assert parent.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.05)
        processes = psutil.Process(parent.pid).children(recursive=True)
        assert {"gcs_server", "raylet"} <= {process.name() for process in processes}
        parent.send_signal(signal.SIGTERM if other == "a stale address" else signal.SIGINT)
        parent.wait(PATIENCE)
    expected = 128 + (signal.SIGTERM if other == "a stale address" else signal.SIGINT)
    assert parent.returncode == expected, log.read_text()[-3000:]
    assert_gone(processes)
    assert ray.get(ray.put(1)) == 1, "and the other cluster is as it was"


# With what it has.


def test_the_same_pairs_with_fewer_cpus_than_actors(config, tmp_path, cluster, caplog):
    config.segmentation = SegmentationConfig(device="cuda")  # GrabCut, which needs none
    build(dataclasses.replace(config, engine="plain", workers=1))
    spread = dataclasses.replace(config, output_dir=str(tmp_path / "ray"), workers=1)
    with caplog.at_level(logging.INFO, "focusdpo"):
        build(spread)
    assert f"Ray: on the cluster that this process has joined already, {cluster}" in caplog.text
    assert tree(config.output_dir) == tree(spread.output_dir)
    assert json.loads((tmp_path / "ray" / "report.json").read_text())["per_second"] > 0


def test_too_few_gpus(config, cluster):
    config.segmentation, config.workers = SegmentationConfig(device="cuda"), 2
    message = "workers: got 2, of which each takes a GPU; the Ray cluster has 1 GPUs. Name fewer workers"
    with pytest.raises(ValueError, match=message):
        prepare_build(config)()


@pytest.mark.parametrize(
    ("cpus", "own", "workers", "devices", "expected"),
    [
        (8, False, 2, {"cpu"}, 1.0),
        (8, True, 2, {"cpu"}, 4.0),
        (2, True, 2, {"cpu", "cuda"}, 0.5),
        (2, False, 3, {"cpu"}, 0.5),
        (4, False, 3, {"cpu", "cuda"}, 0.5),
        (0.5, False, 3, {"cpu"}, 0.3333),
    ],
)
def test_shares_of_the_cpus(monkeypatch, cpus, own, workers, devices, expected):
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": cpus, "GPU": 8})
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 1, "GPU": 8})
    shares = ray_engine._shares(devices, workers, own)
    assert shares == {device: {"num_cpus": expected, "num_gpus": float(device == "cuda")} for device in devices}


# What becomes of its actors.


def test_results_come_one_by_one_and_silence_is_told(tmp_path, cluster, monkeypatch, caplog):
    """The last candidate waits until all the others have been given out."""
    monkeypatch.setattr(workers, "SILENCE", 0.2)
    outcomes = run_ray([Step("cpu", partial(WaitFor, 39, tmp_path / "go"))], candidates(40), 1)
    with caplog.at_level(logging.WARNING, "focusdpo"):
        found = [next(outcomes) for _ in range(39)]
        (tmp_path / "go").touch()
        found += outcomes
    assert sorted(outcome["line"] for outcome in found) == list(range(1, 41))
    assert {outcome["rejected"] for outcome in found} == {"seen"}
    assert "at work on: 0000000-0" in caplog.text, "while the actors begin"


@pytest.mark.parametrize("times", [1, 9])
def test_a_killed_actor_is_begun_again_a_few_times(tmp_path, cluster, monkeypatch, times):
    monkeypatch.setattr(ray_engine, "RETRIES", 1)
    outcomes = run_ray([Step("cpu", partial(Killed, tmp_path, times))], candidates(3), 1)
    if times == 1:
        assert sorted(outcome["line"] for outcome in outcomes) == [1, 2, 3]
        return
    with pytest.raises(
        ChildProcessError, match=r"workers: a Ray actor was lost 2 times while it worked at .*0000001-0.* \(.*same command"
    ) as e:
        list(outcomes)
    assert "\n" not in str(e.value)


def test_what_a_stage_cannot_be_made_for(cluster):
    with pytest.raises(FileNotFoundError, match="^no such model$"):
        list(run_ray([Step("cpu", Broken)], candidates(2), 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ray_address": "x:1"}, "ray_address: got 'x:1'; expected null, or with engine=ray an address"),
        ({"engine": "ray", "ray_address": ""}, "ray_address: got ''"),
        (
            {"engine": "ray", "segmentation": SegmentationConfig(device="cuda:1")},
            "segmentation.device: got 'cuda:1'; expected cpu or cuda with engine=ray",
        ),
    ],
)
def test_settings_are_refused_by_name(changes, message):
    with pytest.raises(ValueError) as error:
        BuildConfig("scenes", "out", **changes)
    assert message in str(error.value)
