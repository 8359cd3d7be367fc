"""Other projects' lists as strangers have them, DreamBench's photos under other suffixes, and FID of too few images."""

from __future__ import annotations

import io
import json
import logging
import os

import numpy as np
import pytest
from PIL import Image

from focusdpo.data import load_pairs
from focusdpo.data.images import read_mask
from focusdpo.data.importers import Dropped, import_pickapic, import_uno, read_uno

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def noise(seed, size=(64, 64)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def png(image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def loser_of(target, seed):
    loser = target.copy()
    loser.paste(noise(seed, (32, 32)))
    return loser


@pytest.fixture
def uno(tmp_path):
    """Images in UNO's layout: 0.png may be imported with its loser."""
    for name in ("uno/images", "uno/refs", "losers/images", "priors/images"):
        (tmp_path / name).mkdir(parents=True)
    for i in range(2):
        noise(i).save(tmp_path / f"uno/images/{i}.png")
        loser_of(noise(i), 10 + i).save(tmp_path / f"losers/images/{i}.png")
        noise(20 + i).save(tmp_path / f"uno/refs/{i}.png")
        prior = np.zeros((64, 64), np.uint8)
        prior[:32, :32] = 255
        Image.fromarray(prior).save(tmp_path / f"priors/images/{i}.png")
    return tmp_path


def entry(**changes):
    return {"prompt": "a thing", "image_paths": ["refs/0.png"], "image_tgt_path": "images/0.png", **changes}


def imported(root, entries, priors=False):
    file = root / "uno" / "train.json"
    file.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return import_uno(file, root / "losers", root / "priors" if priors else None, root / "out", progress=False)


def cut(path):
    path.write_bytes(path.read_bytes()[:2000])


def no_change(root):
    pass


DAMAGED = "an image is missing or damaged"
BAD = {  # what is done, the entry's changes, the reason
    "absolute target": (no_change, lambda r: {"image_tgt_path": str(r / "uno/images/1.png")}, "a path leads out of its folder"),
    "target elsewhere": (no_change, lambda r: {"image_tgt_path": "../uno/images/1.png"}, "a path leads out of its folder"),
    "target elsewhere, later": (no_change, lambda r: {"image_tgt_path": "images/../../uno/images/1.png"}, "a path leads out"),
    "absolute reference": (no_change, lambda r: {"image_paths": [str(r / "uno/refs/0.png")]}, "a path leads out of its folder"),
    "target is a number": (no_change, lambda r: {"image_tgt_path": 3}, "a path is no text"),
    "zeros in a path": (no_change, lambda r: {"image_tgt_path": "a\0b"}, "a path is no text"),
    "a path too long": (no_change, lambda r: {"image_tgt_path": "x" * 5000}, "no winner"),
    "target is a folder": (no_change, lambda r: {"image_tgt_path": "images"}, "no winner"),
    "null prompt": (no_change, lambda r: {"prompt": None}, "the prompt is no text"),
    "list as prompt": (no_change, lambda r: {"prompt": ["a", "b"]}, "the prompt is no text"),
    "blank prompt": (no_change, lambda r: {"prompt": " "}, "the prompt is no text"),
    "half a character": (no_change, lambda r: {"prompt": "\ud83d"}, "the prompt is no text"),
    "no references": (no_change, lambda r: {"image_paths": []}, "no reference"),
    "null references": (no_change, lambda r: {"image_paths": None}, "image_paths is no list of paths"),
    "object as references": (no_change, lambda r: {"image_paths": {"a": 1}}, "image_paths is no list of paths"),
    "number among references": (no_change, lambda r: {"image_paths": ["refs/0.png", 1]}, "a path is no text"),
    "missing reference": (no_change, lambda r: {"image_paths": ["refs/0.png", "refs/9.png"]}, "no reference"),
    "seven references": (no_change, lambda r: {"image_paths": ["refs/0.png"] * 7}, "more than 6 references"),
    "cut winner": (lambda r: cut(r / "uno/images/1.png"), lambda r: {}, DAMAGED),
    "cut loser": (lambda r: cut(r / "losers/images/1.png"), lambda r: {}, DAMAGED),
    "cut reference": (lambda r: cut(r / "uno/refs/1.png"), lambda r: {"image_paths": ["refs/1.png"]}, DAMAGED),
    "cut prior": (lambda r: (r / "priors/images/1.png").write_bytes(b"x"), lambda r: {}, DAMAGED),
    "no loser": (lambda r: (r / "losers/images/1.png").unlink(), lambda r: {}, "no loser"),
    "no prior": (lambda r: (r / "priors/images/1.png").unlink(), lambda r: {}, "no prior"),
    "a pipe as loser": (
        lambda r: ((r / "losers/images/1.png").unlink(), os.mkfifo(r / "losers/images/1.png")), lambda r: {}, "no loser",
    ),
    "the winner as loser": (lambda r: noise(1).save(r / "losers/images/1.png"), lambda r: {}, "the same pixels"),
    "the winner as loser, as WebP": (
        lambda r: noise(1).save(r / "losers/images/1.png", "WEBP", lossless=True), lambda r: {}, "the same pixels",
    ),
    "another size": (lambda r: noise(5, (64, 32)).save(r / "losers/images/1.png"), lambda r: {}, "loser differ in size"),
    "prior of another size": (
        lambda r: Image.new("L", (32, 64), 255).save(r / "priors/images/1.png"), lambda r: {}, "winner differ in size",
    ),
    "empty prior": (lambda r: Image.new("L", (64, 64)).save(r / "priors/images/1.png"), lambda r: {}, "the prior is empty"),
    "reference that shows nothing": (
        lambda r: Image.new("RGBA", (8, 8)).save(r / "uno/refs/1.png"), lambda r: {"image_paths": ["refs/1.png"]},
        "a reference is transparent all over",
    ),
}  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", BAD)
def test_uno_drops_and_counts(uno, case, caplog):
    damage, changes, reason = BAD[case]
    damage(uno)
    bad = {**entry(image_tgt_path="images/1.png"), **changes(uno)}
    with caplog.at_level(logging.WARNING):
        writer = imported(uno, [bad, entry(), *[bad] * 5], priors=True)
    ((found, count),) = writer.dropped.items()
    assert reason in found and count == 6
    assert writer.summary() == f"1 pair; 6 dropped: {found}"
    logged = [record.getMessage() for record in caplog.records if "dropped" in record.getMessage()]
    assert [text.partition(" dropped")[0] for text in logged] == ["entry 0", "entry 2", "entry 3"], "the first few are named"
    if reason == DAMAGED:
        assert "1.png" in logged[0]
    (record,) = load_pairs(uno / "out", progress=False)
    assert record.winner.resolve() == uno / "uno/images/0.png" and record.loser.resolve() == uno / "losers/images/0.png"


def test_losers_that_hardly_differ_have_no_prior(uno):
    faint = np.asarray(noise(1)) ^ 1
    Image.fromarray(faint).save(uno / "losers/images/1.png")
    writer = imported(uno, [entry(), entry(image_tgt_path="images/1.png")])
    assert dict(writer.dropped) == {"winner and loser hardly differ": 1}
    assert read_mask(load_pairs(uno / "out", progress=False)[0].prior[0]).getbbox() == (0, 0, 32, 32)


def test_one_path_is_one_path(uno):
    imported(uno, [entry(image_paths="refs/1.png")])
    (record,) = load_pairs(uno / "out", progress=False)
    assert [reference.image.resolve() for reference in record.references] == [uno / "uno/refs/1.png"]


@pytest.mark.parametrize("score", [None, "4.0", 1e9, 4.1, -1, float("nan"), float("inf"), True, [4], {}])
def test_scores_that_are_none(uno, score):
    def label(value):
        caption = {"img_path1": "a", "img_path2": "b"}
        return {"img_path1": "x.png", "img_path2": "y.png", "caption": caption, "vlm_filter_cot": {"score_final": value}}

    file = uno / "labels.json"
    file.write_text(json.dumps([label(score), label(4), label(3.5), {**label(4), "vlm_filter_cot": None}]))
    dropped = Dropped()
    (row,) = read_uno(file, dropped)
    assert row.number == 1 and dict(dropped) == {"score_final is no number from 0 to 4": 2, "rated below 4": 1}


def test_captions_and_paths_of_labels(uno):
    label = {"img_path1": "x", "img_path2": "y", "caption": {"img_path2": "b"}, "vlm_filter_cot": {"score_final": 4.0}}
    bad = [{"caption": None}, {"caption": {"img_path2": None}}, {"img_path1": "../x"}, {"img_path2": "/x"}, {"img_path2": 3}]
    (uno / "labels.json").write_text(json.dumps([label, *({**label, **changes} for changes in bad)]))
    dropped = Dropped()
    assert len(read_uno(uno / "labels.json", dropped)) == 1
    assert dict(dropped) == {"the prompt is no text": 2, "a path leads out of its folder": 2, "a path is no text": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [("[" * 100_000, "is not JSON"), ("", "is not JSON"), ("[null]", "entry 0: TypeError got NoneType"), ('["x"]', "got str")],
)
def test_what_is_no_list_of_uno_is_refused(uno, content, message):
    with pytest.raises(ValueError, match=message):
        imported(uno, content)
    assert not (uno / "out" / "pairs.jsonl").exists()


def test_a_mark_of_utf_8_before_the_list(uno):
    assert len(imported(uno, "\ufeff" + json.dumps([entry()])).lines) == 1


# Pick-a-Pic


def row(**changes):
    target = noise(1)
    return {
        "caption": "a",
        "jpg_0": png(target),
        "jpg_1": png(loser_of(target, 2)),
        "label_0": 1.0,
        "shown": [png(noise(3))],
        **changes,
    }


def picked(root, values, prior=None, **columns):
    made = pa.Table.from_pylist(values)
    for name, array in columns.items():
        made = made.set_column(made.schema.get_field_index(name), name, array)
    parquet.write_table(made, root / "pick.parquet")
    return import_pickapic([root / "pick.parquet"], ["shown"], prior, root / "out", progress=False)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"caption": None}, "the caption is no text"),
        ({"caption": " "}, "the caption is no text"),
        ({"caption": "a\0"}, "the caption is no text"),
        ({"label_0": float("nan")}, "no label"),
        ({"label_0": 7.0}, "no label"),
        ({"jpg_1": png(noise(1))}, "winner and loser have the same pixels"),
        ({"jpg_1": png(noise(1))[:3000]}, DAMAGED),
        ({"jpg_0": b""}, DAMAGED),
        ({"shown": [png(noise(3)), png(noise(4))[:500]]}, DAMAGED),
        ({"shown": [None]}, DAMAGED),
        ({"shown": None}, DAMAGED),
        ({"marked": png(Image.new("L", (32, 32), 255))}, "prior and winner differ in size"),
        ({"marked": png(Image.new("L", (64, 64)))}, "the prior is empty"),
    ],
)
def test_pickapic_drops_and_counts(tmp_path, changes, reason, caplog):
    whole = {"marked": png(Image.new("L", (64, 64), 255))}
    with caplog.at_level(logging.WARNING):
        writer = picked(tmp_path, [row(**whole), row(**{**whole, **changes})], prior="marked")
    assert dict(writer.dropped) == {reason: 1} and "entry 1 dropped" in caplog.text
    assert len(load_pairs(tmp_path / "out", progress=False)) == 1


@pytest.mark.parametrize(
    "columns",
    [
        {"caption": pa.array([b"a", b"b"])},
        {"caption": pa.array([1, 2])},
        {"caption": pa.array([["a"], ["b"]])},
        {"caption": pa.array([10**15] * 2, pa.timestamp("s"))},
        {"label_0": pa.array(["1", "0"])},
        {"label_0": pa.array([[1], [0]])},
        {"jpg_0": pa.array(["a.jpg", "b.jpg"])},
        {"jpg_0": pa.array([{"url": "a"}] * 2)},
        {"jpg_0": pa.array([{"bytes": "text", "path": "a"}] * 2)},
        {"shown": pa.array([[{"path": "a"}]] * 2)},
        {"shown": pa.array([3, 4])},
    ],
)
def test_columns_of_odd_types(tmp_path, columns):
    """Are dropped to the last row, which is said, and nothing else happens."""
    with pytest.raises(ValueError, match="nothing was imported: 0 pairs; 2 dropped: "):
        picked(tmp_path, [row(), row()], **columns)


def test_dictionaries_are_texts(tmp_path):
    assert len(picked(tmp_path, [row(), row()], caption=pa.array(["a", "b"]).dictionary_encode()).lines) == 2


def test_damaged_parquet_is_named(tmp_path):
    (tmp_path / "pick.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"pick.parquet .+"):
        import_pickapic([tmp_path / "pick.parquet"], ["shown"], None, tmp_path / "out", progress=False)


# DreamBench


def test_photos_of_any_suffix(tmp_path):
    from focusdpo.building.dreambench import manifest
    from focusdpo.building.photo_folder import photos_in

    names = ["00.JPG", "01.jpeg", "02.Png", "03.webp", "04.JPEG", "05.jpg"]
    (tmp_path / "mug").mkdir()
    for name in names:
        (tmp_path / "mug" / name).write_bytes(b"")
    (tmp_path / "mug" / "06.jpg").mkdir()
    (tmp_path / "mug" / "notes.txt").write_text("")
    assert [photo.name for photo in photos_in(tmp_path / "mug")] == names
    listed = [{"prompt": "a", "image_paths": [f"./dreambooth/dataset/mug/{number:02}.jpg"]} for number in (0, 1, 5, 9)]
    (tmp_path / "dreambench_singleip.json").write_text(json.dumps(listed))
    lines, missing = manifest(tmp_path, tmp_path, "single", {"mug": "cup"})
    assert [line["references"][0]["image"] for line in lines] == ["mug/00.JPG", "mug/01.jpeg", "mug/05.jpg"]
    assert missing == {"mug"}


# FID


@pytest.fixture
def study(tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("torchmetrics")
    from tests.tiny_vision import write_tiny_features

    torch.manual_seed(0)
    (tmp_path / "images").mkdir()
    for number in range(3):
        noise(number, (20, 20)).save(tmp_path / f"{number}.png")
        noise(10 + number, (40, 40)).save(tmp_path / "images" / f"{number + 1}.png")
    return tmp_path, str(write_tiny_features(tmp_path / "dino"))


def evaluation(study, images):
    from focusdpo.metrics.config import EvaluateConfig

    root, model = study
    lines = [{"prompt": "a", "references": [{"image": f"{i}.png"}, {"image": f"{(i + 1) % 3}.png"}]} for i in range(images)]
    (root / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for number in range(images, 3):
        (root / "images" / f"{number + 1}.png").unlink()
    paths = {"images": str(root / "images"), "manifest": str(root / "m.jsonl"), "output_dir": str(root / "out")}
    return EvaluateConfig(**paths, dino=model, fid=model, resamples=100, fid_resamples=20)


def test_fid_of_one_image_is_refused_before_anything_is_encoded(study, monkeypatch):
    from focusdpo.commands.evaluate import prepare as prepare_evaluation
    from focusdpo.metrics import inputs

    monkeypatch.setattr(inputs, "load_encoder", lambda *a: pytest.fail("an encoder was loaded"))
    config = evaluation(study, 1)
    with pytest.raises(
        ValueError, match="images: FID needs at least 2 generated images, .*images holds 1; generate more, or leave"
    ):
        prepare_evaluation(config)


def test_resamples_of_one_image_again_and_again():
    """Two prompts of one image each: half of the resamples have the same image twice."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("torchmetrics")
    from focusdpo.metrics.fid import frechet_interval

    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn(5, 8, generator=generator), torch.randn(2, 8, generator=generator)
    distance, low, high = frechet_interval(real, fake, [0, 1], resamples=30)
    assert all(np.isfinite([distance, low, high])) and 0 <= low <= distance <= high
    assert np.isnan(frechet_interval(real, fake, [0, 0], resamples=30)[1:]).all()
