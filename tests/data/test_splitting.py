"""Pairs in two parts: no photo is in both, whatever it is called."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from focusdpo.commands.config import SplitConfig
from focusdpo.commands.data_split import prepare
from focusdpo.data import load_pairs
from focusdpo.data.splitting import groups_of
from focusdpo.demo.scenes import write_dataset
from focusdpo.foundation.files import checksum
from tests import ROOT


@pytest.fixture
def pairs(tmp_path):
    """Eight pairs, no two of which share a photo."""
    file = write_dataset(tmp_path / "pairs", 8, 32, seed=0)
    for number, image in enumerate(sorted(file.parent.glob("*_reference?.png"))):
        changed = Image.open(image).convert("RGB")
        changed.putpixel((0, 0), (number, 0, 0))
        changed.save(image)
    return file


def share(pairs, *numbers):
    """Gives these pairs one reference, each under a name of its own."""
    first, *others = [json.loads(line) for line in pairs.read_text().splitlines()]
    lines = [first, *others]
    photo = pairs.parent / lines[numbers[0]]["references"][0]["image"]
    mask = pairs.parent / lines[numbers[0]]["references"][0]["mask"]
    for number in numbers[1:]:
        for kind, file in (("image", photo), ("mask", mask)):
            shutil.copy(file, pairs.parent / lines[number]["references"][0][kind])


def test_no_photo_is_in_both(pairs, tmp_path):
    share(pairs, 0, 3, 5)
    prepare(SplitConfig(str(pairs), str(tmp_path / "split"), held_out=0.3))()
    parts = {name: load_pairs(tmp_path / "split" / name, progress=False) for name in ("train", "held_out")}
    assert {name: len(part) for name, part in parts.items()} == {"train": 6, "held_out": 2}
    contents = [{checksum(file) for one in part for file in one.image_fields.values()} for part in parts.values()]
    assert not contents[0] & contents[1]
    before = {(one.prompt, checksum(one.winner)) for one in load_pairs(pairs, progress=False)}
    assert {(one.prompt, checksum(one.winner)) for part in parts.values() for one in part} == before
    assert all(one.meta and one.references[0].mask is not None for part in parts.values() for one in part)


def test_pairs_stay_together_over_others(pairs):
    share(pairs, 0, 3)
    share(pairs, 3, 5)
    groups = groups_of(load_pairs(pairs, progress=False))
    assert sorted(map(sorted, groups)) == [[0, 3, 5], [1], [2], [4], [6], [7]]


def test_photos_that_pairs_were_composed_of_count(pairs):
    lines = [json.loads(line) for line in pairs.read_text().splitlines()]
    for number in (1, 2):
        lines[number]["meta"]["reference_photos"] = ["rex/00.jpg"]
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [1, 2] in map(sorted, groups_of(load_pairs(pairs, progress=False)))


def test_what_cannot_be_split_is_refused(pairs, tmp_path):
    share(pairs, *range(8))
    with pytest.raises(ValueError, match="source: all 8 pairs share photos with each other"):
        prepare(SplitConfig(str(pairs), str(tmp_path / "split")))
    with pytest.raises(ValueError, match="held_out: got 1.0"):
        SplitConfig(str(pairs), str(tmp_path / "split"), held_out=1.0)
    assert not (tmp_path / "split" / "train").exists()


def test_the_command_line_and_a_second_start(pairs, tmp_path):
    command = [sys.executable, "-m", "focusdpo", "data", "split", str(pairs.parent), str(tmp_path / "split")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "1 pair in" in run.stderr, run.stderr
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 1 and "holds an earlier run" in again.stderr and "Traceback" not in again.stderr
