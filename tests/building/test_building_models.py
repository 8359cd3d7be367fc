"""The stages with weights, through the real loading of tiny random checkpoints from local folders."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("cv2", reason="needs the extra build: pip install 'focusdpo[build]'")
pytest.importorskip("imagehash", reason="needs the extra build: pip install 'focusdpo[build]'")

from focusdpo.building.candidate import Candidate, Photo, Rejected
from focusdpo.building.captioning import CaptionModel
from focusdpo.building.config import (
    BuildConfig,
    CaptioningConfig,
    DisruptionConfig,
    EncoderConfig,
    GatesConfig,
    SegmentationConfig,
)
from focusdpo.building.disruption import Disruption
from focusdpo.building.encoder import EfficientNetLite0
from focusdpo.building.gates import Gates
from focusdpo.building.inpainting import Inpainting
from focusdpo.building.scenes import load_scenes
from focusdpo.building.segmentation import GrabCut, Rembg, Sam, check_rembg
from focusdpo.commands.data_build import check_models
from focusdpo.commands.data_build import prepare as prepare_build
from focusdpo.data import load_pairs
from tests.demo_scenes import write_scenes
from tests.photo_folder import KNOWN
from tests.tiny_vision import write_tiny_captioner, write_tiny_detector, write_tiny_features, write_tiny_sam


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints, and scenes of 64 pixels."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    write_tiny_sam(folder / "sam")
    write_tiny_detector(folder / "detector")
    write_tiny_captioner(folder / "captioner")
    write_tiny_features(folder / "features")
    write_scenes(folder / "scenes", 3, 64, seed=0)
    return folder


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 255, (48, 80, 3), dtype=np.uint8)


def test_sam_answers_a_box(folder, pixels):
    sam = Sam(SegmentationConfig("sam", str(folder / "sam")))
    boxes = [(0.0, 0.0, 1.0, 1.0), (0.1, 0.1, 0.5, 0.9)]
    masks = [sam.find(pixels, "cat", box) for box in boxes]
    assert all(mask.shape == (48, 80) and mask.dtype == np.bool_ for mask in masks)
    with pytest.raises(Rejected, match="no box given, and no detector"):
        sam.find(pixels, "cat", None)


def test_the_detector_finds_the_box(folder, pixels, monkeypatch):
    sam = Sam(SegmentationConfig("sam", path=str(folder / "sam"), detector=str(folder / "detector"), threshold=0.0))
    seen = []
    processor = sam._processor
    monkeypatch.setattr(sam, "_processor", Spy(processor, seen))
    assert sam.find(pixels, "cat", None).shape == (48, 80)
    ((box,),) = seen[0]
    assert len(box) == 4 and all(np.isfinite(box))
    with pytest.raises(Rejected, match="the detector sees no cat"):
        Sam(SegmentationConfig("sam", path=str(folder / "sam"), detector=str(folder / "detector"), threshold=1.0)).find(
            pixels, "cat", None
        )


class Spy:
    """A processor that keeps the boxes it is given."""

    def __init__(self, processor, seen):
        self._processor, self._seen = processor, seen

    def __call__(self, image, input_boxes, return_tensors):
        self._seen.append(input_boxes)
        return self._processor(image, input_boxes=input_boxes, return_tensors=return_tensors)

    def __getattr__(self, name):
        return getattr(self._processor, name)


def square(pixels):
    mask = np.zeros(pixels.shape[:2], bool)
    mask[10:40, 20:60] = True
    return mask


def photo(scene, pixels, mask):
    subject = scene.subjects[0]
    return Photo(subject, subject.scene, pixels, mask)


def test_a_caption_of_the_subject(folder, pixels):
    (scene, *_) = load_scenes(folder / "scenes", progress=False)
    candidate = Candidate(0, 0, 0, scene, subjects=[photo(scene, pixels, square(pixels))])
    CaptionModel(CaptioningConfig("model", str(folder / "captioner"), "a photo of {class_name}", max_new_tokens=5))(candidate)
    (caption,) = candidate.captions
    assert caption and caption.isprintable()


def test_features_tell_images_apart(folder, pixels):
    distance = Gates(GatesConfig(visibility="features"), EncoderConfig("transformers", str(folder / "features")))._distance
    changed = square(pixels)
    assert distance(pixels, pixels, changed) == pytest.approx(0, abs=1e-6)
    assert distance(pixels, np.where(changed[..., None], 255 - pixels, pixels), changed) > 1e-4
    outside = np.where(changed[..., None], pixels, 255 - pixels).astype(np.uint8)
    assert distance(pixels, outside, changed) == pytest.approx(0, abs=1e-6), "only the region is looked at"


@pytest.mark.parametrize("kind", ["flux", "fill"])
def test_inpainting_changes_the_region_alone(folder, tiny_flux, tmp_path, kind):
    path = tiny_flux if kind == "flux" else write_tiny_fill(tiny_flux, tmp_path / "fill")
    config = DisruptionConfig("inpaint", path=str(path), steps=2, resolution=64, dtype="fp32", guidance=2.0)
    stage = Inpainting(config, None, 1.0)
    scene = load_scenes(folder / "scenes", progress=False)[0]
    pixels = np.asarray(Image.open(scene.image)).copy()
    mask = np.zeros(pixels.shape[:2], bool)
    mask[20:50, 10:40] = True
    losers = []
    for seed in (0, 0, 1):
        candidate = Candidate(
            0, 0, seed, scene, subjects=[photo(scene, pixels, mask)], scene=pixels, captions=["a cat"], changing=[0]
        )
        stage(candidate)
        losers.append(candidate.loser)
        changed = (candidate.loser != pixels).any(axis=-1)
        assert changed[mask].mean() > 0.9
        assert not changed[:15].any() and not changed[:, 46:].any() and not (changed & ~candidate.priors[0]).any()
    assert (losers[0] == losers[1]).all() and (losers[0] != losers[2]).any(), "the seed decides"


def write_tiny_fill(flux, folder):
    """FLUX Fill: the transformer also sees the masked image and the mask."""
    from diffusers import FluxFillPipeline, FluxPipeline, FluxTransformer2DModel

    from focusdpo.models.tiny_flux import transformer_config

    parts = FluxPipeline.from_pretrained(flux).components
    channels = 16 + 16 + 4 * 64
    parts["transformer"] = FluxTransformer2DModel(**{**transformer_config(), "in_channels": channels, "out_channels": 16})
    names = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer")
    FluxFillPipeline(**{name: parts[name] for name in names}).save_pretrained(folder)
    return folder


def test_a_build_with_models_in_every_stage(folder, tiny_flux, tmp_path):
    lines = [json.loads(line) for line in (folder / "scenes" / "scenes.jsonl").read_text().splitlines()]
    for line in lines:
        del line["subjects"][0]["reference_mask"]
    (folder / "scenes" / "boxes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = BuildConfig(
        scenes=str(folder / "scenes" / "boxes.jsonl"),
        output_dir=str(tmp_path / "out"),
        segmentation=SegmentationConfig("sam", path=str(folder / "sam"), detector=str(folder / "detector"), threshold=0.0),
        captioning=CaptioningConfig("model", path=str(folder / "captioner"), prompt="a photo of", max_new_tokens=4),
        disruption=DisruptionConfig("inpaint", path=str(tiny_flux), steps=1, resolution=64, dtype="fp32"),
        gates=GatesConfig(
            visibility="features", min_change=0.0, min_area=0.0, max_area=1.0, min_changed=0.0, max_resemblance=1.0
        ),
        encoder=EncoderConfig("transformers", str(folder / "features")),
        resolution=64,
        reference_resolution=64,
    )
    prepare_build(config)()
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert not [item for item in rejected if "failed" in item], rejected
    records = load_pairs(tmp_path / "out", progress=False)
    assert records and all(record.meta["captions"] for record in records)


def test_grabcut_finds_what_differs():
    pixels = np.full((256, 256, 3), (90, 140, 60), np.uint8)
    pixels += np.random.default_rng(0).integers(0, 20, pixels.shape, dtype=np.uint8)
    y, x = np.mgrid[:256, :256]
    disc = (y - 130) ** 2 + (x - 120) ** 2 < 60**2
    pixels[disc] = pixels[disc] // 2 + np.array([100, 0, 0], np.uint8)
    for area in (None, (0.2, 0.25, 0.73, 0.76)):
        mask = GrabCut().find(pixels, "ball", area)
        assert (mask & disc).sum() / (mask | disc).sum() > 0.95
    with pytest.raises(Rejected, match="does not fill its box"):
        GrabCut().find(pixels, "ball", (0.1, 0.1, 1.0, 1.0))
    with pytest.raises(Rejected, match="sees no subject"):
        GrabCut().find(np.full((64, 64, 3), 7, np.uint8), "ball", None)


@pytest.fixture
def rembg_home(tmp_path, monkeypatch):
    """rembg's folder of models, with one that calls bright what is bright: the mean of the colours, at 320 px."""
    pytest.importorskip("rembg", reason="needs the extra rembg: pip install 'focusdpo[rembg]'")
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    shapes = {"input": [1, 3, 320, 320], "output": [1, 1, 320, 320]}
    tensors = {name: helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    mean = helper.make_node("ReduceMean", ["input"], ["output"], axes=[1], keepdims=1)
    graph = helper.make_graph([mean], "bright", [tensors["input"]], [tensors["output"]])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    monkeypatch.setenv("U2NET_HOME", str(tmp_path / "models"))
    (tmp_path / "models").mkdir()
    onnx.save(model, tmp_path / "models" / "bright.onnx")
    return tmp_path / "models"


def test_rembg_removes_the_background(rembg_home):
    pixels = np.random.default_rng(0).integers(0, 60, (120, 200, 3), dtype=np.uint8)
    pixels[30:80, 50:120] += 180
    config = SegmentationConfig("rembg", str(rembg_home / "bright.onnx"), "u2net_custom")
    check_rembg(config)
    mask = Rembg(config).find(pixels, "box", None)
    box = np.zeros_like(mask)
    box[30:80, 50:120] = True
    assert (mask & box).sum() / (mask | box).sum() > 0.95
    within = Rembg(config).find(pixels, "box", (0.5, 0.0, 1.0, 1.0))
    assert not within[:, :100].any() and within[30:80, 102:118].all(), "it looks in the box alone"


@pytest.mark.parametrize(
    ("model", "path", "message"),
    [
        ("withoutbg", None, "segmentation.model: got 'withoutbg'; expected one of"),  # it sends photos to a server
        ("sam", None, "segmentation.model: got 'sam'; expected one of .*isnet-general-use"),
        ("u2net_custom", "nowhere.onnx", "segmentation.path: no such file: nowhere.onnx; expected the .onnx file"),
        ("u2net_custom", __file__, "model_path must be within"),
    ],
)
def test_models_of_rembg_are_checked(rembg_home, model, path, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check_rembg(SegmentationConfig("rembg", path, model))


@pytest.mark.parametrize(
    ("path", "message"), [("/nowhere", "no such folder"), ("a/b/c", "nor a hub id, which looks like owner/name")]
)
def test_sam_and_its_detector_may_be_of_the_hub(tmp_path, path, message):
    known = SegmentationConfig("sam", "facebook/sam-vit-base", detector="IDEA-Research/grounding-dino-tiny")
    config = BuildConfig("scenes", str(tmp_path / "out"), known)
    check_models(config, "data build")  # they are downloaded when they are loaded
    for changed in (SegmentationConfig("sam", path), SegmentationConfig("sam", "facebook/sam-vit-base", detector=path)):
        with pytest.raises(FileNotFoundError, match=message):
            check_models(BuildConfig("scenes", "out", changed), "data build")


def test_the_loser_may_not_show_the_winners_subject():
    """A change that leaves the subject what it was is passed over for the next, and refused where there is none."""
    cat = np.asarray(KNOWN["chelsea"].image.convert("RGB").resize((96, 96)))
    cup = np.asarray(KNOWN["espresso cup"].image.convert("RGB").resize((96, 96)))
    mask = np.zeros((96, 96), bool)
    mask[8:88, 8:88] = True

    class Ways(Disruption):
        def changes(self, candidate, number, loser):
            yield (
                np.where(mask[..., None], np.clip(loser.astype(int) + 6, 0, 255), loser).astype(np.uint8),
                mask,
                {"kind": "lit"},
            )
            if candidate.variant == 0:
                yield cup, mask, {"kind": "swap"}

    stage = Ways(EfficientNetLite0("cpu"), 0.9)

    def disrupted(variant):
        candidate = Candidate(0, variant, 0, None, scene=cat, changing=[0], kinds={0: ["swap"]})
        candidate.subjects = [Photo(None, None, cat, mask)]
        stage(candidate)
        return candidate

    candidate = disrupted(0)
    (note,) = candidate.notes["disruption"]
    assert note["kind"] == "swap" and note["resemblance"] < 0.8 and candidate.notes["resemblance"] == note["resemblance"]
    assert (candidate.loser[mask] == cup[mask]).all() and (candidate.loser[~mask] == cat[~mask]).all()
    with pytest.raises(Rejected, match="the loser still shows the winner's subject"):
        disrupted(1)
