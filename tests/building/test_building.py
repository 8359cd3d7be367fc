"""Pairs are built from scenes: what a pair is, what is refused, and that a killed or spread-out build gives the same."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests import PATIENCE, ROOT

pytest.importorskip("cv2", reason="needs the extra build: pip install 'focusdpo[build]'")
pytest.importorskip("imagehash", reason="needs the extra build: pip install 'focusdpo[build]'")

from focusdpo.building import builder
from focusdpo.building.candidate import Candidate, Rejected
from focusdpo.building.config import BuildConfig, DisruptionConfig, EncoderConfig, GatesConfig, SegmentationConfig
from focusdpo.building.gates import Gates, duplicates, pair_hash
from focusdpo.building.scenes import load_scenes
from focusdpo.commands.data_build import prepare as prepare_build
from focusdpo.data import DatasetError, LongestSide, PairDataset, load_pairs
from tests.demo_scenes import write_scenes

SIDE = 128
NONE = EncoderConfig("none")  # what it compares is tested by itself


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes") / "scenes", 12, SIDE, seed=1)


def small(scenes, out):
    return BuildConfig(
        str(scenes),
        str(out),
        disruption=DisruptionConfig(changed="one"),
        encoder=NONE,
        resolution=SIDE,
        reference_resolution=SIDE // 2,
        pairs_per_scene=2,
    )


@pytest.fixture
def config(scenes, tmp_path):
    return small(scenes, tmp_path / "pairs")


def build(config):
    prepare_build(config)()
    return load_pairs(config.output_dir, progress=False)


def tree(folder):
    """Every file of a build but the report, which has the clock's numbers, and the list of the files, which has its hash."""
    files = {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
    files = {path: content for path, content in files.items() if path.parts[0] != ".focusdpo"}
    manifest = files.pop(Path("manifest.jsonl"))
    del files[Path("report.json")]
    return files, sorted(manifest.splitlines())


def rejections(config):
    return [json.loads(line) for line in (Path(config.output_dir) / "rejected.jsonl").read_text().splitlines()]


def pixels(path):
    return np.asarray(Image.open(path))


@pytest.fixture(scope="module")
def built(scenes, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "pairs"
    config = small(scenes, out)
    return config, build(config)


def test_pairs_are_what_training_reads(built):
    _, records = built
    assert len(records) > 12 and all(record.per_subject and len(record.prior) == 2 for record in records)
    sample = PairDataset(records, resolution=SIDE, reference_rule=LongestSide(64))[0]
    assert sample.winner.shape == (3, SIDE, SIDE) and sample.prior.shape == (2, SIDE, SIDE)
    assert all(0 < mask.float().mean() < 1 for mask in sample.reference_masks)


def test_only_the_changed_subject_changes_and_only_within_its_prior(built):
    _, records = built
    for record in records:
        changed = (pixels(record.winner) != pixels(record.loser)).any(axis=-1)
        priors = [pixels(path) > 0 for path in record.prior]
        (note,) = record.meta["disruption"]
        assert not (changed & ~priors[note["subject"]]).any(), "exactly"
        assert not priors[1 - note["subject"]].any()
        assert changed[priors[note["subject"]]].mean() > 0.8, "and the prior is what changed"
        other = pixels(Path(record.file).parent / record.prior[1 - note["subject"]])
        assert not other.any()


@pytest.mark.parametrize("kind", ["swap", "recolour", "retexture", "leak"])
def test_every_kind_of_disruption(config, kind):
    config.disruption = DisruptionConfig(kinds=[kind], changed="one")
    records = build(config)
    for record in records:
        (note,) = record.meta["disruption"]
        assert note["kind"] == kind
        if kind == "swap":
            assert note["donor"] != record.meta["subjects"][note["subject"]]
    reasons = {item["rejected"] for item in rejections(config)}
    assert kind == "swap" or not any("nothing to disrupt" in str(reason) for reason in reasons), "the others always apply"


def test_all_subjects_change_where_that_is_asked(config):
    config.disruption = DisruptionConfig(kinds=["recolour"])
    for record in build(config):
        assert all((pixels(path) > 0).any() for path in record.prior)


def test_nothing_is_lost(built):
    config, records = built
    report = json.loads((Path(config.output_dir) / "report.json").read_text())
    listed = rejections(config)
    assert report["drafts"] == 24 == len(records) + len(listed)
    assert sum(report["rejected"].values()) == len(listed)
    kept = {path.name for path in (Path(config.output_dir) / "images").iterdir()}
    assert kept == {record.winner.parent.name for record in records}


def test_a_second_start_builds_nothing(built, caplog):
    config, _ = built
    before = tree(config.output_dir)
    with caplog.at_level(logging.INFO, "focusdpo"):
        prepare_build(config)()
    assert "done before: 24 of 24 candidates" in caplog.text and "built in" not in caplog.text
    assert tree(config.output_dir) == before


@pytest.mark.parametrize("segmentation", ["given", "grabcut"])
def test_processes_give_the_same_pairs(config, tmp_path, segmentation):
    """GrabCut draws from a generator that all pictures share: it must not show."""
    config.segmentation = SegmentationConfig(segmentation)
    if segmentation == "grabcut":
        config.scenes = str(without_masks(Path(config.scenes), tmp_path))
    build(config)
    two = dataclasses.replace(config, output_dir=str(tmp_path / "two"), workers=2)
    build(two)
    assert tree(config.output_dir) == tree(two.output_dir)


def without_masks(scenes, folder):
    """The same scenes with boxes instead of masks."""
    lines = [json.loads(line) for line in scenes.read_text().splitlines()]
    for line in lines:
        line["scene"] = str(scenes.parent / line["scene"])
        for subject in line["subjects"]:
            subject["box"] = list(Image.open(scenes.parent / subject.pop("mask")).getbbox())
            subject["reference"] = str(scenes.parent / subject["reference"])
            subject["reference_mask"] = str(scenes.parent / subject["reference_mask"])
    file = folder / "boxes.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_killed_twenty_times(config, tmp_path):
    config.pairs_per_scene = 8
    build(config)
    killed = dataclasses.replace(config, output_dir=str(tmp_path / "killed"))
    file = tmp_path / "build.yaml"
    file.write_text(yaml.safe_dump(dataclasses.asdict(killed)))
    command = [sys.executable, "-m", "tests.building.killed_build", str(file), "20"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert done.stdout.count("killed") == 20 and "with a pair half written" in done.stdout
    assert tree(killed.output_dir) == tree(config.output_dir), "nothing lost, nothing twice, nothing half"


def test_a_torn_last_line_is_built_again(config):
    build(config)
    before = tree(config.output_dir)
    manifest = Path(config.output_dir) / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:-20])
    build(config)
    assert tree(config.output_dir) == before


def test_other_settings_are_refused_by_name(built, tmp_path):
    config, _ = built
    other = dataclasses.replace(config, seed=5, disruption=DisruptionConfig(kinds=["leak"]))
    with pytest.raises(ValueError, match=r"(?s)with other settings.*disruption.kinds: .*seed: the build has 0, got 5"):
        prepare_build(other)
    prepare_build(dataclasses.replace(config, workers=7, engine="plain"))


def test_what_no_command_wrote_is_not_deleted(config):
    folder = Path(config.output_dir)
    mine = folder / "images" / "0000000-0" / "winner.png"
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(
            FileExistsError, match="output_dir: .* holds images/0000000-0/winner.png, which this command did not"
        ):
            prepare_build(dataclasses.replace(config, overwrite=overwrite))
    assert mine.read_text() == "precious"


def test_a_failure_is_listed_and_tried_again(config, tmp_path, caplog):
    source = Path(config.scenes).parent
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in source.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    config.scenes = str(copy)
    scene = copy / "0003_scene.png"
    work = prepare_build(config)
    scene.rename(copy / "moved.png")  # after it was checked
    work()
    failed = [item for item in rejections(config) if "failed" in item]
    assert [(item["line"], item["variant"]) for item in failed] == [(4, 0), (4, 1)]
    assert "Load: FileNotFoundError: " in failed[0]["failed"] and "0003_scene.png" in failed[0]["failed"]
    assert "2 failed" in caplog.text
    (copy / "moved.png").rename(scene)
    build(config)
    assert not [item for item in rejections(config) if "failed" in item]


def candidate(winner, loser, priors):
    return Candidate(0, 0, 0, None, scene=winner, loser=loser, priors=priors, changing=range(len(priors)))


@pytest.fixture
def halves():
    """A winner, a loser that differs in its left half, and that half."""
    winner = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    loser, prior = winner.copy(), np.zeros((64, 64), bool)
    loser[:, :32] = 255 - loser[:, :32]
    loser[:8, :8] = winner[:8, :8]
    prior[:, :32] = True
    return winner, loser, prior


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"min_area": 0.6}, "the change is too small"),
        ({"max_area": 0.4}, "the change is too large"),
        ({"min_change": 200.0}, "the change is not visible"),
        ({"min_changed": 1.0}, "much of a prior looks the same in winner and loser"),
    ],
)
def test_gates(halves, settings, reason):
    winner, loser, prior = halves
    passing = candidate(winner, loser, [prior])
    Gates(GatesConfig(), NONE)(passing)
    assert passing.notes["area"] == 0.5 and passing.notes["change"] > 20
    with pytest.raises(Rejected, match=reason):
        Gates(GatesConfig(**settings), NONE)(candidate(winner, loser, [prior]))


def test_one_level_of_one_pixel_outside_the_prior_is_seen(halves):
    winner, loser, prior = halves
    loser[40, 50, 1] ^= 1
    with pytest.raises(Rejected, match="outside the prior"):
        Gates(GatesConfig(), NONE)(candidate(winner, loser, [prior]))


def test_duplicates_are_found_exactly():
    rng = np.random.default_rng(0)
    values = [int.from_bytes(rng.bytes(22)) for _ in range(300)]
    for index in range(100, 200):  # near an earlier one; three bits can hide in three of four pieces
        flips = rng.choice(176, size=int(rng.choice([0, 1, 2, 3, 3, 3, 3, 4, 6])), replace=False)
        values[index] = values[index - 100] ^ sum(1 << int(bit) for bit in flips)
    hashes = [(str(index), f"{value:044x}") for index, value in enumerate(values)]
    kept, expected = [], {}
    for index, value in enumerate(values):
        near = [other for other in kept if (values[other] ^ value).bit_count() < 4]
        if near:
            expected[str(index)] = str(near[0])
        else:
            kept.append(index)
    assert dict(duplicates(hashes, 4)) == expected and len(expected) > 60
    assert not list(duplicates(hashes, 0))


def test_the_hash_sees_another_loser_but_not_compression(halves, scenes):
    winner = pixels(scenes.parent / "0000_scene.png")
    other = pixels(scenes.parent / "0001_scene.png")
    prior = halves[2].repeat(2, 0).repeat(2, 1)
    loser = np.where(prior[..., None], other, winner)
    again = np.clip(loser.astype(int) + 1, 0, 255).astype(np.uint8)
    colours = np.where(prior[..., None], (loser * [1, 0.3, 0.3]).astype(np.uint8), loser)

    def bits(a, b):
        return (int(pair_hash(winner, a, prior), 16) ^ int(pair_hash(winner, b, prior), 16)).bit_count()

    assert bits(loser, again) < 4 <= min(bits(loser, winner), bits(loser, colours))


def test_a_scene_given_twice_is_a_duplicate(config, tmp_path):
    config.pairs_per_scene = 1
    config.segmentation = SegmentationConfig("given")
    config.disruption = DisruptionConfig(kinds=["leak"])
    lines = Path(config.scenes).read_text().splitlines()
    twice = Path(config.scenes).with_name("twice.jsonl")
    twice.write_text("\n".join([lines[0], lines[1], lines[0]]) + "\n")
    config.scenes = str(twice)

    def changed(seed, index):
        return Candidate(index, 0, seed, None).rng("changing").integers(2)

    config.seed = next(seed for seed in range(99) if changed(seed, 0) == changed(seed, 2))
    assert len(build(config)) == 2
    assert rejections(config) == [{"line": 3, "variant": 0, "rejected": "a duplicate of 0000000-0"}]


BROKEN = {
    "not json": ("{", "line", "is not JSON"),
    "a list": ("[]", "line", "expected a JSON object, got list"),
    "unknown field": ({"loser": "x"}, "loser", "is not a field; known are prompt"),
    "blank prompt": ({"prompt": " "}, "prompt", "expected a text"),
    "no subjects": ({"subjects": []}, "subjects", "expected a list of 1 to 6 subjects, got 0 items"),
    "no such scene": ({"scene": "none.png"}, "scene", "no such file"),
    "not an image": ({"scene": "scenes.jsonl"}, "scene", "cannot be read as an image"),
    "no reference": ({"subjects": [{"class_name": "cat"}]}, "subjects[0].reference", "is missing"),
    "box": (
        {"subjects": [{"class_name": "cat", "reference": "0000_reference0.png", "box": [5, 5, 2, 9]}]},
        "subjects[0].box",
        "got [5, 5, 2, 9]",
    ),
    "box outside": (
        {"subjects": [{"class_name": "cat", "reference": "0000_reference0.png", "box": [0, 0, 500, 9]}]},
        "subjects[0].box",
        "reaches out of its image of 128x128",
    ),
    "mask of another size": (
        {"subjects": [{"class_name": "cat", "reference": "0000_reference0.png", "reference_mask": "0000_scene.png"}]},
        "subjects[0].reference_mask",
        "is 128x128 pixels, but its image is",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_scenes_are_refused_with_line_and_field(scenes, case):
    change, field, message = BROKEN[case]
    lines = scenes.read_text().splitlines()
    broken = change if isinstance(change, str) else json.dumps({**json.loads(lines[0]), **change})
    file = scenes.with_name("broken.jsonl")
    file.write_text("\n".join([lines[0], broken]) + "\n")
    with pytest.raises(DatasetError) as error:
        load_scenes(file, progress=False)
    (problem,) = error.value.problems
    assert (problem.line, problem.field) == (2, field) and message in problem.message


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SegmentationConfig("sam"), "segmentation.path: got None; expected the local folder of a model"),
        (lambda: SegmentationConfig("grabcut", path="x"), "segmentation.path: got 'x'; expected none for grabcut"),
        (lambda: DisruptionConfig(kinds=[]), "disruption.kinds: got"),
        (lambda: GatesConfig(min_area=0.9), "gates.min_area: got 0.9"),
        (
            lambda: SegmentationConfig("rembg", model="u2net_custom"),
            "segmentation.path: got None; expected an .onnx file for rembg's",
        ),
        (
            lambda: SegmentationConfig("rembg", "x"),
            "segmentation.path: got 'x'; expected none for rembg's isnet-general-use",
        ),
        (lambda: EncoderConfig("transformers"), "encoder.path: got None"),
        (lambda: BuildConfig("a", "b", gates=GatesConfig(visibility="features"), encoder=NONE), "encoder.name: got 'none'"),
        (lambda: BuildConfig("a", "b", workers=0), "workers: got 0; expected at least 1"),
    ],
)
def test_settings_are_refused_by_name(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


def test_a_missing_extra_is_named(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "imagehash", None)
    with pytest.raises(ModuleNotFoundError, match=r"data build needs imagehash, which is not installed; .*focusdpo\[build\]"):
        prepare_build(config)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r"engine=ray needs ray, .*focusdpo\[ray\]"):
        prepare_build(dataclasses.replace(config, engine="ray"))


def test_a_missing_model_is_an_error_before_anything_is_written(config):
    config.segmentation = SegmentationConfig("sam", path="/nowhere")
    with pytest.raises(FileNotFoundError, match="segmentation.path: no such folder: /nowhere"):
        prepare_build(config)
    assert not Path(config.output_dir).exists()


def test_no_pair_at_all_is_an_error(config):
    config.gates = GatesConfig(min_change=500.0)
    with pytest.raises(ValueError, match="no candidate became a pair"):
        prepare_build(config)()
    assert {item["rejected"] for item in rejections(config)} == {"the change is not visible"}


def test_the_command_line(scenes, tmp_path):
    options = ["--scenes", str(scenes), "--output_dir", str(tmp_path / "out"), "--resolution", "128"]
    options += ["--encoder.name", "none"]
    command = [sys.executable, "-m", "focusdpo", "data", "build", *options, "--disruption.kinds", "[recolour]"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "12 candidates tried in" in run.stderr and "per second" in run.stderr
    assert (tmp_path / "out" / builder.FILE_NAME).read_text().count("\n") == 12
