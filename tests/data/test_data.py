"""The dataset format: every problem is found, with file, line and field; and the tensors are right."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from focusdpo.data import DatasetError, LongestSide, PairDataset, SizeBatches, collate, load_pairs
from focusdpo.data.images import fit_image, fit_mask, read_image, read_mask, read_size, token_size

RECORD = {
    "prompt": "a cat and a cup",
    "references": [{"image": "a.png", "mask": "a_mask.png", "class_name": "cat"}, {"image": "b.png"}],
    "winner": "winner.png",
    "loser": "loser.png",
    "prior": "prior.png",
}


@pytest.fixture
def folder(tmp_path):
    """A sound dataset of one pair."""
    rng = np.random.default_rng(0)
    for name, size in {"a": (64, 48), "b": (32, 32), "winner": (96, 64), "loser": (96, 64)}.items():
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    for name, size in {"a_mask": (64, 48), "prior": (96, 64), "empty": (96, 64)}.items():
        mask = np.zeros((size[1], size[0]), dtype=np.uint8)
        mask[16:48, 16:48] = 0 if name == "empty" else 255
        Image.fromarray(mask).save(tmp_path / f"{name}.png")
    write(tmp_path, [RECORD])
    return tmp_path


def write(folder, records):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")


def dataset(records):
    return PairDataset(records, resolution=96, reference_rule=LongestSide(64), reference_rule_multiple=LongestSide(32))


def test_sound_dataset(folder):
    for path in (folder, folder / "pairs.jsonl"):
        (record,) = load_pairs(path)
        assert record.winner == folder / "winner.png" and record.references[0].class_name == "cat"
        assert not record.per_subject and record.line == 1


BROKEN = {
    "not json": ("{", "line", "is not JSON"),
    "a list": ("[1]", "line", "expected a JSON object, got list"),
    "no prompt": ({**RECORD, "prompt": None}, "prompt", "expected a text that is not empty, got None"),
    "blank prompt": ({**RECORD, "prompt": " "}, "prompt", "expected a text"),
    "missing field": ({k: v for k, v in RECORD.items() if k != "loser"}, "loser", "is missing"),
    "unknown field": ({**RECORD, "looser": "x"}, "looser", "is not a field; known are prompt"),
    "no references": ({**RECORD, "references": []}, "references", "expected a list of 1 to 6 references, got 0 items"),
    "references not a list": ({**RECORD, "references": "a.png"}, "references", "got str"),
    "reference not an object": ({**RECORD, "references": ["a.png"]}, "references[0]", "expected an object, got 'a.png'"),
    "reference without image": ({**RECORD, "references": [{"mask": "a_mask.png"}]}, "references[0].image", "is missing"),
    "unknown reference field": ({**RECORD, "references": [{"image": "a.png", "box": 1}]}, "references[0].box", "is not a field"),
    "class name": ({**RECORD, "references": [{"image": "a.png", "class_name": 3}]}, "references[0].class_name", "expected a text"),
    "path of another type": ({**RECORD, "winner": 5}, "winner", "expected the path of an image, got 5"),
    "number of priors": ({**RECORD, "prior": ["prior.png"]}, "prior", "expected one mask, or one per reference (2), got 1"),
    "half a surrogate pair": (json.dumps(RECORD).replace("a cat", "\\ud83d cat"), "prompt", "holds half of a surrogate pair"),
    "a huge number": ('{"meta": ' + "1" * 5000 + "}", "line", "is not JSON"),
    "meta": ({**RECORD, "meta": 1}, "meta", "expected an object, got int"),
    "no such file": ({**RECORD, "winner": "none.png"}, "winner", "no such file"),
    "not an image": ({**RECORD, "winner": "pairs.jsonl"}, "winner", "cannot be read as an image"),
    "a folder": ({**RECORD, "winner": "."}, "winner", "cannot be read as an image"),
    "truncated": ({**RECORD, "winner": "cut.png"}, "winner", "cannot be read as an image"),
    "size of loser": ({**RECORD, "loser": "a.png"}, "loser", "is 64x48 pixels, but winner is 96x64"),
    "size of prior": ({**RECORD, "prior": "a_mask.png"}, "prior", "is 64x48 pixels, but winner is 96x64"),
    "size of mask": ({**RECORD, "references": [{"image": "b.png", "mask": "a_mask.png"}]}, "references[0].mask", "is 64x48"),
    "empty prior": ({**RECORD, "prior": "empty.png"}, "prior", "is empty; expected bright pixels"),
    "all priors empty": ({**RECORD, "prior": ["empty.png", "empty.png"]}, "prior", "every subject's mask is empty"),
    "loser is winner": ({**RECORD, "loser": "winner.png"}, "loser", "has the same pixels as the winner"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_problem_is_reported(folder, case):
    broken, field, message = BROKEN[case]
    data = (folder / "winner.png").read_bytes()
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    write(folder, [RECORD, "", broken])
    with pytest.raises(DatasetError) as error:
        load_pairs(folder, progress=False)
    found = [(p.line, p.field) for p in error.value.problems if message in str(p)]
    assert (3, field) in found, str(error.value)
    assert f"{folder / 'pairs.jsonl'}:3: {field}: " in str(error.value)
    assert all(p.line == 3 for p in error.value.problems), "the sound pair is not blamed"


def test_all_problems_at_once(folder):
    write(folder, ["{", {**RECORD, "prompt": "", "winner": 3}, RECORD, {**RECORD, "winner": "x.png", "loser": "y.png"}])
    with pytest.raises(DatasetError, match="5 problems") as error:
        load_pairs(folder, progress=False)
    assert [p.line for p in error.value.problems] == [1, 2, 2, 4, 4]


def test_no_dataset(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such dataset: .*expected a pairs.jsonl file, or a folder"):
        load_pairs(tmp_path)
    (tmp_path / "pairs.jsonl").write_text("\n")
    with pytest.raises(DatasetError, match="has no pair"):
        load_pairs(tmp_path)


def test_headers_only(folder):
    (folder / "pairs.jsonl").write_text(json.dumps({**RECORD, "prior": "empty.png"}) + "\n")
    assert len(load_pairs(folder, check="headers", progress=False)) == 1


def test_sample_and_batch(folder):
    pairs = dataset(load_pairs(folder, progress=False))
    sample = pairs[0]
    assert sample.winner.shape == (3, 64, 96) and sample.winner.max() <= 1
    assert [x.shape for x in sample.references] == [(3, 16, 32), (3, 32, 32)], "several references use the smaller size"
    assert sample.reference_masks[0].any() and not sample.reference_masks[0].all() and sample.reference_masks[1].all()
    assert sample.prior.shape == (64, 96) and sample.prior[32, 32] and not sample.prior[0, 0]
    batch = collate([sample, sample])
    assert batch.winner.shape == (2, 3, 64, 96) and batch.reference_masks[0].shape == (2, 16, 32)


def test_per_subject_priors(folder):
    write(folder, [{**RECORD, "prior": ["prior.png", "empty.png"]}])
    sample = dataset(load_pairs(folder, progress=False))[0]
    assert sample.prior.shape == (2, 64, 96) and sample.prior[0].any() and not sample.prior[1].any()


def test_winner_loser_and_masks_are_cut_alike():
    """A mark in the corner of a photo lands on the same pixels in image and mask."""
    image = Image.new("RGB", (131, 77))
    image.paste((255, 255, 255), (60, 30, 100, 60))
    mask = image.convert("L")
    size = token_size(image.size, 96)
    assert size == (96, 48)
    fitted, inside = fit_image(image, size), fit_mask(mask, size)
    assert ((fitted[0] > 0.5) == inside).float().mean() > 0.98


@pytest.mark.parametrize("high", [1, 255])
def test_masks_of_any_brightness(tmp_path, high):
    values = np.zeros((8, 8), dtype=np.uint8)
    values[2:4] = high
    Image.fromarray(values).save(tmp_path / "m.png")
    assert (np.asarray(read_mask(tmp_path / "m.png")) == 255).sum() == 16


def test_turned_photos(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_size(tmp_path / "turned.jpg") == (20, 40) == read_image(tmp_path / "turned.jpg").size


def test_token_size():
    assert token_size((512, 512), 512) == (512, 512)
    assert token_size((600, 400), 320) == (320, 208)
    assert token_size((4000, 10), 512) == (512, 16)


class Sizes:
    """Stands for a dataset of pairs of three sizes."""

    sizes = ["a"] * 7 + ["b"] * 4 + ["c"]


def test_batches_cover_every_pair_once_and_never_mix():
    batches = SizeBatches(Sizes(), 3, shuffle=True, seed=1)
    first, second = batches.epoch(0), batches.epoch(1)
    for epoch in (first, second):
        assert sorted(i for batch in epoch for i in batch) == list(range(12))
        assert all(len({Sizes.sizes[i] for i in batch}) == 1 for batch in epoch)
        assert len(epoch) == 6
    assert first != second and first == SizeBatches(Sizes(), 3, shuffle=True, seed=1).epoch(0)
    ordered = SizeBatches(Sizes(), 3, shuffle=False, seed=1).epoch(0)
    assert ordered[0] == [0, 1, 2] and ordered[-1] == [11]


def test_seeds_beyond_32_bits_differ():
    orders = [SizeBatches(Sizes(), 1, shuffle=True, seed=seed).epoch(0) for seed in (0, 1, 2**32 - 1)]
    assert len({str(order) for order in orders}) == 3


def test_transparent_cut_outs(folder):
    """A reference on a transparent ground: white where it is transparent, and its own mask."""
    cut = np.zeros((32, 32, 4), dtype=np.uint8)
    cut[..., :3] = 77  # colours hidden under the transparency
    cut[:16, :, 3] = 255
    Image.fromarray(cut).save(folder / "cut_out.png")
    write(folder, [{**RECORD, "references": [{"image": "cut_out.png"}]}])
    sample = dataset(load_pairs(folder, progress=False))[0]
    assert (sample.references[0][:, 40:] == 1).all()
    assert sample.references[0][0, 10, 10] == pytest.approx(77 / 255, abs=1e-3)
    assert sample.reference_masks[0][:30].all()
    assert not sample.reference_masks[0][34:].any()


def test_mask_in_the_transparency(tmp_path):
    white = np.full((8, 8, 4), 255, dtype=np.uint8)
    white[4:, :, 3] = 0
    Image.fromarray(white).save(tmp_path / "m.png")
    assert (np.asarray(read_mask(tmp_path / "m.png"))[:, 0] == 255).tolist() == [True] * 4 + [False] * 4


def test_deep_images(folder):
    """16 bits are scaled, not clipped; floating point has no known range and is refused."""
    gray = (np.arange(96 * 64).reshape(64, 96) * 10).astype(np.uint16)
    Image.fromarray(gray).save(folder / "deep.png")
    shown = np.asarray(read_image(folder / "deep.png"))[..., 0]
    assert np.abs(shown - gray / 257).max() <= 0.5
    Image.fromarray(gray.astype(np.float32)).save(folder / "float.tiff")
    write(folder, [{**RECORD, "winner": "float.tiff"}])
    with pytest.raises(DatasetError, match=r"winner: .*float.tiff cannot be read as an image \(mode F, more than 8 bits"):
        load_pairs(folder, progress=False)


def test_thin_regions_stay():
    mask = Image.new("L", (2000, 2000))
    mask.paste(255, (0, 1000, 2000, 1001))
    assert fit_mask(mask, (512, 512)).any()
    assert not fit_mask(Image.new("L", (2000, 2000)), (512, 512)).any()


def test_composed_pairs(tiny_pairs):
    """The demo's pairs: winner and loser differ, and only inside the prior."""
    records = load_pairs(tiny_pairs, progress=False)
    assert len(records) == 8
    for record in records:
        winner, loser = (np.asarray(read_image(p)).astype(int) for p in (record.winner, record.loser))
        prior = np.asarray(read_mask(record.prior[0])) > 0
        differs = (winner != loser).any(-1)
        assert differs.any() and not (differs & ~prior).any()
        assert set(record.meta["disruptions"]) <= {"instance", "recolour", "retexture"}
    samples = [dataset(records)[i] for i in range(len(records))]
    assert all(torch.isfinite(s.winner).all() and s.prior.any() for s in samples)


def test_samples_are_remembered_where_all_fit(folder):
    pairs = dataset(load_pairs(folder, progress=False))
    needed = 2 * 3 * 4 * 16**2 * pairs.sizes[0].tokens
    pairs.remember(needed - 1)
    sample = pairs[0]
    assert pairs[0] is not sample
    pairs.remember(needed)
    remembered = pairs[0]
    (folder / "winner.png").unlink()
    assert pairs[0] is remembered and torch.equal(remembered.winner, sample.winner)
    pairs.keep([0])
    with pytest.raises(FileNotFoundError):
        pairs[0]
