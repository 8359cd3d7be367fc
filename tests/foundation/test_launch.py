"""How the processes of a launch wait for each other, share, stop and fail: each a thread here, with a store of its own kind."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import psutil
import pytest
import torch.distributed as dist

from focusdpo.commands.config import ShardConfig
from focusdpo.commands.data_shard import prepare as prepare_shards
from focusdpo.demo.scenes import write_dataset
from focusdpo.foundation import launch as launches
from focusdpo.foundation import rendezvous
from focusdpo.foundation.launch import ElsewhereError, Launch
from focusdpo.foundation.output_folder import OutputFolder
from focusdpo.training.batches import load_datasets
from focusdpo.training.config import DataConfig, ModelConfig, TrainConfig
from tests import PATIENCE, ROOT
from tests.processes import assert_gone, started


@pytest.fixture
def store(monkeypatch):
    """A store; signs of life come fast."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.setattr(launches, "BEAT", 0.05)
    monkeypatch.setattr(launches, "HEARD", 1.0)
    monkeypatch.setattr(launches, "_exit", lambda reason: None)  # of all tests
    return dist.HashStore()


def run(store, work, size=3, locals=1):
    """What `work` returns or raises in each process; `locals` of them are on a machine."""
    made = []

    def process(rank):
        launch = Launch(rank, size, rank % locals, store)
        launch._machine = str(rank // locals)
        made.append(launch)
        try:
            return work(launch)
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(process, range(size)))
    for launch in sorted(made, key=lambda one: -one.rank):
        launch.close()
    return results


def test_one_process_needs_nobody():
    launch = Launch()
    launch.wait("nothing")
    assert launch.gather("a value", 3) == [3]
    assert launch.from_main("a value", lambda: 4) == launch.once_a_machine("a value", lambda: 4) == 4
    assert launch.fail("it ends") and launch.failure() is None and launch.is_main and launch.is_local_main
    assert [launch.stops_here(False), launch.stops_here(True)] == [False, True]
    assert launch.why_stopped == "it was told to"


def test_all_wait_for_the_last(store):
    came, left = [], []

    def work(launch):
        time.sleep(0.1 * launch.rank)
        came.append(launch.rank)
        launch.wait("all are here")
        left.append(launch.rank)
        return len(came)

    assert run(store, work) == [3, 3, 3] and sorted(left) == [0, 1, 2]


def test_values_are_gathered_by_rank(store):
    def work(launch):
        return [launch.gather("a value", [launch.rank, round_]) for round_ in range(5)]

    assert run(store, work, 5) == [[[[rank, round_] for rank in range(5)] for round_ in range(5)]] * 5


def test_work_is_done_once(store):
    done = []

    def work(launch):
        def compute(where):
            done.append((where, launch.rank))
            return {"of": launch.rank}

        return (
            launch.from_main("one does", lambda: compute("all"))["of"],
            launch.once_a_machine("one does", lambda: compute("machine"))["of"],
        )

    assert run(store, work, 6, locals=2) == [(0, 0), (0, 0), (0, 2), (0, 2), (0, 4), (0, 4)]
    assert sorted(done) == [("all", 0), ("machine", 0), ("machine", 2), ("machine", 4)]


@pytest.mark.parametrize("how", ["together", "from_main", "once_a_machine", "failing"])
def test_one_fails_for_all(store, how):
    """With its own error there, and its words elsewhere."""

    def spoil():
        raise ValueError("no such dataset: pairs")

    def work(launch):
        fails = launch.rank == 0
        if how == "together":
            with launch.together("data is looked at"):
                if fails:
                    spoil()
        elif how == "failing":
            if fails:
                with launch.failing():
                    spoil()
            launch.wait("all are here")
        else:
            getattr(launch, how)("data is looked at", spoil)

    first, *others = run(store, work, 3, locals=3)
    assert type(first) is ValueError
    assert all(type(one) is ElsewhereError for one in others)
    assert {str(one) for one in others} == {f"process 0 on {socket.gethostname()}: no such dataset: pairs"}


def test_the_first_reason_is_that_of_all(store):
    def work(launch):
        while launch.rank < 2 and not launch._has("failed"):
            time.sleep(0.005)
        return launch.fail(f"reason {launch.rank}"), launch.failure()

    results = run(store, work)
    assert [first for first, _ in results] == [False, False, True]
    assert results[0][1].endswith("reason 2") and results[2][1] is None


def test_nothing_is_left_of_looking_for_a_shared_folder(store, tmp_path):
    """Whatever becomes of the others meanwhile."""
    out = tmp_path / "out"

    def look(launch):
        if launch.is_main:
            folder = OutputFolder("out", out, "draw", [])
            folder.lock()
            try:
                folder.check_shared(launch)
            finally:
                folder.release()
        else:
            launch.from_main("the output folder was made", lambda: None)
            launch.fail("no such dataset")

    assert isinstance(run(store, look, 2)[0], ElsewhereError)
    assert not out.exists()


def test_who_ends_without_a_word_is_missed(store):
    def work(launch):
        if launch.rank == 1:
            return launch.close()
        return launch.wait("all are here")

    first, _, last = run(store, work)
    assert str(first) == str(last) or {type(first), type(last)} == {ElsewhereError}
    assert "process 1 on" in str(first) and "has ended without a word" in str(first)


def test_who_is_dead_is_missed(store):
    """Its thread died with it; whoever only takes long lives."""

    def work(launch):
        launch.timeout = 2.0
        if launch.rank == 1:
            launch._closed.set()
            time.sleep(4)
            return None
        return launch.wait("all are here")

    first, _, last = run(store, work)
    assert type(first) is type(last) is ElsewhereError
    host = socket.gethostname()
    assert str(first).endswith(f"process 1 on {host} has given no sign of life for 2 s")


def test_who_takes_longer_than_the_timeout_is_waited_for(store):
    def work(launch):
        launch.timeout = 1.0
        time.sleep(2.5 * launch.rank)
        launch.wait("all are here")
        return launch.rank

    assert run(store, work, 2) == [0, 1]


def test_it_is_said_for_whom_one_waits(store, monkeypatch, caplog):
    monkeypatch.setattr(launches, "PATIENCE", 0.2)
    caplog.set_level("INFO")

    def said():
        return [record.message for record in caplog.records if "waiting" in record.message]

    def work(launch):
        while launch.rank == 1 and len(said()) < 2:
            time.sleep(0.01)
        launch.wait("images and prompts are encoded")

    began = time.monotonic()
    run(store, work, 2)
    took, said = time.monotonic() - began, said()
    assert len(said) <= math.log2(took / 0.2) + 1, "at growing intervals"
    assert all(line.startswith("waiting for process 1 on ") for line in said)
    assert said[0].endswith(": images and prompts are encoded")


@pytest.mark.parametrize("seed", range(20))
def test_all_stop_at_the_same_call(store, seed):
    """However far one is ahead of the others, and though nobody waits for the agreement. Barriers are the work's own."""
    drawn = random.Random(seed)
    size, every = 4, 3
    wanting = drawn.sample(range(size), drawn.choice([1, 1, 2, size]))
    when = {rank: drawn.randrange(1, 30) for rank in wanting}
    pauses = [[drawn.random() * 0.004 for _ in range(60)] for _ in range(size)]
    barrier = threading.Barrier(size, timeout=PATIENCE)

    def work(launch):
        for call in range(1, 60):
            if launch.stops_here(call >= when.get(launch.rank, 1000)):
                return call
            time.sleep(pauses[launch.rank][call])
            if call % every == 0:  # as the gradients of a step are averaged
                barrier.wait()
        return None

    (stopped,) = set(run(store, work, size))
    assert min(when.values()) <= stopped <= max(min(when.values()) + every, 1), "soon after the first wanted to"


def test_a_process_that_hangs_ends_when_another_failed(store, monkeypatch, tmp_path):
    ended = []
    monkeypatch.setattr(launches, "LEAVING", 0.2)
    monkeypatch.setattr(launches, "_exit", ended.append)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))

    def work(launch):
        if launch.rank == 1:
            launch.fail("the disk is full")
            launch.close()
        else:
            while not ended:  # in a collective
                time.sleep(0.01)

    run(store, work, 2)
    assert len(ended) == 1 and ended[0].endswith("the disk is full")
    told = json.loads((tmp_path / "error.json").read_text())["message"]
    assert told["message"] == ended[0] and abs(int(told["extraInfo"]["timestamp"]) - time.time()) < 60


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (RuntimeError("[/gloo/pair.cc:553] Connection closed by peer [127.0.0.1]:6535"), True),
        (RuntimeError("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3)"), True),
        (RuntimeError("NCCL error in: Net.cpp:1\nLast error: /dev/shm/nccl-x: No space left on device"), False),
        (RuntimeError("ProcessGroupNCCL is only supported with GPUs"), False),
        (ElsewhereError("process 1 on b: Connection closed by peer"), False),
        (ValueError("Connection closed by peer"), False),
    ],
)
def test_what_is_a_lost_process(error, is_lost):
    """And what is a failure of this one, whose words are not to be cut."""
    assert (launches.lost_connection(error) is not None) == is_lost


@pytest.mark.parametrize("reached", [True, False])
def test_the_store_is_that_of_the_first_process_where_all_reach_it(monkeypatch, reached):
    """Which a launcher does not take along when it dies; a firewall may let its port alone through."""
    own = dist.TCPStore

    def behind_a_firewall(address, port, size, is_main, *args, **kwargs):
        if not is_main:
            time.sleep(args[0].total_seconds())
            raise dist.DistNetworkError("the client socket has timed out")
        return own(address, port, size, is_main, *args, **kwargs)

    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    launchers, until = dist.HashStore(), time.monotonic() + PATIENCE
    if not reached:
        monkeypatch.setattr(dist, "TCPStore", behind_a_firewall)
        monkeypatch.setattr(rendezvous, "REACHED", 1.0)

    def come(rank):
        met = rendezvous._follow(launchers, rank, 3, until) if rank else rendezvous._lead(launchers, 3, until)
        return met[0] or met[1]

    with ThreadPoolExecutor(3) as pool:
        stores = list(pool.map(come, range(3)))
    assert [isinstance(store, own) for store in stores] == [reached] * 3
    stores[2].set("a", "b")
    assert [store.get("a") for store in stores] == [b"b"] * 3


@pytest.mark.parametrize(
    ("environment", "launched", "follows"),
    [
        ({}, False, False),
        ({"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2"}, True, True),
        ({"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"}, True, False),
        ({"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}, False, False),
        ({"RANK": "3", "WORLD_SIZE": "4"}, False, False),  # of a pod, which starts its own launcher
        ({"LOCAL_RANK": "-1", "RANK": "x", "WORLD_SIZE": ""}, False, False),
    ],
)
def test_what_launchers_set(monkeypatch, environment, launched, follows):
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (launches.is_launched(), launches.is_follower()) == (launched, follows)


# Processes of their own, which found each other as srun or mpirun has them do it: the first one serves the store.
JOINED = """
import json, os, signal, sys, time
from focusdpo.foundation import launch
launch.SILENT, launch.LEAVING, launch.HEARD, rank = 3.0, 1.0, 30.0, int(os.environ["RANK"])
joined = launch.Launch.join()
joined.timeout = 3.0
"""
CASES = {
    # Two that meet, one after a while, and exchange more than the store takes at once.
    "meet": """
time.sleep(2 * rank)
print(sum(map(len, joined.gather("texts", "x" * (9 * 2**20)))), joined.from_main("a number", lambda: 7), flush=True)
""",
    "a long reason": """
try:
    with joined.together("data is looked at"):
        if rank:
            raise ValueError("no such image; " * 10**6)
except Exception as error:
    print(type(error).__name__, len(str(error)), flush=True)
""",
    # Which the launcher then ends, and the store with it.
    "the first fails": """
try:
    with joined.together("data is looked at"):
        if rank == 0:
            raise ValueError("no such dataset")
        time.sleep(1.5)
except ValueError:
    os._exit(1)
except launch.ElsewhereError as error:
    print(error, flush=True)
""",
    "the first stands still": """
joined.wait("all are here")
if rank == 0:
    os.kill(os.getpid(), signal.SIGSTOP)
joined.wait("the checkpoint is written")
""",
    "the second is killed": """
joined.timeout = 30.0  # silence is shorter
joined.wait("all are here")
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)  # in a collective
""",
    "the first is killed": """
joined.wait("all are here")
if rank == 0:
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)
try:
    joined.wait("the checkpoint is written")
except launch.ElsewhereError as error:
    print(error, joined.fail("it has no other reason"))
""",
}


@pytest.mark.parametrize("serves", ["the launcher", "the first process"])
def test_who_is_started_twice_is_refused_and_does_no_harm(serves):
    """As a machine of a running launch once more, or one of another launch at the same port."""
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    port = str(store.port)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "ACCELERATE"))}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    if serves == "the launcher":
        environment["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    else:
        del store  # and with it the port
    code = JOINED + "print(len(joined.gather('all are here', 1)), flush=True); sys.stdin.read(); joined.wait('all end')"

    def start(rank, size=2):
        own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        return subprocess.Popen([sys.executable, "-c", code], env=own, text=True, cwd=ROOT, **pipes)

    processes = [start(rank) for rank in range(2)]
    try:
        assert [process.stdout.readline() for process in processes] == ["2\n"] * 2
        for rank in range(2) if serves == "the launcher" else [1]:
            third = start(rank)
            processes.append(third)
            said = third.communicate("", timeout=PATIENCE)[1]
            there = f"process {processes[rank].pid} on {socket.gethostname()}"
            assert third.returncode == 1 and f"the launch at 127.0.0.1:{port}: number {rank} is {there} already; some" in said
        larger = start(3, size=4)
        processes.append(larger)
        said = larger.communicate("", timeout=PATIENCE)[1]
        assert larger.returncode == 1 and "it has 2 processes, and this one would be of 4; something was started twice" in said
        for process in processes[:2]:
            process.stdin.close()
        assert [process.wait(PATIENCE) for process in processes[:2]] == [0, 0]
    finally:
        for process in processes:
            process.kill()


def test_processes_that_are_started_again_find_each_other():
    """By launchers that keep their store, as torchrun's do, each with a count of restarts of its own.

    Nor does torch.distributed's own group find the address of an ended process there, or a child that goes on for a while hold
    anybody at the port of its parent.
    """
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}
    environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "1"}
    code = """
import torch, torch.distributed as dist
one = torch.ones(1)
dist.init_process_group("gloo")
dist.all_reduce(one)
if rank == 0 and os.fork() == 0:
    os.closerange(0, 3)
    time.sleep(1000)
    os._exit(0)
print(joined.gather("pids", os.getpid()), int(one), flush=True)
time.sleep(1000)
"""
    groups = []
    try:
        for ranks in ((0, 1), (1, 0)):
            processes, began = [], time.monotonic()
            for rank in ranks:
                own = environment | {"RANK": str(rank), "LOCAL_RANK": "0", "TORCHELASTIC_RESTART_COUNT": str(rank)}
                command = [sys.executable, "-c", JOINED + code]
                pipe = subprocess.PIPE
                processes.append(subprocess.Popen(command, env=own, stdout=pipe, text=True, cwd=ROOT, start_new_session=True))
                groups.append(processes[-1].pid)
                time.sleep(1.0)
            pids = [process.pid for process in processes]
            assert [process.stdout.readline() for process in processes] == [f"{pids[::-1] if ranks[0] else pids} 2\n"] * 2
            assert time.monotonic() - began < PATIENCE, "as long as the child goes on"
            for process in processes:  # but not what the first one has forked
                process.kill()
                process.communicate()
    finally:
        for group in groups:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)


@pytest.mark.parametrize("when", ["importing", "waiting for the others"])
def test_processes_of_a_dead_launcher_do_not_wait_for_each_other(when):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    child = f"""
import os, sys, time
import focusdpo
parent = os.getppid()
print(os.getpid(), flush=True)
while {when == "importing"} and os.getppid() == parent:
    time.sleep(0.01)
from focusdpo.foundation.launch import Launch
Launch.join()
"""
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": "0"}
    environment |= {"LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "1", "PYTHONPATH": str(ROOT)}
    with started([sys.executable, "-c", launcher], env=environment, stdout=subprocess.PIPE) as process:
        child = psutil.Process(int(process.stdout.readline()))
        until = time.monotonic() + PATIENCE
        while when != "importing" and not [one for one in child.net_connections() if one.status == psutil.CONN_LISTEN]:
            assert time.monotonic() < until
            time.sleep(0.05)
        process.kill()
        assert_gone([child], 20.0)  # less than any other limit that would end it


@pytest.mark.parametrize("case", CASES)
def test_processes(case, tmp_path):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "ACCELERATE"))}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    told = [tmp_path / f"told-{rank}" for rank in range(2)]
    processes = []
    for rank in range(2):
        own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        if case != "meet":
            own["TORCHELASTIC_ERROR_FILE"] = str(told[rank])
        command = [sys.executable, "-c", JOINED + CASES[case]]
        processes.append(subprocess.Popen(command, env=own, stdout=subprocess.PIPE, text=True, cwd=ROOT))
    try:
        if case == "the first stands still":
            processes[1].wait(PATIENCE)
            processes[0].kill()
        said = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    status = [process.returncode for process in processes]
    reasons = [json.loads(file.read_text())["message"]["message"] if file.exists() else None for file in told]
    host = socket.gethostname()
    if case == "meet":
        assert status == [0, 0] and said == [f"{2 * 9 * 2**20} 7\n"] * 2
    elif case == "the first fails":
        assert status == [1, 0] and said[1] == f"process 0 on {host}: no such dataset\n"
    elif case == "a long reason":
        assert said[1] == f"ValueError {15 * 10**6}\n" and said[0].startswith("ElsewhereError 20")
        assert reasons[1].startswith(f"process 1 on {host}: no such image; no such image")
    elif case == "the first stands still":
        assert status[1] == 1 and reasons[1] == "process 0 has given no answer for 3 s (collective_timeout)"
    elif case == "the second is killed":
        assert status == [1, -signal.SIGKILL] and reasons[0] == f"process 1 on {host} has given no sign of life for 3 s"
    else:
        assert said[1].startswith("process 0 on 127.0.0.1 cannot be reached any more: ")
        assert reasons[1] == f"process 1 on {host}: it has no other reason" and said[1].endswith(" True\n")


def test_pairs_are_read_once_a_machine(store, tmp_path, monkeypatch):
    """Those with something to warn of as well; and nothing of it stays."""
    shard = write_shard(tmp_path / "shards" / "pairs-000000.tar")
    config = TrainConfig(ModelConfig("model"), DataConfig(str(shard), resolution=48, check="full"), str(tmp_path / "run"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    results = run(store, lambda launch: load_datasets(config, launch), 4, locals=2)
    assert [len(datasets[0]) for datasets, _ in results] == [2] * 4
    assert len({str(datasets[0].sizes) for datasets, _ in results}) == 1
    assert not list(tmp_path.glob("focusdpo-pairs-*"))


def write_shard(file):
    """Two pairs, and a file that is none of them."""
    pairs = write_dataset(file.parent / "loose", 2, 48, seed=0)
    prepare_shards(ShardConfig(str(pairs), str(file.parent)))()
    (shard,) = file.parent.glob("*.tar")
    with tarfile.open(shard, "a") as archive:
        archive.addfile(tarfile.TarInfo("README"))
    return shard
