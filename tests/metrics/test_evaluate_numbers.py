"""The numbers of an evaluation, each against something that is computed another way."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("scipy", reason="needs the extra evaluation: pip install 'focusdpo[evaluation]'")
pytest.importorskip("torchmetrics", reason="needs the extra evaluation: pip install 'focusdpo[evaluation]'")

from scipy import stats
from scipy.linalg import sqrtm
from torchmetrics.multimodal import CLIPScore
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, Dinov2Model, ViTModel

from focusdpo.metrics.bootstrap import find_clusters, mean_interval
from focusdpo.metrics.encoders import load_encoder, load_inception, unit
from focusdpo.metrics.fid import frechet_distance_of_features, frechet_interval
from focusdpo.metrics.leakage import leakage_of_similarities, region_leakage
from focusdpo.metrics.report import Line, table
from focusdpo.metrics.shares import exact_interval
from tests.tiny_vision import write_tiny_captioner, write_tiny_clip, write_tiny_dinov2, write_tiny_features


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    return {
        "clip": write_tiny_clip(root / "clip"),
        "dino": write_tiny_features(root / "dino"),
        "dinov2": write_tiny_dinov2(root / "dinov2"),
    }


@pytest.fixture(scope="module")
def images():
    """Of several shapes, so that scaling and cropping matter."""
    rng = np.random.default_rng(0)
    sizes = [(48, 40), (40, 64), (33, 33)]
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


# Intervals


def test_the_interval_of_a_mean_is_the_central_limit_theorems():
    values = np.random.default_rng(0).exponential(size=2000)
    mean, low, high = mean_interval(values, resamples=4000)
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    assert mean == values.mean()
    np.testing.assert_allclose([low, high], [mean - half, mean + half], atol=0.06 * half)
    assert mean_interval(values, level=0.5, resamples=4000)[2] - mean == pytest.approx(half * 0.6745 / 1.96, rel=0.06)


def test_a_group_is_drawn_as_a_whole():
    rng = np.random.default_rng(1)
    values = rng.normal(size=40)
    copies, groups = np.repeat(values, 6), np.repeat(np.arange(40), 6)
    assert mean_interval(copies, groups) == pytest.approx(mean_interval(values), rel=1e-12)
    alone = mean_interval(copies)
    assert alone[2] - alone[1] < 0.5 * (mean_interval(values)[2] - mean_interval(values)[1])  # six copies are no evidence


def test_the_mean_is_over_values_where_groups_differ_in_size():
    """The interval is that of a ratio of sums, by its linearisation."""
    rng = np.random.default_rng(2)
    sizes = rng.integers(1, 10, 300)
    groups = np.repeat(np.arange(300), sizes)
    values = (sizes + rng.normal(size=300))[groups]  # large groups have large values
    mean, low, high = mean_interval(values, groups, resamples=4000)
    residuals = np.bincount(groups, values - values.mean())
    half = 1.96 * math.sqrt((residuals**2).sum()) / len(values)
    assert mean == values.mean()
    np.testing.assert_allclose([low, high], [mean - half, mean + half], atol=0.1 * half)


def test_few_groups_know_little_of_their_spread():
    """As Student's, of which a bootstrap's percentiles have 0.8 and less."""
    values = stats.norm.ppf((np.arange(6) + 0.5) / 6)  # symmetric, so that nothing is skewed
    low, high = stats.t.interval(0.95, 5, loc=0, scale=stats.sem(values))
    assert np.ptp(mean_interval(values, resamples=20000)[1:]) == pytest.approx(high - low, rel=0.03)


def test_groups_with_common_members_depend_on_each_other():
    """Their covariance is counted, by hand; those without are as any other."""
    values = np.random.default_rng(3).normal(size=40)
    apart = [frozenset({f"a{i}", f"b{i}"}) for i in range(40)]
    assert mean_interval(values, apart) == mean_interval(values) and find_clusters(apart).independent == pytest.approx(40)
    ring = [frozenset({i, (i + 1) % 40}) for i in range(40)]
    clusters = find_clusters(ring)
    assert clusters.independent == pytest.approx(20)  # the mean of 40 of their members, each in two
    smooth = values + np.roll(values, -1)  # what members add
    residuals = (smooth - smooth.mean()) / 40
    together = sum(residuals[i] * residuals[j] for i in range(40) for j in range(40) if ring[i] & ring[j])
    deviation = math.sqrt(together * 20 / 19)
    _, low, high = mean_interval(smooth, ring, resamples=20000)
    assert high - low == pytest.approx(2 * stats.t.ppf(0.975, 19) * deviation, rel=0.05)
    shares = (smooth > 0).astype(float)
    assert np.ptp(mean_interval(shares, ring, is_share=True)[1:]) > 1.15 * np.ptp(mean_interval(shares, is_share=True)[1:])


def test_groups_of_different_sizes_count_for_less():
    assert find_clusters("aaaaaabbc").independent == pytest.approx(81 / (36 + 4 + 1))
    assert find_clusters([frozenset("ab"), frozenset("ac"), frozenset("ad")]).independent == pytest.approx(6 / (9 + 3) * 3)
    assert find_clusters([frozenset("ab")] * 5).independent == 1


@pytest.mark.parametrize("rate", [1, 29])
def test_a_rate_near_its_end_has_an_interval(rate):
    """Of independent images it is that of a binomial."""
    mean, low, high = mean_interval([1.0] * rate + [0.0] * (30 - rate), is_share=True)
    exact = stats.binomtest(rate, 30).proportion_ci(method="exact")
    assert (low, high) == pytest.approx((exact.low, exact.high)) and 0 <= low < mean < high <= 1


def test_a_share_at_its_end_has_the_exact_interval():
    """Against scipy's test of a binomial; groups count, and not their values."""
    for hits in (0, 8):
        exact = stats.binomtest(hits, 8).proportion_ci(method="exact")
        values, groups = np.full(24, hits / 8), np.repeat(np.arange(8), 3)
        assert mean_interval(values, groups, is_share=True) == pytest.approx((hits / 8, exact.low, exact.high))
    assert math.isnan(mean_interval([0.5] * 8, is_share=True)[1]), "nothing says how much others differ"
    assert mean_interval([0.0, 1 - 0.9 - 0.1], is_share=True)[1:] == exact_interval(0.0, 2), "which is a little below 0"
    assert exact_interval(1.0, 40)[0] == pytest.approx(0.025 ** (1 / 40))
    for hits in range(9):
        found = stats.binomtest(hits, 8).proportion_ci(0.9, "exact")
        assert exact_interval(hits / 8, 8, 0.9) == pytest.approx((found.low, found.high))
    for values in ([-0.1, 0.5], [0.5, 1.1]):
        with pytest.raises(ValueError, match="expected shares, from 0 to 1"):
            mean_interval(values, is_share=True)


def test_few_groups():
    for values, groups in (([1.0, 2.0], [7, 7]), ([0.0, 0.0, 0.0], None), ([1.0, 2.0, 1.5], [1, 1, 2])):
        mean, low, high = mean_interval(values, groups)
        assert mean == np.mean(values) and math.isnan(low) and math.isnan(high), "equal groups say nothing of an interval"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": []}, r"values: got shape \(0,\)"),
        ({"values": [1.0, math.nan]}, "expected .* finite"),
        ({"values": [1.0], "groups": [1, 2]}, "groups: got 2; expected one per value, 1"),
        ({"values": [1.0, 2.0], "level": 95}, "level: got 95"),
        ({"values": [1.0, 2.0], "resamples": 0}, "resamples: got 0"),
    ],
)
def test_intervals_of_nothing_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        mean_interval(**arguments)


# FID


def distance(real, fake):
    """The formula with scipy's matrix root."""
    covariances = np.cov(real.T), np.cov(fake.T)
    root = sqrtm(covariances[0] @ covariances[1]).real
    return ((real.mean(0) - fake.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)


def test_fid_is_the_formula():
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(90, 12)) @ rng.normal(size=(12, 12)), rng.normal(size=(70, 12)) + 0.5
    assert frechet_distance_of_features(real, fake) == pytest.approx(distance(real, fake), rel=1e-9)
    shift = rng.normal(size=12)
    moved = frechet_distance_of_features(torch.from_numpy(real), torch.from_numpy(real + shift))
    assert moved == pytest.approx((shift**2).sum(), rel=1e-6)


def test_the_interval_of_fid_is_about_its_spread():
    rng = np.random.default_rng(0)
    real = torch.from_numpy(rng.normal(size=(400, 4)))
    drawn = [torch.from_numpy(rng.normal(size=(200, 4)) + 1) for _ in range(40)]
    spread = np.std([frechet_distance_of_features(real, fake) for fake in drawn])
    value, low, high = frechet_interval(real, drawn[0], np.arange(200), resamples=60)
    assert value == frechet_distance_of_features(real, drawn[0])
    assert (high - low) / 2 == pytest.approx(1.96 * spread, rel=0.3)
    assert value - low == pytest.approx(high - value)
    assert math.isnan(frechet_interval(real, drawn[0], np.arange(200), resamples=0)[1])
    assert math.isnan(frechet_interval(real, drawn[0], np.zeros(200))[1])


def test_the_interval_of_fid_draws_groups():
    """Groups differ: by single images the spread of other sets would be missed. Common members make it wider, by formula."""
    rng = np.random.default_rng(1)
    real, groups = torch.from_numpy(rng.normal(size=(400, 4))), np.repeat(np.arange(20), 10)
    drawn = [torch.from_numpy(rng.normal(size=(200, 4)) + rng.normal(size=(20, 4))[groups] + 1) for _ in range(60)]
    spread = np.std([frechet_distance_of_features(real, fake) for fake in drawn])
    deviations = []
    for fake in drawn[:5]:
        _, low, high = frechet_interval(real, fake, groups, resamples=60)
        deviations.append((high - low) / 2 / stats.t.ppf(0.975, 19))
    assert np.mean(deviations) == pytest.approx(spread, rel=0.25)
    ring = [frozenset({group, (group + 1) % 20}) for group in groups]
    value, _, high = frechet_interval(real, fake, ring, resamples=60)
    wider = stats.t.ppf(0.975, 9) / stats.t.ppf(0.975, 19) * math.sqrt((20 / 9) / (20 / 19))
    assert high - value == pytest.approx(wider * deviations[-1] * stats.t.ppf(0.975, 19))


@pytest.mark.parametrize(
    ("real", "fake", "message"),
    [
        (np.zeros((5, 3)), np.zeros((5, 4)), r"fake: got real and fake of \(5, 3\) and \(5, 4\)"),
        (np.zeros((1, 3)), np.zeros((5, 3)), "real: .*at least two images"),
        (np.zeros((5, 3)), np.full((5, 3), np.nan), "fake: features are not finite"),
    ],
)
def test_fid_of_what_has_no_covariance_is_refused(real, fake, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance_of_features(real, fake)


def test_an_inception_without_torch_fidelity_is_refused(tmp_path):
    file = tmp_path / "inception.pth"
    torch.save({}, file)
    error = ModuleNotFoundError if importlib.util.find_spec("torch_fidelity") is None else ValueError
    with pytest.raises(error, match="fid: .*torch-fidelity"):
        load_inception(file, "cpu")


# Leakage


def test_leakage_by_hand():
    references = [[[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]]] * 2
    found = region_leakage([[3.0, 4.0], [3.0, 4.0]], references, [1, 0])
    np.testing.assert_allclose(found["right"], [0.8, 0.6])
    np.testing.assert_allclose(found["wrong_mean"], [0.0, 0.1], atol=1e-12)
    np.testing.assert_allclose(found["wrong_max"], [0.6, 0.8])
    np.testing.assert_allclose(found["gap"], [0.2, -0.2])
    assert found["leaks"].tolist() == [0.0, 1.0]


def test_swapped_regions_leak_and_right_ones_do_not():
    rng = np.random.default_rng(0)
    references = rng.normal(size=(20, 3, 8))
    own = rng.integers(0, 3, 20)
    regions = references[np.arange(20), own] + 0.01 * rng.normal(size=(20, 8))
    assert region_leakage(regions, references, own)["leaks"].mean() == 0.0
    swapped = region_leakage(regions, references, (own + 1) % 3)
    assert swapped["leaks"].mean() == 1.0 and (swapped["wrong_max"] > 0.99).all()
    scaled = region_leakage(5 * regions, references * rng.uniform(1, 9, (20, 3, 1)), own)
    np.testing.assert_allclose(scaled["gap"], region_leakage(regions, references, own)["gap"], rtol=1e-9)
    from_torch = region_leakage(torch.from_numpy(regions), torch.from_numpy(references), torch.from_numpy(own))
    np.testing.assert_array_equal(from_torch["gap"], region_leakage(regions, references, own)["gap"])


def test_images_with_fewer_references():
    references = np.array([[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
    present = [[True, True, False], [True, True, True]]
    found = region_leakage([[1.0, 0.0], [1.0, 1.0]], references, [0, 0], present)
    np.testing.assert_allclose(found["wrong_max"], [0.0, 1.0])
    np.testing.assert_allclose(found["wrong_mean"], [0.0, (0.5**0.5 + 1) / 2])


def test_as_near_to_both_is_no_leak():
    assert leakage_of_similarities([[0.5, 0.5]], [0])["leaks"].tolist() == [0.0]


def test_a_leak_is_another_first_choice_among_those_that_are_there():
    found = leakage_of_similarities([[0.4, 0.5, 0.9], [0.5, 0.4, 0.9]], [0, 0], [[True, True, False]] * 2)
    assert found["leaks"].tolist() == [1.0, 0.0]
    assert leakage_of_similarities([[0.5, 0.4, math.nan]], [0], [[True, True, False]])["leaks"].tolist() == [0.0]
    with pytest.raises(ValueError, match="similarities: not finite"):
        leakage_of_similarities([[0.5, math.nan]], [0])


@pytest.mark.parametrize(
    ("regions", "references", "own", "present", "message"),
    [
        (np.ones((2, 3)), np.ones((2, 2, 4)), [0, 0], None, r"got \(2, 3\) and \(2, 2, 4\)"),
        (np.ones((1, 3)), np.ones((1, 1, 3)), [0], None, "no wrong reference"),
        (np.ones((1, 3)), np.ones((1, 2, 3)), [2], None, "own: got 2 to 2; expected 0 to 1"),
        (np.ones((1, 3)), np.ones((1, 2, 3)), [0.0], None, "own: got float64"),
        (np.zeros((1, 3)), np.ones((1, 2, 3)), [0], None, "a feature is zero"),
        (np.ones((1, 3)), np.ones((1, 3, 3)), [2], [[True, True, False]], "own reference is not present"),
        (np.ones((1, 3)), np.ones((1, 3, 3)), [0], [[True, True]], r"present: got \(1, 2\)"),
    ],
)
def test_leakage_of_what_does_not_fit_is_refused(regions, references, own, present, message):
    with pytest.raises(ValueError, match=message):
        region_leakage(regions, references, own, present)


# Encoders


def cosines(a, b):
    return torch.nn.functional.cosine_similarity(torch.as_tensor(a)[:, None], torch.as_tensor(b)[None], dim=-1).numpy()


def pixels_of(image, size, resample, box, mean, std):
    """Preparation by Pillow and numpy alone."""
    scaled = image.resize(size, resample)
    scaled = scaled if box is None else scaled.crop(box)
    values = (np.asarray(scaled, dtype=np.float32) / 255 - np.float32(mean)) / np.float32(std)
    return torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1)[None]


@torch.no_grad()
def test_dino_is_the_class_token_after_the_norm(models, images):
    encode = load_encoder("dino", models["dino"], "cpu").image.encode
    model = ViTModel.from_pretrained(models["dino"]).eval()
    expected = []
    for image in images:
        pixels = pixels_of(image, (32, 32), Image.Resampling.BILINEAR, None, [0.5] * 3, [0.5] * 3)
        tokens = model.embeddings(pixels)
        for layer in model.layers if hasattr(model, "layers") else model.encoder.layer:
            tokens = layer(tokens)
            tokens = tokens[0] if isinstance(tokens, tuple) else tokens
        expected.append(model.layernorm(tokens)[0, 0])
    torch.testing.assert_close(encode(images), torch.stack(expected), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        cosines(encode(images), encode(images)), unit(encode(images)) @ unit(encode(images)).T, atol=1e-6
    )


@torch.no_grad()
def test_dino_with_the_transform_of_its_authors(models, images):
    found = load_encoder("dino", models["dino"], "cpu", "original")
    model = ViTModel.from_pretrained(models["dino"]).eval()
    side = 37  # 32 * 256 / 224
    expected = []
    rng = np.random.default_rng(3)
    # 37 x 39, 41 x 37 and so on: the crop's offset is halfway between two pixels, once with the even one above.
    sizes = [(74, 78), (82, 74), (78, 74), (74, 86)]
    images = [*images, *(Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes)]
    for image in images:
        scale = side / min(image.size)
        width, height = (side if edge == min(image.size) else int(edge * scale) for edge in image.size)
        left, top = (round((edge - 32) / 2) for edge in (width, height))  # as torchvision.transforms.CenterCrop
        colours = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
        pixels = pixels_of(image, (width, height), Image.Resampling.BICUBIC, (left, top, left + 32, top + 32), *colours)
        expected.append(model(pixels).last_hidden_state[0, 0])
    torch.testing.assert_close(found.image.encode(images), torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert found.image.key != load_encoder("dino", models["dino"], "cpu").image.key


@torch.no_grad()
def test_dinov2_is_its_pooled_token(models, images):
    model = Dinov2Model.from_pretrained(models["dinov2"]).eval()
    found = load_encoder("dinov2", models["dinov2"], "cpu").image.encode(images[2:])
    pixels = pixels_of(
        images[2], (32, 32), Image.Resampling.BICUBIC, (2, 2, 30, 30), [0.48145466, 0.4578275, 0.40821073],
        [0.26862954, 0.26130258, 0.27577711],
    )  # fmt: skip
    torch.testing.assert_close(found, model(pixels).pooler_output, rtol=1e-4, atol=1e-4)


class Unwrapped(torch.nn.Module):
    """CLIP with plain tensors for features, as torchmetrics expects of transformers; `sign` is of what it makes of texts."""

    def __init__(self, model, sign):
        super().__init__()
        self.model, self.config, self.sign = model, model.config, sign

    def get_image_features(self, pixels):
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    def get_text_features(self, tokens, mask):
        return self.sign * self.model.get_text_features(input_ids=tokens, attention_mask=mask).pooler_output


@torch.no_grad()
def test_clip_scores_are_those_of_torchmetrics(models, images):
    found = load_encoder("clip", models["clip"], "cpu")
    texts = ["a photo of a cat", "a dog", "a cup of a cat"]
    ours_images, ours_texts = unit(found.image.encode(images)), unit(found.text.encode(texts))
    processor = CLIPProcessor(
        CLIPImageProcessorPil.from_pretrained(models["clip"]), AutoTokenizer.from_pretrained(models["clip"])
    )
    model = CLIPModel.from_pretrained(models["clip"]).eval()
    above, below = (CLIPScore(lambda sign=sign: (Unwrapped(model, sign), processor)) for sign in (1, -1))
    tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]
    for one in range(3):
        # torchmetrics cuts at 0, so that one of the two has the value.
        signed = float(above(tensors[one], texts[one])) - float(below(tensors[one], texts[one]))
        assert signed != 0 and 100 * ours_images[one] @ ours_texts[one] == pytest.approx(signed, abs=1e-3)
        other = (one + 1) % 3
        among = float(above(tensors[one], tensors[other]))
        assert among > 0 and 100 * ours_images[one] @ ours_images[other] == pytest.approx(among, abs=1e-3)


@torch.no_grad()
def test_clip_embeddings_are_the_models_own(models, images):
    found = load_encoder("clip", models["clip"], "cpu")
    model = CLIPModel.from_pretrained(models["clip"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(models["clip"])
    texts = ["a cat", "a photo of a dog . " * 5]
    pixels = CLIPImageProcessorPil.from_pretrained(models["clip"])(images, return_tensors="pt")["pixel_values"]
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=12, return_tensors="pt")
    whole = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels)
    np.testing.assert_allclose(unit(found.image.encode(images)), whole.image_embeds.numpy(), atol=1e-5)
    np.testing.assert_allclose(unit(found.text.encode(texts)), whole.text_embeds.numpy(), atol=1e-5)
    assert found.truncated(texts) == texts[1:]


def test_other_models_and_broken_folders_are_refused(models, tmp_path):
    with pytest.raises(ValueError, match="dino: .*type 'clip'; expected vit, like facebook/dino-vits16"):
        load_encoder("dino", models["clip"], "cpu")
    with pytest.raises(ValueError, match="fid: .*type 'blip'; expected clip, .* or vit, .* or dinov2"):
        load_encoder("fid", write_tiny_captioner(tmp_path / "blip"), "cpu")
    with pytest.raises(FileNotFoundError, match="clip: no such folder: .*models are read from local folders"):
        load_encoder("clip", tmp_path / "nowhere", "cpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        load_encoder("clip", tmp_path / "empty", "cpu")


def test_weights_that_are_missing_are_not_drawn_at_random(models, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "dino"
    folder.mkdir()
    for file in models["dino"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in sorted(weights) if "pooler" not in name)
    save_file({name: value for name, value in weights.items() if name != lost}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="dino: .* lacks 1 of the model's weights"):
        load_encoder("dino", folder, "cpu")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no preprocessor_config.json"):
        load_encoder("dino", folder, "cpu")
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="dino: .* cannot be loaded"):
        load_encoder("dino", folder, "cpu", "original")


# Reports


def test_the_table_says_where_there_is_no_interval():
    one = {"count": 3, "images": 3, "prompts": 1, "subjects": 1, "over": "prompts"}
    lines = {name: Line(0.5, math.nan, math.nan, **one, note="none, of 1 prompt") for name in "ac"}
    text = table(lines, {"a": "A", "b": "B", "c": "C"}, 0.95, "images")
    assert text.endswith("\nintervals: none, of 1 prompt") and text.count("none, of") == 1
    assert text.splitlines()[1].split() == ["A", "0.5000", "-", "3", "1", "1"] and len(text.splitlines()) == 4
