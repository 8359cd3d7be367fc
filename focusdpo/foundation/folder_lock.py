"""The lock of an output folder, and who holds it."""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
import weakref
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from focusdpo.foundation.files import read_object, write_json

logger = logging.getLogger(__name__)

HOLDER = "holder.json"  # beside the lock: who has it
INTRODUCED = 2.0  # seconds in which a process that took a lock says who it is
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class FolderLock:
    """Held by one process; the operating system lets go of it when that process ends.

    Folders that were made for it alone go away again when it is released before the work has begun.

    Args:
        own: the folder of this project's own files, within the one that is locked.
        leads: whether it is for this process to lock it; others lock nothing.
    """

    def __init__(self, own: Path, leads: bool) -> None:
        self._own = own
        self._leads = leads
        self._made: list[Path] = []
        self._lock: FileLock | None = None
        self._end: Any = None

    def acquire(self, setting: str, command: str) -> None:
        file = self._own.resolve() / "lock"
        if self._lock is not None and file.exists():
            return
        if not self._leads or self._own.is_file():  # a file of an earlier version, which only `begin` may change
            return
        self.release()
        try:
            for path in reversed((self._own, *self._own.parents)):
                if not path.exists():
                    path.mkdir(exist_ok=True)
                    self._made.append(path)
            lock = FileLock(file, is_singleton=True, thread_local=False)
            lock.acquire(blocking=False)
        except Timeout as error:
            raise BlockingIOError(
                f"{setting}: {self._own.parent} is being written by {_holder(self._own)}; wait for it, stop it, or name "
                "another folder"
            ) from error
        except (NotImplementedError, OSError) as error:
            if isinstance(error, NotImplementedError) or error.errno in NO_LOCKS:
                logger.warning("%s: %s cannot be locked; see that no other process writes there", setting, self._own.parent)
                return
            _remove(self._made)
            raise PermissionError(
                f"{setting}: {self._own.parent} cannot be written to ({error.strerror}); name another folder"
            ) from error
        self._lock = lock
        self._end = weakref.finalize(self, _unlock, os.getpid(), lock, self._own, self._made)
        since = datetime.now(UTC).isoformat(timespec="seconds")
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "command": command, "since": since}
        with suppress(OSError):  # it only makes a message better
            write_json(self._own / HOLDER, holder)

    def keep(self) -> None:
        """The folders stay."""
        self._made.clear()

    def release(self) -> None:
        if self._end is not None:
            self._end()
        self._lock = self._end = None
        self._made = []


def _unlock(process: int, lock: FileLock, own: Path, made: list[Path]) -> None:
    if os.getpid() != process:  # a fork's copy
        return
    for name in (HOLDER, "lock") if own in made else (HOLDER,):
        (own / name).unlink(missing_ok=True)
    lock.release()
    _remove(made)


def _remove(made: list[Path]) -> None:
    """Deletes folders that were made one in the other, as far as they are empty."""
    while made:
        with suppress(OSError):  # somebody has put something there
            made.pop().rmdir()


def _holder(own: Path) -> str:
    """Who has the lock; that process says so a moment after it took it."""
    until = time.monotonic() + INTRODUCED
    while not (own / HOLDER).exists() and time.monotonic() < until:
        time.sleep(0.02)
    try:
        holder = read_object(own / HOLDER)
        return f"focusdpo {holder['command']}, process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError):
        return "another process"
