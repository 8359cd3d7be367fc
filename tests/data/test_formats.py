"""One dataset in every format gives the same pairs; shards are read by offsets."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import pickle
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from focusdpo.data import DatasetError, LongestSide, PairDataset, load_pairs
from focusdpo.data.formats import content_checksum, find_sources
from focusdpo.data.shards import write_shards
from focusdpo.foundation.files import checksum
from tests.data import parse_pairs
from tests.training.test_resume import SETTINGS, assert_same, train  # noqa: F401 (the settings of its runs)

datasets = pytest.importorskip("datasets")
webdataset = pytest.importorskip("webdataset")

SIZES = {"resolution": 96, "reference_rule": LongestSide(48)}
FORMATS = ("shards", "parquet", "imagefolder")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """`datasets` keeps its tables in a folder of the test's."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def values(pairs):
    """What the lines of pairs.jsonl say."""
    return [json.loads(line) for line in Path(pairs).read_text().splitlines()]


def image(folder, name):
    return {"bytes": (folder / name).read_bytes(), "path": None}


def row(folder, value):
    """A line of pairs.jsonl as a row with its images."""
    references = [
        {"image": image(folder, r["image"]), "mask": image(folder, r["mask"]), "class_name": r["class_name"]}
        for r in value["references"]
    ]
    pictures = {name: image(folder, value[name]) for name in ("winner", "loser", "prior")}
    return {"prompt": value["prompt"], "references": references, **pictures, "meta": json.dumps(value["meta"])}


def features(prior=None):
    picture = datasets.Image()
    reference = {"image": picture, "mask": picture, "class_name": datasets.Value("string")}
    text = datasets.Value("string")
    return datasets.Features(
        {"prompt": text, "references": datasets.List(reference), "winner": picture, "loser": picture, "prior": prior or picture}
        | {"meta": text}
    )


def write_parquet(pairs, folder, files=2):
    rows = [row(Path(pairs).parent, value) for value in values(pairs)]
    folder.mkdir()
    each = -(-len(rows) // files)
    for i in range(files):
        table = datasets.Dataset.from_list(rows[i * each : (i + 1) * each], features=features())
        table.to_parquet(folder / f"train-{i:05}-of-{files:05}.parquet")
    return folder


def write_imagefolder(pairs, folder):
    """As Hugging Face documents it: columns that end in `_file_name` become images."""
    shutil.copytree(Path(pairs).parent, folder, ignore=shutil.ignore_patterns("pairs.jsonl"))
    lines = []
    for value in values(pairs):
        references = [
            {"image_file_name": r["image"], "mask_file_name": r["mask"], "class_name": r["class_name"]}
            for r in value["references"]
        ]
        pictures = {f"{name}_file_name": value[name] for name in ("winner", "loser", "prior")}
        meta = json.dumps(value["meta"])
        lines.append(json.dumps({"prompt": value["prompt"], "references": references, **pictures, "meta": meta}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_format(kind, pairs, folder):
    if kind == "shards":
        folder.mkdir()
        write_shards(load_pairs(pairs, progress=False), folder, 3, progress=False)
        return folder
    return write_parquet(pairs, folder) if kind == "parquet" else write_imagefolder(pairs, folder)


def assert_same_sample(actual, expected):
    for name, value in dataclasses.asdict(expected).items():
        other = getattr(actual, name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(other, value), name
        elif isinstance(value, tuple):
            assert len(other) == len(value) and all(map(torch.equal, other, value)), name
        elif name != "index":
            assert other == value, name


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_has_the_same_pairs(tiny_pairs, tmp_path, kind):
    path = write_format(kind, tiny_pairs, tmp_path / kind)
    expected, actual = (load_pairs(p, progress=False) for p in (tiny_pairs, path))
    assert len(actual) == len(expected) == 8
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours.prompt, ours.meta, ours.per_subject) == (theirs.prompt, theirs.meta, theirs.per_subject)
        assert [r.class_name for r in ours.references] == [r.class_name for r in theirs.references]
        fields = {**ours.image_fields, **ours.mask_fields}, {**theirs.image_fields, **theirs.mask_fields}
        assert {n: checksum(f) for n, f in fields[0].items()} == {n: checksum(f) for n, f in fields[1].items()}
    pairs = [PairDataset(records, **SIZES) for records in (actual, expected)]
    for i in range(8):
        assert_same_sample(pairs[0][i], pairs[1][i])
    assert_same_sample(pickle.loads(pickle.dumps(pairs[0]))[3], pairs[1][3])  # as a worker is given it


@pytest.mark.parametrize("kind", FORMATS)
def test_training_gives_the_same_numbers(config, tiny_pairs, tmp_path, kind):
    """Batches, exact resume in the middle of an epoch, loader's workers and cache: to the bit as from pairs.jsonl."""
    config.max_steps, config.checkpoint_every = 5, 3
    config.optim.scheduler, config.optim.warmup_steps = "constant", 0
    config.data.cache = str(tmp_path / "cache")
    expected = train(config)
    encoded = sorted((tmp_path / "cache").rglob("*.safetensors"))
    path = write_format(kind, tiny_pairs, tmp_path / kind)
    config.data = dataclasses.replace(config.data, train=str(path), num_workers=2)
    config.output_dir, config.max_steps = str(tmp_path / "other"), 3
    train(config)
    config.data.train = str(path.rename(tmp_path / "moved"))
    config.max_steps, config.resume = 5, "latest"
    assert_same(train(config), expected)
    assert sorted((tmp_path / "cache").rglob("*.safetensors")) == encoded, "the cache knows images by content"


def test_other_shards_are_not_resumed(config, tiny_pairs, tmp_path):
    path = write_format("shards", tiny_pairs, tmp_path / "shards")
    config.data.train, config.max_steps = str(path), 2
    train(config)
    for shard in path.iterdir():
        shard.unlink()
    write_shards(load_pairs(tiny_pairs, progress=False)[::-1], path, 3, progress=False)
    with pytest.raises(ValueError, match="data.train \\(its content\\)"):
        train(dataclasses.replace(config, max_steps=3, resume="latest"))


@pytest.mark.parametrize("kind", FORMATS)
def test_the_digest_tells_other_records_apart(tiny_pairs, tmp_path, kind):
    """A letter of a prompt is enough, where all sizes stay."""
    path = write_format(kind, tiny_pairs, tmp_path / "data")
    first = content_checksum(path)
    copied = Path(shutil.copytree(path, tmp_path / "copy"))
    assert content_checksum(copied) == first, "wherever it lies"
    prompt = values(tiny_pairs)[5]["prompt"]
    changed = Path(tiny_pairs).read_text().replace(json.dumps(prompt), json.dumps(prompt[:-1] + "#"))
    other = Path(shutil.copytree(Path(tiny_pairs).parent, tmp_path / "other")) / "pairs.jsonl"
    other.write_text(changed)
    assert content_checksum(write_format(kind, other, tmp_path / "changed")) != first


# shards


@pytest.fixture
def shards(tiny_pairs, tmp_path):
    return write_format("shards", tiny_pairs, tmp_path / "shards")


def test_webdataset_reads_the_shards(shards, tiny_pairs):
    """The library itself: keys, the record, and decoded images."""
    names = sorted(map(str, shards.glob("*.tar")))
    assert [Path(name).name for name in names] == [f"pairs-0000{i}-of-00003.tar" for i in range(3)]
    samples = list(webdataset.WebDataset(names, shardshuffle=False).decode("pil"))
    assert [s["__key__"] for s in samples] == [f"{i:08}" for i in range(8)]
    for sample, value in zip(samples, values(tiny_pairs), strict=True):
        assert sample["json"]["prompt"] == value["prompt"]
        assert sample[sample["json"]["winner"]].size == (96, 96)
        assert {r["class_name"] for r in sample["json"]["references"]} == {r["class_name"] for r in value["references"]}


def test_the_same_records_give_the_same_bytes(shards, tmp_path):
    again = tmp_path / "again"
    again.mkdir()
    write_shards(load_pairs(shards, progress=False), again, 3, progress=False)
    assert [p.read_bytes() for p in sorted(again.iterdir())] == [p.read_bytes() for p in sorted(shards.iterdir())]
    assert content_checksum(again) == content_checksum(shards)


@pytest.mark.parametrize("pattern", ["pairs-*.tar", "pairs-0000{0..2}-of-00003.tar", "pairs-0000[0-2]-of-00003.tar"])
def test_patterns(shards, pattern):
    assert [s.file.name[10] for s in find_sources(shards / pattern)] == ["0", "1", "2"]
    with pytest.raises(FileNotFoundError, match="no such dataset: nothing matches"):
        find_sources(shards / pattern.replace("pairs", "others"))


def test_a_missing_shard_is_noticed(shards):
    (shards / "pairs-00001-of-00003.tar").unlink()
    with pytest.raises(FileNotFoundError, match="lacks pairs-00001-of-00003.tar of 3 files"):
        load_pairs(shards)
    with pytest.raises(FileNotFoundError, match="nothing matches .*pairs-00001-of-00003.tar"):
        load_pairs(shards / "pairs-{00000..00002}-of-00003.tar")


def members(shard):
    with tarfile.open(shard) as tar:
        return [(m, tar.extractfile(m).read()) for m in tar]


def rewritten(shard, contents, mode="w"):
    with tarfile.open(shard, mode) as tar:
        for member, data in contents:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def cut_at(share):
    def damage(shard):
        shard.write_bytes(shard.read_bytes()[: int(shard.stat().st_size * share)])

    return damage


def cut_between_members(shard):
    with tarfile.open(shard) as tar:
        last = list(tar)[-7]
    shard.write_bytes(shard.read_bytes()[: last.offset])


def without(ending):
    return lambda shard: rewritten(shard, [(m, d) for m, d in members(shard) if m.name != f"00000001.{ending}"])


def compressed(shard):
    rewritten(shard, members(shard), "w:gz")


def twice(shard):
    contents = members(shard)
    rewritten(shard, [*contents, contents[-1]])


def linked(shard):
    contents = members(shard)
    contents[-1][0].type, contents[-1][0].linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(shard, "w") as tar:
        for member, data in contents:
            tar.addfile(member, io.BytesIO(data) if member.isreg() else None)


def with_readme(shard):
    rewritten(shard, [*members(shard), (tarfile.TarInfo("README"), b"hello")])


SHARD_DAMAGE = {
    "cut within an image": (cut_at(0.5), 1, "file", "is cut, compressed or damaged"),
    "cut between two members": (cut_between_members, 1, "file", "the end mark is missing"),
    "empty": (lambda shard: shard.write_bytes(b""), 1, "file", "is cut, compressed or damaged"),
    "not a tar": (lambda shard: shard.write_bytes(b"x" * 9999), 1, "file", "is cut, compressed or damaged"),
    "compressed": (compressed, 1, "file", "as a tar that is not compressed"),
    "no record": (without("json"), 2, "json", "00000001 has no 00000001.json"),
    "no winner": (without("winner.png"), 2, "winner", "the shard has no member 00000001.winner.png"),
    "a member twice": (twice, 3, "winner.png", "stands twice"),
    "a link": (linked, 3, "winner.png", "is a link or has holes"),
    "a member of no pair": (with_readme, 1, "README", "belongs to no pair"),
}


@pytest.mark.parametrize("case", SHARD_DAMAGE)
def test_damaged_shards(shards, case):
    damage, line, field, message = SHARD_DAMAGE[case]
    damage(shards / "pairs-00000-of-00003.tar")
    _, problems = parse_pairs(shards)
    found = [(p.file.name, p.line, p.field) for p in problems if message in str(p)]
    assert ("pairs-00000-of-00003.tar", line, field) in found, problems
    assert all(p.remedy for p in problems)
    content_checksum(shards)


def test_a_member_that_is_lost_later(shards):
    """A shard that is cut after it was listed is an error when its image is read, not a shorter image."""
    record = load_pairs(shards, progress=False)[-1]
    cut_at(0.3)(shards / "pairs-00002-of-00003.tar")
    with pytest.raises(OSError, match="ends within 00000007"):
        record.winner.open("rb")


# tables


def test_priors_of_each_subject_in_a_table(tiny_pairs, tmp_path):
    rows = [row(tiny_pairs.parent, value) for value in values(tiny_pairs)]
    for r in rows:
        r["prior"] = [r["prior"], r["prior"]]
    table = datasets.Dataset.from_list(rows, features=features(datasets.List(datasets.Image())))
    table.to_parquet(tmp_path / "pairs.parquet")
    records, problems = parse_pairs(tmp_path / "pairs.parquet")
    assert not problems and all(r.per_subject and len(r.prior) == 2 for r in records)
    assert PairDataset(records, **SIZES)[0].prior.shape == (2, 96, 96)


def test_problems_of_a_table_name_its_rows(tiny_pairs, tmp_path):
    rows = [row(tiny_pairs.parent, value) for value in values(tiny_pairs)]
    rows[1]["winner"] = None
    rows[2]["prompt"] = " "
    rows[3]["loser"] = {"bytes": b"no image", "path": None}
    rows[4]["references"][1]["image"] = None
    rows[5]["meta"] = "{"
    for r in rows:
        r["looser"] = 1
    file = tmp_path / "pairs.parquet"
    datasets.Dataset.from_list(rows, features=datasets.Features({**features(), "looser": datasets.Value("int64")})).to_parquet(
        file
    )
    with pytest.raises(DatasetError) as error:
        load_pairs(file, progress=False)
    found = [(p.line, p.field) for p in error.value.problems]
    assert found == [(1, "looser"), (2, "winner"), (3, "prompt"), (4, "loser"), (5, "references[1].image"), (6, "meta")]
    assert f"{file}, row 4, loser cannot be read as an image" in str(error.value)


def test_damaged_tables(tiny_pairs, tmp_path):
    folder = write_parquet(tiny_pairs, tmp_path / "parquet")
    (first, second) = sorted(folder.glob("*.parquet"))
    second.write_bytes(second.read_bytes()[:-100])
    with pytest.raises(DatasetError, match=r"00001-of-00002.parquet:1: file: cannot be read as a table \(.+\); write it again"):
        load_pairs(folder, progress=False)
    second.unlink()
    with pytest.raises(FileNotFoundError, match="lacks train-00001-of-00002.parquet of 2"):
        load_pairs(folder)
    first.rename(folder / "train-00000-of-00001.parquet")
    shutil.copy(folder / "train-00000-of-00001.parquet", folder / "test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"holds several splits \(test, train\); name one"):
        load_pairs(folder)
    assert len(load_pairs(folder / "train-*.parquet", progress=False)) == 4
    images = write_imagefolder(tiny_pairs, tmp_path / "imagefolder")
    (images / "0000_winner.png").unlink()
    with pytest.raises(DatasetError, match=r"metadata.jsonl:1: winner: no such file: .*0000_winner.png"):
        load_pairs(images, progress=False)


def test_what_is_missing_is_named(shards, tiny_pairs, tmp_path, monkeypatch):
    parquet = write_parquet(tiny_pairs, tmp_path / "parquet")
    for module, load in {
        "pyarrow": lambda: load_pairs(parquet),
        "braceexpand": lambda: find_sources(shards / "pairs-{0..1}.tar"),
        "webdataset": lambda: write_shards(load_pairs(tiny_pairs, progress=False), tmp_path, 3),
    }.items():
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ModuleNotFoundError, match=rf"needs {module}, .*pip install 'focusdpo\[data\]'"):
            load()
    assert len(load_pairs(shards, progress=False)) == 8, "reading shards needs no package"


# the command


def test_shard_command(tiny_pairs, tmp_path, caplog):
    from focusdpo.commands import cli

    out = tmp_path / "out"
    arguments = ["data", "shard", str(tiny_pairs), str(out), "--pairs_per_shard", "3"]
    with caplog.at_level(logging.INFO):
        cli.main(arguments)
    assert f"wrote 8 pairs to 3 shards in {out}" in caplog.text
    assert len(load_pairs(out, progress=False)) == 8
    with pytest.raises(SystemExit, match="out_dir: .* holds an earlier run .*--overwrite true"):
        cli.main(arguments)
    cli.main([*arguments[:-1], "8", "--overwrite", "true"])
    assert sorted(p.name for p in out.glob("*.tar")) == ["pairs-00000-of-00001.tar"], "earlier shards are gone"
    with pytest.raises(SystemExit, match="out_dir: .* holds the source itself"):
        cli.main(["data", "shard", str(out), str(out), "--overwrite", "true"])
    assert len(load_pairs(out, progress=False)) == 8
    with pytest.raises(SystemExit, match="pairs_per_shard: got 0"):
        cli.main([*arguments[:-1], "0"])


def test_an_interrupted_shard_is_no_shard(tiny_pairs, tmp_path):
    records = load_pairs(tiny_pairs, progress=False)
    records[4] = dataclasses.replace(records[4], winner=tmp_path / "none.png")
    with pytest.raises(FileNotFoundError):
        write_shards(records, tmp_path, 3, progress=False)
    assert [p.name for p in tmp_path.glob(".*")] == [] and [p.name for p in tmp_path.glob("*.tar")] == [
        "pairs-00000-of-00003.tar"
    ]
