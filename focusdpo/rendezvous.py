"""How the processes of a launch come together: each one once, whatever other processes left in the launcher's store.

Launchers that start their processes again keep the store, with all that the ended ones put there, and nothing that they tell a
process says which time it is: machines count their own restarts. So the first process begins a meeting of a new name, which it
puts at one known place, and others come to the meeting there whose first process lives.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from contextlib import suppress
from datetime import timedelta
from typing import Any

JOINING = 600.0  # seconds in which the processes of a launch have to come together
REACHED = 20.0  # seconds in which the first process is to be reached directly
SIGN = 1.0  # seconds between the first one's signs of life, while it waits for the others
WATCHED = 3.0  # seconds in which they look for one
PAUSE = 0.05  # seconds between looks at the store

FIRST = "focusdpo/first"  # names the latest meeting, and the process that leads it


def meet(rank: int, size: int) -> tuple[Any, Any]:
    """Finds the other processes at MASTER_ADDR and MASTER_PORT, as torch.distributed's `env://` does.

    Args:
        rank, size: number of this process, and of all.

    Returns:
        A torch.distributed Store that only the processes of this launch have, and the launcher's, which some launchers have the
        first process serve. The former is in the first process: the launcher's may end with the launcher, which many signals of
        one stop can bring about. Where not all reach it, through a firewall as a rule, it is a part of the launcher's.

    Raises:
        ConnectionError: they did not come together in ten minutes, or another process has this one's number.
    """
    from torch.distributed.rendezvous import rendezvous

    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    mine = f"process {os.getpid()} on {socket.gethostname()}\n{uuid.uuid4().hex}"
    until = time.monotonic() + JOINING
    try:
        launchers, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=JOINING)))
        store = _lead(launchers, size, mine, until) if rank == 0 else _follow(launchers, rank, mine, until)
    except _TakenError as error:
        raise ConnectionError(
            f"number {rank} of the launch at {where} is {error} already; it was started twice, or another launch goes on "
            "there: wait for it, stop it, or give this one another port"
        ) from None
    except (RuntimeError, ValueError, TimeoutError) as error:
        line = (str(error) or type(error).__name__).splitlines()[0]  # torch.distributed puts its own stack below
        raise ConnectionError(
            f"process {rank} of {size} did not meet the others at {where} within {JOINING:.0f} s; see that all machines were "
            f"started, each with its own number, and reach that address ({line})"
        ) from error
    if isinstance(store, _tcp_store()) and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        os.environ["MASTER_PORT"] = str(store.port)  # where torch.distributed's group finds nothing of ended processes
    return store, launchers


class _TakenError(Exception):
    """Another process, which lives, has this one's number."""

    def __init__(self, first: str) -> None:
        super().__init__(first.splitlines()[0])


def _lead(launchers: Any, size: int, mine: str, until: float) -> Any:
    """Begins a meeting; returns the store to go on with once all others have come."""
    meeting, own = _meeting(launchers, mine), None
    with suppress(RuntimeError):
        own = _tcp_store()(os.environ["MASTER_ADDR"], 0, None, True, timedelta(seconds=REACHED), wait_for_workers=False)
    meeting.set("port", str(own.port) if own is not None else "0")
    there = launchers.compare_set(FIRST, "", mine).decode()
    while there != mine:
        earlier = _meeting(launchers, there)
        if _client(earlier, WATCHED) is not None or _gives_signs(earlier):
            raise _TakenError(there)
        there = launchers.compare_set(FIRST, there, mine).decode()
    reached = [f"reached/{rank}" for rank in range(1, size)]
    signed = 0.0
    while reached and not meeting.check(reached):
        if (now := time.monotonic()) - signed > SIGN:
            signed = now
            meeting.add("alive/0", 1)
        if (there := launchers.get(FIRST).decode()) != mine:
            raise _TakenError(there)
        _wait(until, "not all have come")
    is_direct = own is not None and all(meeting.get(key) == b"1" for key in reached)
    meeting.set("met", str(int(is_direct)))
    return own if is_direct else meeting


def _follow(launchers: Any, rank: int, mine: str, until: float) -> Any:
    """Comes to the meeting; returns the store to go on with once all have."""
    while True:
        first = launchers.get(FIRST).decode()  # waits for it
        meeting = _meeting(launchers, first)
        own = _client(meeting, REACHED)
        if own is not None or _gives_signs(meeting):
            break
        _wait(until, f"{first.splitlines()[0]} gives no sign of life")
    there = meeting.compare_set(f"is/{rank}", "", mine).decode()
    if there != mine:
        raise _TakenError(there)
    meeting.set(f"reached/{rank}", str(int(own is not None)))
    while not meeting.check(["met"]):  # also if another meeting begins: this process is then one that is going to be ended
        _wait(until, "not all have come")
    return own if meeting.get("met") == b"1" else meeting


def _wait(until: float, why: str) -> None:
    """A moment, if there is time left."""
    time.sleep(PAUSE)
    if time.monotonic() > until:
        raise TimeoutError(why)


def _meeting(launchers: Any, first: str) -> Any:
    """Its part of the launcher's store."""
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    return PrefixStore(f"focusdpo/{first.splitlines()[1]}", launchers)


def _tcp_store() -> Any:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore


def _client(meeting: Any, seconds: float) -> Any | None:
    """A client of the store in the first process, if that is reached."""
    address, port = os.environ["MASTER_ADDR"], int(meeting.get("port"))
    with suppress(OSError, RuntimeError):
        if port:
            socket.create_connection((address, port), seconds).close()  # torch's client would try again for all that time
            return _tcp_store()(address, port, None, False, timedelta(seconds=seconds), wait_for_workers=False)
    return None


def _gives_signs(meeting: Any) -> bool:
    """Whether its first process does, in the launcher's store."""
    signs = meeting.add("alive/0", 0)
    time.sleep(WATCHED)
    return bool(meeting.add("alive/0", 0) > signs)
