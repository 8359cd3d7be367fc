"""What only a GPU can show. Skipped, and saying so, where there is none."""

from __future__ import annotations

import pytest
import torch

from benchmarks import timing
from focusdpo import focus_dpo_loss, focus_mask
from focusdpo_kernels import SimilarityAccumulator, cross_layer_similarity, preference_residual, topk_mask

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")


def inputs(batch=2, patches=64, tokens=40, width=64, subjects=2):
    def tensor(*shape):
        return torch.randn(shape, device="cuda").bfloat16()

    mask = torch.rand(batch, subjects, tokens, device="cuda") > 0.5
    return {
        "target": [tensor(batch, patches, width) for _ in range(3)],
        "reference": [tensor(batch, tokens, width) for _ in range(3)],
        "mask": mask,
        "prior": torch.rand(batch, patches, device="cuda") > 0.5,
        "images": torch.rand(batch, 3, 128, 128, device="cuda"),
        "predictions": [tensor(batch, patches, 16) for _ in range(6)],
    }


def step(x, pooling="reference"):
    scores = cross_layer_similarity(x["target"], x["reference"], x["mask"], pooling=pooling)
    similarity = SimilarityAccumulator(x["mask"], pooling=pooling)
    for target, reference in zip(x["target"], x["reference"], strict=True):
        similarity.update(target, reference)
    focus = focus_mask(scores, x["prior"], x["images"], reference_mask=x["mask"])
    policy = [p.detach().requires_grad_() for p in x["predictions"][:2]]
    out = focus_dpo_loss(*policy, *x["predictions"][2:], focus=focus)
    return [scores, similarity.result(), focus.mask, out.loss, *torch.autograd.grad(out.loss, policy)]


@pytest.mark.parametrize("pooling", ["reference", "max"])
def test_never_waits_for_the_device(pooling):
    x = inputs()
    step(x, pooling)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(x, pooling)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("pooling", ["reference", "max"])
def test_cuda_graph(pooling):
    x = inputs()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(x, pooling)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(x, pooling)
    for _ in range(20):  # the captured call's host memory must not be reused by later ones
        step(inputs(), pooling)
    fresh = inputs()
    for name in ("target", "reference", "predictions"):
        for old, new in zip(x[name], fresh[name], strict=True):
            old.copy_(new)
    graph.replay()
    for actual, expected in zip(captured, step(x, pooling), strict=True):
        assert torch.equal(actual, expected)


def test_timing():
    """The instrument itself: graphs for short calls, launches and memory counted, plausible limits."""
    device = torch.device("cuda")
    x = torch.zeros(1000, device=device)
    how = timing.plan([lambda: x.add_(1)], device)
    assert how.method == "CUDA graph" and how.calls > 10
    before = float(x[0])
    how.round_()
    assert float(x[0]) == before + how.calls, "a round runs so many calls"
    assert timing.count_launches(lambda: x.mul_(2).add_(1), device) == 2
    assert timing.extra_memory(lambda: torch.empty(2**22, dtype=torch.uint8, device=device), device) == 2**22
    slow = torch.randn(8192, 8192, device=device)
    assert timing.plan([lambda: slow @ slow], device).method == "events"
    limits = timing.measure_limits(device)
    assert 1e11 < limits.copy_bytes_per_second < 2e13 and 1e-7 < limits.empty_launch_seconds < 1e-4


def test_beyond_two_to_the_31():
    """Offsets past 2^31 elements, in the batch and along the tokens."""
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("needs 60 GiB of GPU memory")
    big = torch.empty(2**31 + 2**24, dtype=torch.bfloat16, device="cuda")
    big[: 2**22].normal_()
    tail = big[-(2**23) :].normal_()
    target = torch.as_strided(big, (2, 64, 128), (2**31 + 2**23, 128, 1))
    reference = torch.as_strided(big, (2, 16, 128), (2**31 + 2**23, 128, 1), storage_offset=2**20)
    mask = torch.ones(2, 1, 16, device="cuda")
    for pooling in ("reference", "max"):
        actual = cross_layer_similarity([target], [reference], mask, pooling=pooling)
        expected = cross_layer_similarity([target.double()], [reference.double()], mask, pooling=pooling)
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5)  # sums on tensor cores
    along_tokens = [torch.as_strided(big, (1, 2, 128), (0, 2**31 + 2**23, 1), storage_offset=i * 2**14) for i in (0, 1)]
    actual = cross_layer_similarity(along_tokens[:1], along_tokens[1:], mask[:1, :, :2])
    expected = cross_layer_similarity([along_tokens[0].double()], [along_tokens[1].double()], mask[:1, :, :2])
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5)
    predictions = [torch.as_strided(big, (2, 64, 128), (2**31 + 2**23, 128, 1), storage_offset=i * 2**14) for i in range(6)]
    out = preference_residual(*predictions)
    exact = preference_residual(*[p.double() for p in predictions])
    torch.testing.assert_close(out.margin.double(), exact.margin, rtol=1e-4, atol=1e-6)
    assert tail.isfinite().all()
    scores = torch.zeros(2**31 + 2**20, dtype=torch.float16, device="cuda").reshape(-1, 2**20)
    scores[-1, 7] = 1
    assert topk_mask(scores, 1)[-1].nonzero().tolist() == [[7]]


def test_compiled_with_inductor():
    x = inputs()
    policy = [p.clone().requires_grad_() for p in x["predictions"][:2]]

    def loss(win, lose):
        return focus_dpo_loss(win, lose, *x["predictions"][2:]).loss

    compiled = torch.compile(loss, fullgraph=True)(*policy)
    torch.testing.assert_close(compiled, loss(*policy), rtol=1e-6, atol=1e-7)
