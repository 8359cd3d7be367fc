"""Large datasets: headers are read once, memory is that of some pairs at a time, and what changed is seen."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from focusdpo.data import images, load_pairs
from focusdpo.data.dataset import SizeRules
from focusdpo.data.headers import HeaderIndex, kept_folder
from focusdpo.data.references import LongestSide, UnoReferences
from focusdpo.data.validation import validate
from focusdpo.models import BACKBONES
from focusdpo.training.image_sizes import rules_of

RULES = {"resolution": 32, "reference_rule": LongestSide(32)}


def write(folder: Path, count: int, own: int = 4) -> Path:
    """Pairs of few files, each with `own` pairs' worth of files of its own."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in "abcd":
        Image.fromarray(rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    Image.fromarray(np.tri(32, 48, dtype=np.uint8) * 255).save(folder / "mask.png")
    lines = []
    for index in range(count):
        names = {name: f"{name}{index % own}.png" for name in "abcd"}
        for name, copy in names.items():
            if not (folder / copy).exists():
                (folder / copy).write_bytes((folder / f"{name}.png").read_bytes())
        references = [{"image": names[name], "mask": "mask.png", "class_name": "cat"} for name in "cd"]
        line = {
            "prompt": f"pair {index}",
            "references": references,
            "winner": names["a"],
            "loser": names["b"],
            "prior": "mask.png",
        }
        lines.append(json.dumps(line))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def opened(monkeypatch, tmp_path):
    """Files whose headers were read, in an index of its own."""
    monkeypatch.setenv("FOCUSDPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("focusdpo.data.headers.FEWEST", 8)
    found: list[str] = []
    real = images.read_header
    monkeypatch.setattr(
        "focusdpo.data.headers.read_header", lambda file, mask=False: found.append(file.name) or real(file, mask)
    )

    def fresh() -> list[str]:
        """As in a process that has just started."""
        index = HeaderIndex()
        for module in ("checks", "dataset", "validation"):
            monkeypatch.setattr(f"focusdpo.data.{module}.INDEX", index)
        found.clear()
        return found

    return fresh


def test_headers_are_read_once(tmp_path, opened):
    folder = write(tmp_path / "pairs", 20)
    seen = opened()
    first = load_pairs(folder, "headers", progress=False)
    assert len(seen) == 17 == len(set(seen)), "each file once, however often it stands in the dataset"
    seen = opened()
    assert load_pairs(folder, "headers", progress=False) == first and seen == []
    (kept,) = (tmp_path / "cache").glob("headers-*.npz")
    # What is as it was is not written again, also where another dataset was read before.
    other = write(tmp_path / "other", 12)
    written = kept.stat().st_mtime_ns
    opened()
    load_pairs(other, "headers", progress=False)
    load_pairs(folder, "headers", progress=False)
    assert kept.stat().st_mtime_ns == written
    # Another file's headers are not taken for its own: content, name with the time kept, replaced by another of its size.
    state = (folder / "a0.png").stat()
    Image.new("RGB", (48, 32)).save(folder / "a0.png")
    os.utime(folder / "a0.png", ns=(state.st_atime_ns, state.st_mtime_ns))
    (folder / "b.png").replace(folder / "b1.png")
    seen = opened()
    load_pairs(folder, "headers", progress=False)
    assert sorted(seen) == ["a0.png", "b1.png"]
    for damage in (b"", b"PK", kept.read_bytes()[:-100], bytes(1000)):
        kept.write_bytes(damage)
        seen = opened()
        assert load_pairs(folder, "headers", progress=False) == first and len(seen) == 17, "what is damaged is read anew"


def test_a_size_that_changed_is_seen(tmp_path, opened):
    folder = write(tmp_path / "pairs", 20)
    opened()
    load_pairs(folder, "headers", progress=False)
    Image.new("RGB", (16, 16)).save(folder / "a1.png")
    opened()
    report = validate(folder, "headers", SizeRules(**RULES), progress=False)
    assert {problem.line for problem in report.errors} == {2, 6, 10, 14, 18} and report.pairs == 15
    (folder / "a1.png").unlink()
    opened()
    report = validate(folder, "headers", SizeRules(**RULES), progress=False)
    assert "no such file" in report.errors[0].message and report.pairs == 15


def test_an_index_never_makes_a_photo_of_a_32_bit_mask(tmp_path, opened):
    folder = write(tmp_path / "pairs", 20)
    Image.fromarray(np.tri(32, 48, dtype=np.int32)).save(folder / "mask.png", format="TIFF")
    opened()
    assert validate(folder, "headers", SizeRules(**RULES), progress=False).may_start
    text = (folder / "pairs.jsonl").read_text().replace('"winner": "a0.png"', '"winner": "mask.png"')
    (folder / "pairs.jsonl").write_text(text)
    opened()
    report = validate(folder, "headers", SizeRules(**RULES), progress=False)
    assert "more than 8 bits of unknown range" in report.errors[0].message


def test_where_nothing_can_be_kept(tmp_path, opened, monkeypatch):
    (tmp_path / "file").write_text("")
    folder = write(tmp_path / "pairs", 20)
    monkeypatch.setenv("FOCUSDPO_CACHE", str(tmp_path / "file" / "cache"))
    for _ in range(2):
        seen = opened()
        load_pairs(folder, "headers", progress=False)
        assert len(seen) == 17
    monkeypatch.delenv("FOCUSDPO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert kept_folder() == tmp_path / "home" / "focusdpo"


def test_flux_needs_no_pipeline_for_its_sizes():
    assert rules_of("flux") == (UnoReferences(), None) == (BACKBONES["flux"].reference_rule, BACKBONES["flux"].prompt_rule)
    for name, backbone in BACKBONES.items():
        assert rules_of(name) == (backbone.reference_rule, backbone.prompt_rule)


def test_time_and_memory_of_validating_20_000_pairs(tmp_path):
    """A fifth of what 100,000 may take, 60 s of CPU time, on a machine that others use; memory does not grow with the pairs."""
    folder = write(tmp_path / "pairs", 20_000, own=200)
    command = [sys.executable, "-m", "focusdpo", "data", "validate", str(folder), "--check", "headers"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        ["/usr/bin/env", "python3", "-c", MEASURED, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and "20,000 sound pairs" in done.stdout, done.stderr[-2000:]
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 30
    assert int(done.stdout.splitlines()[-1]) < 400 * 1024, "KiB"


MEASURED = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""
