"""SIGKILL at the n-th file operation of every command that writes: see `tests/hostile/killing.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hostile.killing import CASES

ROOT = Path(__file__).parents[2]


# Each is many runs of a command that takes some ten seconds; FOCUSDPO_ALL_KILLS=1 has them as well.
LONG = {"ablate", "demo"} if not os.environ.get("FOCUSDPO_ALL_KILLS") else set()


@pytest.mark.parametrize("case", [case for case in CASES if case not in LONG])
def test_killed_at_its_file_operations(case, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.hostile.killing", case, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert f"{case}: killed at" in done.stdout
