"""What stands in for the specification on a CPU gives its results, and those of float64."""

from __future__ import annotations

import math

import pytest
import torch
from skimage import data as photos
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from focusdpo_kernels import cpu_mask, focus_field, patch_entropy, reference, structure_field, topk_mask
from tests.conftest import HALF_AND_FULL, default_dtype
from tests.kernels.test_matching import hard_scores


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr("tests.kernels.test_matching.DEVICE", torch.device("cpu"))


def images_of(dtype: torch.dtype, channels: int = 3) -> torch.Tensor:
    """A photograph, with a flat part and one of noise."""
    photo = torch.from_numpy(photos.astronaut()[:96, 180:340].copy()).permute(2, 0, 1)[None, :channels] / 255
    images = torch.cat([photo, torch.rand_like(photo), photo.flip(-1)])
    images[1, :, :40] = 0.25 + 0.5 * images[1, :, :1]
    images[2, :, :48, :48] = 0.3
    return (images * 255).round().byte() if dtype == torch.uint8 else images.to(dtype)


@pytest.mark.parametrize("dtype", [*HALF_AND_FULL, torch.uint8], ids=str)
@pytest.mark.parametrize(
    ("patch", "bins", "sigma"),
    [
        (16, 32, 0.01),
        (8, 32, 0.05),
        (16, 256, 0.01),
        (4, 20, 0.0021),
        (16, 2, 0.0385),
        (16, 7, 1.0),
        (32, 100, 0.3),
        (1, 32, 0.01),
    ],
)
def test_entropies_are_those_of_float64(dtype, patch, bins, sigma):
    for channels in (1, 3):
        images = images_of(dtype, channels)
        pixels = images.double() / 255 if dtype == torch.uint8 else images.double()
        expected = reference.patch_entropy(pixels, patch, bins, sigma, "kde", False)
        actual = patch_entropy(images, patch, bins=bins, sigma=sigma, backend="torch")
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("bins", "sigma", "gray"), [(2, 0.0385, 0.49), (2, 0.2, 0.49), (32, 0.05, 0.0), (3, 0.1, 0.251)])
def test_flat_patches_far_from_bins(bins, sigma, gray):
    """Nothing but small weights, whose ratio counts."""
    images = torch.full((1, 1, 16, 16), gray)
    expected = reference.patch_entropy(images.double(), 16, bins, sigma, "kde", False)
    actual = patch_entropy(images, bins=bins, sigma=sigma, backend="torch")
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [*HALF_AND_FULL, torch.uint8], ids=str)
@pytest.mark.parametrize(("patch", "bins"), [(16, 32), (8, 2), (4, 256), (1, 32)])
def test_levels_are_the_specifications(dtype, patch, bins):
    images = images_of(dtype)
    expected = reference.patch_entropy(images, patch, bins, 0.01, "histogram", False)
    actual = patch_entropy(images, patch, bins=bins, method="histogram", backend="torch")
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["kde", "histogram"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -0.5, 1.2, -9e-4, 1.0009])
def test_pixels_out_of_range(method, value):
    images = torch.rand(2, 1, 32, 48)
    images[0, 0, 20, 20] = value
    actual = patch_entropy(images, method=method, check_range=False, backend="torch")
    expected = reference.patch_entropy(images.double(), 16, 32, 0.01, method, False)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-6, equal_nan=True)
    assert actual.isnan().sum() == (not -1e-3 <= value <= 1.001)


@pytest.mark.parametrize("rows", [1, 3, 5])  # of eight; the last block is shorter
def test_blocks_of_patches_are_one_result(monkeypatch, rows):
    images = torch.rand(2, 3, 64, 48)
    expected = patch_entropy(images, 8, normalize=True, backend="torch")
    heights, block_entropy = [], cpu_mask._block_entropy
    monkeypatch.setattr(cpu_mask, "PIXELS", rows * 2 * 48 * 8)
    monkeypatch.setattr(
        cpu_mask, "_block_entropy", lambda part, *args: heights.append(part.shape[2] // 8) or block_entropy(part, *args)
    )
    assert torch.equal(patch_entropy(images, 8, normalize=True, backend="torch"), expected)
    assert heights == {1: [1] * 8, 3: [3, 3, 2], 5: [5, 3]}[rows]
    assert patch_entropy(images[:0], 8, backend="torch").shape == (0, 48)
    assert patch_entropy(images[:, :, :0], 8, backend="torch").shape == (2, 0)


@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
@pytest.mark.parametrize("kind", ["hard", "distinct", "one NaN", "tied", "absent"])
def test_matches_are_the_specifications(dtype, kind):
    scores = torch.randn(2, 3, 50).to(dtype) if kind != "hard" else hard_scores(6, 50).reshape(2, 3, 50).to(dtype)
    if kind == "one NaN":
        scores[1, 2, 7] = math.nan
    elif kind == "tied":
        scores[0, 1, ::2] = 1.5
    elif kind == "absent":
        scores[1, 0] = -math.inf
    prior = torch.rand(2, 3, 50) > 0.5
    tensors = (torch.tensor([[0, 1, 50], [7, 90, -2]]), torch.tensor([[3], [40]]), torch.tensor(5, dtype=torch.uint8))
    for k in (0, 1, 2, 17, 49, 50, *tensors):
        counts = k.long() if isinstance(k, torch.Tensor) else k
        assert torch.equal(topk_mask(scores, k, backend="torch"), reference.topk_mask(scores, counts)), k
        for per_subject, region in ((False, prior[:, 0]), (False, prior), (True, prior), (False, prior[:, 1].float())):
            actual = structure_field(scores, k, region, per_subject=per_subject, backend="torch")
            expected = reference.structure_field(scores, counts, region, per_subject)
            assert all(torch.equal(a, e) and a.dtype == e.dtype for a, e in zip(actual, expected, strict=True)), k


@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
@pytest.mark.parametrize("subjects", [0, 1, 3])
def test_the_field_is_the_specifications(dtype, subjects):
    scores = torch.randn(3, subjects, 300).to(dtype)
    scores[0, :, 7] = math.nan
    scores[2, 1:2] = -math.inf
    prior, entropy = torch.rand(3, subjects, 300) > 0.5, torch.rand(3, 300)
    entropy[1] = 0.25
    regions = [(False, prior), (True, prior), (False, torch.rand(3, 300)), (False, torch.zeros(3, 300, dtype=torch.bool))]
    for k in (0, 1, 90, 300, torch.randint(-2, 310, (3, subjects)), torch.tensor(9, dtype=torch.int8)):
        counts = k.long().expand(3, subjects) if isinstance(k, torch.Tensor) else k
        for per_subject, region in regions:
            actual = focus_field(scores, k, region, entropy, per_subject=per_subject, backend="torch")
            matched = reference.topk_mask(scores, counts)
            expected = reference.focus_field(matched, scores, counts, region, entropy, per_subject, 0.1, 0.3)
            for name, a, e in zip(actual._fields, actual, expected, strict=True):
                assert torch.equal(a, e) and a.dtype == e.dtype, (name, k, per_subject)


def test_what_cannot_be_read_takes_the_specification():
    scores, prior, entropy = torch.randn(2, 1, 3, 40), torch.rand(2, 1, 40) > 0.5, torch.rand(2, 1, 40)

    def fields(scores, prior, entropy):
        return (*focus_field(scores, 5, prior, entropy, backend="torch"), *structure_field(scores, 5, prior, backend="torch"))

    each = [fields(*arguments) for arguments in zip(scores, prior, entropy, strict=True)]
    expected = [torch.stack(parts) for parts in zip(*each, strict=True)]
    assert all(map(torch.equal, torch.vmap(fields)(scores, prior, entropy), expected))
    mode = FakeTensorMode()
    inputs = [mode.from_tensor(x[0]) for x in (scores, prior, entropy)]
    with mode:
        fake = fields(*inputs)
    assert [x.shape for x in fake] == [x.shape[1:] for x in expected]
    # A trace depends on its arguments: the result is no constant in it.
    traced = make_fx(fields)(scores[0], prior[0], entropy[0])
    assert all(map(torch.equal, traced(scores[1], prior[1], entropy[1]), fields(scores[1], prior[1], entropy[1])))
    negative = torch.complex(scores, scores).conj().imag
    assert negative.is_neg() and torch.equal(topk_mask(negative, 5, backend="torch"), topk_mask(-scores, 5, backend="torch"))


@pytest.mark.parametrize("method", ["kde", "histogram"])
@pytest.mark.parametrize("sigma", [0.01, 0.3])
def test_default_device_and_dtype_have_no_say(method, sigma):
    images = torch.rand(1, 3, 32, 32)
    expected = patch_entropy(images, sigma=sigma, method=method, backend="torch")
    with default_dtype(torch.bfloat16), torch.device("meta"):
        found = patch_entropy(images, sigma=sigma, method=method, backend="torch")
    assert found.device.type == "cpu" and torch.equal(found, expected)


def test_values_are_not_looked_at_where_a_transform_sees_none():
    images = torch.rand(2, 1, 3, 32, 32)
    expected = torch.stack([patch_entropy(x, backend="torch") for x in images])
    torch.testing.assert_close(torch.vmap(lambda x: patch_entropy(x, backend="torch"))(images), expected)
    traced = make_fx(lambda x: patch_entropy(x, backend="torch"))(images[0])
    torch.testing.assert_close(traced(images[1]), expected[1])


def test_priors_are_not_written():
    scores, prior = torch.randn(1, 2, 40), torch.ones(1, 40)
    for region in (prior, prior.bool(), prior.long()):
        kept = region.clone()
        structure_field(scores, 5, region, backend="torch")
        assert torch.equal(region, kept)


def test_no_scores():
    assert topk_mask(torch.zeros(2, 0), 0, backend="torch").shape == (2, 0)
    assert topk_mask(torch.zeros(0, 5), 2, backend="torch").shape == (0, 5)
    assert topk_mask(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), backend="torch").shape == (0, 5)
    assert not topk_mask(torch.randn(5), 0, backend="torch").any()


def test_a_compiled_graph_has_the_specification():
    scores, images = torch.randn(1, 2, 6), torch.rand(1, 3, 32, 48)
    prior = torch.rand(1, 6) > 0.5

    def field(scores, images):
        entropy = patch_entropy(images, backend="torch")
        return focus_field(scores, 2, prior, entropy, tau=1.0, backend="torch")

    compiled = torch.compile(field, fullgraph=True, backend="aot_eager")(scores, images)
    for c, e in zip(compiled, field(scores, images), strict=True):
        torch.testing.assert_close(c, e, rtol=0, atol=2e-5)
    assert not cpu_mask.takes(scores.double()) and cpu_mask.takes(scores)
