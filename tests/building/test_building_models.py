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
from focusdpo.building.config import BuildConfig, CaptioningConfig, DisruptionConfig, GatesConfig, SegmentationConfig
from focusdpo.building.gates import FeatureDistance
from focusdpo.building.inpainting import Inpainting
from focusdpo.building.scenes import load_scenes
from focusdpo.building.segmentation import GrabCut, Sam
from focusdpo.commands.data_build import prepare as prepare_build
from focusdpo.data import load_pairs
from tests.demo_scenes import write_scenes
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
    sam = Sam(SegmentationConfig("sam", str(folder / "sam"), str(folder / "detector"), threshold=0.0))
    seen = []
    processor = sam._processor
    monkeypatch.setattr(sam, "_processor", Spy(processor, seen))
    assert sam.find(pixels, "cat", None).shape == (48, 80)
    ((box,),) = seen[0]
    assert len(box) == 4 and all(np.isfinite(box))
    with pytest.raises(Rejected, match="the detector sees no cat"):
        Sam(SegmentationConfig("sam", str(folder / "sam"), str(folder / "detector"), threshold=1.0)).find(pixels, "cat", None)


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
    distance = FeatureDistance(str(folder / "features"), "cpu")
    changed = square(pixels)
    assert distance(pixels, pixels, changed) == pytest.approx(0, abs=1e-6)
    assert distance(pixels, np.where(changed[..., None], 255 - pixels, pixels), changed) > 1e-4
    outside = np.where(changed[..., None], pixels, 255 - pixels).astype(np.uint8)
    assert distance(pixels, outside, changed) == pytest.approx(0, abs=1e-6), "only the region is looked at"


@pytest.mark.parametrize("kind", ["flux", "fill"])
def test_inpainting_changes_the_region_alone(folder, tiny_flux, tmp_path, kind):
    path = tiny_flux if kind == "flux" else write_tiny_fill(tiny_flux, tmp_path / "fill")
    config = DisruptionConfig("inpaint", path=str(path), steps=2, resolution=64, dtype="fp32", guidance=2.0)
    stage = Inpainting(config)
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
        gates=GatesConfig(visibility="features", path=str(folder / "features"), min_change=0.0, min_area=0.0, max_area=1.0),
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
