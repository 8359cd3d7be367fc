"""The estimate's alignment (E10): kernel and specification against float64, written out token by token."""

from __future__ import annotations

import pytest
import torch

from focusdpo_kernels import estimate_alignment
from tests.conftest import DEVICE, HALF_AND_FULL

pytestmark = pytest.mark.usefixtures("poisoned")
BACKENDS = ["triton", "torch"]
SHAPES = [(2, 37, 5), (1, 1, 1), (3, 130, 64), (2, 20, 200), (2, 3, 4, 6), (4, 2, 4, 8), (1, 16, 6, 10)]


def make(shape, dtype=torch.float32):
    latents = [torch.randn(shape, device=DEVICE).to(dtype) for _ in range(4)]
    return latents, torch.rand(shape[0], device=DEVICE) + 0.1, torch.rand(shape[0], device=DEVICE) + 0.5


def tokens_of(latents):
    """[B, P, elements of a token] in float64."""
    if latents.ndim == 3:
        return latents.double()
    rows = []
    for i in range(0, latents.shape[2], 2):
        rows += [latents[:, :, i : i + 2, j : j + 2].flatten(1).double() for j in range(0, latents.shape[3], 2)]
    return torch.stack(rows, dim=1)


def truth(latents, prediction_scale, noised_scale):
    v, x, winner, loser = map(tokens_of, latents)
    found = torch.empty(v.shape[:2], dtype=torch.float64)
    for b in range(v.shape[0]):
        scale = 1.0 if noised_scale is None else float(noised_scale[b])
        for p in range(v.shape[1]):
            clean = scale * x[b, p] + float(prediction_scale[b]) * v[b, p]
            way = winner[b, p] - loser[b, p]
            found[b, p] = ((clean - loser[b, p]) * way).sum() / (way**2).sum()
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype, backend):
    latents, t, scale = make(shape, dtype)
    for noised_scale in (None, scale):
        found = estimate_alignment(*latents, -t, noised_scale, backend=backend)
        exact = truth(latents, -t, noised_scale)
        assert found.dtype == torch.float32 and found.shape == exact.shape
        torch.testing.assert_close(found.cpu().double(), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


def test_float64_stays_float64():
    latents, t, scale = make((2, 7, 3), torch.float64)
    found = estimate_alignment(*latents, t.double(), scale.double())
    torch.testing.assert_close(found.cpu(), truth(latents, t, scale), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 9, 16), (2, 4, 6, 4)], ids=str)
def test_what_it_says_of_known_estimates(shape, backend):
    """A perfect velocity gives 1, that of the loser 0, half of both one half; so do predictions of noise and of v."""
    (_, noise, winner, loser), t, _ = make(shape)
    rows = (-1, *[1] * (len(shape) - 1))
    at = t.reshape(rows)
    x = (1 - at) * winner + at * noise
    for towards, expected in ((winner, 1.0), (loser, 0.0), (0.5 * (winner + loser), 0.5)):
        velocity = (x - towards) / at
        found = estimate_alignment(velocity, x, winner, loser, -t, backend=backend)
        torch.testing.assert_close(found, torch.full_like(found, expected), rtol=0, atol=1e-4)
    alpha, sigma = torch.cos(t), torch.sin(t)
    x = alpha.reshape(rows) * winner + sigma.reshape(rows) * noise
    of_noise = estimate_alignment(noise, x, winner, loser, -sigma / alpha, 1 / alpha, backend=backend)
    v = alpha.reshape(rows) * noise - sigma.reshape(rows) * winner
    of_v = estimate_alignment(v, x, winner, loser, -sigma, alpha, backend=backend)
    for found in (of_noise, of_v):
        torch.testing.assert_close(found, torch.ones_like(found), rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_exchanging_winner_and_loser(backend):
    (v, x, winner, loser), t, _ = make((3, 40, 8))
    winner[1, 5] = loser[1, 5]
    one = estimate_alignment(v, x, winner, loser, -t, backend=backend)
    other = estimate_alignment(v, x, loser, winner, -t, backend=backend)
    torch.testing.assert_close(one + other, torch.ones_like(one), rtol=0, atol=1e-4)
    assert one[1, 5] == 0.5 and other[1, 5] == 0.5, "as near to the one as to the other"


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuting_tokens_permutes_it_and_samples_are_alone(backend):
    latents, t, _ = make((3, 40, 8))
    found = estimate_alignment(*latents, -t, backend=backend)
    order = torch.randperm(40, device=DEVICE)
    assert torch.equal(estimate_alignment(*[x[:, order] for x in latents], -t, backend=backend), found[:, order])
    for b in range(3):
        alone = estimate_alignment(*[x[b : b + 1] for x in latents], -t[b : b + 1], backend=backend)
        torch.testing.assert_close(alone[0], found[b], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_no_samples_and_what_is_no_number(backend):
    latents, t, _ = make((2, 9, 4))
    assert not estimate_alignment(latents[0].requires_grad_(), *latents[1:], -t, backend=backend).requires_grad
    values = [x.detach().clone() for x in latents]
    values[1][0, 3, 2] = torch.nan
    found = estimate_alignment(*values, -t, backend=backend)
    assert found[0, 3].isnan() and found.isnan().sum() == 1
    for shape in ((0, 5, 4), (2, 0, 4)):
        empty = [torch.randn(shape, device=DEVICE)] * 4
        assert estimate_alignment(*empty, torch.rand(shape[0], device=DEVICE), backend=backend).shape == shape[:2]
    slices = [torch.randn(2, 18, 4, device=DEVICE)[:, 3:12] for _ in range(4)]
    whole = estimate_alignment(*[x.contiguous() for x in slices], -t, backend=backend)
    assert torch.equal(estimate_alignment(*slices, -t, backend=backend), whole)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"noised": torch.zeros(2, 9, 5)}, ValueError, r"noised: expected shape \[2, 9, 4\] \(as prediction\)"),
        ({"winner": torch.zeros(2, 9)}, ValueError, r"winner: expected a tensor \[B, P, C\] or \[B, C, H, W\]"),
        ({"loser": torch.zeros(2, 9, 4, dtype=torch.int32)}, TypeError, "loser: got dtype int32"),
        ({"prediction_scale": 0.5}, TypeError, r"prediction_scale: expected a tensor \[B\], got float"),
        ({"noised_scale": torch.zeros(3)}, ValueError, r"noised_scale: expected shape \[2\] \(B of prediction\)"),
        ({name: torch.zeros(1, 2, 3, 4) for name in ("prediction", "noised", "winner", "loser")}, ValueError,
         "prediction: latents of 3x4 have no whole 2x2 patches"),
    ],
)  # fmt: skip
def test_refused(change, error, message):
    arguments = {name: torch.zeros(2, 9, 4) for name in ("prediction", "noised", "winner", "loser")}
    with pytest.raises(error, match=message):
        estimate_alignment(**{**arguments, "prediction_scale": torch.zeros(2), **change})
