"""Processes that work for this one: started anew and never forked, so that they copy none of its locks and thread pools.

They end when this process does, whatever ends it, also in the midst of a task. One that is killed, and a long silence of all,
are reported.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from types import TracebackType
from typing import Any, TypeVar

from focusdpo.foundation.packages import libraries_silenced
from focusdpo.foundation.progress_bars import HIDDEN, hide_progress_bars, terminal_width

logger = logging.getLogger(__name__)

SILENCE = 60.0  # seconds without any result, after which the user is told
PARENT = 1.0  # seconds between two looks at whether the parent is still there
LEAVING = 30.0  # seconds that a worker may take to end
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # which reach a whole process group
GOES_ON = "the same command goes on from what is there"

_connection: Connection | None = None

Task = TypeVar("Task")


class WorkerDiedError(ChildProcessError):
    """A worker ended before it was through with its task."""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_of(workers: int) -> int:
    """Threads for each of so many workers."""
    return max(cores() // workers, 1)


def set_threads(count: int) -> None:
    """Has those of the libraries that were imported use so many threads each; OMP_NUM_THREADS does not reach OpenCV's."""
    for name, setter in (("torch", "set_num_threads"), ("cv2", "setNumThreads")):
        if name in sys.modules:
            getattr(sys.modules[name], setter)(count)


def take_gpu(place: int, devices: int) -> None:
    """Gives this process its GPU, as the `prepare` of a pool; nothing that asks for GPUs may have been imported.

    Args:
        place: the worker's number.
        devices: GPUs of this machine; 0 uses none.

    Raises:
        ChildProcessError: CUDA was initialised before: a process keeps the GPUs that it saw first.
    """
    if not devices:
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(devices)]
    os.environ["CUDA_VISIBLE_DEVICES"] = names[place % devices]
    import torch

    if torch.cuda.device_count() != 1:
        raise ChildProcessError("a worker sees several GPUs: CUDA was initialised before it was given its own")


class Silence:
    """Tells the user when no result comes: after `SILENCE` seconds, then after twice that, and so on."""

    def __init__(self) -> None:
        self.broken()

    def broken(self) -> None:
        """A result has come."""
        self._since, self._patience = time.monotonic(), SILENCE

    def left(self) -> float:
        """Seconds until the user is to be told."""
        return max(self._since + self._patience - time.monotonic(), 0.0)

    def tell(self, at_work: Iterable[str]) -> None:
        """Tells the user, if it is time, and names what is being worked at."""
        if self.left() == 0:
            message = "no worker has given a result for %.0f s; at work on: %s. Models may take long to load. If stopped, %s"
            logger.warning(message, time.monotonic() - self._since, ", ".join(at_work), GOES_ON)
            self._patience *= 2


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    task: Any = None


class Pool:
    """Processes that do one task after the other; leaving its context ends them, also in the midst of a task.

    Each may use its share of the cores, see `threads_of`.

    Args:
        count: how many.
        work: what is called with each task; it reaches every worker once, pickled. What a program's own main module defines is
            not known to workers.
        name: what a task is called in messages.
        prepare: called in each worker first, with its number from 0 to count - 1; `work` and its module come after that.
        hears_signals: whether signals are for the workers as well, which then may leave their tasks in order. Otherwise they
            pass over those that reach the whole process group, and are killed where this process wants no more of them.
    """

    def __init__(
        self,
        count: int,
        work: Callable[[Any], Any],
        name: Callable[[Any], str] = str,
        prepare: Callable[[int], None] | None = None,
        hears_signals: bool = False,
    ) -> None:
        self._workers: list[_Worker] = []
        self._name = name
        self._hears_signals = hears_signals
        try:
            for _ in range(count):
                self._workers.append(_start(threads_of(count)))
            content = pickle.dumps(work)
            for place, worker in enumerate(self._workers):
                with suppress(ConnectionError):  # seen when its first result is waited for
                    worker.connection.send((prepare, place, hears_signals, threads_of(count)))
                    worker.connection.send_bytes(content)
        except BaseException:
            self._end()
            raise

    def run(self, tasks: Iterable[Task], tell_silence: bool = False) -> Iterator[tuple[Task, Any]]:
        """Hands out the tasks, and yields each with its result as they come.

        Args:
            tasks: handed out in order, the first at once.
            tell_silence: whether the user is told where nothing comes for a while.

        Raises:
            WorkerDiedError: a worker was killed, or could not begin.
            Exception: what a task raised, in its worker.
        """
        left = iter(tasks)
        for worker in self._workers:
            self._hand_out(worker, left)
        return self._results(left, tell_silence)

    def _results(self, left: Iterator[Task], tell_silence: bool) -> Iterator[tuple[Task, Any]]:
        silence = Silence()
        while busy := self._busy():
            ready = wait([worker.connection for worker in busy], silence.left() if tell_silence else None)
            if not ready:
                silence.tell(self._name(worker.task) for worker in busy)
            failure: BaseException | None = None
            for worker in busy:
                if worker.connection in ready:
                    task = worker.task
                    try:
                        result = self._result(worker)
                    except BaseException as error:
                        failure = failure or error  # after the results that have come as well
                        continue
                    silence.broken()
                    if failure is None:
                        self._hand_out(worker, left)
                    yield task, result
            if failure is not None:
                raise failure

    def finish(self) -> None:
        """Waits for the tasks that were begun; whatever becomes of them."""
        while busy := self._busy():
            for connection in wait([worker.connection for worker in busy]):
                worker = next(worker for worker in busy if worker.connection is connection)
                with suppress(BaseException):
                    self._result(worker)

    def _busy(self) -> list[_Worker]:
        return [worker for worker in self._workers if worker.task is not None]

    @staticmethod
    def _hand_out(worker: _Worker, left: Iterator[Any]) -> None:
        worker.task = next(left, None)
        if worker.task is not None:
            with suppress(ConnectionError):  # a dead worker is seen when its result is waited for
                worker.connection.send(worker.task)

    def _result(self, worker: _Worker) -> Any:
        task, worker.task = worker.task, None
        try:
            succeeded, result = worker.connection.recv()
        except (EOFError, ConnectionError) as error:
            raise _death(worker.process, self._name(task)) from error
        if not succeeded:
            raise result
        return result

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._end()

    def _end(self) -> None:
        for worker in self._workers:
            if worker.task is None:
                with suppress(OSError):
                    worker.connection.send(None)
            elif self._hears_signals:
                worker.process.terminate()
            else:
                worker.process.kill()
        until = time.monotonic() + LEAVING
        for worker in self._workers:
            try:
                worker.process.wait(max(until - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
            worker.connection.close()


def _start(threads: int) -> _Worker:
    """A process that waits for its work.

    Not with multiprocessing, which would import the program's main module again, and run it where a script has no guard.
    """
    ours, its = Pipe()
    path = [folder or os.getcwd() for folder in sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": str(threads)}
    command = [
        sys.executable,
        "-P",
        "-c",
        f"from {__name__} import serve; serve({its.fileno()}, {os.getpid()})",
    ]
    # One that comes before the worker knows what to do with it has to wait.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment, pass_fds=[its.fileno()])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    its.close()
    return _Worker(process, ours)


def _death(process: subprocess.Popen[bytes], task: str) -> WorkerDiedError:
    try:
        status = process.wait(LEAVING)
    except subprocess.TimeoutExpired:  # its connection is gone
        process.kill()
        status = process.wait()
    if status < 0:
        how = f"was killed by {signal.Signals(-status).name}"
        remedy = "as a rule for want of memory, of which fewer workers need less"
    else:
        how, remedy = f"ended with status {status}", "what it wrote above says why"
    return WorkerDiedError(f"workers: process {process.pid} {how} while it worked at {task}, {remedy}; {GOES_ON}")


def serve(number: int, parent: int) -> None:
    """What a worker does.

    Args:
        number: of the file descriptor of its connection.
        parent: process id of whom it works for.
    """
    global _connection  # open until the process ends: the thread below looks at it
    connection = _connection = Connection(number)
    end_with_parent(number, parent)
    if os.environ.get(HIDDEN) or terminal_width() is None:  # who gave it the work says how far it is
        hide_progress_bars()
    try:
        prepare, place, hears_signals, threads = connection.recv()
        if not hears_signals:
            for signal_number in SIGNALS:
                signal.signal(signal_number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        try:
            if prepare is not None:
                prepare(place)
            with libraries_silenced():  # the work's modules are imported here
                work = pickle.loads(connection.recv_bytes())
            set_threads(threads)
        except Exception as error:
            connection.recv()
            connection.send((False, _portable(error)))
            return
        while (task := connection.recv()) is not None:
            try:
                answer = True, work(task)
            except BaseException as error:
                answer = False, _portable(error)
            connection.send(answer)
    except KeyboardInterrupt:  # between two tasks
        sys.exit(128 + signal.SIGINT)


def _portable(error: BaseException) -> BaseException:
    """The error as it can travel, with its traceback as a note."""
    told = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"in a worker:\n{told}")
    return error


def end_with_parent(number: int, parent: int) -> None:
    """Has this process end as soon as its parent is gone.

    The connection tells at once, unless a fork of the parent holds it too; then it is the parent's number.

    Args:
        number: of the file descriptor of a connection or pipe whose other end the parent has.
        parent: its process id.
    """
    threading.Thread(target=_end_with_parent, args=(number, parent), daemon=True).start()


def _end_with_parent(number: int, parent: int) -> None:
    poll = select.poll()
    poll.register(number, 0)  # only whether the other end was closed
    while os.getppid() == parent and not poll.poll(math.ceil(1000 * PARENT)):
        pass
    os._exit(1)
