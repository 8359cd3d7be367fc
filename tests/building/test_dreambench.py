"""DreamBench: its prompts as manifests, and pairs built from its photos."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests import ROOT

pytest.importorskip("cv2", reason="needs the extra build: pip install 'focusdpo[build]'")
pytest.importorskip("imagehash", reason="needs the extra build: pip install 'focusdpo[build]'")

from focusdpo.building.config import DreamBenchConfig
from focusdpo.building.scenes import load_scenes
from focusdpo.commands.data_dreambench import prepare as prepare_dreambench
from focusdpo.data import load_pairs
from tests.photo_folder import KNOWN, write_photos

pytestmark = pytest.mark.usefixtures("cut_once")
DREAMBENCH = ROOT.parent / "shared" / "data" / "dreambench"
PHOTOS = ("photos", "reference_photos")
NAMES = ["espresso cup", "motorcycle", "chelsea"]
CLASSES = [f"class{index % 15}" for index in range(30)]  # two subjects of each class


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder in DreamBench's and UNO's format: 30 subjects of two photos, 25 prompts for each, and for 30 pairs."""
    root = tmp_path_factory.mktemp("written") / "dreambench"
    write_photos(root, {f"subject{index}": KNOWN[NAMES[index % len(NAMES)]] for index in range(30)}, 2, 192)
    table = "\n".join(f"subject{index},{name}" for index, name in enumerate(CLASSES))
    (root / "prompts_and_classes.txt").write_text(
        f"Classes\n\nsubject_name,class\n{table}\n\nPrompts\n'a {{0}} on {{1}}, wet'\n"
    )

    def item(prompt, *subjects):
        paths = [f"./dreambooth/dataset/subject{subject}/01.png" for subject in subjects]
        return {"prompt": prompt, "image_paths": paths}

    single = [item(f"a {CLASSES[s]} {p}", s) for s in range(30) for p in range(25)]
    multi = [item(f"a {CLASSES[s]} and a {CLASSES[s - 1]} {p}", s, (s - 1) % 30) for s in range(30) for p in range(25)]
    (root / "dreambench_singleip.json").write_text(json.dumps(single))
    (root / "dreambench_multiip.json").write_text(json.dumps(multi))
    return root


@pytest.fixture
def root(written, tmp_path):
    """The same, in a folder of the test's own."""
    return Path(shutil.copytree(written, tmp_path / "dreambench"))


@pytest.fixture
def config(root, tmp_path):
    return DreamBenchConfig(str(root), str(tmp_path / "out"), pairs=6, held_out_pairs=0, resolution=96)


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_750_prompts_each(config, tmp_path):
    config.pairs = 0
    prepare_dreambench(config)()
    single, multi = (lines(tmp_path / "out" / f"{name}.jsonl") for name in ("single", "multi"))
    assert len(single) == len(multi) == 750
    assert all(len(item["references"]) == 1 for item in single) and all(len(item["references"]) == 2 for item in multi)
    assert single[26]["prompt"] == "a class1 1"
    (reference,) = single[26]["references"]
    assert (tmp_path / "out" / reference["image"]).resolve() == Path(config.root) / "subject1" / "01.png"
    assert reference["class_name"] == "class1"
    assert not (tmp_path / "out" / "pairs").exists()


def test_pairs_of_its_photos(config, tmp_path):
    for index in range(6, 30):  # a photo takes half a second
        shutil.rmtree(Path(config.root) / f"subject{index}")
    config.allow_missing = True
    prepare_dreambench(config)()
    train = tmp_path / "out" / "pairs" / "train"
    records = load_pairs(train, progress=False)
    scenes = load_scenes(train, progress=False)
    assert len(scenes) == 6 and len(records) + len(lines(train / "rejected.jsonl")) == 6 and len(records) > 3
    assert {one.class_name for scene in scenes for one in scene.subjects} <= set(CLASSES)
    before = (train / "pairs.jsonl").read_bytes()
    prepare_dreambench(config)()  # goes on, and finds all done
    assert (train / "pairs.jsonl").read_bytes() == before


def test_missing_photos_are_refused_or_counted(config, tmp_path, caplog):
    (Path(config.root) / "subject3" / "01.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks photos of 1 subject \(subject3\).*--allow_missing true"):
        prepare_dreambench(config)
    config.allow_missing, config.pairs = True, 0
    prepare_dreambench(config)()
    assert "left out: the prompts of 1 subject without photos: subject3" in caplog.text
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
    """Of some of its subjects, as each photo takes a second; the dogs swap, the others have nobody to swap with."""
    root = tmp_path / "dreambench"
    root.mkdir()
    for name in ("dog2", "dog6", "duck_toy", "prompts_and_classes.txt", "dreambench_singleip.json", "dreambench_multiip.json"):
        (root / name).symlink_to(DREAMBENCH / name)
    prepare_dreambench(DreamBenchConfig(str(root), str(tmp_path / "out"), True, pairs=10, held_out_pairs=3, resolution=256))()
    pairs = tmp_path / "out" / "pairs"
    shown = {
        split: {photo for scene in load_scenes(pairs / split, False) for name in PHOTOS for photo in scene.meta[name]}
        for split in ("train", "held_out")
    }
    assert shown["train"] and shown["held_out"] and not shown["train"] & shown["held_out"]
    verdicts = [photo for line in lines(pairs / "cutouts.jsonl") for photo in line["photos"]]
    assert len(verdicts) == 15 and sum(one["refused"] is None for one in verdicts) >= 13
    kinds = {"swap": 0}
    for record in load_pairs(pairs / "train", progress=False):
        for note in record.meta["disruption"]:
            kinds[note["kind"]] = kinds.get(note["kind"], 0) + 1
            assert note["kind"] != "swap" or note["donor"] not in record.meta["subjects"]
    assert kinds["swap"] and len(kinds) > 2
