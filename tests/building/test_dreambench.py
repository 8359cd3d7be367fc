"""DreamBench: its prompts as manifests, and pairs built from its photos."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests import ROOT

pytest.importorskip("cv2", reason="needs the extra build: pip install 'focusdpo[build]'")
pytest.importorskip("imagehash", reason="needs the extra build: pip install 'focusdpo[build]'")

from focusdpo.building.config import DreamBenchConfig
from focusdpo.building.scenes import load_scenes
from focusdpo.commands.data_dreambench import prepare as prepare_dreambench
from focusdpo.data import load_pairs

DREAMBENCH = ROOT.parent / "shared" / "data" / "dreambench"
CLASSES = [f"class{index % 15}" for index in range(30)]  # two subjects of each class


@pytest.fixture
def root(tmp_path):
    """A folder in DreamBench's and UNO's format: 30 subjects of two photos, 25 prompts for each, and for 30 pairs."""
    root = tmp_path / "dreambench"
    rng = np.random.default_rng(0)
    for index in range(30):
        folder = root / f"subject{index}"
        folder.mkdir(parents=True)
        for number in range(2):
            photo = Image.fromarray(rng.integers(90, 110, (96, 96, 3), dtype=np.uint8))
            colour = tuple(int(value) for value in rng.integers(0, 255, 3))
            ImageDraw.Draw(photo).ellipse((25 + number, 20, 70, 75 - 2 * number), fill=colour)
            photo.save(folder / f"{number:02d}.jpg")
    table = "\n".join(f"subject{index},{name}" for index, name in enumerate(CLASSES))
    (root / "prompts_and_classes.txt").write_text(
        f"Classes\n\nsubject_name,class\n{table}\n\nPrompts\n'a {{0}} on {{1}}, wet'\n"
    )

    def item(prompt, *subjects):
        paths = [f"./dreambooth/dataset/subject{subject}/01.jpg" for subject in subjects]
        return {"prompt": prompt, "image_paths": paths}

    single = [item(f"a {CLASSES[s]} {p}", s) for s in range(30) for p in range(25)]
    multi = [item(f"a {CLASSES[s]} and a {CLASSES[s - 1]} {p}", s, (s - 1) % 30) for s in range(30) for p in range(25)]
    (root / "dreambench_singleip.json").write_text(json.dumps(single))
    (root / "dreambench_multiip.json").write_text(json.dumps(multi))
    return root


@pytest.fixture
def config(root, tmp_path):
    return DreamBenchConfig(str(root), str(tmp_path / "out"), resolution=96)


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_750_prompts_each(config, tmp_path):
    config.pairs_per_scene = 0
    prepare_dreambench(config)()
    single, multi = (lines(tmp_path / "out" / f"{name}.jsonl") for name in ("single", "multi"))
    assert len(single) == len(multi) == 750
    assert all(len(item["references"]) == 1 for item in single) and all(len(item["references"]) == 2 for item in multi)
    assert single[26]["prompt"] == "a class1 1"
    (reference,) = single[26]["references"]
    assert (tmp_path / "out" / reference["image"]).resolve() == Path(config.root) / "subject1" / "01.jpg"
    assert reference["class_name"] == "class1"
    assert not (tmp_path / "out" / "pairs").exists()


def test_pairs_of_its_photos(config, tmp_path, caplog):
    prepare_dreambench(config)()
    records = load_pairs(tmp_path / "out" / "pairs", progress=False)
    rejected = lines(tmp_path / "out" / "pairs" / "rejected.jsonl")
    scenes = load_scenes(tmp_path / "out", progress=False)
    together = [scene for scene in scenes if len(scene.subjects) == 2]
    assert len(scenes) - len(together) == 60 and len(together) > 10
    assert all(
        subject.scene.mask and subject.reference.image != scene.image for scene in together for subject in scene.subjects
    )
    assert len(records) + len(rejected) == len(scenes) and len(records) > 30
    assert not [item for item in rejected if "failed" in item]
    before = (tmp_path / "out" / "pairs" / "pairs.jsonl").read_bytes()
    prepare_dreambench(config)()  # goes on, and finds all done
    assert (tmp_path / "out" / "pairs" / "pairs.jsonl").read_bytes() == before


def test_missing_photos_are_refused_or_counted(config, tmp_path, caplog):
    (Path(config.root) / "subject3" / "01.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks photos of 1 subjects \(subject3\).*--allow_missing true"):
        prepare_dreambench(config)
    config.allow_missing, config.pairs_per_scene = True, 0
    prepare_dreambench(config)()
    assert "left out: the prompts of 1 subjects without photos: subject3" in caplog.text
    assert [len(lines(tmp_path / "out" / f"{name}.jsonl")) for name in ("single", "multi")] == [725, 700]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("dreambench_multiip.json", None, "root: no dreambench_multiip.json in"),
        ("prompts_and_classes.txt", None, "root: no prompts_and_classes.txt in"),
        ("dreambench_singleip.json", "{}", "expected a list, got dict"),
        ("dreambench_singleip.json", "[{}]", "item 1: expected prompt and image_paths"),
        ("dreambench_singleip.json", '[{"prompt": "a", "image_paths": ["x/unknown/01.jpg"]}]', "item 1: .*unknown"),
    ],
)
def test_broken_folders_are_refused(config, name, content, message):
    file = Path(config.root) / name
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        prepare_dreambench(config)


@pytest.mark.skipif(
    not DREAMBENCH.is_dir(), reason=f"no DreamBench in {DREAMBENCH.parent.name}/{DREAMBENCH.name} beside the repository"
)
def test_the_real_photos(tmp_path):
    config = DreamBenchConfig(str(DREAMBENCH), str(tmp_path / "out"), allow_missing=True, resolution=256)
    config.disruption.kinds = ["swap"]
    prepare_dreambench(config)()
    scenes = load_scenes(tmp_path / "out", progress=False)
    classes = {scene.subjects[0].class_name for scene in scenes}
    assert {"dog", "cat", "stuffed animal", "toy"} <= classes
    records = load_pairs(tmp_path / "out" / "pairs", progress=False)
    notes = [(record, record.meta["disruption"][0]) for record in records]
    swapped = {record.references[note["subject"]].class_name for record, note in notes}
    assert len(records) > 20 and {"dog", "stuffed animal", "toy"} <= swapped
    assert all(note["donor"] != record.meta["subjects"][note["subject"]] for record, note in notes)
