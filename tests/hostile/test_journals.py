"""Files that grow by a line at a time: damage costs the lines it is in, and reading holds one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from focusdpo.building.builder import read_manifest
from focusdpo.foundation.journals import MAX_LINE, Journal, read_metrics, read_rows, read_steps, up_to
from focusdpo.training.health import Health
from tests.synthetic_run import write_run

DAMAGES = {
    "empty": b"",
    "spaces": b"   ",
    "zeros": b"\0" * 40,
    "no UTF-8": b'{"step": 3, "loss": "\xff\xfe"}',
    "half a line": b'{"step": 3, "lo',
    "no object": b"[1, 2]",
    "a number": b"3",
    "deep": b"[" * 100_000,
    "two rows in one": b'{"step": 3}{"step": 4}',
}


def rows_of(steps):
    return [{"step": step, "loss": 0.5} for step in steps]


def lines_of(rows):
    return [json.dumps(row).encode() for row in rows]


@pytest.mark.parametrize("case", DAMAGES)
@pytest.mark.parametrize("place", [0, 4, 9])
def test_a_damaged_line_costs_that_line(tmp_path, caplog, case, place):
    lines = lines_of(rows_of(range(1, 11)))
    lines[place] = DAMAGES[case]
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b"\n".join(lines) + b"\n")
    expected = rows_of(step for step in range(1, 11) if step != place + 1)
    assert read_metrics(file) == expected
    assert f"metrics.jsonl:{place + 1}: left out" in caplog.text and caplog.text.count("left out") == 1
    Journal(file, up_to(8)).write({"step": 9, "loss": 1.0})
    kept = [row for row in expected if row["step"] <= 8]
    caplog.clear()
    assert read_metrics(file) == [*kept, {"step": 9, "loss": 1.0}] and not caplog.text, "and it is gone from the file"


def test_a_last_line_that_a_kill_cut_short(tmp_path, caplog):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b"\n".join(lines_of(rows_of([1, 2]))) + b'\n{"step": 3}')
    assert read_metrics(file) == rows_of([1, 2]) and not caplog.text, "nothing says that it is all of the row"
    Journal(file).write({"step": 3})
    assert [row["step"] for row in read_rows(file)] == [1, 2, 3]


def test_rows_without_a_step(tmp_path, caplog):
    file = tmp_path / "metrics.jsonl"
    rows = [{"step": 1}, {"loss": 2.0}, {"step": "2"}, {"step": None}, {"step": float("nan")}, {"step": True}, {"step": 5}]
    file.write_bytes(b"\n".join(lines_of(rows)) + b"\n")
    assert read_metrics(file) == [{"step": 1}, {"step": 5}] and caplog.text.count("it has no step") == 5
    assert len(list(read_rows(file))) == 7, "a build's rows have none"
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_a_line_without_end(tmp_path, caplog):
    """A hole in the file: as many zeros as a disk lost."""
    file = tmp_path / "metrics.jsonl"
    first, last = lines_of(rows_of([1, 2]))
    with file.open("wb") as stream:
        stream.write(first + b"\n")
        stream.truncate(10 * MAX_LINE)
        stream.seek(10 * MAX_LINE)
        stream.write(b"\n" + last + b"\n")
    assert [row["step"] for row in read_steps(file)] == [1, 2] and caplog.text.count("left out") == 1


@settings(deadline=None)
@given(st.binary(max_size=300), st.integers(0, 5))
def test_whatever_a_disk_did(tmp_path_factory, junk, place):
    """Every line that is as it was written is read, in its order."""
    file = tmp_path_factory.mktemp("journal") / "log.jsonl"
    lines = lines_of(rows_of(range(6)))
    file.write_bytes(b"\n".join([*lines[:place], junk, *lines[place:]]) + b"\n")
    found = [row["step"] for row in read_rows(file) if row.get("loss") == 0.5]
    assert found == list(range(6))


READ = """
import resource, sys
from pathlib import Path
from focusdpo.foundation.journals import Journal, read_steps, up_to
from focusdpo.training.config import DataConfig, ModelConfig, TrainConfig
from focusdpo.training.health import Health
from focusdpo.drawing.training_curves import draw_curves
import focusdpo_kernels.checks  # which the settings of a run load
file = Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
Journal(file, up_to(99_000)).close()
Health(TrainConfig(ModelConfig("-"), DataConfig("-"), "-")).restore(read_steps(file))
draw_curves(read_steps(file), [], file.with_suffix(".png"))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_memory_of_a_resume_after_100_000_rows(tmp_path):
    """And of the card at its end."""
    file = write_run(tmp_path / "run", 100_000) / "metrics.jsonl"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", READ, str(file)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 100, "MiB"


def test_outcomes_of_a_build(tmp_path, caplog):
    pair = {"name": "0000001-0", "line": 1, "variant": 0, "hash": "ff", "pair": {"winner": "a.png"}}
    rows = [
        pair,
        {"name": "0000002-0", "line": 2, "variant": 0, "rejected": "too small"},
        {"name": "0000003-0", "line": 3, "variant": 0, "failed": "an error"},
        {"name": "0000004-0", "line": 4, "variant": 0},
        {**pair, "name": 5},
        {**pair, "name": "0000006-0", "hash": None},
        {**pair, "name": "0000007-0", "pair": "a.png"},
        {**pair, "name": "0000008-0", "failed": "as well"},
    ]
    (tmp_path / "manifest.jsonl").write_bytes(b"\n".join([*lines_of(rows), b"\xff"]) + b"\n")
    assert list(read_manifest(tmp_path)) == ["0000001-0", "0000002-0", "0000003-0"]
    assert "manifest.jsonl:9: left out" in caplog.text


def test_alarms_after_a_resume_are_those_of_a_run_that_never_stopped():
    from focusdpo.training.config import DataConfig, ModelConfig, TrainConfig

    rows = [
        {
            "step": step,
            "loss": 0.6,
            "gradient_factor": 0.01,
            "focus/coverage": 1.0,
            "focus/detail_share": 0.0,
            "focus/all_matched": 0.5,
        }
        | {f"error/{model}_{side}": 1.0 for model in ("policy", "reference") for side in ("win", "lose")}
        for step in range(1, 61)
    ]
    config = TrainConfig(ModelConfig("-"), DataConfig("-"), "-")
    straight, resumed = Health(config), Health(config)
    raised = [straight.update(row) for row in rows]
    resumed.restore(iter(rows[:55]))
    assert [resumed.update(row) for row in rows[55:]] == raised[55:]
    assert {alarm.name for alarms in raised for alarm in alarms} >= {"saturated", "all_matched", "tau_never_reached"}
