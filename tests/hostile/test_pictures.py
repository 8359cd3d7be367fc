"""Pictures as strangers have them: turned, deep, cut out, huge, endless, or no files at all."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from focusdpo.building.scenes import load_scenes
from focusdpo.data import DatasetError, LongestSide, PairDataset, PairRecord, Reference, load_pairs
from focusdpo.data.checks import check_pair
from focusdpo.data.dataset import SizeRules
from focusdpo.data.images import (
    MAX_PIXELS,
    ROOM,
    ImageError,
    attempt,
    inside,
    on_white,
    read_alpha,
    read_gray,
    read_header,
    read_image,
    read_mask,
    read_photo,
    read_size,
)
from focusdpo.data.shards import image_suffix, write_shards
from focusdpo.data.validation import validate

SIZES = {"resolution": 64, "reference_rule": LongestSide(64)}
TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}  # what EXIF's orientations do, in numpy's words
FORMS = {
    "jpg": {"quality": 100, "subsampling": 0},
    "png": {},
    "webp": {"lossless": True, "exact": True},
    "tiff": {},
    "mpo": {"format": "MPO", "save_all": True, "append_images": [Image.new("RGB", (8, 8))], "quality": 100},
}


def pixels(width=45, height=30):
    """Smooth, so that JPEG changes little, and of another colour in every corner."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([x, y, 255 - x], -1).astype(np.uint8)


def exif_of(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("orientation", TURNS)
def test_every_orientation_is_turned_once(tmp_path, form, orientation, monkeypatch):
    file = tmp_path / f"photo.{form}"
    Image.fromarray(pixels()).save(file, exif=exif_of(orientation), **FORMS[form])
    expected = TURNS[orientation](pixels()).astype(int)
    shown = np.asarray(read_photo(file)).astype(int)
    assert shown.shape == expected.shape
    assert np.abs(shown - expected).max() <= (0 if form in ("png", "webp", "tiff") else 16)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("pixels were decoded"))
    header = read_header(file)
    assert header.size == expected.shape[1::-1] and not header.animated


@pytest.mark.parametrize("mode", ["L", "I;16", "RGBA", "P", "1"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_turned_tiffs_of_every_mode(tmp_path, mode, orientation):
    image = Image.fromarray(pixels()).convert("L") if mode == "I;16" else Image.fromarray(pixels()).convert(mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    image.save(tmp_path / "m.tiff", exif=exif_of(orientation))
    assert (
        read_size(tmp_path / "m.tiff") == read_photo(tmp_path / "m.tiff").size == ((30, 45) if orientation == 6 else (45, 30))
    )


def png_chunks(data):
    position, chunks = 8, []
    while position < len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        chunks.append(data[position : position + length + 12])
        position += length + 12
    return chunks


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_exif_behind_the_pixels_of_a_png(tmp_path):
    """Which the format allows: the header has to look there."""
    file = tmp_path / "late.png"
    Image.fromarray(pixels()).save(file, exif=exif_of(6))
    chunks = png_chunks(file.read_bytes())
    late = [c for c in chunks if c[4:8] == b"eXIf"]
    assert late
    kept = [c for c in chunks if c[4:8] != b"eXIf"]
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join([*kept[:-1], *late, kept[-1]]))
    assert read_size(file) == read_photo(file).size == (30, 45)


# masks


def shape(low, high, dtype=np.uint8):
    values = np.full((8, 8), low, dtype)
    values[2:5, 1:4] = high
    return values


SHAPE = shape(0, 1).astype(bool)


def clear_around(inner, outer, alpha_out=0, alpha_in=255):
    """RGBA: the shape in one gray, what is around it in another."""
    colour = shape(outer, inner)
    return np.dstack([colour, colour, colour, shape(alpha_out, alpha_in)])


def palette(transparent):
    image = Image.new("P", (8, 8))
    image.putdata(list(shape(0, 1).reshape(-1)))
    image.putpalette([255, 255, 255, 0, 0, 0])  # dark on white
    image.info["transparency"] = transparent
    return image


MASKS = {
    "8 bits, 0 and 1": (Image.fromarray(shape(0, 1)), "png"),
    "16 bits, 0 and 1": (Image.fromarray(shape(0, 1, np.uint16)), "png"),
    "16 bits, 0 and 255": (Image.fromarray(shape(0, 255, np.uint16)), "png"),
    "16 bits, 0 and 65535": (Image.fromarray(shape(0, 65535, np.uint16)), "png"),
    "16 bits, faint and bright": (Image.fromarray(shape(100, 300, np.uint16)), "png"),
    "16 bits of a TIFF": (Image.fromarray(shape(0, 1, np.uint16)), "tiff"),
    "32 bits, 0 and 1": (Image.fromarray(shape(0, 1, np.int32)), "tiff"),
    "32 bits, 0 and 255": (Image.fromarray(shape(0, 255, np.int32)), "tiff"),
    "32 bits, 0 and 65535": (Image.fromarray(shape(0, 65535, np.int32)), "tiff"),
    "1 bit": (Image.fromarray(shape(0, 255)).convert("1"), "png"),
    "a cut-out in colours": (Image.fromarray(clear_around(77, 200)), "png"),
    "a dark silhouette on clear white": (Image.fromarray(clear_around(0, 255)), "png"),
    "a dark silhouette in WebP": (Image.fromarray(clear_around(0, 255)), "webp"),
    "white on clear black": (Image.fromarray(clear_around(255, 0)), "png"),
    "all white, the shape in the alpha": (Image.fromarray(clear_around(255, 255)), "png"),
    "soft alpha of 0 and 1": (Image.fromarray(clear_around(0, 255, 0, 1)), "png"),
    "opaque RGBA": (Image.fromarray(clear_around(255, 0, 255, 255)), "png"),
    "evenly half clear RGBA": (Image.fromarray(clear_around(255, 0, 128, 128)), "png"),
    "LA": (Image.fromarray(clear_around(0, 255)).convert("LA"), "png"),
    "P with a clear colour": (palette(0), "png"),
    "P with a list of alphas": (palette(bytes([0, 255])), "png"),
    "L with a clear gray": (Image.fromarray(shape(255, 0)), "png", {"transparency": 255}),
    "16 bits with a clear gray": (Image.fromarray(shape(60000, 0, np.uint16)), "png", {"transparency": 60000}),
    "GIF with a clear colour": (palette(0), "gif"),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_mark_the_shape(tmp_path, name):
    image, form, *options = MASKS[name]
    file = tmp_path / f"mask.{form}"
    lossless = {"lossless": True, "exact": True} if form == "webp" else {}
    image.save(file, **lossless, **(options[0] if options else {}))
    assert np.array_equal(inside(read_gray(file)), SHAPE)
    assert np.array_equal(np.asarray(read_mask(file)) == 255, SHAPE)
    assert read_header(file, mask=True).size == (8, 8)


def test_clear_all_over_marks_nothing(tmp_path):
    Image.fromarray(clear_around(255, 255, 0, 0)).save(tmp_path / "m.png")
    assert not inside(read_gray(tmp_path / "m.png")).any()


def test_photos_of_unknown_range_are_refused(tmp_path):
    for name, kind in (("i", np.int32), ("f", np.float32)):
        Image.fromarray(shape(0, 1, kind)).save(tmp_path / f"{name}.tiff")
        for read in (read_photo, read_header):
            with pytest.raises(ImageError, match=f"mode {name.upper()}, more than 8 bits of unknown range; save it"):
                read(tmp_path / f"{name}.tiff")
    with pytest.raises(ImageError, match="mode F"):
        read_gray(tmp_path / "f.tiff")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_on_white_is_compositing(tmp_path, mode):
    """In strips of rows, and as the formula has it."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (600, 20, 4), dtype=np.uint8)).convert(mode)
    rgba = np.asarray(image.convert("RGBA")).astype(float)
    alpha = rgba[..., 3:] / 255
    assert np.abs(np.asarray(on_white(image)) - (rgba[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1.01


def test_alpha_of_a_cut_out(tmp_path):
    Image.fromarray(clear_around(0, 255)).convert("LA").save(tmp_path / "c.png")
    assert np.array_equal(np.asarray(read_alpha(tmp_path / "c.png")) == 255, SHAPE)
    Image.fromarray(shape(0, 1)).save(tmp_path / "o.png")
    assert read_alpha(tmp_path / "o.png") is None


# what is no file


def no_files(folder):
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    (folder / "link.png").symlink_to(folder / "pipe.png")
    (folder / "device.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket.png"))
    return [folder / f"{name}.png" for name in ("pipe", "folder", "link", "device", "socket")]


READERS = (read_header, read_size, read_photo, read_image, read_gray, read_mask, read_alpha)


@pytest.mark.timeout(20)
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_what_is_no_file_is_refused_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # sockets' names are short
    sound = tmp_path / "sound.png"
    Image.fromarray(pixels()).save(sound)
    for file in no_files(Path()):
        for read in READERS:
            with pytest.raises(ImageError, match="it is no file; name an image"):
                read(file)
        record = PairRecord(tmp_path / "x", 1, "a", (Reference(sound),), file, sound, (sound,), False)
        found = {p.field: str(p) for p in check_pair(record, "full").problems}
        assert "it is no file" in found["winner"] and "name an image" in found["winner"]
        with pytest.raises(ImageError, match="it is no file"):
            write_shards([record], tmp_path, 1, progress=False)
        scene = {
            "prompt": "a",
            "scene": str(file),
            "subjects": [{"class_name": "a", "reference": str(sound), "mask": str(file)}],
        }
        (tmp_path / "scenes.jsonl").write_text(json.dumps(scene) + "\n")
        with pytest.raises(DatasetError, match="it is no file") as error:
            load_scenes(tmp_path, progress=False)
        assert {p.field for p in error.value.problems} >= {"scene", "subjects[0].mask"}


# too much


def png(width, height, *chunks):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join([chunk(b"IHDR", header), *chunks, chunk(b"IDAT", b"x"), chunk(b"IEND", b"")])


@pytest.mark.parametrize("size", [(8001, 8000), (13000, 13000), (65000, 65000), (2**31 - 1, 1), (1, 64_000_001)])
def test_too_many_pixels_are_refused_by_every_reader(tmp_path, size):
    """Before they are decoded, and without Pillow's warning, which a strict program would turn into another error."""
    file = tmp_path / "large.png"
    file.write_bytes(png(*size))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for read in (*READERS, lambda f: image_suffix(f.read_bytes())):
            with pytest.raises(ImageError, match="more than 64 million pixels; scale it down"):
                read(file)
        with pytest.raises(ImageError, match=r"large.png cannot be read as an image \(.*more than 64 million"):
            attempt(read_size, file)


def test_no_warning_reaches_the_terminal(tmp_path):
    (tmp_path / "large.png").write_bytes(png(10000, 9500))
    code = f"from focusdpo.data.images import *; attempt(read_size, Path({str(tmp_path / 'large.png')!r}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "10000x9500 pixels, more than 64 million pixels" in run.stderr and "Warning" not in run.stderr


def test_the_limit_itself_passes(tmp_path):
    (tmp_path / "m.png").write_bytes(png(8000, 8000))
    assert read_size(tmp_path / "m.png") == (8000, 8000) and MAX_PIXELS == 8000 * 8000


def tiff(pages, after):
    """A TIFF of 4 x 4 gray pixels and so many directories; the last one's next is page `after`."""
    size = 2 + 12 * 8 + 4
    start = 8 + 16
    data = bytearray(b"II*\0" + struct.pack("<I", start) + bytes(range(16)))
    tags = [(256, 4), (257, 4), (258, 8), (259, 1), (262, 1), (273, 8), (278, 4), (279, 16)]
    for page in range(pages):
        following = page + 1 if page + 1 < pages else after
        data += struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
        data += struct.pack("<I", 0 if following is None else start + following * size)
    return bytes(data)


def gif(count):
    """A GIF of so many frames of 4 x 4 pixels."""
    frame = b"\x2c\0\0\0\0\4\0\4\0\0" + b"\2\5\x84\x8f\xa9\xcb\x5a\0"
    return b"GIF89a\4\0\4\0\x80\0\0\0\0\0\xff\xff\xff" + frame * count + b";"


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("name", "data", "animated"),
    [
        ("one page", tiff(1, None), False),
        ("100 000 pages", tiff(100_000, None), True),
        ("a circle of one", tiff(1, 0), False),
        ("a circle", tiff(3, 1), True),
        ("pages beyond the end", tiff(3, 10_000_000), True),
        ("100 000 frames", gif(100_000), True),
    ],
)
def test_pages_are_not_counted(tmp_path, name, data, animated):
    file = tmp_path / "many"
    file.write_bytes(data)
    begin = time.process_time()
    header = read_header(file)
    assert (header.size, header.animated) == ((4, 4), animated)
    if "TIFF" in name or data[:2] == b"II":
        assert np.array_equal(np.asarray(read_photo(file)).reshape(-1), range(16))
    assert time.process_time() - begin < 10


@pytest.mark.timeout(30)
@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_long_animations(tmp_path, form):
    frames = [Image.new("RGB", (4, 4), (i % 256, i // 256, 0)) for i in range(1000)]
    frames[0].save(tmp_path / "a", form, save_all=True, append_images=frames[1:], lossless=True)
    begin = time.process_time()
    assert read_header(tmp_path / "a").animated and read_image(tmp_path / "a").getpixel((0, 0)) == (0, 0, 0)
    assert time.process_time() - begin < 10


def test_text_bombs_and_large_exif(tmp_path):
    """A megabyte of text from a kilobyte is named; what is large is no harm by itself."""
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(200_000_000)))
    (tmp_path / "bomb.png").write_bytes(png(8, 8, bomb))
    begin = time.process_time()
    with pytest.raises(ImageError, match="bomb.png cannot be read as an image .Decompressed data too large"):
        attempt(read_size, tmp_path / "bomb.png")
    exif = exif_of(6)
    exif[0x9286] = b"x" * 60_000
    for form in ("jpg", "png", "webp", "tiff"):
        Image.fromarray(pixels()).save(tmp_path / f"e.{form}", exif=exif)
        assert read_size(tmp_path / f"e.{form}") == read_photo(tmp_path / f"e.{form}").size == (30, 45)
    assert time.process_time() - begin < 30


def test_large_pictures_are_held_a_few_at_a_time():
    """Room is shared by pixels; what is larger than all of it is held alone, and nobody waits forever."""
    from concurrent.futures import ThreadPoolExecutor

    held, most = [], []

    def work(pixels):
        with ROOM.hold(pixels):
            held.append(pixels)
            most.append(sum(held))
            time.sleep(0.01)
            held.remove(pixels)

    sizes = [MAX_PIXELS, 5 * MAX_PIXELS, 10, MAX_PIXELS // 2] * 5
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, sizes))
    assert len(most) == len(sizes) and max(size for size in most if size < 5 * MAX_PIXELS) <= 2 * MAX_PIXELS


MEASURED = """
import resource, sys
from focusdpo.data.validation import check_pairs
begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pairs, problems = check_pairs(sys.argv[1], "full", False)
assert len(pairs) == 8 and not [p for p in problems if p.severity == "error"], problems
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begin) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the C library gives memory back in another way")
def test_memory_of_the_validator_is_bounded(tmp_path):
    """Eight pairs of 25 million pixels a picture: six threads at once would take two gigabytes."""
    base = np.repeat(np.repeat(np.random.default_rng(0).integers(0, 256, (250, 250, 3), dtype=np.uint8), 20, 0), 20, 1)
    for number in range(2):
        base[:1000, :1000] = number * 90
        Image.fromarray(base).save(tmp_path / f"{number}.png", compress_level=1)
    prior = np.zeros((5000, 5000), np.uint8)
    prior[:1000, :1000] = 255
    Image.fromarray(prior).save(tmp_path / "prior.png", compress_level=1)
    Image.fromarray(pixels()).save(tmp_path / "reference.png")
    pair = {"references": [{"image": "reference.png"}], "winner": "0.png", "loser": "1.png", "prior": "prior.png"}
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({"prompt": str(i), **pair}) + "\n" for i in range(8)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", MEASURED, str(tmp_path)], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 900, "MB"


def test_a_dataset_with_32_bit_masks_trains(tmp_path):
    for number in range(2):
        values = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(values).save(tmp_path / f"{number}.png")
    mask = np.zeros((64, 64), np.int32)
    mask[:32] = 1
    Image.fromarray(mask).save(tmp_path / "m.tiff")
    references = [{"image": "1.png", "mask": "m.tiff"}]
    record = {"prompt": "a", "references": references, "winner": "0.png", "loser": "1.png", "prior": "m.tiff"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(record) + "\n")
    assert not validate(tmp_path, "full", SizeRules(**SIZES), progress=False).errors
    sample = PairDataset(load_pairs(tmp_path, progress=False), **SIZES)[0]
    assert sample.prior[:32].all() and not sample.prior[32:].any() and not sample.reference_masks[0][32:].any()
