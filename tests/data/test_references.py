"""References as each backbone's own pipeline takes them: the same pixels for VAE and text encoder, masks that lie on them."""

from __future__ import annotations

import json
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers.utils import load_image
from PIL import Image, ImageOps

from focusdpo.data import DatasetError, LongestSide, collate, leave_out_misfits, load_pairs
from focusdpo.data.dataset import SizeRules
from focusdpo.data.images import read_photo, read_size
from focusdpo.data.validation import validate
from focusdpo.foundation.launch import Launch
from focusdpo.models import BACKBONES
from focusdpo.models.conditioning import Conditioner
from focusdpo.models.tiny_flux import write_tiny_flux
from focusdpo.training.batches import dataset_of
from focusdpo.training.cache import EncodingCache
from focusdpo.training.config import DataConfig, ModelConfig, TrainConfig
from focusdpo.training.image_sizes import reference_rules, size_rules
from focusdpo.training.trainer import Trainer
from tests.tiny_flux2 import write_tiny_flux2
from tests.tiny_qwen import write_tiny_qwen

RULES = {name: model.reference_rule for name, model in BACKBONES.items()}
PROMPT = "a cat"


def noise(width, height, mode="RGB"):
    channels = {"RGB": 3, "RGBA": 4}[mode]
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, channels), dtype=np.uint8), mode)


def cut_out(width, height):
    """Opaque in the middle, with other colours under its clear parts, as image editors leave them."""
    photo = noise(width, height)
    alpha = Image.new("L", photo.size)
    alpha.paste(255, (width // 4, height // 3, width // 2, height - 5))
    photo.putalpha(alpha)
    return photo


def turned(photo):
    """As a camera held upright writes it."""
    photo.getexif()[0x0112] = 6
    return photo


PHOTOS = {
    "portrait": noise(301, 457),
    "landscape": noise(703, 411),
    "tiny": noise(65, 70),
    "thumbnail": noise(33, 47),  # in whole tokens a square, by which Kontext's pipeline chooses a size
    "large": noise(1301, 1103),
    "turned": turned(noise(504, 302)),
    "cut-out": cut_out(333, 290),
    "large cut-out": cut_out(1203, 1001),
}


def write_pair(folder, *photos, masks=None):
    """A pair whose references are given images; its folder."""
    folder.mkdir(exist_ok=True)
    for i, photo in enumerate(photos):
        photo.save(folder / f"{i}.png", exif=photo.getexif())
    for name in ("winner", "loser"):
        noise(64 if name == "winner" else 63, 64).resize((64, 64)).save(folder / f"{name}.png")
    Image.new("L", (64, 64), 255).save(folder / "prior.png")
    references = [{"image": f"{i}.png"} for i in range(len(photos))]
    for i, mask in enumerate(masks or ()):
        mask.save(folder / f"{i}_mask.png")
        references[i]["mask"] = f"{i}_mask.png"
    record = {"prompt": PROMPT, "references": references, "winner": "winner.png", "loser": "loser.png", "prior": "prior.png"}
    (folder / "pairs.jsonl").write_text(json.dumps(record) + "\n")
    return folder


def dataset(folder, backbone, **settings):
    return dataset_of(load_pairs(folder, progress=False), DataConfig(str(folder), resolution=64, **settings), backbone)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Tiny checkpoints in the real format, loaded once."""
    write = {
        "kontext": lambda folder: write_tiny_flux(folder, kontext=True),
        "klein": write_tiny_flux2,
        "dev": lambda folder: write_tiny_flux2(folder, klein=False),
        "qwen-edit-plus": write_tiny_qwen,
    }
    loaded = {}

    def load(kind):
        if kind not in loaded:
            folder = write[kind](tmp_path_factory.mktemp(kind) / "model")
            model = BACKBONES["flux2" if kind in ("klein", "dev") else kind]
            loaded[kind] = model.from_pretrained(str(folder), dtype=torch.float32, max_sequence_length=16)
        return loaded[kind]

    return load


class Enough(Exception):  # noqa: N818  # no error
    """The call has shown what is asked of it."""


def seen(backbone, images, run):
    """What reaches the VAE, and the text encoder as pixels, in a call; it ends before the last of so many images is encoded."""
    vae, text_encoder = backbone.pipeline.vae, getattr(backbone.pipeline, "text_encoder", None)
    encoded, read = [], []
    encode = vae.encode

    def recorded(pixels, *args, **kwargs):
        encoded.append(pixels)
        if len(encoded) == images:
            raise Enough
        return encode(pixels, *args, **kwargs)

    def keep(module, args, kwargs):
        if kwargs.get("pixel_values") is not None:
            read.append((kwargs["pixel_values"], kwargs["image_grid_thw"]))

    handle = text_encoder.register_forward_pre_hook(keep, with_kwargs=True)
    vae.encode = recorded
    try:
        with pytest.raises(Enough):
            run()
    finally:
        del vae.encode
        handle.remove()
    return encoded, read


def check_same(ours, theirs):
    (encoded, read), (expected, text) = ours, theirs
    assert len(encoded) == len(expected) > 0 and len(read) == len(text)
    assert [x.shape for x in encoded] == [x.shape for x in expected]
    assert all(torch.equal(a, b) for a, b in zip(encoded, expected, strict=True)), "what the VAE is given"
    for (pixels, grid), (other, other_grid) in zip(read, text, strict=True):
        assert torch.equal(grid, other_grid) and torch.equal(pixels, other), "what the text encoder is given"


CALLS = {
    "kontext": [["portrait"], ["turned"], ["thumbnail"], ["large"], ["cut-out"]],
    "klein": [["portrait", "cut-out"], ["turned"], ["tiny"], ["large"], ["large cut-out"]],
    "dev": [["tiny", "large"]],
    "qwen-edit-plus": [["tiny", "portrait"], ["turned"], ["large"], ["cut-out"]],
}


@pytest.mark.parametrize(("kind", "names"), [(k, n) for k, calls in CALLS.items() for n in calls], ids=str)
def test_the_pixels_are_those_of_the_pipelines_own_call(load, tmp_path, kind, names):
    backbone = load(kind)
    folder = write_pair(tmp_path / "pair", *(PHOTOS[name] for name in names))
    # FLUX.2's pipelines make RGB of an image themselves, the others take what load_image does.
    own_mode = {"convert_method": lambda image: image} if backbone.name == "flux2" else {}
    images = [load_image(str(folder / f"{i}.png"), **own_mode) for i in range(len(names))]
    arguments = {"prompt": PROMPT, "height": 64, "width": 64, "num_inference_steps": 1, "max_sequence_length": 16}
    backbone.pipeline.set_progress_bar_config(disable=True)
    image = images[0] if kind == "kontext" else images
    theirs = seen(backbone, len(names), lambda: backbone.pipeline(image=image, **arguments))

    batch = collate([dataset(folder, backbone.name)[0]])
    conditioner = Conditioner(backbone)

    def ours():
        conditioner.embed(batch)
        for pixels in batch.references:
            backbone.encode_images(pixels)

    check_same(seen(backbone, len(names), ours), theirs)
    assert bool(batch.prompt_images) == (kind == "qwen-edit-plus")


def test_qwens_text_encoder_sees_the_photo_itself(load, tmp_path):
    """Also where a number makes the VAE's references smaller."""
    backbone, photo = load("qwen-edit-plus"), PHOTOS["landscape"]
    folder = write_pair(tmp_path / "pair", photo)
    arguments = {"prompt": PROMPT, "height": 64, "width": 64, "num_inference_steps": 1}
    _, theirs = seen(backbone, 1, lambda: backbone.pipeline(image=[photo], **arguments))
    batch = collate([dataset(folder, "qwen-edit-plus", reference_resolution=64)[0]])
    assert batch.references[0].shape == (1, 3, 32, 64)
    conditioner = Conditioner(backbone)

    def ours():
        conditioner.embed(batch)
        backbone.encode_images(batch.references[0])

    _, read = seen(backbone, 1, ours)
    assert len(read) == len(theirs) == 1
    assert all(torch.equal(a, b) for a, b in zip(read[0], theirs[0], strict=True))


def test_a_batch_without_the_text_encoders_images_is_refused(load, tmp_path):
    batch = collate([dataset(write_pair(tmp_path / "pair", PHOTOS["tiny"]), "flux")[0]])
    conditioner = Conditioner(load("qwen-edit-plus"))
    with pytest.raises(ValueError, match="batch.prompt_images: got those of 0 pairs; expected 1, by a dataset with"):
        conditioner.embed(batch)


def unos_way(photo, several):
    """What UNO's repository says it does with a reference: uint8 [H, W, 3]."""
    longest = 320 if several else 512
    width, height = photo.size
    if width >= height:
        width, height = longest, int((longest / width) * height)
    else:
        width, height = int((longest / height) * width), longest
    resized = photo.resize((width, height), Image.LANCZOS)
    right, bottom = width % 16, height % 16  # is cut away, the larger half behind
    left, top = right // 2, bottom // 2
    box = (left, top, width - (right - left), height - (bottom - top))
    return np.asarray(resized.crop(box).convert("RGB"))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", [*PHOTOS, "palette", "square"])
def test_uno(tmp_path, name, count):
    others = {"palette": lambda: PHOTOS["landscape"].quantize(16), "square": lambda: noise(49, 49)}
    photo = PHOTOS[name] if name in PHOTOS else others[name]()
    assert int(512 / 49 * 49) == 511, "rounded to just below: a square whose height is a token less"
    if name == "palette":
        photo.info["transparency"] = bytes([0, 20, *[255] * 14])
    sample = dataset(write_pair(tmp_path / "pair", *[photo] * count), "flux")[0]
    with Image.open(tmp_path / "pair" / "0.png") as file:
        expected = unos_way(ImageOps.exif_transpose(file), count > 1)  # a program that shows it upright hands that over
    assert max(expected.shape) == (512 if count == 1 else 320)
    for image in sample.references:
        assert np.array_equal((image * 255).round().byte().permute(1, 2, 0).numpy(), expected)
    if name == "cut-out":
        assert (expected[:20] == 0).all(), "clear parts are black"


def test_unos_sizes():
    for width in range(20, 400, 7):
        for height in (*range(20, 400, 13), width):
            photo = Image.new("1", (width, height))
            for count in (1, 3):
                assert RULES["flux"].place(photo.size, count).size == unos_way(photo, count > 1).shape[1::-1]


def drawn(kind, size):
    """A white rectangle, or an opaque one, in a corner of a photo whose shape every rule has to change."""
    mask, (width, height) = Image.new("L", size), size
    mask.paste(255, (width // 11, height * 6 // 11, width * 5 // 13, height * 9 // 11))
    if kind == "mask":
        return mask.convert("RGB"), mask
    photo = Image.new("RGBA", size, "white")
    photo.putalpha(mask)
    return photo, None


@pytest.mark.parametrize("buckets", [None, ["1:1"]], ids=str)
@pytest.mark.parametrize(("kind", "size"), [("mask", (333, 517)), ("mask", (1103, 1301)), ("alpha", (333, 517))], ids=str)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_mask_lies_on_what_it_was_drawn_from(tmp_path, backbone, kind, size, buckets):
    photo, mask = drawn(kind, size)
    folder = write_pair(tmp_path / "pair", photo, masks=[mask] if mask else None)
    if kind == "alpha":  # opaque on black, so that the alpha channel is the picture
        black = Image.new("RGBA", size, (0, 0, 0, 0))
        black.paste(photo, (0, 0), photo)
        black.save(folder / "0.png")
    sample = dataset(folder, backbone, reference_buckets=buckets)[0]
    shown, marked = sample.references[0].mean(0) > 0.5, sample.reference_masks[0]
    assert shown.shape == marked.shape and 0.01 < marked.float().mean() < 0.5
    for axis in (0, 1):
        edges = [x.any(axis).nonzero()[[0, -1], 0] for x in (shown, marked)]
        # Scaled in its own mode, a cut-out has its colour wherever its opacity is more than none, as far as Lanczos reaches.
        assert (edges[0] - edges[1]).abs().max() <= (1 if kind == "mask" else 5)
    assert (shown & marked).sum() > (0.98 if kind == "mask" else 0.9) * (shown | marked).sum()


@pytest.mark.parametrize(
    ("backbone", "expected"),
    [("flux", {"1:1": (512, 512), "4:3": (512, 384), "16:9": (512, 288)}),
     ("kontext", {"1:1": (1024, 1024), "4:3": (1184, 880), "16:9": (1392, 752)}),
     ("flux2", {"1:1": (1024, 1024), "4:3": (1168, 880), "16:9": (1360, 768)}),
     ("qwen-edit-plus", {"1:1": (1024, 1024), "4:3": (1184, 896), "16:9": (1376, 768)})],
)  # fmt: skip
def test_photos_of_many_shapes_share_the_sizes_of_their_buckets(backbone, expected):
    """By hand from the ratios; truncation after rounding would make some a token smaller."""
    rule, ratios = RULES[backbone], {text: tuple(map(int, text.split(":"))) for text in expected}
    found = {text: Counter() for text in expected}
    for width in range(1500, 2400, 31):
        for text, (across, down) in ratios.items():
            for less in (0, 1, 5, 40):  # in height, of the exact ratio
                size = width, width * down // across - less
                placement = rule.place(size, 1, list(ratios.values()))
                found[text][placement.size] += 1
                assert max(abs(a - b) for a, b in zip(placement.cut, size, strict=True)) <= 16 + less * across / down
                assert abs(placement.cut[0] / placement.cut[1] - across / down) < 0.01
                assert 0 <= placement.lost(size) < 0.08
    assert {text: list(sizes) for text, sizes in found.items()} == {text: [size] for text, size in expected.items()}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_bucket_is_a_cut_before_the_rule(tmp_path, backbone):
    """The same as the photo cut by hand; what the text encoder sees is cut, too."""
    photo = PHOTOS["landscape"]
    cut = dataset(write_pair(tmp_path / "whole", photo), backbone, reference_buckets=["1:1", "3:1"])[0]
    by_hand = photo.crop(((703 - 411) // 2, 0, (703 - 411) // 2 + 411, 411))
    expected = dataset(write_pair(tmp_path / "cut", by_hand), backbone)[0]
    assert torch.equal(cut.references[0], expected.references[0])
    assert len(cut.prompt_images) == len(expected.prompt_images) == (backbone == "qwen-edit-plus")
    assert all(torch.equal(a, b) for a, b in zip(cut.prompt_images, expected.prompt_images, strict=True))


def test_max_crop_counts_what_a_bucket_cuts_away(tmp_path):
    folder = write_pair(tmp_path / "pair", PHOTOS["landscape"])
    for allowed, left in ((0.42, 1), (0.41, None)):  # 1 - 411 / 703 = 0.415
        data = dataset(folder, "kontext", reference_buckets=["1:1"])
        if left is None:
            with pytest.raises(DatasetError, match="references.0..image: loses 41.5% of its area from 703x411 px"):
                leave_out_misfits(data, allowed, progress=False)
        else:
            assert not leave_out_misfits(data, allowed, progress=False) and len(data) == left


MODES = {
    "bilevel": lambda: noise(90, 120).convert("1"),
    "gray": lambda: noise(90, 120).convert("L"),
    "gray and alpha": lambda: cut_out(90, 120).convert("LA"),
    "palette": lambda: noise(90, 120).quantize(8),
    "RGBA": lambda: cut_out(90, 120),
    "16 bits": lambda: Image.fromarray(np.linspace(0, 65535, 90 * 120).astype(np.uint16).reshape(120, 90)),
    "strip": lambda: noise(400, 70),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_files_of_every_mode(tmp_path, backbone, mode):
    sample = dataset(write_pair(tmp_path / "pair", MODES[mode]()), backbone)[0]
    for image in (*sample.references, *sample.prompt_images):
        assert image.dtype == torch.float32 and image.shape[0] == 3
        assert 0 <= image.min() < 0.3 and 0.7 < image.max() <= 1
    if mode == "16 bits":
        assert sample.references[0].mean() == pytest.approx(0.5, abs=0.01), "scaled, not clipped"


REFUSED = [
    ("flux", (600, 12), "600x12 px would become 320x6 px; expected sides of at least 16 px, one token"),
    ("kontext", (400, 15), "400x15 px; expected a height of at least 16 px, one token"),
    ("flux2", (63, 90), "Image too small: 63×90"),
    ("flux2", (900, 100), "Aspect ratio too extreme: 900×100"),
    ("qwen-edit-plus", (6500, 20), "aspect ratio must be smaller than 200"),
    ("qwen-edit-plus", (20000, 2), "20000x2 px is too narrow"),
]


@pytest.mark.parametrize(("backbone", "size", "message"), REFUSED, ids=str)
def test_what_cannot_be_brought_to_size_is_named(tmp_path, backbone, size, message):
    folder = write_pair(tmp_path / "pair", PHOTOS["portrait"], noise(*size))
    with pytest.raises(DatasetError) as error:
        dataset(folder, backbone)
    (problem,) = error.value.problems
    assert (problem.line, problem.field) == (1, "references[1].image") and message in problem.message
    assert "1.png cannot be brought to size" in problem.message and problem.remedy == "cut or enlarge it by hand"
    if backbone != "qwen-edit-plus":  # whose text encoder has its limit anyhow
        assert max(dataset(folder, backbone, reference_resolution=64)[0].references[1].shape[1:]) == 64
    report = validate(folder, "full", SizeRules(**size_rules(DataConfig("-"), backbone)), progress=False)
    assert not report.may_start and report.pairs == 0 and message in str(report)


def test_it_is_refused_before_the_model_is_loaded(tmp_path):
    folder = write_pair(tmp_path / "pair", noise(400, 15))
    model = ModelConfig("nobody/no-such-model", backbone="kontext")
    with pytest.raises(DatasetError, match="400x15 px; expected a height of at least 16 px"):
        Trainer(TrainConfig(model, DataConfig(str(folder)), str(tmp_path / "run"), cpu=True))


@pytest.mark.parametrize("form", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_header_has_the_size_that_the_photo_is_read_in(tmp_path, form, orientation):
    """Turned or not; Pillow turns a TIFF's size itself."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"photo.{form}"
    noise(300, 200).save(file, exif=exif)
    assert read_size(file) == read_photo(file).size == ((200, 300) if orientation > 4 else (300, 200))


def test_floating_point_images_are_refused_by_their_header(tmp_path):
    folder = write_pair(tmp_path / "pair", PHOTOS["tiny"])
    Image.new("F", (65, 70), 0.5).save(folder / "0.tiff")
    text = (folder / "pairs.jsonl").read_text().replace('"0.png"', '"0.tiff"')
    (folder / "pairs.jsonl").write_text(text)
    with pytest.raises(DatasetError, match="references.0..image: .*0.tiff cannot be read as an image .mode F, more than 8"):
        load_pairs(folder, "headers", progress=False)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_settings(backbone):
    def rules(**settings):
        return reference_rules(DataConfig("-", **settings), backbone)

    own = RULES[backbone]
    assert rules() == (own, own)
    assert rules(reference_resolution=512) == (LongestSide(512), LongestSide(512))
    assert rules(reference_resolution=512, reference_resolution_multiple=320) == (LongestSide(512), LongestSide(320))
    assert rules(reference_resolution_multiple=320) == (own, LongestSide(320))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_it_goes_to_the_loaders_processes(tmp_path, backbone):
    data = dataset(write_pair(tmp_path / "pair", PHOTOS["portrait"]), backbone)
    sent = pickle.loads(pickle.dumps(data))
    assert sent.placements == data.placements and torch.equal(sent[0].references[0], data[0].references[0])


def test_the_cache_tells_rules_of_one_size_apart(tmp_path, tiny_flux):
    """A cut-out of a size that FLUX.2 leaves alone, and a number leaves alone, has other colours in its clear parts."""
    folder = write_pair(tmp_path / "pair", cut_out(64, 80))
    config = TrainConfig(ModelConfig(str(tiny_flux), "flux2"), DataConfig(str(folder), cache=str(tmp_path / "cache")), "-")
    cache = EncodingCache(config, Accelerator(cpu=True), Launch())
    keys, pixels = [], []
    for number in (None, 80):
        data = dataset(folder, "flux2", reference_resolution=number)
        assert data.sizes[0].references == ((64, 80),)
        cache.attach([data])
        keys.append(data.encodings.pairs[0])
        data.encodings = None
        pixels.append(data[0].references[0])
    assert not torch.equal(*pixels)
    assert [a == b for a, b in zip(*keys, strict=True)] == [True, True, False, True], "winner, loser, reference, prompt"
