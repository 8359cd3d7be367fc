"""Tables and lists as strangers have them: odd names, odd types, several splits, replaced or damaged files, other encodings."""

from __future__ import annotations

import csv
import datetime
import decimal
import io
import json
import os
import pickle
import shutil
from functools import partial

import numpy as np
import pytest
from PIL import Image

from focusdpo.building.scenes import load_scenes
from focusdpo.data import DatasetError, LongestSide, PairDataset, formats, load_pairs
from focusdpo.data.formats import content_checksum, find_sources
from focusdpo.data.prompts import read_prompts
from focusdpo.data.shards import write_shards
from tests.data import parse_pairs

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

SIZED = partial(PairDataset, resolution=64, reference_rule=LongestSide(64))


def png(seed, kind="RGB"):
    values = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    if kind == "L":
        values = np.zeros((64, 64), np.uint8)
        values[:32] = 255
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    return stream.getvalue()


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SCHEMA = pa.schema(
    [
        ("prompt", pa.string()),
        ("references", pa.list_(pa.struct([("image", IMAGE), ("mask", IMAGE), ("class_name", pa.string())]))),
        *((name, IMAGE) for name in ("winner", "loser", "prior")),
    ]
)


def rows(count=4, start=0):
    def image(*arguments):
        return {"bytes": png(*arguments), "path": None}

    return [
        {
            "prompt": f"prompt {i}",
            "references": [{"image": image(100 + i), "mask": None, "class_name": "cat"}],
            "winner": image(i),
            "loser": image(50 + i),
            "prior": image(0, "L"),
        }
        for i in range(start, start + count)
    ]


def table(count=4, start=0):
    return pa.Table.from_pylist(rows(count, start), SCHEMA)


def with_column(name, values, kind=None, count=4):
    made = table(count)
    array = pa.array(values, kind)
    place = made.schema.get_field_index(name)
    return made.append_column(name, array) if place < 0 else made.set_column(place, name, array)


def write(file, made=None, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table() if made is None else made, file, **options)
    return file


def prompts(path):
    records, problems = parse_pairs(path)
    assert not problems, problems
    return [record.prompt for record in records]


# names


@pytest.mark.parametrize("name", ["set[1]", "a*b", "x::y", "a?b", "{a,b}", "hf:__x", "zip::a", "100%", "a b", "#1", "é"])
@pytest.mark.parametrize("kind", ["folder", "file", "pattern"])
def test_names_are_names(tmp_path, name, kind):
    """What is there is meant as it is called: another's rows are not read."""
    folder = tmp_path / name
    write(folder / f"{name}.parquet")
    for other in ("set1", "axb", "aXb", "a", "b"):
        write(tmp_path / other / f"{other}.parquet", table(2, 20))
    path = {"folder": folder, "file": folder / f"{name}.parquet", "pattern": folder / "*.parquet"}[kind]
    assert prompts(path) == [f"prompt {i}" for i in range(4)]
    assert all(str(record.winner).startswith(str(folder)) for record in parse_pairs(path)[0])


def test_a_file_replaced_with_its_time_kept(tmp_path):
    file = write(tmp_path / "p.parquet", table(4), compression="none")
    first, second = write(tmp_path / "other" / "p.parquet", table(4, 4), compression="none"), content_checksum(file)
    assert prompts(file)[0] == "prompt 0"
    time = file.stat().st_mtime_ns
    shutil.copyfile(first, file)
    os.utime(file, ns=(time, time))
    assert prompts(file) == [f"prompt {i}" for i in range(4, 8)]
    assert content_checksum(file) != second


def test_the_digest_is_of_the_content(tmp_path):
    """A byte of an image changes neither the file's size nor its footer."""
    file = write(tmp_path / "p.parquet", compression="none", write_statistics=False)
    before, data = content_checksum(file), bytearray(file.read_bytes())
    place = data.index(png(2)) + 60
    data[place] ^= 1
    file.write_bytes(bytes(data))
    assert content_checksum(file) != before
    assert content_checksum(shutil.copy(file, tmp_path / "copy.parquet")) == content_checksum(file)


def test_a_file_replaced_while_it_is_read(tmp_path):
    file = write(tmp_path / "p.parquet")
    (record, *_), _ = parse_pairs(file)
    write(tmp_path / "p2.parquet", table(4, 4)).replace(file)
    formats._CELLS.__init__()
    with pytest.raises(OSError, match="p.parquet was replaced while it was read; start again"):
        record.winner.open("rb")


# reading at random


@pytest.mark.parametrize("group", [1, 3, 100])
def test_cells_at_random(tmp_path, group, monkeypatch):
    """In any order, from blocks of a row or all at once, after pickling, and with little room."""
    file = write(tmp_path / "p.parquet", table(10), row_group_size=group)
    records, _ = parse_pairs(file)
    order = np.random.default_rng(0).permutation(np.repeat(range(10), 3)).tolist()
    for block, kept, held in ((1, 1, 1), (30_000, 50_000, 2**20), (2**24, 2**27, 2**29)):
        for name, value in (("BLOCK", block), ("KEPT", kept), ("HELD", held)):
            monkeypatch.setattr(formats, name, value)
        formats._CELLS.__init__()
        sent = pickle.loads(pickle.dumps(records))
        for i in order:
            for record in (records[i], sent[i]):
                assert record.winner.open("rb").read() == png(i) and record.loser.open("rb").read() == png(50 + i)
                assert record.references[0].image.open("rb").read() == png(100 + i)
        cells = formats._CELLS
        assert sum(values.nbytes for values in cells._kept.values()) <= max(kept, 300_000)
    assert len(pickle.dumps(records)) < 10_000, "images do not travel"


def test_rows_in_order_are_decoded_once(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "BLOCK", 1)
    records, _ = parse_pairs(write(tmp_path / "p.parquet", table(10)))
    begun, real = [], formats.Table.batches
    monkeypatch.setattr(formats.Table, "batches", lambda self, *a: begun.append(a) or real(self, *a))
    for record in records:
        record.winner.open("rb"), record.loser.open("rb")
    assert begun == [(0, "winner"), (0, "loser")]


def test_large_row_groups_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "HELD", 1000)
    _, problems = parse_pairs(write(tmp_path / "p.parquet", row_group_size=2))
    assert [(p.line, p.severity) for p in problems] == [(1, "warning"), (3, "warning")]
    assert "row_group_size=100" in str(problems[0])


# splits


def touch(root, names):
    for number, name in enumerate(names):
        file = root / name
        if file.suffix == ".parquet":
            write(file, table(1, number))
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(bytes(1024))


@pytest.mark.parametrize(
    ("names", "choices"),
    [
        (["train/a.parquet", "test/a.parquet"], ["{}/train", "{}/test"]),
        (["default/train/0.parquet", "default/test/0.parquet"], ["{}/default/train", "{}/default/test"]),
        (["default/train/0.parquet", "default/train/1.parquet", "default/val/0.parquet"], ["{}/default/train", "default/val"]),
        (["train.parquet", "test.parquet"], ["{}/train.parquet", "{}/test.parquet"]),
        (["Train.parquet", "VALIDATION.parquet"], ["Train.parquet", "VALIDATION.parquet"]),
        (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test-00000-of-00001.parquet"], ["{}/train-"]),
        (["train-0.tar", "train-1.tar", "val-0.tar", "val-1.tar"], ["{}/train-*.tar", "{}/val-*.tar"]),
        (["my_train_1.tar", "my_dev_1.tar"], ["my_train_1.tar", "my_dev_1.tar"]),
        (["pairs.tar", "pairs_heldout.tar"], ["pairs.tar", "pairs_heldout.tar"]),
        (["pairs.tar", "held_out.tar"], ["pairs.tar", "held_out.tar"]),
        (["training/0.parquet", "evaluation/0.parquet"], ["training", "evaluation"]),
        (["train/data-00000-of-00001.parquet", "eval/data-00000-of-00001.parquet"], ["train", "eval"]),
        (["cats-00000-of-00001.parquet", "dogs-00000-of-00001.parquet"], ["cats-00000", "dogs-00000"]),
    ],
)
@pytest.mark.parametrize("home", ["data", "test"])
def test_splits_are_not_merged(tmp_path, names, choices, home):
    root = tmp_path / home
    touch(root, names)
    with pytest.raises(ValueError, match="holds several splits") as error:
        find_sources(root)
    assert str(root) in str(error.value) and "name one: " in str(error.value)
    assert all(choice.format(root) in str(error.value) for choice in choices)
    found = set()
    for choice in str(error.value).partition("name one: ")[2].split(", "):
        own = [str(source.file) for source in find_sources(choice)]
        assert own and not found & set(own)
        found |= set(own)
    assert len(found) == len(names), "every choice can be taken, and together they are all"


def test_a_pattern_over_splits_is_refused_and_braces_say_so(tmp_path):
    touch(tmp_path, ["train-0.tar", "val-0.tar"])
    with pytest.raises(ValueError, match="holds several splits"):
        find_sources(tmp_path / "*.tar")
    assert len(find_sources(tmp_path / "{train,val}-*.tar")) == 2


@pytest.mark.parametrize("home", ["test", "val", "Validation", "train", "data"])
@pytest.mark.parametrize(
    "names",
    [
        ["part-0001.parquet", "part-0002.parquet"],
        ["pairs-00000-of-00002.tar", "pairs-00001-of-00002.tar"],
        ["shard_a.tar", "shard_b.tar"],
        ["trainer.parquet", "latest.parquet", "contest.parquet"],
        ["train/0.parquet", "train/1.parquet"],
        ["cat/train.parquet", "dog/train.parquet"],
        ["train-1.tar", "training-2.tar"],
    ],
)
def test_series_and_folders_of_one_split(tmp_path, home, names):
    touch(tmp_path / home, [*names, ".hidden-test.parquet"])
    assert len(find_sources(tmp_path / home)) == len(names)


def test_a_series_is_whole_in_each_folder(tmp_path):
    touch(tmp_path, ["a/x-00000-of-00002.parquet", "b/x-00001-of-00002.parquet"])
    with pytest.raises(FileNotFoundError, match="a lacks x-00001-of-00002.parquet of 2 files"):
        find_sources(tmp_path)
    touch(tmp_path / "long", ["x-0-of-999999999999.parquet"])
    with pytest.raises(FileNotFoundError, match="lacks x-000000000001-of-999999999999.parquet"):
        find_sources(tmp_path / "long")


# types


WRONG = {
    "binary prompts": ("prompt", [b"prompt"] * 4, None, "got b'prompt'"),
    "a number as prompt": ("prompt", [1] * 4, None, "got 1"),
    "a list as prompt": ("prompt", [["a", "b"]] * 4, None, "got ['a', 'b']"),
    "a time as prompt": ("prompt", [datetime.datetime(2020, 1, 1)] * 4, None, "got datetime.date"),
    "a blank prompt": ("prompt", [" "] * 4, None, "got ' '"),
    "zeros in a prompt": ("prompt", ["a\0b"] * 4, None, "expected a text that is not empty"),
    "a number as winner": ("winner", [1.5] * 4, None, "expected the path of an image, got 1.5"),
    "zeros in a path": ("winner", ["a\0b"] * 4, None, "expected the path of an image"),
    "an object as winner": ("winner", [{"url": "x"}] * 4, None, "expected the path of an image, got {'url': 'x'}"),
    "a list as winner": ("winner", [[b"x"]] * 4, None, "expected the path of an image, got [b'x']"),
    "no bytes": ("loser", [b""] * 4, None, "of no known format"),
    "text as references": ("references", ["cat.png"] * 4, None, "expected a list of 1 to 6 references, got str"),
    "numbers as references": ("references", [[1]] * 4, None, "expected an object, got 1"),
    "an object as references": ("references", [{"image": b"x"}] * 4, None, "got dict"),
    "bytes as a class": ("references", [[{"image": png(1), "class_name": b"cat"}]] * 4, None, "class_name: expected a text"),
    "a number as meta": ("meta", [1] * 4, None, "expected an object, got int"),
    "bytes in meta": ("meta", [{"a": b"x"}] * 4, None, "holds what JSON does not have (bytes)"),
    "deep JSON in meta": ("meta", ["[" * 100_000] * 4, None, "expected an object, got str"),
    "a year beyond Python": ("prompt", [10**15] * 4, pa.timestamp("s"), "is of type timestamp[ms] and cannot be read"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_types_are_named(tmp_path, case):
    name, values, kind, message = WRONG[case]
    file = write(tmp_path / "p.parquet", with_column(name, values, kind))
    with pytest.raises(DatasetError) as error:
        load_pairs(file, progress=False)
    found = [p for p in error.value.problems if p.field.startswith(name) and message in str(p)]
    assert {p.line for p in found} == {1, 2, 3, 4} and all(p.file == file and p.remedy for p in found), str(error.value)


@pytest.mark.parametrize(
    "kind",
    [pa.dictionary(pa.int32(), pa.string()), pa.large_string(), getattr(pa, "string_view", pa.string)(), pa.string()],
    ids=str,
)
def test_every_kind_of_text_is_text(tmp_path, kind):
    texts = ["a", "b", "a", "ä\ud7ff"]
    assert prompts(write(tmp_path / "p.parquet", with_column("prompt", pa.array(texts).cast(kind)))) == texts


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), pa.binary()), IMAGE], ids=str)
def test_every_kind_of_image(tmp_path, kind):
    images = [png(i) for i in range(4)]
    values = [{"bytes": i, "path": "x.png"} for i in images] if kind == IMAGE else images
    array = pa.array(images).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array(values, kind)
    records, problems = parse_pairs(write(tmp_path / "p.parquet", with_column("winner", array)))
    assert not problems and [record.winner.open("rb").read() for record in records] == images


def test_a_path_is_no_other_columns_image(tmp_path):
    """A text that looks like the name of a place in the table is a path all the same."""
    file = write(tmp_path / "p.parquet", with_column("winner", ["loser", "prior", "references[0].image", "x.png"]))
    records, _ = parse_pairs(file)
    assert [record.winner for record in records] == [tmp_path / n for n in ("loser", "prior", "references[0].image", "x.png")]


def test_times_and_decimals_in_meta(tmp_path):
    meta = {"at": datetime.datetime(2020, 1, 2), "on": datetime.date(2020, 1, 2), "price": decimal.Decimal("1.50"), "n": None}
    file = write(tmp_path / "p.parquet", with_column("meta", [meta] * 4))
    records = load_pairs(file, progress=False)
    assert records[0].meta == {"at": "2020-01-02T00:00:00", "on": "2020-01-02", "price": "1.50", "n": None}
    (tmp_path / "shards").mkdir()
    write_shards(records, tmp_path / "shards", 4, progress=False)
    assert load_pairs(tmp_path / "shards", progress=False)[0].meta == records[0].meta


def test_empty_and_damaged_files(tmp_path):
    cases = {"empty": b"", "text": b"prompt,winner\n", "magic": b"PAR1PAR1", "footer": b"PAR1" + b"\xff" * 40 + b"PAR1"}
    for name, content in cases.items():
        file = tmp_path / f"{name}.parquet"
        file.write_bytes(content)
        _, (problem,) = parse_pairs(file)
        assert problem.field == "file" and "cannot be read as a table" in problem.message and problem.remedy
    _, (problem,) = parse_pairs(write(tmp_path / "none.parquet", table(0)))
    assert problem.message == "has no pair"
    whole = write(tmp_path / "whole.parquet", compression="snappy", use_dictionary=False).read_bytes()
    for place in range(10, len(whole), len(whole) // 40):
        data = bytearray(whole)
        data[place : place + 4] = b"\xff\xfe\xfd\xfc"
        (tmp_path / "flipped.parquet").write_bytes(bytes(data))
        parse_pairs(tmp_path / "flipped.parquet")  # nothing is raised


def test_two_columns_of_one_name(tmp_path):
    made = table().append_column("winner", pa.array(["x"] * 4))
    _, (problem,) = parse_pairs(write(tmp_path / "p.parquet", made))
    assert "two columns have one name" in problem.message


def test_training_reads_tables(tmp_path):
    records = load_pairs(write(tmp_path / "p.parquet", row_group_size=2), progress=False)
    sample = SIZED(records)[3]
    assert np.array_equal((sample.winner * 255).round().byte().permute(1, 2, 0).numpy(), Image.open(io.BytesIO(png(3))))


# image folders


@pytest.fixture
def folder(tmp_path):
    for name, data in {"w.png": png(0), "l.png": png(1), "p.png": png(0, "L"), "r.png": png(2)}.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


LINE = {
    "prompt": "1",
    "references": [{"image_file_name": "r.png", "class_name": "cat", "mask_file_name": None}],
    "winner_file_name": "w.png",
    "loser_file_name": "l.png",
    "prior_file_name": "p.png",
    "meta": '{"a": [1]}',
}


def write_metadata(folder, kind, line):
    if kind == "jsonl":
        (folder / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    elif kind == "csv":
        with (folder / "metadata.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(line))
            writer.writeheader()
            writer.writerow({name: value if isinstance(value, str) else json.dumps(value) for name, value in line.items()})
    else:
        parquet.write_table(pa.Table.from_pylist([line]), folder / "metadata.parquet")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_every_kind_of_metadata(folder, kind):
    write_metadata(folder, kind, LINE)
    (record,) = load_pairs(folder, progress=False)
    assert (record.prompt, record.meta, record.winner, record.prior) == ("1", {"a": [1]}, folder / "w.png", (folder / "p.png",))
    assert record.references[0].image == folder / "r.png" and record.references[0].mask is None
    assert not record.per_subject
    line = {**LINE, "prior_file_names": ["p.png"]}
    del line["prior_file_name"]
    write_metadata(folder, kind, line)
    assert load_pairs(folder, progress=False)[0].per_subject
    write_metadata(folder, kind, {**LINE, "winner": "l.png"})
    with pytest.raises(DatasetError, match=rf"metadata.{kind}:1: winner: stands twice, with winner"):
        load_pairs(folder, progress=False)
    write_metadata(folder, kind, {**LINE, "file_name": "w.png"})
    with pytest.raises(DatasetError, match=r"file_name: is not a (field|column)"):
        load_pairs(folder, progress=False)


def test_csv_that_is_none(folder):
    good = "prompt,winner_file_name\n"
    for content, message in {
        b"": "has no pair",
        good.encode(): "has no pair",
        b"a,a\n1,2\n": "two columns have one name",
        good.encode() + b"a,b,c\n": "has 3 cells, but there are 2 columns",
        good.encode() + b"\xff,b\n": "is not UTF-8",
        good.encode() + b'"a' + b"x" * 200_000: "cannot be read as CSV",
        (good + "a,b\n").encode("utf-16"): "is not UTF-8",
    }.items():
        (folder / "metadata.csv").write_bytes(content)
        assert message in "".join(map(str, parse_pairs(folder)[1])), message


# encodings


PAIR = {"prompt": "a", "references": [{"image": "r.png"}], "winner": "w.png", "loser": "l.png", "prior": "p.png"}
SCENE = {"prompt": "a", "scene": "w.png", "subjects": [{"class_name": "cat", "reference": "r.png"}]}


def read_lines(folder, name, content):
    file = folder / name
    file.write_bytes(content)
    return {
        "pairs.jsonl": lambda f: load_pairs(f, progress=False),
        "metadata.jsonl": lambda f: load_pairs(f, progress=False),
    }.get(name, {"scenes.jsonl": lambda f: load_scenes(f, progress=False), "prompts.jsonl": read_prompts}.get(name))(file)


LISTS = {"pairs.jsonl": PAIR, "metadata.jsonl": LINE, "scenes.jsonl": SCENE, "prompts.jsonl": PAIR}


@pytest.mark.parametrize("name", LISTS)
def test_a_mark_of_utf_8_is_no_harm(folder, name):
    assert len(read_lines(folder, name, json.dumps(LISTS[name]).encode("utf-8-sig"))) == 1


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_named(folder, name, encoding):
    with pytest.raises(DatasetError, match=rf"{name}:1: line: is not UTF-8 \(but UTF-16.*save the file as UTF-8"):
        read_lines(folder, name, (json.dumps(LISTS[name]) + "\n").encode(encoding))


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "\\ud83d"}', "prompt: holds half of a surrogate pair"),
        ('{"prompt": "a\\u0000b"}', "prompt: expected a text that is not empty"),
        ("[" * 100_000, "line: is not JSON"),
        ('{"meta": ' + '{"a": ' * 100_000, "line: is not JSON"),
        ('{"prompt": "a", "prompt": "b"}', "prompt: stands twice"),
        ('{"references": ["x"], "subjects": ["x"]}', "expected an object"),
    ],
    ids=["surrogate", "zero", "deep list", "deep object", "twice", "texts"],
)
def test_what_is_no_text_is_named(folder, name, text, message):
    with pytest.raises(DatasetError) as error:
        read_lines(folder, name, text.encode())
    assert message in str(error.value) and f"{name}:1: " in str(error.value)


@pytest.mark.parametrize("field", ["scene", "class_name", "name", "reference", "mask", "reference_mask"])
def test_scenes_hold_no_halves_of_characters(folder, field):
    scene = json.loads(json.dumps(SCENE))
    (scene if field == "scene" else scene["subjects"][0])[field] = "x\ud83d"
    with pytest.raises(DatasetError, match=rf"{field}: holds half of a surrogate pair"):
        read_lines(folder, "scenes.jsonl", json.dumps(scene).encode())


def test_prompts_beside_odd_paths(folder):
    """An evaluation does not look at a pair's other images, whatever their paths are."""
    from focusdpo.metrics.subjects import find_subjects

    line = {**PAIR, "winner": "a\0b", "loser": "\ud83d", "prior": [3, "x" * 5000]}
    found = read_lines(folder, "prompts.jsonl", json.dumps(line).encode())
    assert find_subjects(folder / "prompts.jsonl", found, "all").photos
