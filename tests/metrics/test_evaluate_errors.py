"""`focusdpo evaluate` refuses what cannot be measured, by name, before anything is encoded."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

pytest.importorskip("scipy", reason="needs the extra evaluation: pip install 'focusdpo[evaluation]'")
pytest.importorskip("torchmetrics", reason="needs the extra evaluation: pip install 'focusdpo[evaluation]'")

from focusdpo.commands.evaluate import prepare as prepare_evaluation
from focusdpo.metrics.config import EvaluateConfig
from tests.tiny_vision import write_tiny_features


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    torch.manual_seed(0)
    return str(write_tiny_features(tmp_path_factory.mktemp("models") / "dino"))


@pytest.fixture
def study(tmp_path):
    """Two prompts with one image each; the first of two subjects."""
    (tmp_path / "images").mkdir()
    for name, size in (("cat.png", 20), ("cup.png", 24), ("images/1.png", 40), ("images/2.png", 40)):
        Image.new("RGB", (size, size), (size, 100, 200)).save(tmp_path / name)
    Image.new("L", (20, 20), 255).save(tmp_path / "mask.png")
    manifest(tmp_path, ["cat.png", "cup.png"], ["cup.png"])
    return tmp_path


def manifest(root, *lines, **fields):
    rows = [{"prompt": "a", "references": [{"image": image, **fields} for image in images]} for images in lines]
    (root / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def refused(study, model, message, error=ValueError, **changes):
    paths = {"images": str(study / "images"), "manifest": str(study / "m.jsonl"), "output_dir": str(study / "out")}
    with pytest.raises(error, match=message):
        prepare_evaluation(EvaluateConfig(**{**paths, "dino": model, **changes}))
    assert not (study / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dino": None}, "clip, dino, dinov2, fid: got none of them; name the local folder of at least one encoder"),
        ({"real": "photos"}, "real: got 'photos'; expected none without fid"),
        ({"dino": None, "fid": "x", "regions": "r.jsonl"}, "regions: got 'r.jsonl'; expected none without clip, dino"),
        ({"reference_crop": "mask", "references": "all"}, "reference_crop: got 'mask'; expected none with --references all"),
        ({"dino": None, "clip": "c", "dino_transform": "original"}, "dino_transform: got 'original'; expected folder"),
        ({"images_per_prompt": 0}, "images_per_prompt: got 0; expected at least 1"),
        ({"level": 95.0}, "level: got 95.0; expected a number between 0 and 1"),
        ({"resamples": 10}, "resamples: got 10; expected at least 100"),
        ({"fid_resamples": 1}, "fid_resamples: got 1; expected 0, or at least 2"),
        ({"seed": -1}, "seed: got -1; expected 0 or more"),
        ({"batch_size": 0}, "batch_size: got 0; expected at least 1"),
        ({"device": "cuda:99"}, "device: got 'cuda:99', which cannot be used"),
    ],
)  # fmt: skip
def test_settings(study, dino, changes, message):
    refused(study, dino, message, **changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"m.jsonl:1: line: the file is empty"),
        ("[1]\n", r"m.jsonl:1: line: expected a JSON object, got list"),
        ('\n{"prompt": "a"\n', r"m.jsonl:2: line: is not JSON"),
        ('{"prompt": "", "references": [{"image": "cat.png"}]}\n', r"m.jsonl:1: prompt: expected a text"),
        ('{"prompt": "a"}\n', r"m.jsonl:1: references: is missing"),
        ('{"prompt": "a", "references": []}\n', r"m.jsonl:1: references: expected a list of 1 to 6 references, got 0"),
        ('{"prompt": "a", "references": [{"photo": "cat.png"}]}\n', r"m.jsonl:1: references\[0\].photo: is not a field"),
        ('{"prompt": "a", "references": [{"image": "cat.png"}], "seed": 1}\n', r"m.jsonl:1: seed: is not a field"),
    ],
)
def test_manifests(study, dino, content, message):
    (study / "m.jsonl").write_text(content)
    refused(study, dino, message)


def test_all_lines_are_reported_at_once(study, dino):
    (study / "m.jsonl").write_text('{"prompt": "a"}\n7\n')
    refused(study, dino, r"(?s)m.jsonl:1: references.*m.jsonl:2: line")


def test_folders_and_files_that_are_not_there(study, dino):
    refused(study, dino, "images: no such folder: nowhere", FileNotFoundError, images="nowhere")
    refused(study, dino, "manifest: no such file: nowhere.jsonl", FileNotFoundError, manifest="nowhere.jsonl")
    refused(study, dino, "regions: no such file: nowhere.jsonl", FileNotFoundError, regions="nowhere.jsonl")
    refused(study, dino, "real: no such folder: nowhere", FileNotFoundError, fid=dino, real="nowhere")
    refused(study, dino, "dinov2: no such folder: nowhere", FileNotFoundError, dinov2="nowhere")
    refused(study, dino, "output_dir: .* is a file", NotADirectoryError, output_dir=str(study / "m.jsonl"))


@pytest.mark.parametrize(
    ("added", "message"),
    [
        (["3.png"], "images of no prompt: 3.png; name the images of line N"),
        (["grid.png", "0.png", "1_a.png", "1_0_0.png"], "images of no prompt: 0.png, 1_0_0.png, 1_a.png, grid.png"),
        (["1_0.png"], "two images of one number: 1_0.png and 1.png; keep one"),
        (["01.png"], "two images of one number: 1.png and 01.png"),
        (["2/0.png"], "two images of one number: 2.png and 2/0.png"),
    ],
)
def test_names_of_images(study, dino, added, message):
    for name in added:
        file = study / "images" / name
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(file)
    refused(study, dino, message)
    refused(study, dino, message, allow_missing=True)  # which is for what is missing, not for what is too much


def test_numbers_of_images(study, dino):
    refused(study, dino, "line 1 has 1, line 2 has 1; expected 6; generate them", images_per_prompt=6)
    (study / "images" / "2.png").rename(study / "images" / "1_1.png")
    (study / "images" / "1.png").rename(study / "images" / "1_0.png")
    refused(study, dino, "line 2 has 0; expected at least 1; generate them, or go on with --allow_missing true")
    refused(study, dino, "line 1 has 2; expected 1; correct --images_per_prompt", images_per_prompt=1, allow_missing=True)
    for file in (study / "images").iterdir():
        file.unlink()
    refused(study, dino, "no image in it; expected .png", allow_missing=True)


def test_images_that_cannot_be_decoded(study, dino):
    whole = (study / "images" / "1.png").read_bytes()
    (study / "images" / "1.png").write_bytes(whole[: len(whole) // 2])
    (study / "images" / "2.png").write_bytes(b"no image")
    (study / "cat.png").unlink()
    refused(study, dino, r"(?s)m.jsonl:1: references\[0\].image: no such file: .*cat.png")
    refused(study, dino, r"(?s)images: .*1.png cannot be read as an image .image file is truncated")
    refused(study, dino, r"(?s)images: .*2.png cannot be read as an image .of no known format.; write it again")


def test_masks_of_references(study, dino):
    refused(study, dino, r"m.jsonl:1: references\[0\].mask: is missing", reference_crop="mask")
    manifest(study, ["cat.png", "cup.png"], ["cup.png"], mask="mask.png")
    message = r"m.jsonl:2: references\[0\].mask: is 20x20 pixels, but its image is 24x24"
    refused(study, dino, message, reference_crop="mask")
    Image.new("L", (20, 20), 0).save(study / "mask.png")
    manifest(study, ["cat.png"], ["cat.png"], mask="mask.png")
    refused(study, dino, r"m.jsonl:1: references\[0\].mask: .*mask.png is empty", reference_crop="mask")


def test_fid_of_too_few_images(study, dino):
    (study / "real").mkdir()
    Image.new("RGB", (8, 8)).save(study / "real" / "a.png")
    refused(study, dino, "real: FID needs at least 2 images .*holds 1", fid=dino, real=str(study / "real"))
    manifest(study, ["cup.png"], ["cup.png"])
    refused(study, dino, "real: FID needs at least 2 images .*references are 1 photo; name a folder", fid=dino)


FIRST = {"image": "1.png"}
SECOND = {"image": "2.png", "boxes": [None]}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["no JSON"], r"r.jsonl:1: line: is not JSON"),
        ([{"image": "1.png"}], 'r.jsonl:1: line: expected "image" and either "boxes" or "masks"'),
        ([{"image": "1.png", "boxes": [], "masks": []}], 'r.jsonl:1: line: expected "image" and either'),
        ([{"image": "9.png", "boxes": []}], r"r.jsonl:1: image: '9.png' is no evaluated image"),
        ([{"image": "1.png", "boxes": [None]}], r"r.jsonl:1: boxes: expected a list of 2, as line 1 of the manifest.*got 1"),
        ([SECOND, SECOND], r"r.jsonl:2: image: 2.png stands in line 1 as well"),
        ([{"image": "2.png", "boxes": [[5, 0, 5, 9]]}], r"r.jsonl:1: boxes\[0\]: expected \[left, top, right, bottom\]"),
        ([{"image": "2.png", "boxes": [[0, 0, "9", 9]]}], r"r.jsonl:1: boxes\[0\]: expected \[left"),
        ([{"image": "2.png", "boxes": [[0, 0, 9, NotImplemented]]}], r"r.jsonl:1: boxes\[0\]: expected \[left"),
        ([{"image": "2.png", "masks": [3]}], r"r.jsonl:1: masks\[0\]: expected the path of a mask"),
        ([SECOND], "r.jsonl has no line for 1 image, as 1.png; add them, or go on with --allow_missing true"),
        ([SECOND, FIRST | {"boxes": [[0, 0, 41, 9], None]}], r"r.jsonl:2: boxes\[0\]: \[0.0, .* reaches out of 1.png, 40x40"),
        ([SECOND, FIRST | {"masks": ["mask.png", None]}], r"r.jsonl:2: masks\[0\]: is 20x20 pixels, but 1.png is 40x40"),
        ([SECOND, FIRST | {"masks": ["none.png", None]}], r"r.jsonl:2: masks\[0\]: no such file: .*none.png"),
    ],
)  # fmt: skip
def test_regions(study, dino, lines, message):
    text = [line if isinstance(line, str) else json.dumps(line, default=lambda _: float("inf")) for line in lines]
    (study / "r.jsonl").write_text("\n".join(text) + "\n")
    refused(study, dino, message, regions=str(study / "r.jsonl"))


def test_regions_of_single_subjects(study, dino):
    manifest(study, ["cat.png"], ["cup.png"])
    (study / "r.jsonl").write_text(json.dumps(SECOND) + "\n")
    refused(study, dino, "regions: no prompt has two references", regions=str(study / "r.jsonl"))
