"""UNO's json and Pick-a-Pic's columns become pairs; what is dropped is counted, and what cannot be is refused by name."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from focusdpo.commands import cli
from focusdpo.data import load_pairs
from focusdpo.data.images import read_image, read_mask
from focusdpo.data.importers import Dropped, read_uno

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def noise(seed, size=(64, 64)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def run(*arguments):
    cli.main(["data", "import", *map(str, arguments)])


@pytest.fixture
def uno(tmp_path):
    """UNO's layout, and losers that differ from the targets in one corner."""
    entries = []
    (tmp_path / "uno" / "refs").mkdir(parents=True)
    (tmp_path / "losers" / "images").mkdir(parents=True)
    (tmp_path / "uno" / "images").mkdir()
    for i in range(3):
        target, loser = noise(i), noise(i)
        loser.paste(noise(10 + i, (32, 32)))
        target.save(tmp_path / "uno" / "images" / f"{i}.png")
        loser.save(tmp_path / "losers" / "images" / f"{i}.png")
        noise(20 + i).save(tmp_path / "uno" / "refs" / f"{i}.png")
        entries.append({"prompt": f"a thing {i}", "image_paths": [f"refs/{i}.png"], "image_tgt_path": f"images/{i}.png"})
    file = tmp_path / "uno" / "train.json"
    file.write_text(json.dumps(entries))
    return file


def test_uno(uno, tmp_path, caplog):
    (tmp_path / "losers" / "images" / "1.png").unlink()
    entries = json.loads(uno.read_text())
    entries[2]["image_path"] = entries[2].pop("image_paths")[0]
    entries += [{"prompt": "no target", "image_paths": ["refs/0.png"]}] * 2
    uno.write_text(json.dumps(entries))
    with caplog.at_level(logging.INFO):
        run(uno, tmp_path / "out", "--losers", tmp_path / "losers")
    assert f"{tmp_path / 'out'}: 2 pairs; 2 dropped: no image_tgt_path; 1 dropped: no loser" in caplog.text
    records = load_pairs(tmp_path / "out", progress=False)
    assert [r.prompt for r in records] == ["a thing 0", "a thing 2"]
    for i, record in zip((0, 2), records, strict=True):
        assert np.array_equal(np.asarray(read_image(record.winner)), np.asarray(noise(i)))
        assert np.array_equal(np.asarray(read_image(record.references[0].image)), np.asarray(noise(20 + i)))
        assert read_mask(record.prior[0]).getbbox() == (0, 0, 32, 32), "it marks where both differ"
    assert not caplog.text.count("warnings;"), "the validator agrees"


def test_uno_with_priors_of_ones_own(uno, tmp_path):
    (tmp_path / "priors" / "images").mkdir(parents=True)
    for i in range(2):
        Image.new("L", (64, 64), 255).save(tmp_path / "priors" / "images" / f"{i}.png")
    run(uno, tmp_path / "out", "--losers", tmp_path / "losers", "--priors", tmp_path / "priors")
    records = load_pairs(tmp_path / "out", progress=False)
    assert [read_mask(r.prior[0]).getbbox() for r in records] == [(0, 0, 64, 64)] * 2


def test_uno_1m_labels(uno):
    """Those below full marks are dropped, as UNO's own filter does; the second image is the target."""
    entries = [
        {
            "img_path1": "split1/a.png",
            "img_path2": "split1/b.png",
            "caption": {"img_path1": "a cup", "img_path2": "a cup on a table"},
            "vlm_filter_cot": {"score_final": score},
        }
        for score in (4.0, 3.5)
    ]
    uno.write_text(json.dumps(entries))
    dropped = Dropped()
    (row,) = read_uno(uno, dropped)
    assert (row.prompt, row.target) == ("a cup on a table", "images/split1/b.png")
    assert row.references == (uno.parent / "images/split1/a.png",) and dropped == {"rated below 4": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ('{"prompt": "x"}', "expected UNO's list of objects, got dict"),
        ('[{"prompt": "x", "image_tgt_path": "a.png"}]', "entry 0: KeyError 'image_paths'; expected prompt, image_paths"),
        ("[3]", "entry 0: TypeError"),
        ("[]", "nothing was imported: 0 pairs"),
    ],
)
def test_other_json_is_refused(uno, tmp_path, content, message):
    uno.write_text(content)
    with pytest.raises(SystemExit, match="focusdpo data import: error: source: ") as stop:
        run(uno, tmp_path / "out", "--losers", tmp_path / "losers")
    assert message in str(stop.value)
    assert not (tmp_path / "out" / "pairs.jsonl").exists()


def data(image, kind="PNG"):
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


ROWS = {
    "jpg_0 won": {"label_0": 1.0},
    "jpg_1 won": {"label_0": 0.0},
    "a tie": {"label_0": 0.5},
    "another tie": {"label_0": 0.5},
    "not rated": {"label_0": 0.5, "has_label": False},
    "no label": {"label_0": None},
    "damaged": {"label_0": 1.0, "jpg_1": b"no image"},
    "missing": {"label_0": 1.0, "jpg_0": None},
    "two sizes": {"label_0": 1.0, "jpg_1": data(noise(5, (32, 64)))},
    "no reference": {"label_0": 1.0, "shown": []},
}


@pytest.fixture
def pickapic(tmp_path):
    rows = []
    for i, (caption, changes) in enumerate(ROWS.items()):
        row = {
            "caption": caption,
            "jpg_0": data(noise(2 * i), "JPEG"),
            "jpg_1": data(noise(2 * i + 1), "JPEG"),
            "has_label": True,
        }
        reference = {"bytes": data(noise(100 + i)), "path": None}  # as `datasets` stores an image
        rows.append({**row, "shown": [reference, reference], "marked": data(Image.new("L", (64, 64), 255)), **changes})
    file = tmp_path / "pick.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file


def test_pickapic(pickapic, tmp_path, caplog):
    out = tmp_path / "out"
    with caplog.at_level(logging.INFO):
        run(pickapic, out, "--references", '["shown"]')
    for reason in (
        "2 pairs", "2 dropped: a tie", "2 dropped: no label", "2 dropped: an image is missing or damaged",
        "1 dropped: winner and loser differ in size", "1 dropped: not 1 to 6 references",
    ):  # fmt: skip
        assert reason in caplog.text
    first, second = load_pairs(out, progress=False)
    assert (first.prompt, second.prompt) == ("jpg_0 won", "jpg_1 won")
    for record, winner, loser in ((first, 0, 1), (second, 3, 2)):
        assert record.winner.read_bytes() == data(noise(winner), "JPEG"), "the bytes stay as they are"
        assert record.loser.read_bytes() == data(noise(loser), "JPEG")
        assert len(record.references) == 2 and read_mask(record.prior[0]).getbbox() == (0, 0, 64, 64)


def test_pickapic_refused(pickapic, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="references: a pair needs 1 to 6 reference images, and Pick-a-Pic itself has none"):
        run(pickapic, out)
    with pytest.raises(SystemExit, match="pick.parquet has no column refs; it has caption, has_label"):
        run(pickapic, out, "--references", '["refs"]')
    with pytest.raises(SystemExit, match="losers: got 'x'; expected none with parquet files"):
        run(pickapic, out, "--references", '["shown"]', "--losers", "x")
    run(pickapic, out, "--references", '["shown"]', "--prior", "marked", "--overwrite", "true")
    assert Path(load_pairs(out, progress=False)[0].prior[0]).name == "0000000_prior.png"
    with pytest.raises(SystemExit, match="out_dir: .* holds an earlier run"):
        run(pickapic, out, "--references", '["shown"]')


def test_what_is_not_there(uno, tmp_path):
    with pytest.raises(SystemExit, match="losers: no such folder"):
        run(uno, tmp_path / "out", "--losers", tmp_path / "nowhere")
    with pytest.raises(SystemExit, match=r"source: no such file: .*none.json"):
        run(uno.with_name("none.json"), tmp_path / "out", "--losers", tmp_path / "losers")
    with pytest.raises(SystemExit, match="losers: UNO's json has winners alone"):
        run(uno, tmp_path / "out")
    with pytest.raises(SystemExit, match="no such dataset"):
        run(tmp_path / "none.parquet", tmp_path / "out", "--references", '["shown"]')
    assert not (tmp_path / "out").exists()
