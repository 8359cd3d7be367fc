"""Cross-layer similarity: kernel against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from focusdpo_kernels import SimilarityAccumulator, cross_layer_similarity
from tests.conftest import DEVICE, HALF_AND_FULL

pytestmark = pytest.mark.usefixtures("poisoned")

POOLINGS = ["reference", "max"]
SHAPES = [  # N, B, P, Q, D, R
    (1, 1, 1, 1, 1, 1),
    (2, 2, 37, 23, 50, 3),
    (3, 1, 16, 8, 256, 1),
    (2, 1, 33, 40, 264, 6),
    (1, 3, 5, 9, 300, 2),
    (1, 2, 5, 330, 20, 3),  # so many reference tokens that they are split among programs
]


def make(layers, batch, patches, tokens, width, subjects, dtype):
    """Target and reference as slices of one longer sequence, as a transformer gives them."""
    sequences = [torch.randn(batch, 3 + patches + tokens, width, device=DEVICE).to(dtype) for _ in range(layers)]
    target = [h[:, 3 : 3 + patches] for h in sequences]
    reference = [h[:, 3 + patches :] for h in sequences]
    mask = torch.rand(batch, subjects, tokens, device=DEVICE) > 0.4
    mask[..., 0] = True
    return target, reference, mask


def truth(target, reference, mask, pooling="reference"):
    """E3 and E4 written out in float64 with a function of PyTorch that the reference does not use."""
    scores = []
    for h_tgt, h_ref in zip(target, reference, strict=True):
        if pooling == "max":
            cosine = F.cosine_similarity(h_ref.double()[:, :, None], h_tgt.double()[:, None], dim=-1)  # [B, Q, P]
            best = [[cosine[b, mask[b, r]].amax(0) for r in range(mask.shape[1])] for b in range(len(mask))]
            scores.append(torch.stack([torch.stack(rows) for rows in best]))
            continue
        weights = mask.double()
        pooled = torch.einsum("brq,bqd->brd", weights, h_ref.double()) / weights.sum(-1, keepdim=True)
        scores.append(F.cosine_similarity(pooled[:, :, None], h_tgt.double()[:, None], dim=-1))
    return torch.stack(scores).mean(0)


@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_matches_float64(shape, dtype, backend, pooling):
    target, reference, mask = make(*shape, dtype)
    scores = cross_layer_similarity(target, reference, mask, pooling=pooling, backend=backend)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), truth(target, reference, mask, pooling), rtol=0, atol=5e-7)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_accumulator_gives_the_same(backend, pooling):
    target, reference, mask = make(3, 2, 19, 11, 70, 2, torch.bfloat16)
    accumulator = SimilarityAccumulator(mask, pooling=pooling, backend=backend)
    for h_tgt, h_ref in zip(target, reference, strict=True):
        accumulator.update(h_tgt, h_ref)
    expected = cross_layer_similarity(target, reference, mask, pooling=pooling, backend=backend)
    torch.testing.assert_close(accumulator.result(), expected, rtol=0, atol=2e-7)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_layer_weights(backend):
    target, reference, mask = make(2, 1, 7, 5, 20, 2, torch.float32)
    each = [cross_layer_similarity([t], [r], mask, backend=backend) for t, r in zip(target, reference, strict=True)]
    weighted = cross_layer_similarity(target, reference, mask, layer_weights=[1.0, 3.0], backend=backend)
    torch.testing.assert_close(weighted, 0.25 * each[0] + 0.75 * each[1], rtol=0, atol=2e-7)
    accumulator = SimilarityAccumulator(mask, backend=backend)
    accumulator.update(target[0], reference[0], weight=1.0)
    accumulator.update(target[1], reference[1], weight=3.0)
    torch.testing.assert_close(accumulator.result(), weighted, rtol=0, atol=2e-7)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_absent_subject_and_zero_tokens(backend, pooling):
    target, reference, mask = make(2, 2, 6, 5, 12, 3, torch.float32)
    mask[0, 1] = False
    target[0][1, 2] = 0
    scores = cross_layer_similarity(target, reference, mask, pooling=pooling, backend=backend)
    assert (scores[0, 1] == -torch.inf).all()
    scores[0, 1] = 0
    assert scores.isfinite().all()


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("zero", ["batch", "patches", "tokens", "subjects", "width"])
def test_sizes_of_zero(backend, zero, pooling):
    sizes = {"batch": 2, "patches": 3, "tokens": 4, "width": 5, "subjects": 2} | {zero: 0}
    target = [torch.randn(sizes["batch"], sizes["patches"], sizes["width"], device=DEVICE)]
    reference = [torch.randn(sizes["batch"], sizes["tokens"], sizes["width"], device=DEVICE)]
    mask = torch.ones(sizes["batch"], sizes["subjects"], sizes["tokens"], device=DEVICE)
    scores = cross_layer_similarity(target, reference, mask, pooling=pooling, backend=backend)
    assert scores.shape == (sizes["batch"], sizes["subjects"], sizes["patches"])
    if zero == "tokens":
        assert (scores == -torch.inf).all()
    if zero == "width":
        assert (scores == 0).all()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_any_strides(pooling):
    layers = torch.randn(2, 24, 3, 20, device=DEVICE)  # [N, D, B, P + Q]: every layer transposed
    hidden = layers.permute(0, 2, 3, 1)
    target, reference = hidden[:, :, :12].unbind(0), hidden[:, :, 12:].unbind(0)
    mask = (torch.rand(2, 8, 3, device=DEVICE) > 0.3).permute(2, 0, 1)
    contiguous = [[h.contiguous() for h in side] for side in (target, reference)]
    expected = cross_layer_similarity(*contiguous, mask, pooling=pooling, backend="torch")
    actual = cross_layer_similarity(target, reference, mask, pooling=pooling, backend="triton")
    torch.testing.assert_close(actual, expected, rtol=0, atol=5e-7)
    stacked = cross_layer_similarity(hidden[:, :, :12], hidden[:, :, 12:], mask, pooling=pooling, backend="triton")
    assert torch.equal(stacked, actual)


def test_expanded_batch():
    target, reference, mask = make(1, 1, 9, 6, 32, 2, torch.bfloat16)
    many = cross_layer_similarity(
        [target[0].expand(4, -1, -1)], [reference[0].expand(4, -1, -1)], mask.expand(4, -1, -1), backend="triton"
    )
    one = cross_layer_similarity(target, reference, mask, backend="triton")
    assert torch.equal(many, one.expand(4, -1, -1))


def test_outlier_channels():
    """Hidden states of FLUX have channels 100 times larger than the rest."""
    target, reference, mask = make(3, 1, 21, 17, 128, 2, torch.float32)
    for h in (*target, *reference):
        h[..., 5] *= 300
        h[..., 77] *= 100
    target, reference = ([h.bfloat16() for h in side] for side in (target, reference))
    scores = cross_layer_similarity(target, reference, mask, backend="triton")
    torch.testing.assert_close(scores.double(), truth(target, reference, mask), rtol=0, atol=1e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_bitwise_deterministic(pooling):
    target, reference, mask = make(2, 2, 37, 23, 50, 3, torch.bfloat16)
    runs = [cross_layer_similarity(target, reference, mask, pooling=pooling, backend="triton") for _ in range(2)]
    assert torch.equal(*runs)


def test_autocast_changes_nothing():
    target, reference, mask = make(2, 1, 9, 6, 64, 2, torch.float32)
    expected = cross_layer_similarity(target, reference, mask, backend="torch")
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert torch.equal(cross_layer_similarity(target, reference, mask, backend="torch"), expected)


def test_float64_on_the_torch_backend():
    target, reference, mask = make(2, 1, 9, 6, 64, 2, torch.float64)
    scores = cross_layer_similarity(target, reference, mask)
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores, truth(target, reference, mask), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_nan_token_is_never_the_best_match(backend):
    target, reference, mask = make(1, 1, 6, 5, 12, 1, torch.float32)
    mask[:] = True
    expected = cross_layer_similarity(target, [reference[0][:, 1:]], mask[..., 1:], pooling="max", backend=backend)
    reference[0][:, 0] = torch.nan
    actual = cross_layer_similarity(target, reference, mask, pooling="max", backend=backend)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_max_pooling_tells_look_alikes_apart(backend):
    """Two subjects with the same mean and different tokens: only the dense match sees whose tokens these are."""
    a, b, c, _ = torch.eye(4, device=DEVICE)
    reference = torch.stack([a + b, a - b, a + c, a - c])[None]
    mask = torch.tensor([[[1, 1, 0, 0], [0, 0, 1, 1]]], device=DEVICE)
    target = torch.stack([a + b, a + c])[None]
    pooled = cross_layer_similarity([target], [reference], mask, backend=backend)
    dense = cross_layer_similarity([target], [reference], mask, pooling="max", backend=backend)
    torch.testing.assert_close(pooled[0, 0], pooled[0, 1])
    torch.testing.assert_close(dense[0].diag(), torch.ones(2, device=DEVICE), rtol=0, atol=1e-6)
    assert dense[0, 1, 0] < 0.6
    assert dense[0, 0, 1] < 0.6
