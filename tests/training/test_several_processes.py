"""Launches of two processes, on one machine or on two that this one stands in for: what one of them meets, all of them learn.

Started by torchrun and by `accelerate launch` from the files in configs/, on CPUs over gloo.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from focusdpo.demo.scenes import write_dataset
from focusdpo.foundation.journals import read_metrics, read_rows
from focusdpo.training.checkpoints import complete_checkpoints, damage
from tests import PATIENCE, ROOT

WORKER = str(ROOT / "tests" / "training" / "several_worker.py")
SOON = 300  # seconds, on a busy machine; a process that is not told would wait for ten minutes


SETTINGS = {
    "data.resolution": 48, "data.reference_resolution": 32, "data.reference_resolution_multiple": None,
    "data.check": "full", "lora.rank": 2, "lora.alpha": 2, "lora.target_modules": ["to_q"],
    "focus.tau": 0.1, "checkpoint_every": 2, "trackers": [],
}  # fmt: skip


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


class Launched:
    """A launcher and its processes, in a session of their own; what they say goes to files."""

    def __init__(self, config, place, machine=None, port=None, case="", cwd=ROOT, network=None):
        place.mkdir(exist_ok=True)
        self.notes = place
        file = place / "train.yaml"
        file.write_text(yaml.safe_dump(dataclasses.asdict(config)))
        if machine is None:
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
        else:
            settings = str(ROOT / "configs" / "accelerate-4nodes.yaml")
            command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", settings, "--num_machines", "2"]
            address = "127.0.0.1" if network is None else ADDRESSES[0]
            command += ["--num_processes", "2", "--machine_rank", str(machine), "--main_process_ip", address]
            command += ["--main_process_port", port, "--mixed_precision", "no"]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        environment |= {"OMP_NUM_THREADS": "1", "CASE": case, "NOTES": str(place), "PYTHONPATH": str(ROOT)}
        if case == "hangs":  # which hears no signal either
            environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "5"
        self.log = (place / "log").open("w+")
        if network is not None:
            command = ["ip", "netns", "exec", network, *command]
            environment["GLOO_SOCKET_IFNAME"] = "cable"
        command += [WORKER, "--config", str(file)]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, cwd=cwd, env=environment)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.signal(signal.SIGKILL)
        self.process.wait()
        self.log.close()

    def processes(self):
        """All of them that live, launcher and loaders too: the launcher gives each a session of its own."""
        found = []
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdecimal() and f"NOTES={self.notes}\0".encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue  # it has ended, or is somebody else's
        return found

    def signal(self, number):
        """To all at once, as a scheduler does."""
        for process in self.processes():
            with suppress(ProcessLookupError):
                os.kill(process, number)

    def end(self, seconds=PATIENCE):
        """The exit status of the launcher, and what all have said."""
        status = self.process.wait(seconds)
        return status, self.said()

    def said(self):
        return Path(self.log.name).read_text().replace("\r", "\n")

    def all_end(self, seconds=SOON):
        """Waits for all of its processes, whatever became of the launcher."""
        until = time.monotonic() + seconds
        while self.processes():
            self.process.poll()
            assert time.monotonic() < until, f"they go on:\n{self.said()[-3000:]}"
            time.sleep(0.1)

    def until(self, condition, what):
        until = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < until and self.process.poll() is None, f"{what} did not happen:\n{self.said()[-3000:]}"
            time.sleep(0.02)


ADDRESSES = "10.77.0.1", "10.77.0.2"


@pytest.fixture
def networks():
    """Names of two network namespaces with an address each, and a cable between them."""
    names = [f"focusdpo-{os.getpid()}-{number}" for number in range(2)]

    def ip(*words):
        return subprocess.run(["ip", *words], capture_output=True, text=True)

    try:
        if shutil.which("ip") is None or any(ip("netns", "add", name).returncode for name in names):
            pytest.skip("network namespaces need ip, and the right to make them")
        ends = [["name", "cable", "netns", name] for name in names]
        assert ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1]).returncode == 0
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


def rows(config):
    return read_metrics(Path(config.output_dir) / "metrics.jsonl")


def last_words(said):
    """The cause that the launcher names at the very end."""
    found = re.search(r"Root Cause.*?traceback : (.*?)\n=+\s*$", said, re.DOTALL)
    assert found, said[-3000:]
    return found[1].strip()


def test_work_is_shared_and_said_once(config, tmp_path):
    """On one machine: pairs are checked once, images hashed once, and one process shows progress and warns.

    Nor does it matter that one of them takes longer to encode than a collective waits.
    """
    config.collective_timeout = 10.0
    config.data = dataclasses.replace(config.data, cache=str(tmp_path / "cache"), validation=config.data.train)
    with Launched(config, tmp_path / "work", case="counts") as one:
        status, said = one.end()
    assert status == 0, said[-3000:]
    counted = {name: [len(f.read_bytes()) if (f := one.notes / f"{name}-{rank}").exists() else 0 for rank in (0, 1)]
               for name in ("checked", "hashed")}  # fmt: skip
    assert counted["checked"] == [16, 0], "training and held-out pairs, which are the same here"
    assert sum(counted["hashed"]) == 32 and abs(counted["hashed"][0] - counted["hashed"][1]) <= 1, "shared"
    for line in (
        "held-out pairs have images of data.train",
        "INFO: training begins",
        " 2 pairs a step (data.batch_size=1, 2 processes)",
    ):
        assert said.count(line) == 1, line
    for bar in ("training: ", "encoding: "):
        assert said.count(f"INFO: {bar}  0%") == 1, f"one bar: {bar}"
    assert said.count("INFO: Loading pipeline components...:   0%") == 2, "encoders and transformer, of the first process"


def test_a_machine_without_data_is_named_at_once(config, tmp_path):
    """As a relative path or a disk that one machine does not have: the others do not wait for it."""
    here, there, port = tmp_path / "here", tmp_path / "there", free_port()
    write_dataset(here / "pairs", 4, 48, seed=0)
    there.mkdir()
    config.data.train = "pairs"
    began = time.monotonic()
    with (
        Launched(config, tmp_path / "0", 0, port, cwd=here) as first,
        Launched(config, tmp_path / "1", 1, port, cwd=there) as second,
    ):
        ended = [first.end(), second.end()]
    assert time.monotonic() - began < SOON
    reason = f"process 1 on {socket.gethostname()}: no such dataset: pairs"
    for status, said in ended:
        assert status != 0 and last_words(said).startswith(reason)
    assert "focusdpo train: error" not in ended[0][1].split("Traceback")[0], "it has nothing of its own to say"
    assert "focusdpo train: error: no such dataset: pairs" in ended[1][1]
    assert not (tmp_path / "run").exists(), "what was made for it is gone"


def test_a_folder_that_is_not_shared_is_found_before_the_model(config, tmp_path):
    here, there, port = tmp_path / "here", tmp_path / "there", free_port()
    here.mkdir()
    there.mkdir()
    config.output_dir = "run"
    with (
        Launched(config, tmp_path / "0", 0, port, cwd=here) as first,
        Launched(config, tmp_path / "1", 1, port, cwd=there) as second,
    ):
        ended = [first.end(), second.end()]
    for status, said in ended:
        assert status != 0 and f"output_dir: {there}/run does not hold what process 0 has just written" in last_words(said)
        assert "Loading pipeline" not in said
    assert not any(here.iterdir()) and not any(there.iterdir()), "nothing is left of it"


def test_machines_that_lose_each_other(config, tmp_path, networks):
    """Each with an address of its own, in mid-run: a cable is pulled, on which nobody says goodbye."""
    config = dataclasses.replace(config, max_steps=5000, checkpoint_every=0, collective_timeout=10.0)
    port = free_port()
    first = Launched(config, tmp_path / "0", 0, port, network=networks[0])
    second = Launched(config, tmp_path / "1", 1, port, network=networks[1])
    with first, second:
        first.until(lambda: len(rows(config)) >= 3, "three steps")
        subprocess.run(["ip", "-n", networks[1], "link", "set", "cable", "down"], check=True)
        ended = [first.end(SOON), second.end(SOON)]
        for each in (first, second):
            each.all_end()
    for status, said in ended:
        words = last_words(said)
        # Whichever of them is noticed first: a broken collective, the first process's silence, or that of the second.
        known = (
            "another process was lost; ",
            "process 0 has given no answer for 10 s",
            f"process 1 on {socket.gethostname()} has given no sign of life for 10 s",
            "cannot be reached any more",
        )
        assert status != 0 and any(text in words for text in known), words


def test_one_stop_however_often_it_is_said(config, tmp_path):
    """To launcher and processes at once, which the launcher then passes on: saved in the midst of a long step, and resumed."""
    config = dataclasses.replace(config, max_steps=2, gradient_accumulation=30, checkpoint_every=0)
    with Launched(config, tmp_path / "stopped", case="slow") as one:
        one.until(lambda: len(rows(config)) == 1, "the first step")
        time.sleep(0.5)
        one.signal(signal.SIGTERM)
        time.sleep(0.1)
        one.signal(signal.SIGTERM)
        one.all_end()  # two signals are too many for the launcher, which leaves them alone
        said = one.said()
    assert (
        "SIGTERM: stopping after this batch, with all steps saved" in said and "stopped at step 1 of 2, which is saved" in said
    )
    (checkpoint,) = complete_checkpoints(Path(config.output_dir) / "checkpoints")
    assert checkpoint.name == "step-000001" and damage(checkpoint) is None, "not after 30 batches"
    with Launched(dataclasses.replace(config, resume="latest"), tmp_path / "resumed") as one:
        assert one.end()[0] == 0, one.said()[-3000:]
    whole = dataclasses.replace(config, output_dir=str(tmp_path / "whole"))
    with Launched(whole, tmp_path / "uninterrupted") as one:
        assert one.end()[0] == 0, one.said()[-3000:]
    for row, other in zip(rows(config), rows(whole), strict=True):
        assert {k: v for k, v in row.items() if k[:5] not in ("pairs", "peak_")} == {
            k: v for k, v in other.items() if k[:5] not in ("pairs", "peak_")
        }


def test_without_a_launcher_they_end_and_while_they_run_no_other_does(config, tmp_path):
    """A second launch, in the same second or later, is told who writes there; a launcher's death is a stop."""
    config = dataclasses.replace(config, max_steps=100_000, checkpoint_every=0)
    with Launched(config, tmp_path / "first", case="slow") as one, Launched(config, tmp_path / "second", case="slow") as two:
        until = time.monotonic() + PATIENCE
        while one.process.poll() is None and two.process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.05)
        refused, runs = (one, two) if one.process.poll() is not None else (two, one)
        assert refused.end()[0] != 0
        assert f"{config.output_dir} is being written by focusdpo train, process " in last_words(refused.said())
        runs.until(lambda: len(rows(config)) >= 2, "two steps")
        again = Launched(dataclasses.replace(config, resume="latest"), tmp_path / "third")
        with again:
            assert again.end()[0] != 0 and "is being written by focusdpo train" in last_words(again.said())
        os.kill(runs.process.pid, signal.SIGKILL)
        runs.all_end()
    steps = len(rows(config))
    (checkpoint,) = complete_checkpoints(Path(config.output_dir) / "checkpoints")
    assert checkpoint.name == f"step-{steps:06d}" and damage(checkpoint) is None, "and nothing is lost"


def test_the_guilty_pair_is_named(config, tmp_path):
    """That of rank 1, and as the one whose loss is not finite."""
    config.data.shuffle = False
    config.max_steps = 1
    with Launched(config, tmp_path / "spoilt", case="nan") as one:
        assert one.end()[0] == 0, one.said()[-3000:]
    (alarm,) = read_rows(Path(config.output_dir) / "alarms.jsonl")
    places = re.findall(r"pairs\.jsonl:\d+", alarm["message"].split("; without")[0])
    guilty = re.findall(r"pairs\.jsonl:\d+", alarm["message"].split("; without")[1])
    assert len(places) == 2 and guilty == places[1:], alarm["message"]
    assert one.said().count("non_finite_gradient") == 1


@pytest.mark.parametrize("case", ["hangs", "dies"])
def test_collectives_give_up(config, tmp_path, case):
    """After collective_timeout where a process does not come, at once where it is dead; the end is one line and no trace."""
    config.collective_timeout = 10.0
    with Launched(config, tmp_path / case, case=case) as one:
        one.until(lambda: len(rows(config)) >= 1, "the first step")
        began = time.monotonic()
        status, said = one.end()
        took = time.monotonic() - began
    assert status != 0 and took < SOON, "not after ten minutes"
    ours = said.split("Traceback (most recent call last):")[0]
    if case == "hangs":
        assert "focusdpo train: error: another process was lost; the launcher" in ours, said[-4000:]
        assert "another process was lost; the launcher of its machine says why (" in last_words(said)
    else:
        assert "Signal 9 (SIGKILL)" in last_words(said)


def test_other_commands_are_for_one_process(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    command += ["-m", "focusdpo", "data", "validate", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode != 0
    assert last_words(done.stderr).startswith("focusdpo data validate: error: a launcher has started several processes")
