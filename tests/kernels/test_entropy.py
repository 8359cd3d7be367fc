"""Patch entropy and fusion: kernel against independent float64 formulas."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from skimage import data as photos
from skimage.measure import shannon_entropy

from focusdpo_kernels import fuse_focus, patch_entropy
from focusdpo_kernels import reference as spec
from tests.conftest import DEVICE, HALF_AND_FULL

pytestmark = pytest.mark.usefixtures("poisoned")
BACKENDS = ["triton", "torch"]


def kde_entropy(pixels: np.ndarray, bins: int, sigma: float) -> float:
    """E7 for one patch of gray values, in float64."""
    centres = np.linspace(0, 1, bins)
    weight = np.exp(-(((pixels.reshape(-1, 1) - centres) / sigma) ** 2) / 2).mean(0)
    q = weight / weight.sum()
    q = q[q > 0]
    return float(-(q * np.log(q)).sum())


def gray_patches(images: torch.Tensor, patch: int) -> list[list[np.ndarray]]:
    values = images.double().cpu().numpy()
    if images.dtype == torch.uint8:
        values = values / 255
    gray = values[:, 0] if values.shape[1] == 1 else np.tensordot([0.2989, 0.587, 0.114], values, axes=(0, 1))
    rows, columns = gray.shape[1] // patch, gray.shape[2] // patch
    return [
        [g[r * patch : (r + 1) * patch, c * patch : (c + 1) * patch] for r in range(rows) for c in range(columns)] for g in gray
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [*HALF_AND_FULL, torch.uint8], ids=str)
@pytest.mark.parametrize(("channels", "patch", "bins", "sigma"), [(3, 16, 32, 0.01), (1, 8, 20, 0.05), (3, 5, 3, 0.2)])
def test_kde(backend, dtype, channels, patch, bins, sigma):
    images = torch.rand(2, channels, 2 * patch, 3 * patch, device=DEVICE)
    images = (images * 255).byte() if dtype == torch.uint8 else images.to(dtype)
    expected = [[kde_entropy(p, bins, sigma) for p in image] for image in gray_patches(images, patch)]
    actual = patch_entropy(images, patch, bins=bins, sigma=sigma, backend=backend)
    assert actual.shape == (2, 6) and actual.dtype == torch.float32
    torch.testing.assert_close(actual.double().cpu(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=3e-6)


@pytest.mark.parametrize(("method", "sigma"), [("kde", 0.05), ("histogram", 0.01)])
def test_in_float64(method, sigma):
    images = torch.rand(2, 3, 16, 24, dtype=torch.float64, device=DEVICE)
    actual = patch_entropy(images, 8, bins=20, sigma=sigma, method=method)
    if method == "kde":
        expected = [[kde_entropy(p, 20, sigma) for p in image] for image in gray_patches(images, 8)]
    else:
        expected = [[shannon_entropy(np.floor(p * 20), base=math.e) for p in image] for image in gray_patches(images, 8)]
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual.cpu(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bins", [2, 7, 32, 256])
def test_the_sigma_that_an_error_recommends_is_taken(bins):
    images = torch.rand(1, 1, 16, 16, device=DEVICE)
    with pytest.raises(ValueError, match="expected at least") as error:
        patch_entropy(images, 16, bins=bins, sigma=1e-6)
    sigma = float(re.search(r"at least ([\d.e-]+)", str(error.value))[1])
    assert patch_entropy(images, 16, bins=bins, sigma=sigma).isfinite().all()
    with pytest.raises(ValueError, match="expected at least"):
        patch_entropy(images, 16, bins=bins, sigma=0.98 * sigma)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_ends_of_a_histogram(backend):
    """White belongs to the last bin and not to the one before; what rounding left below black to the first."""
    images = torch.full((1, 1, 16, 16), 30.5 / 32, device=DEVICE)
    images[..., :8] = 1.0
    low = torch.full((1, 1, 16, 16), 1.5 / 32, device=DEVICE)
    low[..., :8] = -5e-4
    for image in (images, low):
        actual = patch_entropy(image, 16, method="histogram", check_range=False, backend=backend)
        assert actual.item() == pytest.approx(math.log(2), abs=1e-6)
    low[..., 8:] = 0.5 / 32
    assert patch_entropy(low, 16, method="histogram", check_range=False, backend=backend).item() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_of_one_patch_has_no_complexity(backend):
    images = torch.rand(3, 1, 16, 16, device=DEVICE)
    assert patch_entropy(images, 16, backend=backend).min() > 1
    assert patch_entropy(images, 16, normalize=True, backend=backend).tolist() == [[0.0]] * 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bins", [16, 32, 256])
def test_histogram_is_scikit_images_entropy(backend, bins):
    photo = torch.from_numpy(photos.camera()[:64, 200:296].copy())[None, None].to(DEVICE)
    images = photo.float() / 256  # exact in every bin count that divides 256
    actual = patch_entropy(images, 16, bins=bins, method="histogram", backend=backend)
    expected = [shannon_entropy(np.floor(p * bins), base=math.e) for p in gray_patches(images, 16)[0]]
    torch.testing.assert_close(actual[0].double().cpu(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_normalize(backend):
    images = torch.rand(3, 3, 32, 48, device=DEVICE)
    images[0] = 0.3  # flat: every patch alike
    raw = patch_entropy(images, backend=backend)
    complexity = patch_entropy(images, normalize=True, backend=backend)
    assert (complexity[0] == 0).all()
    assert complexity[1:].amin(1).tolist() == [0, 0] and complexity[1:].amax(1).tolist() == [1, 1]
    expected = (raw[1] - raw[1].min()) / (raw[1].max() - raw[1].min())
    torch.testing.assert_close(complexity[1], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["kde", "histogram"])
def test_strides_and_empty(method):
    images = torch.rand(2, 32, 48, 3, device=DEVICE).permute(0, 3, 1, 2)
    actual = patch_entropy(images, method=method, backend="triton")
    torch.testing.assert_close(actual, patch_entropy(images.contiguous(), method=method, backend="torch"), rtol=0, atol=2e-6)
    assert patch_entropy(images[:0], method=method, backend="triton").shape == (0, 6)


def test_extreme_pixels():
    images = torch.zeros(1, 1, 16, 32, device=DEVICE)
    images[..., 16:] = 1.0
    for backend in BACKENDS:
        assert (patch_entropy(images, method="histogram", backend=backend) == 0).all()
        flat = kde_entropy(np.zeros(256), 32, 0.01)  # not 0: the kernel reaches the next bin
        assert patch_entropy(images, backend=backend)[0].tolist() == pytest.approx([flat, flat], abs=1e-6)


def test_detail_scores_above_flat():
    photo = torch.from_numpy(photos.astronaut().copy()).permute(2, 0, 1)[None].float().to(DEVICE) / 255
    entropy = patch_entropy(photo).reshape(32, 32)
    assert entropy[13, 18] > entropy[5, 20], "collar against the plain backdrop"


def test_value_range_is_refused():
    with pytest.raises(ValueError, match=r"images: values from -1.* expected \[0, 1\].*\(images \+ 1\) / 2"):
        patch_entropy(torch.full((1, 1, 16, 16), -1.0), check_range=True)
    with pytest.raises(ValueError, match="images: values from nan"):
        patch_entropy(torch.full((1, 1, 16, 16), math.nan), check_range=True)


@pytest.mark.parametrize("value", [math.nan, -0.5, 1.2])
@pytest.mark.parametrize("method", ["kde", "histogram"])
@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
def test_pixels_out_of_range_never_end_as_plausible_numbers(value, method, dtype):
    """On a GPU nobody looks at the values first: what cannot be refused must be loud."""
    images = torch.rand(2, 1, 16, 32, device=DEVICE).to(dtype)
    images[0, ..., 20] = value
    for backend in BACKENDS:
        entropy = patch_entropy(images, method=method, check_range=False, backend=backend)
        assert entropy.isnan().tolist() == [[False, True], [False, False]]
        complexity = patch_entropy(images, method=method, normalize=True, check_range=False, backend=backend)
        assert complexity.isnan().tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_outside_the_prior_stays_outside(backend):
    prior = torch.tensor([[1, 0]], device=DEVICE)
    complexity = torch.tensor([[0.5, math.nan]], device=DEVICE)
    zero = torch.zeros(1, 2, device=DEVICE)
    assert fuse_focus(zero, zero[:, 0], complexity, prior, gamma=0.0, backend=backend).tolist() == [[0.5, 0.0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_fusion_of_half_precision_fields_is_fp32(backend):
    ones = torch.ones(1, 2, device=DEVICE).bfloat16()
    coverage = torch.tensor([0.1], device=DEVICE).bfloat16()  # 0.1001 in bf16: above tau
    mask = fuse_focus(0 * ones, coverage, ones, ones, tau=0.1, backend=backend)
    assert mask.dtype == torch.float32
    assert not mask.any()


@pytest.mark.parametrize("per_subject", [False, True])
def test_fuse_focus(per_subject):
    batch, patches = 4, 50
    prior = torch.rand(batch, *([3] if per_subject else []), patches, device=DEVICE) > 0.5
    structure = (torch.rand(batch, patches, device=DEVICE) > 0.5).float()
    complexity = torch.rand(batch, patches, device=DEVICE)
    coverage = torch.tensor([0.0, 0.1, 0.1000001, 0.9], device=DEVICE)
    union = prior.any(1) if per_subject else prior
    blended = 0.3 * structure + 0.7 * complexity * union
    expected = torch.stack([blended[0], blended[1], structure[2], structure[3]])
    for backend in BACKENDS:
        mask = fuse_focus(structure, coverage, complexity, prior, tau=0.1, gamma=0.3, backend=backend)
        torch.testing.assert_close(mask, expected, rtol=0, atol=1e-7)


def test_the_specification_of_bytes_and_of_complexity():
    """On a CPU others stand in for it, with its gray values."""
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    same = spec.patch_entropy(images.float() / 255, 16, 32, 0.01, "kde", False)
    torch.testing.assert_close(spec.patch_entropy(images, 16, 32, 0.01, "kde", False), same, rtol=1e-6, atol=0)
    plain = spec.patch_entropy(images.double() / 255, 16, 32, 0.01, "kde", False)
    low, high = plain.amin(1, keepdim=True), plain.amax(1, keepdim=True)
    complexity = spec.patch_entropy(images.double() / 255, 16, 32, 0.01, "kde", True)
    torch.testing.assert_close(complexity, (plain - low) / (high - low), rtol=1e-12, atol=1e-12)
