"""How the processes of a launch come together: each one once, whatever other processes left in the launcher's store.

Launchers that start their processes again keep the store, with all that the ended ones put there, and nothing that they tell a
process says which time it is: machines count their own restarts. So the first process begins a meeting of a new name, which it
puts at one known place. What others find there may be the name of an earlier meeting: they come to it if its first process
lives, and else wait for the next.
"""

from __future__ import annotations

import os
import resource
import socket
import threading
import time
import uuid
from contextlib import suppress
from datetime import timedelta
from typing import Any

from focusdpo.foundation.text import first_line

JOINING = 600.0  # seconds in which the processes of a launch have to come together
SERVED = 60.0  # seconds in which a launcher's store is to be reached
REACHED = 20.0  # seconds in which the first process is to be reached directly
SIGN = 1.0  # seconds between the first one's signs of life, while it waits for the others
WATCHED = 3.0  # seconds in which they look for one
PAUSE = 0.05  # seconds between looks at the store

FIRST = "focusdpo/first"  # the name of the latest meeting
SIGNS = "alive/0"  # counts its first process's signs of life, also where `Launch` gives them in a part of the launcher's store


def meet(rank: int, size: int) -> tuple[Any, Any]:
    """Finds the other processes at MASTER_ADDR and MASTER_PORT, as torch.distributed's `env://` does.

    Args:
        rank, size: number of this process, and of all.

    Returns:
        Two torch.distributed Stores. The first one only the processes of this launch have. It is served by the first process,
        as the launcher's may end with the launcher, which many signals of one stop can bring about; if not all reach that one,
        through a firewall as a rule, it is a part of the launcher's. The second one is the launcher's, to be held: some
        launchers have the first process serve it.

    Raises:
        ConnectionError: they did not come together in ten minutes, or another process has this one's number.
    """
    from torch.distributed.rendezvous import rendezvous

    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    until = time.monotonic() + JOINING
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        # A launcher serves its store before it starts processes; where the first process does, others may be early.
        launchers, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=SERVED if has_agent else JOINING)))
        launchers.set_timeout(timedelta(seconds=JOINING))
        own, meeting = _lead(launchers, size, until) if rank == 0 else _follow(launchers, rank, size, until)
    except _RefusedError as error:
        raise ConnectionError(
            f"the launch at {where}: {error}; something was started twice, or again while the others went on, or another "
            "launch goes on there: wait for it, stop it, or give this one another port"
        ) from None
    except (RuntimeError, ValueError, TimeoutError) as error:
        reason = first_line(error)
        if "EADDRINUSE" in reason:
            reason = "something else uses that port; give this launch another one"
        raise ConnectionError(
            f"process {rank} of {size} did not meet the others at {where}, in {JOINING:.0f} s at most; see that all machines "
            f"were started, each with its own number, and reach that address ({reason})"
        ) from error
    if own is not None and has_agent:
        os.environ["MASTER_PORT"] = str(own.port)  # where torch.distributed's group finds nothing of ended processes
    return own or meeting, launchers


class _RefusedError(Exception):
    """This process does not belong to the meeting."""


def _lead(launchers: Any, size: int, until: float) -> tuple[Any | None, Any]:
    """Begins a meeting; once all others have come, returns this process's store, if all reach it, and the meeting's."""
    name, own = uuid.uuid4().hex, None
    meeting = _meeting(launchers, name)
    _allow_files(2 * size + 1000)
    with suppress(RuntimeError):
        own = _tcp_store(0, REACHED, is_main=True)
        own.set(name, "1")
    meeting.set("size", str(size))
    meeting.set("port", str(own.port) if own is not None else "0")
    meeting.set("is/0", _self())
    there = launchers.compare_set(FIRST, "", name).decode()
    while there != name:
        if _client(launchers, there, WATCHED) is not None or _gives_signs(launchers, there):
            raise _taken(launchers, there, 0)
        there = launchers.compare_set(FIRST, there, name).decode()
    missing, signed = list(range(1, size)), 0.0
    while missing:
        if (now := time.monotonic()) - signed > SIGN:
            signed = now
            meeting.add(SIGNS, 1)
        if (there := launchers.get(FIRST).decode()) != name:
            raise _taken(launchers, there, 0)
        _wait(until, f"processes {', '.join(map(str, missing[:5]))}{' ...' if missing[5:] else ''} have not come")
        missing = [rank for rank in missing if not meeting.check([f"reached/{rank}"])]
    is_direct = own is not None and all(meeting.get(f"reached/{rank}") == b"1" for rank in range(1, size))
    meeting.set("met", str(int(is_direct)))
    return own if is_direct else None, meeting


def _follow(launchers: Any, rank: int, size: int, until: float) -> tuple[Any | None, Any]:
    """Comes to the meeting; once all have, returns the first process's store, if all reach it, and the meeting's."""
    while True:
        while not launchers.check([FIRST]):
            _wait(until, "process 0 has not come")
        name = launchers.get(FIRST).decode()
        meeting, own = _meeting(launchers, name), _client(launchers, name, REACHED)
        if own is None and not _gives_signs(launchers, name):
            _wait(until, "process 0 gives no sign of life")
            continue
        if (other := int(meeting.get("size"))) != size:
            raise _RefusedError(f"it has {other} processes, and this one would be of {size}")
        mine = _self()
        if meeting.compare_set(f"is/{rank}", "", mine).decode() != mine:
            raise _taken(launchers, name, rank)
        meeting.set(f"reached/{rank}", str(int(own is not None)))
        while not meeting.check(["met"]) and launchers.get(FIRST).decode() == name:
            _wait(until, "not all have come")
        if meeting.check(["met"]):
            return own if meeting.get("met") == b"1" else None, meeting


def _wait(until: float, why: str) -> None:
    """A moment, if there is time left."""
    time.sleep(PAUSE)
    if time.monotonic() > until:
        raise TimeoutError(why)


def _self() -> str:
    """Names this process, and tells it from others: in containers names and numbers may be alike."""
    return f"process {os.getpid()} on {socket.gethostname()}\n{uuid.uuid4().hex}"


def _taken(launchers: Any, name: str, rank: int) -> _RefusedError:
    there = _meeting(launchers, name).get(f"is/{rank}").decode()
    return _RefusedError(f"number {rank} is {there.splitlines()[0]} already")


def _meeting(launchers: Any, name: str) -> Any:
    """Its part of the launcher's store."""
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    return PrefixStore(f"focusdpo/{name}", launchers)


def _tcp_store(port: int, seconds: float, is_main: bool = False) -> Any:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore(os.environ["MASTER_ADDR"], port, None, is_main, timedelta(seconds=seconds), wait_for_workers=False)


def _client(launchers: Any, name: str, seconds: float) -> Any | None:
    """A client of the store that the first process of the latest meeting serves, if that is reached in so many seconds."""
    port, found = int(_meeting(launchers, name).get("port")), []

    def reach() -> None:
        with suppress(OSError, RuntimeError):
            socket.create_connection((os.environ["MASTER_ADDR"], port), seconds).close()  # torch's would try again all the time
            store = _tcp_store(port, seconds)
            if store.check([name]):
                found.append(store)

    # A port at which nobody answers, as it is inherited by a process that outlives the first one, holds torch's for ever.
    thread = threading.Thread(target=reach, daemon=True)
    until = time.monotonic() + seconds
    if port:
        thread.start()
    while thread.is_alive() and time.monotonic() < until and launchers.get(FIRST).decode() == name:
        thread.join(PAUSE)
    return found[0] if found else None


def _gives_signs(launchers: Any, name: str) -> bool:
    """Whether the first process of the latest meeting does, in the launcher's store."""
    meeting = _meeting(launchers, name)
    before, until = meeting.add(SIGNS, 0), time.monotonic() + WATCHED
    while time.monotonic() < until and launchers.get(FIRST).decode() == name:
        time.sleep(PAUSE)
        if meeting.add(SIGNS, 0) > before:
            return True
    return False


def _allow_files(count: int) -> None:
    """Raises the limit of open files for the connections of all others, as far as that is allowed."""
    with suppress(OSError, ValueError):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if 0 <= soft < count:  # none is below 0
            resource.setrlimit(resource.RLIMIT_NOFILE, (count if hard < 0 else min(count, hard), hard))
