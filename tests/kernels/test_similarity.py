"""Cross-layer similarity: kernel against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional as F

from focusdpo_kernels import SimilarityAccumulator, cross_layer_similarity, layers
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
    (2, 2, 5, 330, 20, 3),
]
STREAMED = [  # one layer takes other kernels than several at once: both tokens and widths are split
    (2, 2, 37, 23, 50, 3),
    (3, 1, 300, 330, 256, 2),
    (2, 1, 33, 40, 264, 6),
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


def stream(target, reference, mask, **options):
    accumulator = SimilarityAccumulator(mask, **options)
    for h_tgt, h_ref in zip(target, reference, strict=True):
        accumulator.update(h_tgt, h_ref)
    return accumulator.result()


@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
@pytest.mark.parametrize("shape", STREAMED, ids=str)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_streamed_matches_float64(shape, dtype, backend):
    target, reference, mask = make(*shape, dtype)
    scores = stream(target, reference, mask, backend=backend)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), truth(target, reference, mask), rtol=0, atol=5e-7)


def test_result_can_be_asked_for_at_any_layer():
    """A layer's cosines are added by the next launch, whatever it is."""
    target, reference, mask = make(4, 1, 19, 11, 70, 2, torch.bfloat16)
    accumulator = SimilarityAccumulator(mask, backend="triton")
    for n in range(4):
        accumulator.update(target[n], reference[n])
        expected = truth(target[: n + 1], reference[: n + 1], mask)
        for _ in range(2):
            torch.testing.assert_close(accumulator.result().double(), expected, rtol=0, atol=5e-7)


def test_streamed_layers_may_differ():
    """In width, dtype and strides; the launches of one kind and their memory must not be taken for another."""
    bf16, half, full = torch.bfloat16, torch.float16, torch.float32
    kinds = [(64, bf16), (300, bf16), (64, full), (64, bf16), (256, half)]
    hidden = [torch.randn(2, 40, width, device=DEVICE).to(dtype) for width, dtype in kinds]
    hidden.append(torch.randn(2, 64, 40, device=DEVICE).bfloat16().mT)
    hidden.append(torch.randn(2, 40, 65, device=DEVICE).bfloat16()[..., 1:])  # rows that start between 16 bytes
    target, reference = [h[:, :22] for h in hidden], [h[:, 22:] for h in hidden]
    mask = torch.rand(2, 3, 18, device=DEVICE) > 0.4
    expected = truth(target, reference, mask)
    actual = stream(target, reference, mask, backend="triton")
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=5e-7)


@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
@pytest.mark.parametrize("scale", [3e-5, 1.0, 2e4])
def test_streamed_at_any_scale(dtype, scale):
    """The mean tokens are split into parts before they are normalised: fp16 has few exponents for them."""
    target, reference, mask = make(2, 1, 21, 17, 160, 2, torch.float32)
    target, reference = ([(scale * h).clamp(-6e4, 6e4).to(dtype) for h in side] for side in (target, reference))
    reference[0][..., 3] *= 1e-3
    scores = stream(target, reference, mask, backend="triton")
    torch.testing.assert_close(scores.double(), truth(target, reference, mask), rtol=0, atol=5e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_sample_does_not_depend_on_its_batch(dtype):
    target, reference, mask = make(3, 3, 150, 140, 136, 2, dtype)
    many = stream(target, reference, mask, backend="triton")
    for b in range(3):
        one = stream([t[b : b + 1] for t in target], [r[b : b + 1] for r in reference], mask[b : b + 1], backend="triton")
        assert torch.equal(many[b : b + 1], one)
    assert torch.equal(many, stream(target, reference, mask, backend="triton"))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_every_layer_is_checked(backend):
    """The checks are left out only for a layer that is like the one before it."""
    (target, *_), (reference, *_), mask = make(1, 2, 6, 5, 12, 2, torch.float32)
    accumulator = SimilarityAccumulator(mask, backend=backend)
    for _ in range(2):
        accumulator.update(target, reference)
        for error, message, arguments in (
            (ValueError, "target: got 5 tokens, while earlier layers had 6", (target[:, 1:], reference)),
            (ValueError, r"reference_mask: expected shape \[2, 2, 4\]", (target, reference[:, 1:])),
            (ValueError, r"reference\[0\]: expected shape \[2, 5, 11\]", (target[..., 1:], reference)),
            (TypeError, "reference: got dtype torch.float16", (target, reference.half())),
            (TypeError, r"target\[0\]: expected a tensor", (None, reference)),
            (TypeError, r"reference\[0\]: expected a tensor", (target, [reference])),
        ):
            with pytest.raises(error, match=message):
                accumulator.update(*arguments)
    assert accumulator.layers == 2
    torch.testing.assert_close(accumulator.result().double(), truth([target], [reference], mask), rtol=0, atol=5e-7)


def test_float64_does_not_mix_with_kernels():
    (target, *_), (reference, *_), mask = make(1, 1, 6, 5, 12, 2, torch.float32)
    accumulator = SimilarityAccumulator(mask, backend="triton")
    accumulator.update(target, reference)
    with pytest.raises(TypeError, match="Triton kernels take fp16, bf16 and fp32"):
        accumulator.update(target.double(), reference.double())


def test_a_table_for_a_graph():
    """Written by launches whose arguments are the numbers: no host memory is kept for a replay."""
    rows = [[2**63 - 1, -(2**62) - 3, 2**53 + 1, 0, -1], [1, 2, 3, 4, 2**31]]
    table = layers.written_table(rows, torch.device(DEVICE))
    assert table.dtype == torch.int64 and table.tolist() == rows


def test_a_captured_call_keeps_no_host_memory(monkeypatch):
    class Captured:
        """A tensor of a GPU, as far as the table looks at it."""

        device = torch.device("cuda", 0)
        data_ptr = staticmethod(lambda: 2**47 + 16)
        stride = staticmethod(lambda: (7, 5, 1))

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pytest.fail("host memory that a graph would read again"))
    monkeypatch.setattr(layers, "written_table", lambda rows, device: (rows, device))
    rows, device = layers.pointer_table([Captured()] * 2, [Captured()] * 2)
    assert device == Captured.device and rows == [[2**47 + 16, 7, 5, 1] * 2] * 2


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_accumulator_gives_the_same(backend, pooling):
    target, reference, mask = make(3, 2, 19, 11, 70, 2, torch.bfloat16)
    accumulator = SimilarityAccumulator(mask, pooling=pooling, backend=backend)
    for h_tgt, h_ref in zip(target, reference, strict=True):
        accumulator.update(h_tgt, h_ref)
    expected = cross_layer_similarity(target, reference, mask, pooling=pooling, backend=backend)
    torch.testing.assert_close(accumulator.result(), expected, rtol=0, atol=2e-7)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_absent_subject_and_zero_tokens(backend, pooling):
    target, reference, mask = make(2, 2, 6, 5, 12, 3, torch.float32)
    mask[0, 1] = False
    target[0][1, 2] = 0
    for function in (cross_layer_similarity, stream):
        scores = function(target, reference, mask, pooling=pooling, backend=backend)
        assert (scores[0, 1] == -torch.inf).all()
        scores[0, 1] = 0
        assert scores.isfinite().all()


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("zero", ["batch", "patches", "tokens", "subjects", "width"])
@pytest.mark.parametrize("number", [1, 2])
def test_sizes_of_zero(backend, zero, pooling, number):
    sizes = {"batch": 2, "patches": 3, "tokens": 4, "width": 5, "subjects": 2} | {zero: 0}
    target = [torch.randn(sizes["batch"], sizes["patches"], sizes["width"], device=DEVICE)] * number
    reference = [torch.randn(sizes["batch"], sizes["tokens"], sizes["width"], device=DEVICE)] * number
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
    streamed = stream(target, reference, mask, pooling=pooling, backend="triton")
    torch.testing.assert_close(streamed, expected, rtol=0, atol=5e-7)
    stacked = cross_layer_similarity(hidden[:, :, :12], hidden[:, :, 12:], mask, pooling=pooling, backend="triton")
    assert torch.equal(stacked, actual)


@pytest.mark.parametrize("number", [1, 2])
def test_expanded_batch(number):
    target, reference, mask = make(number, 1, 9, 6, 32, 2, torch.bfloat16)
    expanded = [[h.expand(4, -1, -1) for h in side] for side in (target, reference)]
    many = cross_layer_similarity(*expanded, mask.expand(4, -1, -1), backend="triton")
    one = cross_layer_similarity(target, reference, mask, backend="triton")
    assert torch.equal(many, one.expand(4, -1, -1))


def test_outlier_channels():
    """Hidden states of FLUX have channels 100 times larger than the rest."""
    target, reference, mask = make(3, 1, 21, 17, 128, 2, torch.float32)
    for h in (*target, *reference):
        h[..., 5] *= 300
        h[..., 77] *= 100
    target, reference = ([h.bfloat16() for h in side] for side in (target, reference))
    for function in (cross_layer_similarity, stream):
        scores = function(target, reference, mask, backend="triton")
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


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_layers_of_inference_mode_and_others(backend, pooling):
    target, reference, mask = make(3, 1, 8, 8, 16, 2, torch.float32)
    for inferred in range(3):
        accumulator = SimilarityAccumulator(mask, pooling=pooling, backend=backend)
        for n, layer in enumerate(zip(target, reference, strict=True)):
            with torch.inference_mode(n == inferred):
                accumulator.update(*layer)
        expected = cross_layer_similarity(target, reference, mask, pooling=pooling, backend="torch")
        torch.testing.assert_close(accumulator.result(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_memory_that_stands_for_its_negative(pooling):
    target, reference, mask = make(1, 2, 6, 4, 5, 2, torch.float32)
    negative = torch.complex(target[0], target[0]).conj().imag
    assert negative.is_neg()
    for pair in ((negative, reference[0]), (reference[0], negative)):
        tokens = mask if pair[1] is reference[0] else mask.new_ones(2, 2, 6)
        accumulator = SimilarityAccumulator(tokens, pooling=pooling, backend="triton")
        accumulator.update(*pair)
        resolved = [[x.resolve_neg()] for x in pair]
        expected = cross_layer_similarity(*resolved, tokens, pooling=pooling, backend="torch")
        torch.testing.assert_close(accumulator.result(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_tangent_does_not_pass(backend):
    target, reference, mask = make(1, 1, 6, 4, 8, 2, torch.float32)
    with forward_ad.dual_level():
        layers_n = [[forward_ad.make_dual(x[0], x[0] ** 2)] for x in (target, reference)]
        accumulator = SimilarityAccumulator(mask, backend=backend)
        accumulator.update(layers_n[0][0], layers_n[1][0])
        for scores in (cross_layer_similarity(*layers_n, mask, backend=backend), accumulator.result()):
            assert forward_ad.unpack_dual(scores).tangent is None
