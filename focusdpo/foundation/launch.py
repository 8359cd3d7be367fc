"""The processes of one launch, on one machine or several: they wait for each other, share what one found, and fail together.

All of it goes through a store of torch.distributed, which the first process keeps, and not through collectives: it works
before there is a process group, whoever waits knows for whom, and may do so for as long as the others live. Two threads of each
process stand behind that: one gives signs of life and hears what others say, the other ends the process where its launcher has
ended, or where another process has and the main thread hangs in a collective.
"""

from __future__ import annotations

import atexit
import functools
import json
import logging
import math
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import focusdpo
from focusdpo.foundation.rendezvous import JOINING, meet
from focusdpo.foundation.text import first_line

logger = logging.getLogger(__name__)

BEAT = 1.0  # seconds between signs of life
PATIENCE = 30.0  # seconds after which a waiting process says for whom it waits, then in twice the time
LEAVING = 30.0  # seconds that a process has to leave by itself once another one has failed: it may be writing
HEARD = 5.0  # seconds that a failing process waits for the others to hear of it
SILENT = 120.0  # seconds without a sign of life after which a process counts as dead, or collective_timeout if that is less
PART = 2**20  # characters that are sent at once; the store takes no more than 8 MiB
LONGEST = 20_000  # characters of a reason
ORPHANED = "the launcher has ended"

# What the libraries under torch.distributed say where another process is gone; their errors have no class of their own.
LOST = re.compile(
    r"Connection (closed by peer|reset by peer)|[Tt]imed out waiting|collective operation timeout|remote process exited"
)

T = TypeVar("T")


class ElsewhereError(RuntimeError):
    """Another process of the launch has failed; the message has its number, its machine and its reason."""


def lost_connection(error: BaseException) -> str | None:
    """What to say of an error that collectives raise where another process does not come, or is gone; None of others."""
    if not isinstance(error, RuntimeError) or isinstance(error, ElsewhereError):
        return None
    line = next((line.strip() for line in str(error).splitlines() if LOST.search(line)), None)
    return None if line is None else f"another process was lost; the launcher of its machine says why ({line})"


def _reason(error: BaseException) -> str:
    """What an error says; of those that are not about what a user gave, their class as well."""
    if lost := lost_connection(error):
        return lost
    return str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"


def tell_launcher(text: str) -> None:
    """Has torchrun, and accelerate's launcher, which uses it, say the reason in their last words."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file and not os.path.exists(file):
        with suppress(OSError):
            found = {"py_callstack": text, "timestamp": str(int(time.time()))}
            Path(file).write_text(json.dumps({"message": {"message": text, "extraInfo": found}}))


def is_launched() -> bool:
    """Whether this is one of several processes, by what launchers set: nothing is joined yet."""
    return _places() is not None


def is_follower() -> bool:
    """Whether it is another one than the first."""
    return _places() is not None and os.environ["RANK"] != "0"


def _places() -> tuple[int, int] | None:
    """Rank and number of processes, where a launcher started several; as accelerate looks for it."""
    names = ("LOCAL_RANK", "RANK", "WORLD_SIZE")
    values = [os.environ.get(name, "") for name in names]
    if not all(value.isdecimal() for value in values) or int(values[2]) < 2:
        return None
    return int(values[1]), int(values[2])


class Launch:
    """A process among those of its launch. All of them make the same calls in the same order.

    Args:
        rank, size: number of this process, and of all.
        local_rank: its number on its machine.
        store: a torch.distributed Store that all of them see; None where there is one process.
        parent: process id of the launcher, without which this process ends; None does not look.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, store: Any = None, parent: int | None = None) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self.is_main = rank == 0  # the first process of all: the one that writes, logs and shows bars
        self.is_local_main = local_rank == 0  # the first process of its machine
        self.timeout = JOINING  # seconds without a sign of life after which a process counts as dead
        self._host = socket.gethostname()
        self._machine = f"{self._host}/{os.environ.get('GROUP_RANK', '')}"  # launchers number machines, names may be alike
        self._store = store
        self._launchers_store: Any = None  # held, as some launchers have the first process serve it
        self._meetings = 0
        self._calls = 0  # of stops_here
        self._stop_at: int | None = None  # as all have agreed
        self._is_orphan = False  # the launcher has ended
        self._failed = False  # this process
        self._heard: str | None = None  # why another one ends
        self._lost: str | None = None  # why the store cannot be asked any more
        self._unheard = 0  # beats since the store last answered
        self._hears = store is not None  # whether it is asked
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
        if store is not None:
            store.set(f"host/{rank}", self._host)
            self._threads.append(threading.Thread(target=self._pulse, name="launch-pulse", daemon=True))
        if store is not None or parent is not None:
            self._threads.append(threading.Thread(target=self._watch, args=(parent,), name="launch-watch", daemon=True))
        for thread in self._threads:
            thread.start()

    @classmethod
    @functools.cache
    def join(cls) -> Launch:
        """The launch of this process; where it has several, their first meeting.

        Raises:
            ConnectionError: as `meet`.
        """
        places = _places()
        # accelerate starts a single process without torchrun, and sets this for it.
        is_launched = any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"))
        parent = _parent() if is_launched else None
        if places is None:
            return cls(parent=parent)
        has_met = threading.Event()
        threading.Thread(target=_end_with, args=(parent, has_met), name="launch-parent", daemon=True).start()
        try:
            store, launchers = meet(*places)
        except ConnectionError as error:
            tell_launcher(str(error))
            raise
        finally:
            has_met.set()
        launch = cls(*places, int(os.environ["LOCAL_RANK"]), store, parent)
        launch._launchers_store = launchers
        atexit.register(launch.close)
        return launch

    # What all do together.

    def wait(self, what: str) -> None:
        """Waits until all processes have come here.

        Args:
            what: they then have done, for messages.

        Raises:
            ElsewhereError: one of them failed, or is dead.
        """
        if self._store is not None:
            self._meet(self._next(), what)

    def gather(self, what: str, value: Any) -> list[Any]:
        """A JSON value of each process, by rank; waits as `wait` does."""
        if self._store is None:
            return [value]
        key = self._next()
        self._put(f"{key}/value/{self.rank}", value)
        self._meet(key, what)
        return [self._take(f"{key}/value/{rank}") for rank in range(self.size)]

    def from_main(self, what: str, compute: Callable[[], T]) -> T:
        """What `compute`, called in the first process alone, returns there: a JSON value.

        Raises:
            ElsewhereError: it failed there; the first process raises its own error.
        """
        return self._from_one(what, compute, self.is_main, "main", [0])

    def once_a_machine(self, what: str, compute: Callable[[], T]) -> T:
        """What `compute`, called in the first process of each machine, returns there: a JSON value; raises as `from_main`."""
        first = max(self.rank - self.local_rank, 0)
        return self._from_one(what, compute, self.is_local_main, f"machine/{self._machine}", [first])

    def _from_one(self, what: str, compute: Callable[[], T], mine: bool, place: str, whom: Sequence[int]) -> T:
        if self._store is None:
            return compute()
        key = f"{self._next()}/{place}"
        if not mine:
            self._wait_for(key, what, None, whom)
            value: T = self._take(key)
            return value
        with self.failing():
            value = compute()
        self._put(key, value)
        return value

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Work that all processes do: who is through waits for the others, and one that fails has all others fail with it."""
        with self.failing():
            yield
        self.wait(what)

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Work of this process; if it fails, all others are told why, and end: there is no second try."""
        try:
            yield
        except ElsewhereError:
            raise
        except BaseException as error:
            self.fail(_reason(error))
            raise

    def stops_here(self, wanted: bool) -> bool:
        """Whether to stop: all processes get True at the same one of their calls, soon after one of them wanted to.

        Nobody waits for that. Each says how many calls it has come to before it looks whether a stop is wanted; so who sees
        that first knows, of what the others have said by then, a call that none of them has passed.

        Args:
            wanted: whether this process wants to stop.
        """
        if self._store is None:
            return wanted
        self._calls += 1
        self._set(f"calls/{self.rank}", str(self._calls))
        if wanted:
            told = "was told to stop" if not self._is_orphan else "has lost its launcher"
            self._set("stop", f"process {self.rank} on {self._host} {told}")
        if self._stop_at is None and self._ask(lambda store: store.check(["stop"])):
            others = [rank for rank in range(self.size) if rank != self.rank]
            passed = [int(self._get(f"calls/{rank}")) for rank in others if self._has(f"calls/{rank}")]
            agreed = str(max([self._calls, *(each + 1 for each in passed)]))
            self._stop_at = int(self._ask(lambda store: store.compare_set("stop/at", "", agreed)))
        return self._stop_at is not None and self._calls >= self._stop_at

    @property
    def why_stopped(self) -> str:
        """What the processes stop for, once `stops_here` was true."""
        if self._store is None:
            return ORPHANED if self._is_orphan else "it was told to"
        return self._get("stop").decode()

    # Failing and leaving.

    def fail(self, reason: str) -> bool:
        """Tells all processes why this one ends, and waits a moment until they have heard it.

        Returns:
            Whether this is the reason that all end for, or the only one that is known here; False where another process failed
            first.
        """
        if self._store is None:
            return True
        if len(reason) > LONGEST:
            reason = f"{reason[:LONGEST]} ..."
        text = f"process {self.rank} on {self._host}: {reason}"
        try:
            first = self._declare(self.rank, text)
            is_first = bool(first["rank"] == self.rank)
            tell_launcher(first["text"])
            if not self._failed:
                self._failed = True
                self._wait_until_heard()
            return is_first
        except ElsewhereError:
            tell_launcher(self._heard or text)
            return self._heard is None

    def _declare(self, rank: int, text: str) -> dict[str, Any]:
        """Puts down why the launch fails, and returns what was put down first."""
        mine = json.dumps({"rank": rank, "text": text})
        return dict(json.loads(self._ask(lambda store: store.compare_set("failed", "", mine))))

    def pass_on(self, reason: str) -> None:
        """Tells the launcher why this process ends: another one does."""
        tell_launcher(reason)
        with suppress(ElsewhereError):
            self._wait_until_heard()

    def _wait_until_heard(self) -> None:
        """The end of a process has the launcher end all of its machine, and the store may be in one of them."""
        until = time.monotonic() + HEARD
        waiting = {rank for rank in range(self.size) if rank != self.rank}
        while waiting and time.monotonic() < until:
            waiting = {rank for rank in waiting if not (self._has(f"heard/{rank}") or self._has(f"left/{rank}"))}
            time.sleep(0.05)

    def failure(self, seconds: float = 0.0) -> str | None:
        """Why another process ends, if one does; waits so long for its word, which may come after its connections broke."""
        until = time.monotonic() + seconds
        while self._store is not None:
            try:
                found = self._found_failure()
            except ElsewhereError as error:
                return str(error)
            if found is not None and found["rank"] != self.rank:
                return str(found["text"])
            if time.monotonic() >= until:
                return None
            time.sleep(0.1)
        return None

    def close(self) -> None:
        """Leaves: the others need not wait for a sign of this process any more."""
        if self._closed.is_set():
            return
        self._closed.set()
        for thread in self._threads:  # one that is in torch's code at the end of the interpreter would abort the process
            thread.join(2 * BEAT)
        if self._store is None:
            return
        with suppress(ElsewhereError):
            self._set(f"left/{self.rank}", "1")
            # The first process may be where the store is.
            until = time.monotonic() + HEARD
            while self.is_main and time.monotonic() < until and not all(self._has(f"left/{r}") for r in range(self.size)):
                time.sleep(0.05)

    # The store.

    def _next(self) -> str:
        self._meetings += 1
        return f"meeting/{self._meetings}"

    def _meet(self, key: str, what: str) -> None:
        """Says that this process has come, and waits until all have."""
        self._set(f"{key}/{self.rank}", "1")
        if self._ask(lambda store: store.add(f"{key}/count", 1)) == self.size:
            self._set(f"{key}/all", "1")
        self._wait_for(f"{key}/all", what, key, range(self.size))

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        """What the store answers; never a question that it would wait for, as the thread asks too."""
        try:
            return question(self._store)
        except RuntimeError as error:  # torch.distributed's own errors among them
            where = f"process 0 on {os.environ.get('MASTER_ADDR')}"
            raise ElsewhereError(self._heard or f"{where} cannot be reached any more: {first_line(error)}") from error

    def _put(self, key: str, value: Any) -> None:
        """Sends a JSON value in parts; the key itself comes last."""
        text = json.dumps(value)
        parts = [text[start : start + PART] for start in range(0, len(text), PART)]
        for number, part in enumerate(parts):
            self._set(f"{key}/part/{number}", part)
        self._set(key, str(len(parts)))

    def _take(self, key: str) -> Any:
        return json.loads(b"".join(self._get(f"{key}/part/{number}") for number in range(int(self._get(key)))))

    def _set(self, key: str, value: str) -> None:
        self._ask(lambda store: store.set(key, value))

    def _has(self, key: str) -> bool:
        return bool(self._ask(lambda store: store.check([key])))

    def _get(self, key: str) -> bytes:
        value: bytes = self._ask(lambda store: store.get(key))
        return value

    def _found_failure(self) -> dict[str, Any] | None:
        return dict(json.loads(self._get("failed"))) if self._has("failed") else None

    def _wait_for(self, key: str, what: str, meeting: str | None, whom: Sequence[int]) -> None:
        """Until the store has a key that others set: those of `whom` who have not come to a meeting."""
        began = time.monotonic()
        patience, pause, looked = PATIENCE, 0.002, began
        while not self._has(key):
            found = self._found_failure()
            if found is not None:
                raise ElsewhereError(found["text"])
            now = time.monotonic()
            if now - looked >= BEAT:
                looked = now
                missing = [rank for rank in whom if rank != self.rank and not (meeting and self._has(f"{meeting}/{rank}"))]
                for rank in missing:
                    if self._has(f"left/{rank}"):
                        self.fail(reason := f"{self._name(rank)} has ended without a word")
                        raise ElsewhereError(reason)
                if now - began >= patience:
                    patience *= 2
                    names = ", ".join(map(self._name, missing[:5])) + (f" and {len(missing) - 5} more" if missing[5:] else "")
                    if self.is_main:
                        logger.info("waiting for %s: %s", names, what)
            time.sleep(pause)
            pause = min(1.5 * pause, 0.1)

    def _name(self, rank: int) -> str:
        host = f" on {self._get(f'host/{rank}').decode()}" if self._has(f"host/{rank}") else ""
        return f"process {rank}{host}"

    # The threads.

    def _pulse(self) -> None:
        """Gives signs of life, and hears of failures; in the first process, looks for the others' signs."""
        beats: dict[int, tuple[bytes, int]] = {}  # of others: the last one, and for how many of ours there was no new one
        while not self._closed.wait(BEAT):
            try:
                self._ask(lambda store: store.add(f"alive/{self.rank}", 1))
                if self._has("left/0") and not self.is_main:
                    break
                found = self._found_failure()
                if found is not None:
                    self._set(f"heard/{self.rank}", "1")
                    self._heard = found["text"] if found["rank"] != self.rank else None
                elif self.is_main:
                    self._look_at(beats)
                self._unheard = 0
            except ElsewhereError as error:
                self._lost = str(error)
                break
        self._hears = False

    def _look_at(self, beats: dict[int, tuple[bytes, int]]) -> None:
        for rank in range(1, self.size):
            beat = self._get(f"alive/{rank}") if self._has(f"alive/{rank}") else b""
            last, missed = beats.get(rank, (beat, 0))
            beats[rank] = beat, missed + 1 if beat == last else 0
            silent = min(self.timeout, SILENT)
            if beats[rank][1] * BEAT > silent and not self._has(f"left/{rank}"):
                self._heard = f"{self._name(rank)} has given no sign of life for {silent:g} s"
                self._declare(rank, self._heard)
                return

    def _watch(self, parent: int | None) -> None:
        """Ends this process, after a while, where its launcher or another process has ended; asks the store nothing."""
        deadline, reason = math.inf, ""
        while not self._closed.wait(BEAT):
            self._unheard += self._hears
            now = time.monotonic()
            if deadline < now:
                tell_launcher(reason)
                _exit(reason)
                return
            if deadline < math.inf or self._failed:  # who failed itself ends by itself
                continue
            if parent is not None and os.getppid() != parent:
                logger.warning("process %d: the launcher has ended, and so does this process", self.rank)
                self._is_orphan = True
                os.kill(os.getpid(), signal.SIGTERM)  # as the launcher's own word to stop
                deadline, reason = now + max(self.timeout, LEAVING), ORPHANED
            elif found := self._heard or self._lost:
                deadline, reason = now + LEAVING, found
            elif self._unheard * BEAT > self.timeout:
                deadline, reason = now, f"process 0 has given no answer for {self.timeout:g} s (collective_timeout)"


def _parent() -> int:
    """The process that started this one, dead or alive."""
    process, parent = focusdpo._STARTED
    return parent if process == os.getpid() else os.getppid()  # of a fork


def _end_with(parent: int | None, is_over: threading.Event) -> None:
    """Ends this process with its parent: nothing else can where it waits for the others to come, and it has nothing to lose."""
    while not is_over.wait(BEAT):
        if parent is not None and os.getppid() != parent:
            _exit(ORPHANED)


def _exit(reason: str) -> None:
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        print(f"focusdpo: {reason}", file=sys.stderr, flush=True)
    os._exit(1)
