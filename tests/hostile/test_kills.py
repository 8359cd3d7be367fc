"""SIGKILL at the n-th file operation of every command that writes: see `tests/hostile/killing.py`.

FOCUSDPO_LONG_TESTS=1 kills them at more operations, and the commands of which each run takes half a minute as well.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests import PATIENCE, ROOT
from tests.conftest import LONG
from tests.hostile.killing import CASES


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if LONG or case.kills != 0])
def test_killed_at_its_file_operations(case, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.hostile.killing", case, str(tmp_path), *(["long"] if LONG else [])]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert f"{case}: killed at" in done.stdout
