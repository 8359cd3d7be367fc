"""Pages of much data: how long they take to write and to open, and that reading a run in parts finds what is in the whole."""

from __future__ import annotations

import json
import math
import os
import time

import numpy as np
import pytest

from focusdpo.foundation.journals import Part, parts_of, read_steps
from focusdpo.pages.pairs import check_page, write_page
from focusdpo.pages.run import binning
from focusdpo.pages.run.binning import read_run
from tests import PATIENCE
from tests.browser import browser, in_browser
from tests.pages.test_show import write_pairs
from tests.synthetic_run import write_run

OPENING = """
  seen.elements = page.querySelectorAll("*").length;
  seen.count = page.getElementById("count").textContent;
"""


@browser
def test_page_of_2000_pairs(tmp_path):
    pairs = write_pairs(tmp_path / "pairs", 2000)
    folder = tmp_path / "shown"
    folder.mkdir()
    page = folder / "page.html"
    started = time.process_time()
    write_page(pairs, page, check_page(page, False), 64, progress=False)
    assert time.process_time() - started < PATIENCE, "seconds of a processor; about ten where nothing else runs"
    assert page.stat().st_size < 1.5e6, "a few hundred bytes a pair"
    (tmp_path / "profile").mkdir()
    seen, _ = in_browser(folder, tmp_path / "profile", OPENING)
    assert "error" not in seen and seen["count"] == "2000 pairs"
    assert seen["elements"] < 3000, "those near the sight"


def test_50_000_rows(tmp_path):
    """Ten times the rows take ten times as long at most, on any machine, and not a hundred times: none looks at others."""
    took = {}
    for count in (5_000, 50_000):
        file = write_run(tmp_path / f"run-{count}", count, distinct=1000) / "metrics.jsonl"
        names = list(json.loads(file.open().readline()))[1:]
        started = time.process_time()
        run = read_run(file, names, 2000, progress=False)
        took[count] = time.process_time() - started
        assert run.curves.keys() == set(names) and run.pairs == 4 * count
        file.unlink()  # pytest keeps its folders
    assert took[50_000] < 12 * took[5_000]


# In parts


def damaged_rows(count):
    """Lines, and the numbers of those that are left out: damage of each kind, missing metrics, and values that are none."""
    rng = np.random.default_rng(0)
    lines, bad = [], []
    for i in range(1, count + 1):
        row = {"step": i, "loss": float(rng.normal()), "pairs": 4.0, "pairs_per_second": 8.0}
        row |= {"a": float(rng.normal()), "b": float(rng.normal())} if i % 3 else {"b": 1}
        row |= {"loss": [math.nan, math.inf, -math.inf, "x", 10**400, [1], {"a": 1}, True][i // 29 % 8]} if i % 29 == 0 else {}
        lines.append(json.dumps(row))
        if i % 41 == 0:
            lines[-1] = ["\x00" * 30, "[1]", '{"loss": 1}', '{"step": 7', '{"a": [{}', "{}]}", '{"b": 1},{"c": 2}'][i // 41 % 7]
            bad.append(i)
    return lines, bad


LINES = ["loss", "a", "a-b", "pairs", "none", "b-none"]


def plain(lines, bad, width, bins):
    """Values of each line of a panel by bin, as the definition has them."""
    found = {line: [[] for _ in range(bins)] for line in LINES}
    for number, text in enumerate(lines, 1):
        if number in bad:
            continue
        row = json.loads(text)
        for line, values in found.items():
            first, _, second = line.partition("-")
            if first in row and (not second or second in row):
                value = row[first]
                number_there = isinstance(value, int | float) and abs(value) < 1e300
                values[(number - 1) // width].append(
                    value - row[second] if second else float(value) if number_there else math.nan
                )
    return found


@pytest.mark.parametrize("cores", [1, 2, 5])
def test_parts_find_what_the_whole_file_has(tmp_path, caplog, monkeypatch, cores):
    """Each damaged line is named once by its number, whichever process read it; 900 rows in bins of 13, in which parts end."""
    lines, bad = damaged_rows(900)
    file = tmp_path / "metrics.jsonl"
    file.write_text("\n".join(lines) + '\n{"step": 901, "lo')
    monkeypatch.setattr(binning, "PART", 2**10)
    monkeypatch.setattr(binning, "cores", lambda: cores)
    own = []
    read_part = binning._read_part
    monkeypatch.setattr(binning, "_read_part", lambda *task: own.append(task) or read_part(*task))
    run = read_run(file, LINES, points=70, progress=False)
    assert len(own) == 1, "the other parts are read elsewhere"
    assert (own[0][1].end < file.stat().st_size) == (cores > 1), "there are others"
    assert (run.first, run.last, run.width) == (1, 900, 13)
    expected = plain(lines, bad, 13, 70)
    assert run.curves.keys() == {"loss", "a", "a-b", "pairs"}
    for line, curve in run.curves.items():
        for i, values in enumerate(expected[line]):
            finite = [value for value in values if math.isfinite(value)]
            assert curve.bad[i] == len(values) - len(finite)
            np.testing.assert_allclose(curve.mean[i], sum(finite) / len(finite), rtol=1e-12, atol=1e-12)
            assert (curve.low[i], curve.high[i]) == (min(finite), max(finite))
    assert sum(curve.bad.sum() for curve in run.curves.values()) > 20
    sound = 900 - len(bad)
    assert (run.pairs, run.seconds) == (4 * sound, sound / 2)
    named = [message for message in caplog.messages if "left out" in message]
    assert [int(message.split(":")[1]) for message in named] == bad, named
    assert sum("it has no step" in message for message in named) == sum(lines[i - 1] == '{"loss": 1}' for i in bad)


READ_APART = binning._read_apart


def dies(task, part):
    """Of two workers the first."""
    return READ_APART(task, part) if part.start > os.path.getsize(task.path) / 2 else os._exit(1)


def lacks_memory(task, part):
    raise MemoryError


@pytest.mark.parametrize(("fails", "here"), [(dies, 2), (lacks_memory, 3)])
def test_a_worker_that_fails_costs_the_time_of_its_part(tmp_path, monkeypatch, fails, here):
    file = write_run(tmp_path / "run", 300) / "metrics.jsonl"
    whole = read_run(file, ["loss"], points=40, progress=False)
    monkeypatch.setattr(binning, "PART", 2**10)
    monkeypatch.setattr(binning, "cores", lambda: 3)
    monkeypatch.setattr(binning, "_read_apart", fails)
    read = []
    read_part = binning._read_part
    monkeypatch.setattr(binning, "_read_part", lambda *task: read.append(task) or read_part(*task))
    run = read_run(file, ["loss"], points=40, progress=False)
    assert len(read) == here, "its own part, and those of the workers that failed"
    np.testing.assert_allclose(run.curves["loss"].mean, whole.curves["loss"].mean, rtol=1e-12)
    assert run.pairs == whole.pairs == 1200


def test_a_worker_imports_nothing_from_the_working_folder(tmp_path, monkeypatch):
    file = write_run(tmp_path / "run", 300) / "metrics.jsonl"
    (tmp_path / "numpy.py").write_text("raise SystemExit(1)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(binning, "PART", 2**10)
    monkeypatch.setattr(binning, "cores", lambda: 2)
    own = []
    read_part = binning._read_part
    monkeypatch.setattr(binning, "_read_part", lambda *task: own.append(task) or read_part(*task))
    read_run(file, ["loss"], points=40, progress=False)
    assert len(own) == 1 and own[0][1].end < file.stat().st_size


@pytest.mark.parametrize("count", [1, 2, 3, 7, 50, 1000])
def test_every_line_is_in_one_part(tmp_path, count):
    """Short lines, long ones and empty ones; also where there are more parts than lines, or bytes."""
    file = tmp_path / "metrics.jsonl"
    rows = [{"step": i, "text": "x" * (i * 37 % 400)} for i in range(1, 41)]
    file.write_text("".join(json.dumps(row) + "\n" * (1 + row["step"] % 5 // 4) for row in rows))
    parts = parts_of(file, count)
    assert parts[0].start == 0 and parts[-1].end == file.stat().st_size and len(parts) <= count
    assert [row for part in parts for row in read_steps(file, part=part)] == rows
    file.write_text("")
    assert parts_of(file, count) == [] and list(read_steps(file, part=Part(0, 0))) == []


def test_damaged_lines_that_would_be_sound_together(tmp_path, caplog):
    """Lines are parsed many at once: what is no row by itself is none beside others."""
    file = tmp_path / "metrics.jsonl"
    broken = ['{"step": 1, "a": 1', '"b": 2}, {"step": 2}', '{"step": 3, "a": [{}', "{}]}", '{"step": 4},{"step": 5}']
    for lines in (broken[:2], broken[2:], broken):
        caplog.clear()
        file.write_text("\n".join([*lines, '{"step": 6}']) + "\n")
        assert list(read_steps(file)) == [{"step": 6}] and caplog.text.count("left out") == len(lines)
