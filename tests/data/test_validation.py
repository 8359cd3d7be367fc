"""The validator: every kind of damage is recognised with file, line, field and remedy, and nothing ends in a traceback."""

from __future__ import annotations

import json
import logging
import os
import shutil
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from focusdpo.data import DatasetError, LongestSide, load_pairs
from focusdpo.data.dataset import SizeRules
from focusdpo.data.validation import validate

SIZED = SizeRules(resolution=128, reference_rule=LongestSide(64))
RECORD = {
    "prompt": "a cat and a cup",
    "references": [{"image": "cat.png", "mask": "cat_mask.png", "class_name": "cat"}, {"image": "cup.png"}],
    "winner": "winner.png",
    "loser": "loser.png",
    "prior": "prior.png",
}
W, H = 160, 128
BOX = (40, 24, 104, 88)  # what differs


def noise(seed, width=W, height=H):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def mask(*box, size=(W, H)):
    image = Image.new("L", size)
    if box:
        image.paste(255, box)
    return image


@pytest.fixture
def folder(tmp_path):
    """A dataset of one pair, of which there is nothing to say."""
    winner, loser = noise(0), noise(0)
    loser.paste(noise(1).crop(BOX), BOX)
    images = {"winner": winner, "loser": loser, "prior": mask(*BOX), "cat": noise(2, 64, 48), "cup": noise(3, 32, 32)}
    images["cat_mask"] = mask(8, 8, 56, 40, size=(64, 48))
    for name, image in images.items():
        image.save(tmp_path / f"{name}.png")
    write(tmp_path, [RECORD])
    return tmp_path


def write(folder, lines):
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (folder / "pairs.jsonl").write_bytes(b"\n".join(raw) + b"\n")


def saved(name, make, **changes):
    """Damage by a file of its own: writes it, and has a record name it."""

    def damage(folder):
        made = make(folder)
        if made is not None:
            made.save(folder / name)
        return [{**other_pair(folder), **changes}]

    return damage


def other_pair(folder):
    """A record of other images than the first's, so that no pair is there twice."""
    for name in ("winner", "loser"):
        image = Image.open(folder / f"{name}.png")
        image.transpose(Image.Transpose.ROTATE_180).save(folder / f"{name}2.png")
    left, top, right, bottom = BOX
    mask(W - right, H - bottom, W - left, H - top).save(folder / "prior2.png")
    return {**RECORD, "winner": "winner2.png", "loser": "loser2.png", "prior": "prior2.png"}


def changed(**changes):
    return lambda folder: [{**other_pair(folder), **changes}]


def raw(line):
    return lambda folder: [line]


def without(name):
    return lambda folder: [{key: value for key, value in other_pair(folder).items() if key != name}]


def cut(name, share, **options):
    def make(folder):
        noise(9).save(folder / name, **options)
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return make


def flipped(folder):
    data = bytearray((folder / "winner.png").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (folder / "bad.png").write_bytes(bytes(data))


def bomb(folder):
    """A PNG of a few bytes whose header says 60000 x 60000."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b""))


def turned(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(4).save(folder / "bad.jpg", exif=exif)


def transparent(alpha):
    def make(folder):
        image = noise(5).convert("RGBA")
        image.putalpha(alpha)
        return image

    return make


def frames(folder):
    noise(6).save(folder / "bad.gif", save_all=True, append_images=[noise(7)])


def faint(folder):
    return Image.open(folder / "winner2.png").point(lambda value: value ^ 1)


def in_grey(folder):
    return Image.open(folder / "loser.png").convert("L").transpose(Image.Transpose.ROTATE_180)


def same_pixels(folder):
    Image.open(folder / "winner.png").transpose(Image.Transpose.ROTATE_180).save(folder / "bad.webp", lossless=True)


def reference(image, **others):
    return {"references": [{"image": image, **others}]}


def pairs_of_classes(folder):
    """Twenty references of cats, and one of a cup."""
    records = [RECORD]
    for i in range(10):
        for name in ("winner", "loser"):
            image = Image.open(folder / f"{name}.png").convert("RGB")
            image.putpixel((0, 0), (i, i, i))
            image.save(folder / f"{name}{i}.png")
        cats = [{"image": "cat.png", "class_name": "cat"}, {"image": "cup.png", "class_name": "cat"}]
        records.append({**RECORD, "references": cats, "winner": f"winner{i}.png", "loser": f"loser{i}.png"})
    records[-1]["references"][1]["class_name"] = "cup"
    return records[1:]


def swapped(folder):
    return [{**RECORD, "winner": "loser.png", "loser": "winner.png"}]


E, W_ = "error", "warning"
DAMAGE = {
    # the line
    "not json": (raw(b"{"), E, "line", "is not JSON"),
    "not an object": (raw(b"[1]"), E, "line", "expected a JSON object, got list"),
    "not utf-8": (raw(b'{"prompt": "\xff"}'), E, "line", "is not UTF-8 (byte 12)"),
    "a huge number": (raw(b'{"meta": ' + b"1" * 5000 + b"}"), E, "line", "is not JSON"),
    "nested without end": (raw(b"[" * 200_000), E, "line", "is not JSON"),
    "a field twice": (raw(b'{"prompt": "a", "prompt": "b"}'), E, "prompt", "stands twice in one object"),
    # fields
    "no loser": (without("loser"), E, "loser", "is missing"),
    "no prior": (without("prior"), E, "prior", "is missing"),
    "unknown field": (changed(looser="x"), E, "looser", "is not a field; known are prompt"),
    "no prompt": (changed(prompt=None), E, "prompt", "expected a text that is not empty, got None"),
    "blank prompt": (changed(prompt=" "), E, "prompt", "expected a text that is not empty"),
    "half a surrogate pair": (changed(prompt="\ud83d cat"), E, "prompt", "holds half of a surrogate pair"),
    "no references": (changed(references=[]), E, "references", "got 0 items"),
    "seven references": (changed(references=[{"image": "cat.png"}] * 7), E, "references", "got 7 items"),
    "references no list": (changed(references="cat.png"), E, "references", "got str"),
    "reference no object": (changed(references=["cat.png"]), E, "references[0]", "expected an object, got 'cat.png'"),
    "reference without image": (changed(references=[{"mask": "cat_mask.png"}]), E, "references[0].image", "is missing"),
    "unknown reference field": (changed(**reference("cat.png", box=1)), E, "references[0].box", "is not a field"),
    "class name": (changed(**reference("cat.png", class_name=3)), E, "references[0].class_name", "expected a text"),
    "path of another type": (changed(winner=5), E, "winner", "expected the path of an image, got 5"),
    "path with a zero": (changed(winner="a\0b"), E, "winner", "expected the path of an image"),
    "path that is no text": (changed(winner="\udc80.png"), E, "winner", "holds half of a surrogate pair"),
    "number of priors": (changed(prior=["prior.png"]), E, "prior", "one per reference (2), got 1"),
    "meta": (changed(meta=1), E, "meta", "expected an object, got int"),
    # files
    "no winner": (changed(winner="none.png"), E, "winner", "no such file"),
    "no such loser": (changed(loser="none.png"), E, "loser", "no such file"),
    "no such prior": (changed(prior="none.png"), E, "prior", "no such file"),
    "no such reference": (changed(**reference("none.png")), E, "references[0].image", "no such file"),
    "no such mask": (changed(**reference("cat.png", mask="none.png")), E, "references[0].mask", "no such file"),
    "a path too long": (changed(winner="x" * 5000), E, "winner", "cannot be read as an image"),
    "not an image": (changed(winner="pairs.jsonl"), E, "winner", "cannot be read as an image (of no known format)"),
    "zero bytes": (saved("bad.png", lambda f: (f / "bad.png").touch(), winner="bad.png"), E, "winner", "no known format"),
    "a folder": (changed(winner="."), E, "winner", "it is no file"),
    "a pipe": (saved("", lambda f: os.mkfifo(f / "pipe"), winner="pipe"), E, "winner", "it is no file"),
    "cut PNG": (saved("", cut("bad.png", 0.5), winner="bad.png"), E, "winner", "cannot be read as an image"),
    "cut JPEG": (saved("", cut("bad.jpg", 0.9), loser="bad.jpg"), E, "loser", "cannot be read as an image"),
    "cut WebP": (saved("", cut("bad.webp", 0.7), loser="bad.webp"), E, "loser", "cannot be read as an image"),
    "cut prior": (saved("", cut("bad.png", 0.5), prior="bad.png"), E, "prior", "cannot be read as an image"),
    "a flipped byte": (saved("", flipped, winner="bad.png"), E, "winner", "cannot be read as an image"),
    "a bomb": (saved("", bomb, winner="bad.png"), E, "winner", "more than 64 million pixels"),
    "floating point": (
        saved("bad.tiff", lambda f: Image.fromarray(np.ones((H, W), np.float32)), winner="bad.tiff"),
        E, "winner", "mode F, more than 8 bits",
    ),
    # sizes
    "size of loser": (saved("bad.png", lambda f: noise(4, 96, 64), loser="bad.png"), E, "loser", "is 96x64 pixels, but winner is"),
    "size of prior": (saved("bad.png", lambda f: mask(size=(96, 64)), prior="bad.png"), E, "prior", "is 96x64 pixels, but winner"),
    "size of mask": (changed(**reference("cup.png", mask="cat_mask.png")), E, "references[0].mask", "is 64x48 pixels, but references[0].image"),
    "turned by its EXIF": (saved("", turned, loser="bad.jpg"), E, "loser", f"is {H}x{W} pixels, but winner is {W}x{H}"),
    # modes
    "a gray loser": (saved("bad.png", in_grey, loser="bad.png"), W_, "loser", "has mode L, the winner RGB"),
    "CMYK": (saved("bad.jpg", lambda f: noise(3).convert("CMYK"), **reference("bad.jpg")), W_, "references[0].image", "has mode CMYK"),
    "see-through winner": (saved("bad.png", transparent(mask(*BOX)), winner="bad.png"), W_, "winner", "has transparent parts"),
    "an animation": (saved("", frames, **reference("bad.gif")), W_, "references[0].image", "has several frames"),
    "one colour": (saved("bad.png", lambda f: Image.new("RGB", (W, H), "red"), **reference("bad.png")), W_, "references[0].image", "is of one colour"),
    # subjects
    "empty mask": (saved("bad.png", lambda f: mask(size=(32, 32)), **reference("cup.png", mask="bad.png")), E, "references[0].mask", "is empty"),
    "mask of a few tokens": (saved("bad.png", lambda f: mask(4, 4, 5, 6, size=(32, 32)), **reference("cup.png", mask="bad.png")), E, "references[0].mask", "marks 2 pixels, 2.0 tokens"),
    "invisible cut-out": (saved("bad.png", transparent(0), **reference("bad.png")), E, "references[0].image", "shows no subject"),
    "winner as reference": (changed(**reference("winner2.png")), W_, "references[0].image", "is the same file as winner"),
    "one reference twice": (changed(references=[{"image": "cat.png"}] * 2), W_, "references[1].image", "is the same file as references[0].image"),
    # priors
    "empty prior": (saved("bad.png", lambda f: mask(), prior="bad.png"), E, "prior", "is empty"),
    "all priors empty": (saved("bad.png", lambda f: mask(), prior=["bad.png"] * 2), E, "prior", "every subject's mask is empty"),
    "full prior": (saved("bad.png", lambda f: mask(0, 0, W, H), prior="bad.png"), W_, "prior", "marks every pixel"),
    "tiny prior": (saved("bad.png", lambda f: mask(80, 80, 82, 82), prior="bad.png"), W_, "prior", "marks 4 pixels"),
    "one prior for two": (changed(prior=["prior2.png"] * 2), W_, "prior[1]", "marks the same pixels as prior[0]"),
    "photo as prior": (saved("bad.png", lambda f: noise(8).convert("L"), prior="bad.png"), W_, "prior", "as a photo is"),
    "prior larger than the difference": (saved("bad.png", lambda f: mask(4, 4, W - 4, H), prior="bad.png", loser="small.png"), W_, "prior", "is larger than the difference"),
    "prior smaller than the difference": (saved("bad.png", lambda f: mask(56, 40, 80, 56), prior="bad.png"), W_, "prior", "is smaller than the difference"),
    "prior elsewhere": (saved("bad.png", lambda f: mask(0, 0, 32, 32), prior="bad.png"), W_, "prior", "hardly differ where it marks"),
    # pairs
    "loser is winner": (changed(loser="winner2.png"), E, "loser", "has the same pixels as the winner"),
    "loser is winner in another format": (saved("", same_pixels, loser="bad.webp"), E, "loser", "has the same pixels as the winner"),
    "loser hardly differs": (saved("bad.png", lambda f: faint(f), loser="bad.png"), W_, "prior", "hardly differ"),
    "the same pair": (lambda folder: [RECORD], W_, "line", "is the same pair as"),
    "the opposite pair": (swapped, W_, "line", "prefers what"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_recognised(folder, case):
    damage, severity, field, message = DAMAGE[case]
    other_pair(folder)
    small = Image.open(folder / "winner2.png")
    small.paste(noise(5, 24, 24), (80, 64))
    small.save(folder / "small.png")
    write(folder, [RECORD, b"", *damage(folder)])
    report = validate(folder, "full", SIZED, progress=False)
    problems = [*report.errors, *report.warnings]
    assert (severity, 3, field) in [(p.severity, p.line, p.field) for p in problems if message in str(p)], str(report)
    assert {p.line for p in problems} == {3}, "the sound pair is not blamed"
    assert all(p.file == folder / "pairs.jsonl" and p.remedy for p in problems)
    assert report.may_start == (severity == W_) == (not report.errors)
    if severity == E:
        with pytest.raises(DatasetError, match=r"pairs.jsonl:3: "):
            load_pairs(folder, progress=False)
    else:
        assert len(load_pairs(folder, progress=False)) == 2
    listed = json.loads(json.dumps(report.as_json()))["problems"]
    assert {(severity, 3, field)} <= {(p["severity"], p["line"], p["field"]) for p in listed}


def test_there_are_forty_kinds():
    assert len(DAMAGE) >= 40


def test_nothing_to_say_of_a_sound_dataset(folder, tiny_pairs):
    for path, pairs in ((folder, 1), (tiny_pairs, 8)):
        report = validate(path, "full", SIZED, progress=False)
        assert (report.errors, report.warnings, report.pairs) == ([], [], pairs), str(report)


def test_compression_is_no_difference(folder):
    """JPEG changes all pixels a little: neither prior nor loser is blamed."""
    for name in ("winner", "loser"):
        smooth = Image.open(folder / f"{name}.png").resize((20, 16)).resize((W, H), Image.Resampling.BICUBIC)
        smooth.save(folder / f"{name}.jpg", quality=85)
    write(folder, [{**RECORD, "winner": "winner.jpg", "loser": "loser.jpg"}])
    assert validate(folder, "full", SIZED, progress=False).warnings == []


def test_classes_out_of_balance(folder):
    write(folder, [RECORD, *pairs_of_classes(folder)])
    report = validate(folder, "full", SIZED, progress=False)
    assert [p.message for p in report.warnings] == ["classes are out of balance: 20 references of cat, 1 of cup"]
    assert report.classes == {"cat": 20, "cup": 1} and report.unnamed == 1


def test_counts_per_layout(folder):
    write(folder, [RECORD, {**other_pair(folder), **reference("cat.png")}, {**RECORD, "winner": "none.png"}])
    report = validate(folder, "full", SIZED, progress=False)
    layouts = {(sizes.target, sizes.references): count for sizes, count in report.layouts.items()}
    assert layouts == {((128, 96), ((64, 48), (64, 64))): 1, ((128, 96), ((64, 48),)): 1}, "the broken pair is not counted"
    assert "layout: 1 of 128x96 px with references of 64x48 px" in str(report)


def test_warnings_are_logged_and_do_not_stop(folder, caplog):
    write(folder, [RECORD] * 15)
    with caplog.at_level(logging.WARNING):
        assert len(load_pairs(folder, progress=False)) == 15
    assert "14 warnings" in caplog.text and "and 4 more" in caplog.text
    assert caplog.text.count("is the same pair") == 10


def run(*arguments):
    command = [sys.executable, "-m", "focusdpo", "data", "validate", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_command(folder, tmp_path):
    """The exit status says whether training may start; the report is text, and JSON in a file or instead."""
    report = tmp_path / "report.json"
    sound = run(folder, "--json", report)
    assert sound.returncode == 0, sound.stderr
    assert "1 sound pair, 0 errors, 0 warnings: training may start" in sound.stdout
    assert json.loads(report.read_text())["may_start"] is True
    write(folder, [RECORD, {**RECORD, "winner": "\udc80.png", "prompt": "\ud83d"}, {**RECORD, "winner": "none.png"}])
    broken = run(folder, "--json", "-", "--resolution", "128")
    assert broken.returncode == 1 and "Traceback" not in broken.stderr
    found = json.loads(broken.stdout)
    assert (found["may_start"], found["errors"], found["pairs"]) == (False, 3, 1)
    assert found["problems"][-1] | {"file": ""} == {
        "file": "", "line": 3, "field": "winner", "message": f"no such file: {folder / 'none.png'}",
        "remedy": "copy it there, or correct the path", "severity": "error",
    }  # fmt: skip
    assert found["layouts"][0]["target"] == [128, 96]
    assert run(folder).stdout.count("pairs.jsonl:") == 3


def test_a_name_that_is_no_text(folder):
    """A folder whose name is not UTF-8 is printable, too."""
    renamed = folder.rename(os.fsdecode(os.fsencode(folder) + b"\xff"))
    write(renamed, [RECORD, {**RECORD, "winner": "none.png"}])
    report = validate(renamed, "full", SIZED, progress=False)
    assert report.pairs == 1 and len(report.errors) == 1
    assert "\\udcff" in str(report).encode("utf-8").decode()


TEXTS = (
    st.sampled_from(["cat.png", "winner.png", "prior.png", "", "..", "\0", "\ud800", "/", "cat.png/x", "~", "x" * 300])
    | st.text()
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["image", "mask", "class_name"]) | TEXTS, inner, max_size=4),
    max_leaves=6,
)  # fmt: skip
RECORDS = st.fixed_dictionaries(
    {}, optional={name: st.just(value) | VALUES for name, value in RECORD.items()} | {"meta": VALUES}
)
FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(st.lists(RECORDS | VALUES | st.binary(max_size=40), min_size=1, max_size=3))
def test_no_record_ends_in_a_traceback(folder, lines):
    write(folder, lines)
    report = validate(folder, "full", SIZED, progress=False)
    printed = [str(report), *map(str, report.errors), json.dumps(report.as_json())]
    assert all(text.encode("utf-8") for text in printed), "what is quoted may be no text, and is printable all the same"
    lines_found = (folder / "pairs.jsonl").read_bytes().split(b"\n")
    assert report.errors or report.pairs == sum(bool(line.strip()) for line in lines_found)


@FUZZ
@given(
    st.sampled_from(["winner", "loser", "prior", "cat", "cat_mask"]),
    st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "TGA", "ICO", "PCX", "SGI", "DDS", "JPEG2000"]),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=8),
    st.floats(0, 1),
)
def test_no_damaged_image_ends_in_a_traceback(folder, name, kind, edits, share):
    """In any of Pillow's formats, with bytes changed, or the end cut off."""
    whole = folder / "whole"
    whole.mkdir(exist_ok=True)
    if not (whole / name).exists():
        shutil.copy(folder / f"{name}.png", whole / name)
    Image.open(whole / name).convert("L" if kind == "GIF" else "RGB").save(folder / f"{name}.png", format=kind)
    data = bytearray((folder / f"{name}.png").read_bytes())
    for position, value in edits:
        data[position % len(data)] = value
    (folder / f"{name}.png").write_bytes(data[: max(int(len(data) * (0.5 + share)), 1)])
    try:
        validate(folder, "full", SIZED, progress=False)
    finally:
        shutil.copy(whole / name, folder / f"{name}.png")
