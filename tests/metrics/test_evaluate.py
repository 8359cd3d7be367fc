"""`focusdpo evaluate`, from a folder of images to its results: planted cases, resume, and every refusal by name."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("scipy", reason="needs the extra evaluation: pip install 'focusdpo[evaluation]'")
pytest.importorskip("torchmetrics", reason="needs the extra evaluation: pip install 'focusdpo[evaluation]'")

from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, Dinov2Model, ViTModel

from focusdpo.commands.cli import main
from focusdpo.commands.evaluate import prepare as prepare_evaluation
from focusdpo.foundation.tensor_files import TensorFiles
from focusdpo.metrics import inputs as inputs_module
from focusdpo.metrics.bootstrap import find_clusters, mean_interval
from focusdpo.metrics.config import EvaluateConfig
from focusdpo.metrics.encoders import Encoder, Encoders, load_encoder
from tests.tiny_vision import write_tiny_clip, write_tiny_dinov2, write_tiny_features

SUBJECTS = ("cat", "cup", "dog")
LINES = [("a cat and a cup", (0, 1)), ("a dog and a cat", (2, 0)), ("a cup", (1,)), ("a photo of a cup and a dog", (1, 2))]
SIDE = 32  # of references and of regions


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    return {
        "clip": str(write_tiny_clip(root / "clip")),
        "dino": str(write_tiny_features(root / "dino")),
        "dinov2": str(write_tiny_dinov2(root / "dinov2")),
    }


def picture(seed, size=(SIDE, SIDE)):
    """Smooth noise of one hue, which tiny encoders tell apart."""
    rng = np.random.default_rng(seed)
    colour, coarse = rng.integers(30, 225, 3), rng.integers(-90, 90, (4, 4, 3))
    pixels = np.clip(colour + coarse, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def study(tmp_path):
    """References by subject, a manifest of four prompts, and two images for each: its subjects side by side, and noise."""
    for index, name in enumerate(SUBJECTS):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        picture(index).save(folder / "00.png")
        picture(10 + index).save(folder / "01.png")
        mask = np.zeros((SIDE, SIDE), np.uint8)
        mask[4:20, 8:30] = 255
        Image.fromarray(mask).save(folder / "mask.png")
    write_lines(tmp_path, LINES)
    images = tmp_path / "images"
    images.mkdir()
    for line, (_, subjects) in enumerate(LINES, start=1):
        side_by_side(subjects).save(images / f"{line:03d}_0.png")
        picture(100 + line, (80, 48)).save(images / f"{line:03d}_1.png")
    return tmp_path


def write_lines(root, lines):
    def reference(subject):
        folder = f"photos/{SUBJECTS[subject]}"
        return {"image": f"{folder}/00.png", "mask": f"{folder}/mask.png", "class_name": SUBJECTS[subject]}

    text = [json.dumps({"prompt": prompt, "references": [reference(s) for s in subjects]}) for prompt, subjects in lines]
    (root / "multi.jsonl").write_text("\n".join(text) + "\n")


def side_by_side(subjects):
    """The very pixels of the references, at x = 0, 32, ..."""
    whole = Image.new("RGB", (SIDE * len(subjects), SIDE))
    for place, subject in enumerate(subjects):
        whole.paste(picture(subject), (place * SIDE, 0))
    return whole


def settings(study, **changes):
    paths = {"images": str(study / "images"), "manifest": str(study / "multi.jsonl"), "output_dir": str(study / "out")}
    return EvaluateConfig(**{**paths, "resamples": 200, "batch_size": 3, **changes})


def evaluate(study, **changes):
    config = settings(study, **changes)
    prepare_evaluation(config)()
    return json.loads((Path(config.output_dir) / "results.json").read_text())


def features(models, setting, images):
    """Embeddings of length 1 by transformers alone."""
    cls = {"clip": CLIPModel, "dino": ViTModel, "dinov2": Dinov2Model}[setting]
    model = cls.from_pretrained(models[setting]).eval()
    pixels = AutoImageProcessor.from_pretrained(models[setting])(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        found = model.get_image_features(pixel_values=pixels) if setting == "clip" else model(pixel_values=pixels)
    vectors = (found.pooler_output if setting == "clip" else found.last_hidden_state[:, 0]).double()
    return (vectors / vectors.norm(dim=-1, keepdim=True)).numpy()


def test_every_value_is_the_encoders_own(study, models, capsys):
    results = evaluate(study, **models)
    assert [row["image"] for row in results["images"]] == [f"{line:03d}_{k}.png" for line in range(1, 5) for k in range(2)]
    tokenizer, clip = AutoTokenizer.from_pretrained(models["clip"]), CLIPModel.from_pretrained(models["clip"]).eval()
    for row in results["images"]:
        prompt, subjects = LINES[row["line"] - 1]
        assert row["subjects"] == [SUBJECTS[subject] for subject in subjects]
        image = Image.open(study / "images" / row["image"]).convert("RGB")
        for setting, name in (("clip", "clip_i"), ("dino", "dino"), ("dinov2", "dinov2")):
            first, *others = features(models, setting, [image, *(picture(subject) for subject in subjects)])
            cosines = [first @ other for other in others]
            assert row[f"{name}_references"] == pytest.approx(cosines, abs=1e-5)
            assert row[name] == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)
            assert row[f"{name}_min"] == pytest.approx(min(cosines), abs=1e-5)
        with torch.no_grad():
            text = clip.get_text_features(**tokenizer([prompt], return_tensors="pt")).pooler_output[0].double().numpy()
        ours = features(models, "clip", [image])[0] @ (text / np.linalg.norm(text))
        assert row["clip_t"] == pytest.approx(ours, abs=1e-5)
    one = results["images"][4]  # the line of one subject: its image is the reference itself
    assert one["image"] == "003_0.png" and one["dino"] == pytest.approx(1.0, abs=1e-6) == one["clip_i_min"]

    summary = results["summary"]
    assert set(summary) == {"clip_i", "clip_i_min", "dino", "dino_min", "dinov2", "dinov2_min", "clip_t"}
    for name, line in summary.items():
        assert line["mean"] == pytest.approx(np.mean([row[name] for row in results["images"]]))
        assert line["low"] is None and (line["count"], line["images"], line["prompts"], line["subjects"]) == (8, 8, 4, 3)
        assert (line["over"], line["note"]) == ("subjects", "none for 3 subjects, which count as 1.6, too few: 6 are needed")
    cat = results["subjects"]["cat"]["dino"]
    own = [row["dino_references"][row["subjects"].index("cat")] for row in results["images"] if "cat" in row["subjects"]]
    assert cat["mean"] == pytest.approx(np.mean(own)) and (cat["count"], cat["prompts"], cat["subjects"]) == (4, 2, 1)
    assert (cat["over"], cat["note"]) == ("prompts", "none for 2 prompts, too few: 6 are needed")
    with (study / "out" / "prompts.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(row["line"], row["prompt"], row["images"]) for row in table] == [
        (str(line), prompt, "2") for line, (prompt, _) in enumerate(LINES, start=1)
    ]
    assert float(table[2]["dino"]) == pytest.approx((1 + results["images"][5]["dino"]) / 2, abs=1e-5)
    assert table[2]["dino_low"] == ""  # two images
    with (study / "out" / "subjects.csv").open() as file:
        assert [row["subject"] for row in csv.DictReader(file)] == sorted(SUBJECTS)
    assert Image.open(study / "out" / "subjects.png").width > 800
    printed = capsys.readouterr().out
    assert f"{summary['dino']['mean']:.4f}" in printed and "DINO, minimum over references" in printed
    assert printed.count("intervals: none for 3 subjects, which count as 1.6, too few: 6 are needed") == 1
    assert results["settings"]["clip"] == models["clip"] and results["versions"]["torch"] == torch.__version__


def many(study, lines, images=1):
    """A manifest of those lines alone, of subjects by number, with noise for images."""
    for subject in {each for _, subjects in lines for each in subjects}:
        folder = study / "photos" / f"subject{subject}"
        folder.mkdir()
        picture(700 + subject).save(folder / "00.png")
    text = [
        json.dumps({"prompt": prompt, "references": [{"image": f"photos/subject{each}/00.png"} for each in subjects]})
        for prompt, subjects in lines
    ]
    (study / "multi.jsonl").write_text("\n".join(text) + "\n")
    shutil.rmtree(study / "images")
    (study / "images").mkdir()
    for line in range(1, len(lines) + 1):
        for number in range(images):
            picture(1000 + 10 * line + number).save(study / "images" / f"{line}_{number}.png")


def numbers(line):
    return [line[end] for end in ("mean", "low", "high")]


def test_what_intervals_draw(study, models, capsys):
    """All: subjects with their prompts. A subject: its prompts. A prompt: its images."""
    many(study, [(f"prompt {number}", (number // 6,)) for number in range(42)], images=6)
    results = evaluate(study, dino=models["dino"])
    dino = np.array([row["dino"] for row in results["images"]]).reshape(7, 6, 6)
    line = results["summary"]["dino"]
    assert numbers(line) == pytest.approx(mean_interval(dino.ravel(), np.repeat(range(7), 36), resamples=200))
    assert [line[name] for name in ("subjects", "prompts", "images", "over", "note")] == [7, 42, 252, "subjects", ""]
    line = results["subjects"]["subject2"]["dino"]
    assert numbers(line) == pytest.approx(mean_interval(dino[2].ravel(), np.repeat(range(6), 6), resamples=200))
    assert [line[name] for name in ("subjects", "prompts", "images", "over", "note")] == [1, 6, 36, "prompts", ""]
    with (study / "out" / "prompts.csv").open() as file:
        row = list(csv.DictReader(file))[20]
    found = [float(row[name]) for name in ("dino", "dino_low", "dino_high")]
    assert found == pytest.approx(mean_interval(dino[3, 2], resamples=200), abs=1e-6)
    assert "intervals:" not in capsys.readouterr().out


def test_pairs_that_share_subjects(study, models):
    """Nine pairs of ten subjects, one after the other; regions are in those of their image. FID draws pairs too."""
    many(study, [(f"prompt {number}", (number // 2, number // 2 + 1)) for number in range(18)])
    boxes = {f"{line}_0.png": [[0, 0, 16, 32], [16, 0, 32, 32]] for line in range(1, 19)}
    results = evaluate(study, dino=models["dino"], regions=regions(study, boxes), fid=models["dino"], fid_resamples=3)
    subjects = [frozenset({number // 2, number // 2 + 1}) for number in range(18)]
    independent = find_clusters(subjects).independent
    assert independent == pytest.approx(18 * 36 / (2 * 2**2 + 8 * 4**2))  # two subjects in two prompts, eight in four
    too_few = f"none for 10 subjects, which count as {independent:.1f}, too few: 6 are needed"
    assert {line["note"] for line in results["summary"].values()} == {too_few}


def test_one_subject_has_an_interval_of_its_own(study, models, capsys):
    many(study, [(f"prompt {number}", (0,)) for number in range(7)], images=2)
    options = {"fid": models["dino"], "real": str(study / "photos"), "fid_resamples": 3}
    line = evaluate(study, dino=models["dino"], **options)["summary"]
    for name in ("dino", "fid"):
        assert line[name]["low"] < line[name]["mean"] < line[name]["high"] and line[name]["over"] == "prompts"
        assert line[name]["note"] == "over prompts, of subject0 alone"
    assert "intervals: over prompts, of subject0 alone" in capsys.readouterr().out


def regions(study, boxes, name="regions.jsonl"):
    lines = [json.dumps({"image": image, "boxes": found}) for image, found in boxes.items()]
    (study / name).write_text("\n".join(lines) + "\n")
    return str(study / name)


def planted(swapped=False):
    """The exact places of the subjects in the first image of each prompt, and nothing in the second."""
    boxes = {}
    for line, (_, subjects) in enumerate(LINES, start=1):
        places = [[SIDE * place, 0, SIDE * place + SIDE, SIDE] for place in range(len(subjects))]
        boxes[f"{line:03d}_0.png"] = places[::-1] if swapped else places
        boxes[f"{line:03d}_1.png"] = [None] * len(subjects)
    return boxes


def test_leakage_of_planted_regions(study, models, capsys):
    right = evaluate(study, **models, regions=regions(study, planted()))
    for name in ("clip_i", "dino", "dinov2"):
        leaks = right["summary"][f"{name}_leaks"]
        assert leaks["mean"] == 0.0 and leaks["high"] is None, "no leak of so few subjects is no certainty"
        assert right["summary"][f"{name}_right"]["mean"] == pytest.approx(1.0, abs=1e-6)
        assert right["summary"][f"{name}_gap"]["mean"] > 0
        assert right["summary"][f"{name}_right"]["count"] == 6  # the prompt of one subject has none to leak from
    assert right["summary"]["missing"]["mean"] == 0.5 and right["summary"]["missing"]["count"] == 14
    assert "leakage rate" in capsys.readouterr().out
    first = right["regions"][0]
    a, b = features(models, "dino", [picture(0), picture(1)])
    assert first["dino_wrong_max"] == pytest.approx(a @ b, abs=1e-5) and first["dino_gap"] == pytest.approx(1 - a @ b, abs=1e-5)

    swapped = evaluate(study, **models, regions=regions(study, planted(True)), overwrite=True)
    for name in ("clip_i", "dino", "dinov2"):
        assert swapped["summary"][f"{name}_leaks"]["mean"] == 1.0
        assert swapped["summary"][f"{name}_wrong_max"]["mean"] == pytest.approx(1.0, abs=1e-6)
    assert swapped["subjects"]["dog"]["dino_leaks"]["mean"] == 1.0


def on_square(image):
    width, height = image.size
    square = Image.new("RGB", (max(width, height),) * 2, "white")
    square.paste(image, (round((square.width - width) / 2), round((square.height - height) / 2)))
    return square


def test_the_ends_of_a_long_region_are_seen(study, models):
    """CLIP's preparation takes the middle square, which would leave them out."""
    file = study / "images" / "001_0.png"
    found = []
    for colour in ("red", "blue"):
        image = Image.open(file).convert("RGB")
        image.paste(colour, (0, 0, 4, 10))
        image.save(file)
        boxes = regions(study, {"001_0.png": [[0, 0, 2 * SIDE, 10], None]})
        result = evaluate(study, clip=models["clip"], regions=boxes, allow_missing=True, overwrite=bool(found))
        found.append(result["regions"][0]["clip_i_right"])
    assert abs(found[0] - found[1]) > 1e-4


def test_masks_are_regions_with_white_around(study, models):
    """One that marks nothing is a missing subject."""
    mask = np.zeros((SIDE, 2 * SIDE), np.uint8)
    Image.fromarray(mask).save(study / "none.png")
    mask[5:25, 3:20] = 255
    mask[10:12, 5:9] = 0
    Image.fromarray(mask).save(study / "some.png")
    (study / "regions.jsonl").write_text(json.dumps({"image": "001_0.png", "masks": ["some.png", "none.png"]}) + "\n")
    found = evaluate(study, dino=models["dino"], regions=str(study / "regions.jsonl"), allow_missing=True)
    assert [row["missing"] for row in found["regions"]] == [0.0, 1.0]
    crop = np.asarray(side_by_side((0, 1))).copy()
    crop[mask == 0] = 255
    part = on_square(Image.fromarray(crop[5:25, 3:20]))
    region, right, wrong = features(models, "dino", [part, picture(0), picture(1)])
    assert found["regions"][0]["dino_right"] == pytest.approx(region @ right, abs=1e-5)
    assert found["regions"][0]["dino_wrong_max"] == pytest.approx(region @ wrong, abs=1e-5)
    assert len(found["images_without_regions"]) == 7


def test_all_photos_of_a_subject(study, models):
    """The mean of their cosines; the mask in their folder is none of them."""
    row = evaluate(study, dino=models["dino"], references="all")["images"][5]
    image = Image.open(study / "images" / "003_1.png").convert("RGB")
    first, *photos = features(models, "dino", [image, picture(1), picture(11)])
    assert row["dino"] == pytest.approx(np.mean([first @ photo for photo in photos]), abs=1e-5)


def test_references_cut_to_their_masks(study, models):
    row = evaluate(study, dino=models["dino"], reference_crop="mask")["images"][5]
    image = Image.open(study / "images" / "003_1.png").convert("RGB")
    first, cut = features(models, "dino", [image, on_square(picture(1).crop((8, 4, 30, 20)))])
    assert row["dino"] == pytest.approx(first @ cut, abs=1e-5)


@pytest.mark.parametrize("real", [True, False])
def test_fid_is_that_of_the_encoders_features(study, models, real):
    (study / "real" / "more").mkdir(parents=True)
    pictures = [picture(200 + number) for number in range(24)] if real else [picture(index) for index in range(3)]
    for number in range(24):
        picture(200 + number).save(study / "real" / "more" / f"{number}.png")
    for number in range(20):
        picture(300 + number).save(study / "images" / f"3_{number + 2}.png")
    options = {"real": str(study / "real")} if real else {}
    found = evaluate(study, fid=models["dino"], fid_resamples=5, **options)["summary"]["fid"]
    fakes = [Image.open(file).convert("RGB") for file in sorted((study / "images").iterdir())]
    first, second = (raw_features(models, each) for each in (pictures, fakes))
    values, vectors = np.linalg.eigh(np.cov(first.T))
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T  # of a covariance that may not be full, as that of three photos
    shared = np.sqrt(np.linalg.eigvalsh(root @ np.cov(second.T) @ root).clip(0)).sum()
    expected = ((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(np.cov(first.T) + np.cov(second.T)) - 2 * shared
    assert found["mean"] == pytest.approx(expected, rel=1e-4)
    assert found["low"] is None and (found["count"], found["prompts"], found["subjects"]) == (28, 4, 3)


def raw_features(models, images):
    model = ViTModel.from_pretrained(models["dino"]).eval()
    pixels = AutoImageProcessor.from_pretrained(models["dino"])(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return model(pixel_values=pixels).last_hidden_state[:, 0].double().numpy()


# Going on


@pytest.fixture
def encoded(monkeypatch):
    """How many images each encoder has encoded."""
    counts = {}

    def counting(setting, *arguments):
        found = load_encoder(setting, *arguments)

        def encode(images):
            counts[setting] = counts.get(setting, 0) + len(images)
            return found.image.encode(images)

        return Encoders(Encoder(found.image.name, found.image.key, encode), found.text, found.truncated)

    monkeypatch.setattr(inputs_module, "load_encoder", counting)
    return counts


def without_place(results):
    return {**results, "settings": {**results["settings"], "output_dir": None}}


def test_a_run_cut_short_goes_on_to_the_same_numbers(study, models, encoded, monkeypatch):
    options = {"dino": models["dino"], "clip": models["clip"], "regions": regions(study, planted())}
    whole = evaluate(study, **options, output_dir=str(study / "whole"))
    every = dict(encoded)
    encoded.clear()
    write, writes = TensorFiles.write, []

    def cut_short(self, key, tensors):
        if len(writes) == 3:
            raise KeyboardInterrupt
        writes.append(key)
        write(self, key, tensors)

    monkeypatch.setattr(TensorFiles, "write", cut_short)
    with pytest.raises(KeyboardInterrupt):
        evaluate(study, **options)
    assert encoded == {"clip": 12} and not (study / "out" / "results.json").exists()  # the fourth batch of 3 was lost
    monkeypatch.setattr(TensorFiles, "write", write)
    encoded.clear()
    assert without_place(evaluate(study, **options)) == without_place(whole)
    assert encoded == {"clip": every["clip"] - 9, "dino": every["dino"]}


def run_killed(study, models):
    """Evaluates, and dies in the middle of the second file."""
    write, calls = Path.write_bytes, []

    def killed(path, content):
        calls.extend([path] * ("embeddings" in path.parts))  # the folder's own lists are none
        if len(calls) == 2:
            write(path, b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, content)

    Path.write_bytes = killed
    evaluate(study, dino=models["dino"])


def test_a_killed_process_goes_on(study, models):
    """Killed by the system while it writes the second batch: a file half written is not taken for whole."""
    whole = evaluate(study, dino=models["dino"], output_dir=str(study / "whole"))
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # a fork has none of its parent's threads
        try:
            run_killed(study, models)
        finally:
            os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    left = [file.suffix for file in (study / "out" / "embeddings").rglob("*") if file.is_file()]
    assert sorted(left) == [".partial", ".safetensors"] and not (study / "out" / "results.json").exists()
    assert without_place(evaluate(study, dino=models["dino"])) == without_place(whole)


def test_another_manifest_encodes_only_what_is_new(study, models, encoded):
    evaluate(study, dino=models["dino"])
    write_lines(study, [*LINES, ("a dog", (2,))])
    picture(500).save(study / "images" / "5.png")
    encoded.clear()
    results = evaluate(study, dino=models["dino"], overwrite=True)
    assert encoded == {"dino": 1} and len(results["images"]) == 9
    encoded.clear()
    evaluate(study, dino=models["dino"], overwrite=True, images_per_prompt=None, seed=3)
    assert encoded == {}


def test_changed_images_and_damaged_embeddings_are_made_again(study, models, encoded, caplog):
    before = evaluate(study, dino=models["dino"])
    files = sorted((study / "out" / "embeddings").rglob("*.safetensors"))
    files[0].write_bytes(files[0].read_bytes()[:40])
    encoded.clear()
    assert evaluate(study, dino=models["dino"], overwrite=True)["images"] == before["images"]
    assert encoded["dino"] in (2, 3) and "is damaged" in caplog.text
    encoded.clear()
    picture(600, (80, 48)).save(study / "images" / "004_1.png")
    after = evaluate(study, dino=models["dino"], overwrite=True)
    assert encoded == {"dino": 1} and after["images"][:-1] == before["images"][:-1]
    assert after["images"][-1] != before["images"][-1]


def test_results_are_not_written_over(study, models):
    evaluate(study, dino=models["dino"])
    with pytest.raises(FileExistsError, match=r"output_dir: .*earlier run \(.*results.json.*\).*--overwrite true"):
        prepare_evaluation(settings(study, dino=models["dino"]))
    (study / "mine").mkdir()
    (study / "mine" / "prompts.csv").write_text("my own")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=r"prompts.csv"):
            prepare_evaluation(settings(study, dino=models["dino"], output_dir=str(study / "mine"), overwrite=overwrite))


# What is there, and what is missing


def test_partial_sets_are_counted(study, models, caplog):
    for name in ("002_0.png", "002_1.png", "004_1.png"):
        (study / "images" / name).unlink()
    with pytest.raises(ValueError, match=r"line 2 has 0, line 4 has 1; expected 2; generate them, or .*--allow_missing true"):
        prepare_evaluation(settings(study, dino=models["dino"], images_per_prompt=2))
    results = evaluate(study, dino=models["dino"], allow_missing=True, images_per_prompt=2)
    assert results["missing_lines"] == [2, 4] and results["counts"]["images_per_prompt"] == {"1": 1, "2": 2}
    assert "2 of 4 prompts: no or too few images" in caplog.text and "count by their images, and differ" in caplog.text
    assert math.isclose(results["summary"]["dino"]["mean"], np.mean([row["dino"] for row in results["images"]]))


def test_names_of_images(study, models, caplog):
    """N.png, N_K.png and N/K.png, with and without leading zeros, in order of N and K; other files are no images."""
    images = study / "images"
    shutil.rmtree(images)
    (images / "2").mkdir(parents=True)
    names = ["1_2.png", "1_10.png", "2/0.webp", "2/01.jpg", "0003.jpeg", "4.png"]
    for seed, name in enumerate(names):
        picture(seed).save(images / name)
    (images / "notes.txt").write_text("no image")
    results = evaluate(study, dino=models["dino"])
    assert [(row["image"], row["line"]) for row in results["images"]] == [
        (name, int(name.split(".")[0].split("_")[0].split("/")[0])) for name in names
    ]


def test_a_prompt_of_one_image_has_no_interval_and_copies_are_told(study, models, caplog):
    for file in (study / "images").glob("*_1.png"):
        file.unlink()
    shutil.copy(study / "images" / "003_0.png", study / "images" / "003_7.png")
    results = evaluate(study, clip=models["clip"])
    assert results["lines_with_copies"] == [3] and "byte for byte: 3" in caplog.text
    with (study / "out" / "prompts.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["clip_t"] and rows[0]["clip_t_low"] == ""
    write_lines(study, [("a cat of a cup of a dog of a cat of a cup", (0, 1)), *LINES[1:]])
    results = evaluate(study, clip=models["clip"], overwrite=True)
    assert results["lines_cut_by_clip"] == [1] and "longer than CLIP reads, and cut: 1 prompt (line 1)" in caplog.text


def test_pairs_serve_as_a_manifest(study, models):
    """Their winner, loser and prior need not be there. References of one folder are called by their files."""
    folder = study / "pairs" / "images"
    folder.mkdir(parents=True)
    for subject in (0, 1):
        picture(subject).save(folder / f"ref_{subject}.png")
    references = [{"image": f"images/ref_{subject}.png"} for subject in (0, 1)]
    pair = {"prompt": "a cat and a cup", "references": references, "winner": "w.png", "loser": "l.png", "prior": ["a.png"]}
    (study / "pairs" / "pairs.jsonl").write_text("\n" + json.dumps(pair) + "\n")
    (study / "generated").mkdir()
    picture(1).save(study / "generated" / "2.png")
    options = {"images": str(study / "generated"), "manifest": str(study / "pairs" / "pairs.jsonl"), "dino": models["dino"]}
    (row,) = evaluate(study, **options)["images"]
    assert row["subjects"] == ["images/ref_0.png", "images/ref_1.png"] and row["dino_references"][1] == pytest.approx(1)
    # A folder is that of its pairs.jsonl, and a build says who its subjects are.
    named = {**pair, "meta": {"subjects": ["rex", "blue"]}}
    (study / "pairs" / "pairs.jsonl").write_text("\n" + json.dumps(named) + "\n")
    (row,) = evaluate(study, **options | {"manifest": str(study / "pairs")}, output_dir=str(study / "named"))["images"]
    assert row["subjects"] == ["rex", "blue"]
    with pytest.raises(ValueError, match="pairs.jsonl:2: references: two subjects have their photos in"):
        prepare_evaluation(settings(study, **options, references="all", output_dir=str(study / "other")))


def test_from_the_command_line(study, models, capsys):
    arguments = ["evaluate", "--images", str(study / "images"), "--manifest", str(study / "multi.jsonl")]
    arguments += ["--output_dir", str(study / "out"), "--resamples", "100"]
    with pytest.raises(SystemExit, match="evaluate: error: clip, dino, dinov2, fid: got none of them"):
        main(arguments)
    with pytest.raises(SystemExit, match="evaluate: error: dino: no such folder: nowhere"):
        main([*arguments, "--dino", "nowhere"])
    main([*arguments, "--dino", models["dino"], "--images_per_prompt", "2"])
    assert "95% interval" in capsys.readouterr().out and (study / "out" / "results.json").is_file()
