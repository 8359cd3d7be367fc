"""Worker processes: they end with their parent, have their share of the cores, and what becomes of them is told."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from focusdpo.foundation import workers
from focusdpo.foundation.workers import Pool, WorkerDiedError, threads_of
from tests import PATIENCE, ROOT
from tests.foundation.worker_tasks import Threads, note_place, work
from tests.processes import assert_gone, started


def test_every_task_is_done_once_by_processes_of_their_own(tmp_path):
    tasks = [("sleep", 0.02 * number) for number in range(6)]
    prepare = functools.partial(note_place, folder=tmp_path)
    with Pool(2, work, prepare=prepare) as pool:
        done = list(pool.run(tasks))
    assert sorted(task for task, _ in done) == tasks
    assert len({process for _, process in done} - {os.getpid()}) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


def test_workers_share_the_cores(monkeypatch):
    pytest.importorskip("cv2", reason="needs the extra build: pip install 'focusdpo[build]'")
    monkeypatch.setattr(workers, "cores", lambda: 6)
    assert [threads_of(count) for count in (1, 2, 4, 6, 9)] == [6, 3, 1, 1, 1]
    monkeypatch.setattr(workers, "threads_of", lambda count: 2 + count)
    with Pool(1, Threads()) as pool:
        assert dict(pool.run([1])) == {1: (3, 3, "3")}


def test_one_that_is_killed_is_told_and_ends_the_others():
    tasks = [("sleep", 0), ("sleep", 600), ("kill", signal.SIGKILL)]
    with Pool(2, work, name=lambda task: f"the task {task[0]}") as pool:
        results = pool.run(tasks)
        assert next(results)[0] == ("sleep", 0)
        with pytest.raises(WorkerDiedError) as error:
            next(results)
        processes = [psutil.Process(worker.process.pid) for worker in pool._workers if worker.process.poll() is None]
    assert "was killed by SIGKILL while it worked at the task kill, as a rule for want of memory" in str(error.value)
    assert "fewer workers need less; the same command goes on from what is there" in str(error.value)
    assert "\n" not in str(error.value) and not any(process.is_running() for process in processes)


def test_one_that_ends_by_itself_is_told():
    with Pool(1, work) as pool, pytest.raises(WorkerDiedError, match="ended with status 3 while it worked at"):
        list(pool.run([("exit", 3)]))


def test_an_error_comes_with_its_traceback():
    for task, expected, message in (
        (("raise", ValueError("bad")), ValueError, "bad"),
        (("odd", 0), RuntimeError, "OddError: odd"),
    ):
        with Pool(1, work) as pool, pytest.raises(expected, match=message) as error:
            list(pool.run([task]))
        assert "in work" in error.value.__notes__[0]


def test_an_error_before_the_first_task_is_raised():
    prepare = functools.partial(note_place, folder=Path("/nowhere"))
    with Pool(2, work, prepare=prepare) as pool, pytest.raises(FileNotFoundError):
        list(pool.run([("sleep", 0)]))


def begun(pool):
    """All of its workers, so that they take their first tasks at once."""
    list(pool.run([("sleep", 0)] * len(pool._workers)))


def test_those_that_have_begun_may_finish(tmp_path):
    with Pool(2, work) as pool:
        begun(pool)
        tasks = [("touch", tmp_path / "first"), ("raise", ZeroDivisionError()), ("touch", tmp_path / "second")]
        with pytest.raises(ZeroDivisionError):
            list(pool.run(tasks))
        pool.finish()
    assert {path.name for path in tmp_path.iterdir()} == {"first"}, "and no other was begun"


def test_results_that_came_with_a_failure_are_given_out_and_no_other_task(tmp_path):
    tasks = [("fail", 1.0), ("sleep", 0), ("sleep", 0.1), ("touch", tmp_path / "file")]
    with Pool(2, work) as pool:
        begun(pool)
        results = pool.run(tasks)
        assert next(results)[0] == tasks[1]
        while len(wait([worker.connection for worker in pool._workers])) < 2:  # until both have answered
            time.sleep(0.01)
        assert next(results)[0] == tasks[2]
        with pytest.raises(ZeroDivisionError):
            next(results)
        pool.finish()
    assert not list(tmp_path.iterdir())


def test_signals_to_the_whole_group_are_for_the_parent():
    with Pool(1, work) as pool:
        results = pool.run([("sleep", 0), ("sleep", 0.5)])
        process = next(results)[1]
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(process, number)
        assert next(results)[1] == process


def test_silence_is_told(monkeypatch, caplog):
    monkeypatch.setattr(workers, "SILENCE", 0.3)
    with Pool(2, work) as pool:
        begun(pool)
        with caplog.at_level(logging.WARNING, "focusdpo"):
            list(pool.run([("sleep", 1.0), ("sleep", 1.1)], tell_silence=True))
    assert "no worker has given a result for 0 s; at work on: ('sleep', 1.0), ('sleep', 1.1)" in caplog.text


def test_silence_is_told_at_growing_intervals(monkeypatch, caplog):
    seconds = [0.0]
    monkeypatch.setattr(workers, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    silence, told = workers.Silence(), []
    with caplog.at_level(logging.WARNING, "focusdpo"):
        for seconds[0] in range(900):
            if seconds[0] == 500:
                silence.broken()
            silence.tell(["a pair"])
            told += [seconds[0]] * (len(caplog.records) - len(told))
    assert told == [60, 120, 240, 480, 560, 620, 740]
    assert "no worker has given a result for 480 s; at work on: a pair. " in caplog.text


SCRIPT = """
from focusdpo.foundation.workers import Pool
from tests.processes import assert_gone, started
from tests.foundation.worker_tasks import work
with Pool(2, work) as pool:  # with no guard for processes that would import this again
    print(*(worker.process.pid for worker in pool._workers), flush=True)
    list(pool.run([("sleep", 0.1)] * 4))
    print("at work", flush=True)
    list(pool.run([("sleep", 600)] * 2))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
def test_they_end_with_their_parent_in_the_midst_of_a_task(tmp_path, number):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with started([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE) as parent:
        processes = [psutil.Process(int(number)) for number in parent.stdout.readline().split()]
        assert parent.stdout.readline() == "at work\n"
        parent.send_signal(number)
    assert_gone(processes)


def test_ctrl_c_ends_all_without_a_word_from_the_workers(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with started(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as parent:
        processes = [psutil.Process(int(number)) for number in parent.stdout.readline().split()]
        assert parent.stdout.readline() == "at work\n"
        os.killpg(parent.pid, signal.SIGINT)
        said = parent.stderr.read()
    assert said.count("Traceback") == 1 and said.endswith("KeyboardInterrupt\n")
    assert_gone(processes)


def test_a_worker_imports_little_before_it_is_prepared():
    """What an ablation's worker must not import before it has its GPU: see `take_gpu`."""
    code = "import sys, focusdpo.foundation.workers; print(sorted({'torch', 'cv2', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout.strip() == "[]", done.stderr


def test_libraries_say_nothing_while_a_worker_imports_them(tmp_path, monkeypatch, capfd):
    """As each worker would repeat what they say of packages that are not installed; what a task says is heard."""
    said = "import logging, warnings\nwarnings.warn('a name is old')\nlogging.warning('a package is missing')\n"
    (tmp_path / "talkative.py").write_text(said + "def work(task):\n    logging.warning('at work on %s', task)\n")
    monkeypatch.syspath_prepend(tmp_path)
    talkative = importlib.import_module("talkative")
    capfd.readouterr()
    with Pool(1, talkative.work) as pool:
        list(pool.run(["it"]))
    heard = capfd.readouterr().err
    assert "at work on it" in heard and "old" not in heard and "missing" not in heard
