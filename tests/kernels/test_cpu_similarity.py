"""Pooled similarity on a CPU in blocks of tokens: the specification's numbers, and no less exact."""

from __future__ import annotations

import pytest
import torch

from focusdpo_kernels import SimilarityAccumulator, cpu_similarity, cross_layer_similarity
from focusdpo_kernels import reference as spec
from tests.conftest import default_dtype

HALF = [torch.float16, torch.bfloat16]
SHAPES = [  # N, B, P, Q, D, R: less than a block, whole blocks, a rest
    (1, 1, 1, 1, 1, 1),
    (2, 2, 37, 23, 50, 3),
    (1, 2, 512, 256, 64, 2),
    (3, 1, 300, 270, 72, 6),
]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Sizes of a test count as large."""
    monkeypatch.setattr(cpu_similarity, "MIN_ELEMENTS", 0)
    monkeypatch.setattr(cpu_similarity, "BLOCK", 2048)


@pytest.fixture(params=[1, 2, 5], ids="threads{}".format)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def make(layers, batch, patches, tokens, width, subjects, dtype):
    """Slices of one longer sequence, with channels 100 times larger than the rest."""
    hidden = [torch.randn(batch, 3 + patches + tokens, width) for _ in range(layers)]
    for h in hidden:
        h[..., width // 2] *= 100
    hidden = [h.to(dtype) for h in hidden]
    mask = torch.rand(batch, subjects, tokens) > 0.4
    mask[..., 0] = True
    return [h[:, 3 : 3 + patches] for h in hidden], [h[:, 3 + patches :] for h in hidden], mask


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("threads")
def test_no_less_exact_than_the_specification(shape, dtype):
    target, reference, mask = make(*shape, dtype)
    arguments = ([t.double() for t in target], [r.double() for r in reference], mask)
    exact = spec.cross_layer_similarity(*arguments)
    plain = spec.cross_layer_similarity(target, reference, mask)
    actual = cross_layer_similarity(target, reference, mask, backend="torch")
    assert actual.dtype == torch.float32
    bound = 2 * float((plain.double() - exact).abs().max()) + 1e-7
    torch.testing.assert_close(actual.double(), exact, rtol=0, atol=bound)
    streamed = SimilarityAccumulator(mask, backend="torch")
    for t, r in zip(target, reference, strict=True):
        streamed.update(t, r)
    torch.testing.assert_close(streamed.result().double(), exact, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_it_is_what_a_cpu_takes(monkeypatch, dtype):
    target, reference, mask = make(1, 1, 5, 4, 8, 2, dtype)
    monkeypatch.setattr(spec, "layer_similarity", lambda *args: pytest.fail("the specification"))
    cross_layer_similarity(target, reference, mask, backend="torch")
    SimilarityAccumulator(mask, backend="torch").update(target[0], reference[0])


@pytest.mark.parametrize(
    ("dtype", "pooling"), [(torch.float32, "reference"), (torch.float64, "reference"), (torch.bfloat16, "max")]
)
def test_the_rest_runs_as_specified(monkeypatch, dtype, pooling):
    target, reference, mask = make(1, 1, 5, 4, 8, 2, dtype)
    monkeypatch.setattr(cpu_similarity, "layer_similarity", lambda *args: pytest.fail("in blocks"))
    scores = cross_layer_similarity(target, reference, mask, pooling=pooling, backend="torch")
    assert torch.equal(scores, spec.cross_layer_similarity(target, reference, mask, pooling))
    SimilarityAccumulator(mask, pooling=pooling, backend="torch").update(target[0], reference[0])


def test_small_layers_run_as_specified(monkeypatch):
    target, reference, mask = make(1, 1, 64, 4, 8, 2, torch.bfloat16)
    monkeypatch.setattr(cpu_similarity, "MIN_ELEMENTS", 64 * 8 + 1)
    scores = cross_layer_similarity(target, reference, mask, backend="torch")
    assert torch.equal(scores, spec.cross_layer_similarity(target, reference, mask))
    assert not cpu_similarity.takes(target[0], "reference")
    monkeypatch.setattr(cpu_similarity, "MIN_ELEMENTS", 64 * 8)
    assert cpu_similarity.takes(target[0], "reference")


def test_strides_and_empty_inputs():
    target, reference, mask = make(1, 2, 300, 270, 20, 2, torch.bfloat16)
    expected = cpu_similarity.layer_similarity(target[0], reference[0], mask)
    transposed = [h[0].mT.contiguous().mT for h in (target, reference)]
    assert torch.equal(cpu_similarity.layer_similarity(*transposed, mask), expected)
    for b in range(2):  # a sample does not depend on its batch
        assert torch.equal(
            cpu_similarity.layer_similarity(target[0][b:][:1], reference[0][b:][:1], mask[b:][:1])[0], expected[b]
        )
    for t, r, m in (
        (target[0][:0], reference[0][:0], mask[:0]),
        (target[0][:, :0], reference[0], mask),
        (target[0], reference[0][:, :0], mask[..., :0]),
        (target[0], reference[0], mask[:, :0]),
        (target[0][..., :0], reference[0][..., :0], mask),
    ):
        assert torch.equal(cpu_similarity.layer_similarity(t, r, m), spec.layer_similarity(t, r, m))


def test_autocast_changes_nothing():
    target, reference, mask = make(1, 1, 9, 6, 64, 2, torch.bfloat16)
    expected = cpu_similarity.layer_similarity(target[0], reference[0], mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cpu_similarity.layer_similarity(target[0], reference[0], mask), expected)


def test_a_compiler_is_given_the_specification():
    target, reference, mask = make(2, 1, 300, 140, 16, 2, torch.bfloat16)
    torch.compiler.reset()
    compiled = torch.compile(lambda *args: cross_layer_similarity(*args, backend="torch"), fullgraph=True, backend="eager")
    expected = spec.cross_layer_similarity(target, reference, mask)
    assert torch.equal(compiled(target, reference, mask), expected)


def test_default_device_and_dtype_have_no_say():
    target, reference, mask = make(2, 1, 16, 8, 64, 2, torch.bfloat16)
    expected = cross_layer_similarity(target, reference, mask, backend="torch")
    for default in (torch.float64, torch.bfloat16):
        with default_dtype(default), torch.device("meta"):
            found = cross_layer_similarity(target, reference, mask, backend="torch")
        assert found.device.type == "cpu" and torch.equal(found, expected)
