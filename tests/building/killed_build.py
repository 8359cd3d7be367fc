"""Builds in a child process and kills it, again and again, until it may finish: killed_build.py CONFIG.yaml KILLS."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

from focusdpo.commands.cli import COMMANDS, parse_config

FEW = 3  # pairs between two kills


def _done(folder: Path) -> int:
    """Pairs that are done."""
    manifest = folder / "manifest.jsonl"
    return manifest.read_bytes().count(b"\n") if manifest.exists() else 0


def build(file: str) -> None:
    name, config = parse_config(["data", "build", "--config", file])
    COMMANDS[name].prepare(config)()


def stop_within_a_pair(child: int, folder: Path) -> None:
    """Stops the child while a pair's images are half written: between a look and a kill it could have finished them."""
    while True:
        if any(folder.glob("images/.*.partial")):
            os.kill(child, signal.SIGSTOP)
            _, status = os.waitpid(child, os.WUNTRACED)
            if not os.WIFSTOPPED(status):
                break
            if any(folder.glob("images/.*.partial")):
                return
            os.kill(child, signal.SIGCONT)
        elif os.waitpid(child, os.WNOHANG) != (0, 0):
            break
    raise SystemExit("the build ended before it was killed")


def main(file: str, kills: int) -> None:
    # Imported before the fork, which spares every child the seconds.
    import focusdpo.building.engines
    import focusdpo.building.gates  # noqa: F401

    draw = random.Random(0)
    folder = Path(parse_config(["data", "build", "--config", file])[1].output_dir)
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            build(file)
            os._exit(0)
        if draw.random() < 0.5:
            # A fast machine would build so many pairs in the time that it ended before it was killed often enough.
            enough, latest = _done(folder) + FEW, time.monotonic() + draw.uniform(0, 0.6)
            while time.monotonic() < latest and _done(folder) < enough:
                time.sleep(0.002)
        else:
            stop_within_a_pair(child, folder)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            raise SystemExit("the build ended before it was killed")
        torn = "with a pair half written" if any(folder.glob("images/.*.partial")) else "between pairs"
        print("killed", torn, flush=True)
    build(file)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
