"""Runs the parts of a measurement in processes of their own, so that an error, a crash or a hang ends one case alone.

A part's process appends to the result what it begins and what it has measured (benchmarks/records.py). When it crashes, loses
its device or falls silent, the case that it had begun is recorded as failed, and a fresh process goes on with the rest.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.records import Recorder

OUT_OF_TIME = "out of time"
POLL = 0.1  # seconds between two looks at a process


@dataclass(frozen=True)
class Part:
    """One part of a plan.

    Args:
        name: of the part.
        what: it shows, in a few words.
        command: of its process.
        seconds: it may take at most, and what the parts before it have left over.
        silence: seconds after which a process that has appended nothing counts as hung. None: the part has no cases of its own
            to go on with, and ends with its process.
        needs: packages or programs without which it is left out.
        log: file for what it prints, in the folder of the result; None lets it print.
    """

    name: str
    what: str
    command: tuple[str, ...]
    seconds: float
    silence: float | None = None
    needs: tuple[str, ...] = ()
    log: str | None = None


def run_part(part: Part, recorder: Recorder, until: float) -> str:
    """Runs a part until it is done, its time is over or nothing of it can go on; says how it ended.

    Args:
        part: to run.
        recorder: of the result, which its processes append to as well.
        until: by `time.monotonic`: the part's own seconds, and what the parts before it have left over.
    """
    started = time.monotonic()
    missing = [name for name in part.needs if importlib.util.find_spec(name) is None and shutil.which(name) is None]
    ended = f"left out: needs {', '.join(missing)}" if missing else _run(part, recorder, until)
    recorder.append("part", name=part.name, ended=ended, seconds=round(time.monotonic() - started, 1))
    return ended


def _run(part: Part, recorder: Recorder, until: float) -> str:
    clean = True
    while True:
        known, since = recorder.ended(), len(recorder.records())
        code, why = _process(part, recorder, until)
        begun = recorder.unfinished(since) if part.silence is not None else []
        if why == OUT_OF_TIME:
            for case in begun:
                recorder.append("cut", case=case, part=part.name, why=why)
            return why if not begun else f"{why}, in {begun[0]}"
        for case in begun:
            recorder.append("failed", case=case, part=part.name, why=why or _status(code))
        if why is None and code in (0, 1) and not begun:
            return "done" if code == 0 and clean else "done, with failures"
        clean = False
        if part.silence is None or recorder.ended() == known:  # nothing to go on with, or nothing that moves
            return f"failed: {why or _status(code)}"


def _process(part: Part, recorder: Recorder, until: float) -> tuple[int, str | None]:
    """Runs the command once: its exit status, and why it was killed, or None."""
    with contextlib.ExitStack() as stack:
        log = None
        if part.log is not None and recorder.path is not None:
            log = stack.enter_context((recorder.path.parent / part.log).open("ab"))
        # A session of its own: what it leaves behind can be ended with it.
        process = subprocess.Popen(part.command, start_new_session=True, stdout=log, stderr=log, preexec_fn=end_with_parent)
        stack.callback(_end, process)
        why, size, heard = None, _size(recorder.path), time.monotonic()
        while process.poll() is None and why is None:
            now = time.monotonic()
            if _size(recorder.path) != size:
                size, heard = _size(recorder.path), now
            if now >= until:
                why = OUT_OF_TIME
            elif part.silence is not None and now - heard > part.silence:
                why = f"silent for {part.silence:.0f} s"
            else:
                time.sleep(POLL)
    return -signal.SIGKILL if process.returncode is None else process.returncode, why


def end_with_parent() -> None:
    """In a child: it does not outlive a parent that is killed and cannot end it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # one that is stuck in a driver may not hold up the others
        process.wait(timeout=5)


def _size(path: Path | None) -> int:
    return path.stat().st_size if path is not None and path.exists() else 0


def _status(code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return "its device was lost to the process" if code == 70 else f"exit status {code}"
