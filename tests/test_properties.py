"""Properties that hold for every shape and value, sought by hypothesis: kernels against the specification, and invariants."""

from __future__ import annotations

import math

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from focusdpo import focus_dpo_loss
from focusdpo_kernels import cross_layer_similarity, fuse_focus, patch_entropy, preference_residual, structure_field, topk_mask
from tests.conftest import DEVICE

# Shrinking a failure in the interpreter takes minutes; the failing example is printed as it was found.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
small = settings(max_examples=25, deadline=None, phases=PHASES)
seeds = st.integers(0, 2**31)
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
EXTREMES = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 3.4e38, -3.4e38, 1e-45, 65504.0]


def strided(draw, tensor):
    """The same values under another layout: transposed storage, a slice of something longer, or as they are."""
    kind = draw(st.sampled_from(["contiguous", "transposed", "sliced"]))
    if kind == "transposed":
        return tensor.mT.contiguous().mT
    if kind == "sliced":
        wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), math.nan, dtype=tensor.dtype, device=tensor.device)
        wide[..., 2:-1] = tensor
        return wide[..., 2:-1]
    return tensor


@small
@given(data=st.data(), seed=seeds, dtype=dtypes)
def test_similarity(data, seed, dtype):
    torch.manual_seed(seed)
    draw = data.draw
    batch, subjects, layers = draw(st.integers(0, 3)), draw(st.integers(0, 4)), draw(st.integers(1, 3))
    patches, tokens, width = draw(st.integers(0, 40)), draw(st.integers(0, 20)), draw(st.integers(0, 300))
    scale = 10.0 ** draw(st.integers(-3, 3))
    target = [strided(draw, (torch.randn(batch, patches, width, device=DEVICE) * scale).to(dtype)) for _ in range(layers)]
    reference = [strided(draw, (torch.randn(batch, tokens, width, device=DEVICE) * scale).to(dtype)) for _ in range(layers)]
    mask = torch.rand(batch, subjects, tokens, device=DEVICE) > draw(st.sampled_from([0.0, 0.5, 1.0]))
    actual = cross_layer_similarity(target, reference, mask, backend="triton")
    exact = [[h.double() for h in side] for side in (target, reference)]
    expected = cross_layer_similarity(*exact, mask)
    absent = ~mask.any(-1)
    assert (actual[absent] == -math.inf).all()
    torch.testing.assert_close(actual[~absent].double(), expected[~absent], rtol=0, atol=2e-6)
    assert not actual[~absent].numel() or actual[~absent].abs().max() <= 1 + 1e-5


@small
@given(data=st.data(), seed=seeds, dtype=dtypes)
def test_topk_and_structure(data, seed, dtype):
    torch.manual_seed(seed)
    draw = data.draw
    batch, subjects, patches = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(0, 300))
    levels = torch.tensor([*EXTREMES, *torch.randn(draw(st.integers(1, 20))).tolist()], device=DEVICE)
    scores = levels[torch.randint(len(levels), (batch, subjects, patches), device=DEVICE)].to(dtype)
    scores = strided(draw, scores)
    k = torch.randint(-3, patches + 1000, (batch, subjects), device=DEVICE)
    matched = topk_mask(scores, k, backend="triton")
    assert torch.equal(matched, topk_mask(scores, k, backend="torch"))
    finite = ~scores.isnan() & (scores != -math.inf)
    assert torch.equal(matched.sum(-1), torch.minimum(k.clamp_min(0), finite.sum(-1)))
    assert not (matched & ~finite).any()
    per_subject = draw(st.booleans())
    prior = torch.rand(batch, subjects, patches, device=DEVICE) > draw(st.sampled_from([0.0, 0.5, 1.0]))
    prior = prior if per_subject or draw(st.booleans()) else prior[:, 0]
    fields = [structure_field(scores, k, prior, per_subject=per_subject, backend=b) for b in ("triton", "torch")]
    assert torch.equal(fields[0][0], fields[1][0])
    torch.testing.assert_close(fields[0][1], fields[1][1], rtol=1e-6, atol=0)
    assert ((fields[0][1] >= 0) & (fields[0][1] <= 1)).all()


@small
@given(data=st.data(), seed=seeds, dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.uint8]))
def test_entropy_and_fusion(data, seed, dtype):
    torch.manual_seed(seed)
    draw = data.draw
    patch, rows, columns = draw(st.integers(1, 20)), draw(st.integers(0, 3)), draw(st.integers(0, 3))
    channels, bins = draw(st.sampled_from([1, 3])), draw(st.integers(2, 70))
    method = draw(st.sampled_from(["kde", "histogram"]))
    images = torch.rand(2, channels, rows * patch, columns * patch, device=DEVICE)
    if draw(st.booleans()):
        images = images.round()
    images = (images * 255).to(dtype) if dtype == torch.uint8 else strided(draw, images.to(dtype))
    options = {"bins": bins, "sigma": 0.1, "method": method}
    actual = patch_entropy(images, patch, **options, backend="triton")
    expected = patch_entropy(images if dtype == torch.uint8 else images.double(), patch, **options, backend="torch")
    if method == "kde":
        # Hard bins may put a pixel on a bin's very edge on either side, depending on rounding.
        torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=2e-5)
    assert ((actual >= -1e-5) & (actual <= math.log(bins) + 1e-5)).all()
    complexity = patch_entropy(images, patch, **options, normalize=True, backend="triton")
    assert ((complexity >= 0) & (complexity <= 1)).all()
    structure = (torch.rand_like(complexity) > 0.5).float()
    prior = torch.rand_like(complexity) > 0.3
    tau, gamma = draw(st.floats(0, 1)), draw(st.floats(0, 1))
    arguments = (structure, torch.rand(2, device=DEVICE), complexity, prior)
    masks = [fuse_focus(*arguments, tau=tau, gamma=gamma, backend=backend) for backend in ("triton", "torch")]
    torch.testing.assert_close(*masks, rtol=1e-6, atol=1e-7)
    assert ((masks[0] >= 0) & (masks[0] <= 1 + 1e-6)).all()


@small
@given(data=st.data(), seed=seeds, dtype=dtypes)
def test_residual(data, seed, dtype):
    torch.manual_seed(seed)
    draw = data.draw
    batch = draw(st.integers(0, 3))
    if draw(st.booleans()):
        shape = (batch, draw(st.integers(0, 70)), draw(st.integers(0, 70)))
        patches = shape[1]
    else:
        shape = (batch, draw(st.integers(1, 5)), 2 * draw(st.integers(0, 5)), 2 * draw(st.integers(0, 5)))
        patches = shape[2] * shape[3] // 4
    predictions = [strided(draw, torch.randn(shape, device=DEVICE).to(dtype)) for _ in range(6)]
    weight = (torch.rand(batch, patches, device=DEVICE) * (torch.rand(batch, patches, device=DEVICE) > 0.4)).to(dtype)
    options = {"reduction": draw(st.sampled_from(["mean", "sum", "masked_mean"])), "mask_power": draw(st.sampled_from([1, 2]))}
    results = []
    for backend, kind in (("triton", dtype), ("torch", torch.float64)):
        policy = [x.detach().clone().to(kind).requires_grad_() for x in predictions[:2]]
        out = preference_residual(*policy, *[x.to(kind) for x in predictions[2:]], weight.to(kind), **options, backend=backend)
        (out.margin + 0.5 * out.policy_win).sum().backward()
        results.append(([x.detach().double() for x in out], [x.grad.double() for x in policy]))
    (values, gradients), (exact_values, exact_gradients) = results
    size = float(sum(x.abs().sum() for x in exact_values)) + 1e-6
    for actual, expected in zip(values, exact_values, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6 * size)
    rounding = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    for actual, expected in zip(gradients, exact_gradients, strict=True):
        # Below fp16's normal range a gradient keeps an absolute precision only.
        torch.testing.assert_close(actual, expected, rtol=rounding, atol=1e-7)


@small
@given(
    seed=seeds,
    beta=st.floats(1e-3, 1e6),
    scale=st.sampled_from([0.0, 1e-6, 1.0, 1e4]),
    loss_type=st.sampled_from(["sigmoid", "hinge", "ipo", "sft"]),
    loser_scale=st.sampled_from([None, "sdpo"]),
    reduction=st.sampled_from(["mean", "sum", "masked_mean"]),
    keep=st.sampled_from([0.0, 0.5, 1.0]),
    backend=st.sampled_from(["triton", "torch"]),
)
def test_loss_is_finite_and_masked(seed, beta, scale, loss_type, loser_scale, reduction, keep, backend):
    torch.manual_seed(seed)
    predictions = [torch.randn(2, 9, 4, device=DEVICE) * scale for _ in range(6)]
    mask = (torch.rand(2, 9, device=DEVICE) < keep).float()
    policy = [x.clone().requires_grad_() for x in predictions[:2]]
    out = focus_dpo_loss(
        *policy,
        *predictions[2:],
        focus=mask,
        beta=beta,
        loss_type=loss_type,
        loser_scale=loser_scale,
        reduction=reduction,
        backend=backend,
    )
    out.loss.backward()
    assert out.loss.isfinite() and 0 <= float(out.accuracy) <= 1
    if loss_type == "sft":
        assert policy.pop().grad is None, "the loser has no part in the loss"
    for x in policy:
        assert x.grad.isfinite().all()
        assert (x.grad[mask == 0] == 0).all(), "no gradient outside the mask"
