"""Bad arguments are refused by name, with what came and what to do."""

from __future__ import annotations

import pytest
import torch

import focusdpo
import focusdpo_kernels as kernels
from focusdpo_kernels import backend as backends
from tests.conftest import DEVICE

T = torch.randn(2, 6, 4)  # [B, P, D] and [B, P, C]
Q = torch.randn(2, 5, 4)
MASK = torch.ones(2, 3, 5)
SCORES = torch.randn(2, 3, 6)
PRIOR = torch.ones(2, 6)
IMAGES = torch.rand(2, 3, 32, 48)
SIX = [torch.randn(2, 6, 4) for _ in range(6)]

CASES = {
    "no layer": (lambda: kernels.cross_layer_similarity([], [], MASK), ValueError, "target: got no layer"),
    "one tensor for a list": (lambda: kernels.cross_layer_similarity(T, Q, MASK), ValueError, "target: .*wrap a single layer in a list"),
    "not tensors": (lambda: kernels.cross_layer_similarity(["x"], [Q], MASK), TypeError, r"target\[0\]: expected a tensor .*got str"),
    "number of layers": (lambda: kernels.cross_layer_similarity([T, T], [Q], MASK), ValueError, "reference: got 1 layers, while target has 2"),
    "layer shapes": (lambda: kernels.cross_layer_similarity([T, T[:, 1:]], [Q, Q], MASK), ValueError, r"target\[1\]: expected shape \[2, 6, 4\]"),
    "widths": (lambda: kernels.cross_layer_similarity([T], [Q[..., 1:]], MASK), ValueError, r"reference\[0\]: expected shape \[2, 5, 4\]"),
    "dtypes of layers": (lambda: kernels.cross_layer_similarity([T], [Q.half()], MASK), TypeError, "reference: got dtype torch.float16"),
    "integer layers": (lambda: kernels.cross_layer_similarity([T.int()], [Q], MASK), TypeError, r"target\[0\]: got dtype int32; allowed are float16"),
    "reference mask": (lambda: kernels.cross_layer_similarity([T], [Q], MASK[..., 1:]), ValueError, r"reference_mask: expected shape \[2, 3, 5\]"),
    "pooling": (lambda: kernels.cross_layer_similarity([T], [Q], MASK, pooling="sum"), ValueError, "pooling: got 'sum'; expected one of 'reference', 'max'"),
    "accumulator without layers": (lambda: kernels.SimilarityAccumulator(MASK).result(), RuntimeError, r"no layer was added; call update"),
    "k above P": (lambda: kernels.topk_mask(SCORES, 7), ValueError, "k: got 7; expected 0 to P = 6"),
    "negative k": (lambda: kernels.topk_mask(SCORES, -1), ValueError, "k: got -1"),
    "float k": (lambda: kernels.topk_mask(SCORES, 2.5), TypeError, "k: expected an int or an integer tensor, got float"),
    "float k tensor": (lambda: kernels.topk_mask(SCORES, torch.ones(2, 3)), TypeError, "k: got dtype torch.float32"),
    "shape of k": (lambda: kernels.topk_mask(SCORES, torch.ones(4, dtype=torch.int64)), ValueError, r"k: shape \[4\] does not broadcast to \[2, 3\]"),
    "integer scores": (lambda: kernels.topk_mask(SCORES.int(), 2), TypeError, "scores: got dtype int32"),
    "prior shape": (lambda: kernels.structure_field(SCORES, 2, PRIOR[:, 1:]), ValueError, r"prior: expected shape \[2, 6\]"),
    "per subject without priors": (lambda: kernels.structure_field(SCORES, 2, PRIOR, per_subject=True), ValueError, "prior: per_subject=True needs one prior per subject"),
    "image range": (lambda: kernels.patch_entropy(IMAGES * 2 - 1), ValueError, r"images: values from -.*\(images \+ 1\) / 2"),
    "image channels": (lambda: kernels.patch_entropy(IMAGES[:, :2]), ValueError, r"images: expected 1 \(gray\) or 3 \(RGB\) channels"),
    "image rank": (lambda: kernels.patch_entropy(IMAGES[0]), ValueError, r"images: expected a tensor \[B, 1 or 3, H, W\], got float32 \[3, 32, 48\]"),
    "patch size": (lambda: kernels.patch_entropy(IMAGES, 20), ValueError, "patch_size: 20 does not divide images of 32x48"),
    "bins": (lambda: kernels.patch_entropy(IMAGES, bins=1), ValueError, "bins: got 1; expected at least 2"),
    "sigma": (lambda: kernels.patch_entropy(IMAGES, sigma=1e-4), ValueError, "sigma: got 0.0001; expected at least 0.001241 with 32 bins, or a pixel between two"),
    "wide sigma": (lambda: kernels.patch_entropy(IMAGES, sigma=1.5), ValueError, "sigma: got 1.5; expected no more than 1, the width"),
    "sigma that is none": (lambda: kernels.patch_entropy(IMAGES, sigma=float("nan")), ValueError, "sigma: got nan; expected no more"),
    "many bins": (lambda: kernels.patch_entropy(IMAGES, bins=257), ValueError, "bins: got 257; expected at most 256, the gray values"),
    "method": (lambda: kernels.patch_entropy(IMAGES, method="hist"), ValueError, "method: got 'hist'; expected one of 'kde', 'histogram'"),
    "tau": (lambda: kernels.fuse_focus(PRIOR, PRIOR[:, 0], PRIOR, PRIOR, tau=2.0), ValueError, "tau: got 2.0; expected a number from 0 to 1"),
    "gamma": (lambda: kernels.fuse_focus(PRIOR, PRIOR[:, 0], PRIOR, PRIOR, gamma=-1), ValueError, "gamma: got -1"),
    "coverage": (lambda: kernels.fuse_focus(PRIOR, PRIOR[:1, 0], PRIOR, PRIOR), ValueError, r"coverage: expected shape \[2\]"),
    "prediction shapes": (lambda: kernels.preference_residual(*SIX[:5], T[:, 1:]), ValueError, r"target_lose: expected shape \[2, 6, 4\] \(as policy_win\)"),
    "prediction rank": (lambda: kernels.preference_residual(*[x[0] for x in SIX]), ValueError, r"policy_win: expected a tensor \[B, P, C\] or \[B, C, H, W\]"),
    "weight shape": (lambda: kernels.preference_residual(*SIX, torch.ones(2, 5)), ValueError, r"weight: expected shape \[2, 6\]"),
    "subjects": (lambda: kernels.preference_residual(*SIX, subjects=torch.ones(2, 2, 5)), ValueError, r"subjects: expected shape \[2, 2, 6\]"),
    "no subject": (lambda: kernels.preference_residual(*SIX, subjects=torch.ones(2, 0, 6)), ValueError, r"subjects: got .*without a subject; pass None"),
    "subjects of another layout": (lambda: kernels.preference_residual(*[torch.randn(1, 2, 4, 4)] * 6, torch.ones(1, 4), subjects=torch.ones(1, 2, 4, 4)), ValueError, "subjects: got .* while masks are .*; use one layout for both"),
    "subjects and sft": (lambda: focusdpo.focus_dpo_loss(*SIX, subjects=torch.ones(2, 2, 6), loss_type="sft"), ValueError, "^subjects: given with loss_type='sft'"),
    "source": (lambda: focusdpo.focus_mask(SCORES, PRIOR, IMAGES, match_count=2, source="truth"), ValueError, "^source: got 'truth'; expected one of 'features', 'estimate', 'random'"),
    "scores of an estimate": (lambda: focusdpo.focus_mask(SCORES, PRIOR, IMAGES, source="estimate"), ValueError, r"^scores: expected a tensor \[B, P\], as estimate_alignment gives them"),
    "subjects of an estimate": (lambda: focusdpo.focus_mask(SCORES[:, 0], PRIOR, IMAGES, source="estimate", per_subject=True), ValueError, "^per_subject: True with source='estimate'"),
    "draws": (lambda: focusdpo.focus_mask(SCORES, PRIOR, IMAGES, match_count=2, source="random", draws=torch.rand(2, 5)), ValueError, r"^draws: expected shape \[2, 6\]"),
    "odd latents": (lambda: kernels.preference_residual(*[torch.randn(1, 2, 3, 4)] * 6, torch.ones(1, 3)), ValueError, "latents of 3x4 have no whole 2x2 patches"),
    "reduction": (lambda: kernels.preference_residual(*SIX, reduction="none"), ValueError, "reduction: got 'none'; expected one of 'mean'"),
    "mask power": (lambda: kernels.preference_residual(*SIX, mask_power=3), ValueError, "mask_power: got 3"),
    "loser's weight alone": (lambda: kernels.preference_residual(*SIX, weight_lose=PRIOR), ValueError, "weight_lose: given without weight"),
    "loser's weight alone, whatever it is": (lambda: kernels.preference_residual(*SIX, weight_lose=[0]), ValueError, "weight_lose: given without weight"),
    "beta": (lambda: focusdpo.focus_dpo_loss(*SIX, beta=0), ValueError, "beta: got 0; expected a positive number"),
    "loss type": (lambda: focusdpo.focus_dpo_loss(*SIX, loss_type="kto"), ValueError, "loss_type: got 'kto'"),
    "smoothing": (lambda: focusdpo.focus_dpo_loss(*SIX, label_smoothing=0.5), ValueError, "label_smoothing: got 0.5"),
    "smoothing of hinge": (lambda: focusdpo.focus_dpo_loss(*SIX, label_smoothing=0.1, loss_type="hinge"), ValueError, "works with loss_type='sigmoid' only"),
    "loser scale": (lambda: focusdpo.focus_dpo_loss(*SIX, loser_scale="x"), ValueError, "loser_scale: got 'x'"),
    "sample weight": (lambda: focusdpo.focus_dpo_loss(*SIX, sample_weight=torch.ones(3)), ValueError, r"sample_weight: expected shape \[2\]"),
    "focus shape": (lambda: focusdpo.focus_dpo_loss(*SIX, focus=PRIOR[:, 1:]), ValueError, r"^focus: expected shape \[2, 6\]"),
    "focus of numbers": (lambda: focusdpo.focus_dpo_loss(*SIX, focus=[1.0]), TypeError, r"^focus: expected a tensor \[B, P\], got list"),
    "loser's focus alone": (lambda: focusdpo.focus_dpo_loss(*SIX, focus_lose=PRIOR), ValueError, "^focus_lose: given without focus; pass focus"),
    "loser's focus": (lambda: focusdpo.focus_dpo_loss(*SIX, focus=PRIOR, focus_lose=PRIOR[:1]), ValueError, r"^focus_lose: expected shape \[2, 6\]"),
    "sample weight of numbers": (lambda: focusdpo.focus_dpo_loss(*SIX, sample_weight=[1, 1]), TypeError, r"^sample_weight: expected a tensor \[B\]"),
    "no policy": (lambda: focusdpo.focus_dpo_loss(None, *SIX[1:], sample_weight=PRIOR[:, 0]), TypeError, "^policy_win: expected a tensor"),
    "match count": (lambda: focusdpo.focus_mask(SCORES, PRIOR, IMAGES, match_count="all"), ValueError, "match_count: got 'all'; expected 'reference'"),
    "match count without masks": (lambda: focusdpo.focus_mask(SCORES, PRIOR, IMAGES), ValueError, "reference_mask: needed for match_count='reference'"),
    "image grid": (lambda: focusdpo.focus_mask(SCORES, PRIOR, IMAGES[..., :16], match_count=2), ValueError, r"images: .* give \[2, 2\] tokens, while scores"),
    "backend name": (lambda: kernels.topk_mask(SCORES, 2, backend="cuda"), ValueError, "argument backend: got 'cuda'; expected one of triton, torch"),
    "float64 on triton": (lambda: kernels.topk_mask(SCORES.double(), 2, backend="triton"), (TypeError, ValueError), "torch"),
    "sparse scores": (lambda: kernels.topk_mask(SCORES.to_sparse(), 2), TypeError, r"scores: expected a dense tensor .*got layout sparse_coo"),
    "sparse weight": (lambda: kernels.preference_residual(*SIX, PRIOR.to_sparse()), TypeError, "weight: expected a dense tensor"),
    "complex prior": (lambda: kernels.structure_field(SCORES, 2, PRIOR + 0j), TypeError, "prior: got dtype complex64; allowed are"),
    "prior of 8 bits": (lambda: kernels.structure_field(SCORES, 2, PRIOR.to(torch.float8_e4m3fn)), TypeError, "prior: got dtype float8_e4m3fn"),
    "complex reference mask": (lambda: kernels.cross_layer_similarity([T], [Q], MASK + 0j), TypeError, "reference_mask: got dtype complex64"),
    "complex timestep weight": (lambda: focusdpo.focus_dpo_loss(*SIX, timestep_weight=torch.ones(2) + 0j), TypeError, "timestep_weight: got dtype complex64"),
    "patch size that is none": (lambda: kernels.patch_entropy(IMAGES, 16.0), TypeError, "patch_size: got 16.0; expected an int"),
    "patch size of truth": (lambda: kernels.patch_entropy(IMAGES, True), TypeError, "patch_size: got True; expected an int"),
    "bins that are none": (lambda: kernels.patch_entropy(IMAGES, bins=32.0), TypeError, "bins: got 32.0; expected an int"),
    "no sigma": (lambda: kernels.patch_entropy(IMAGES, sigma=None), TypeError, "sigma: got None; expected a number"),
    "tau as text": (lambda: kernels.focus_field(SCORES, 2, PRIOR, PRIOR, tau="0.1"), TypeError, "tau: got '0.1'; expected a number"),
    "beta as text": (lambda: focusdpo.focus_dpo_loss(*SIX, beta="2000"), TypeError, "beta: got '2000'; expected a number"),
    **{
        f"{name} as text": (lambda name=name: focusdpo.focus_dpo_loss(*SIX, **{name: "1"}), TypeError, f"^{name}: got '1'; expected a number")
        for name in ("label_smoothing", "winner_anchor", "reference_anchor", "sdpo_mu")
    },
    "complex mask of counts": (lambda: focusdpo.focus_mask(SCORES, PRIOR, IMAGES, reference_mask=MASK + 0j), TypeError, "^reference_mask: got dtype complex64"),
    "elements": (lambda: focusdpo.convert_beta(1.0, 0, source="mean", target="sum"), ValueError, "elements: got 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_message(case):
    call, kind, message = CASES[case]
    with pytest.raises(kind, match=message):
        call()


def test_devices_must_agree():
    with pytest.raises(ValueError, match="prior: is on meta while scores is on cpu; move both to one device"):
        kernels.structure_field(SCORES, 2, PRIOR.to("meta"))


def test_triton_needs_an_accelerator(monkeypatch):
    monkeypatch.setattr(backends, "INTERPRETED", False)
    with pytest.raises(ValueError, match="argument backend: 'triton' needs tensors on an accelerator, got device cpu"):
        kernels.topk_mask(SCORES, 2, backend="triton")
    monkeypatch.setenv("FOCUSDPO_BACKEND", "triton")
    with pytest.raises(ValueError, match="environment variable FOCUSDPO_BACKEND: 'triton' needs"):
        kernels.topk_mask(SCORES, 2)
    assert kernels.topk_mask(SCORES, 2, backend="torch").any(), "the argument wins over the environment"
    monkeypatch.setenv("FOCUSDPO_BACKEND", "jax")
    with pytest.raises(ValueError, match="environment variable FOCUSDPO_BACKEND: got 'jax'"):
        kernels.topk_mask(SCORES, 2)


def test_automatic_choice(monkeypatch):
    monkeypatch.delenv("FOCUSDPO_BACKEND", raising=False)
    assert backends.resolve_backend(None, T) == "torch"
    on_device = T.to(DEVICE)
    expected = "triton" if DEVICE.type == "cuda" else "torch"
    assert backends.resolve_backend(None, on_device) == expected
    assert backends.resolve_backend(None, on_device.double()) == "torch"


def test_inputs_are_never_written():
    inputs = [*SIX, PRIOR, SCORES, IMAGES, MASK, T, Q]
    before = [x.clone() for x in inputs]
    for backend in ("triton", "torch") if DEVICE.type == "cpu" else ("torch",):
        scores = kernels.cross_layer_similarity([T], [Q], MASK, backend=backend)
        focus = focusdpo.focus_mask(scores, PRIOR, IMAGES, reference_mask=MASK, backend=backend)
        policy = [x.clone().requires_grad_() for x in SIX[:2]]
        focusdpo.focus_dpo_loss(*policy, *SIX[2:], focus=focus, backend=backend).loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_masks_in_float64_do_not_choose_the_backend(backend):
    """numpy's default. They are compared with 0 or cast: Triton takes them, and is not left for their sake."""
    scores, target, reference, images = (x.to(DEVICE) for x in (SCORES, T, Q, IMAGES))
    prior, mask, coverage = (x.to(DEVICE) for x in (PRIOR, MASK, PRIOR[:, 0]))
    prior[:, 2:4], mask[0, 1] = 0, 0
    six = [x.to(DEVICE) for x in SIX]

    def streamed(reference_mask):
        accumulator = kernels.SimilarityAccumulator(reference_mask, backend=backend)
        accumulator.update(target, reference)
        return (accumulator.result(),)

    calls = {
        "similarity": lambda kind: (kernels.cross_layer_similarity([target], [reference], mask.to(kind), backend=backend),),
        "streamed": lambda kind: streamed(mask.to(kind)),
        "structure": lambda kind: kernels.structure_field(scores, 2, prior.to(kind), backend=backend),
        "fusion": lambda kind: (kernels.fuse_focus(prior, coverage, prior, prior.to(kind), backend=backend),),
        "residual": lambda kind: kernels.preference_residual(*six, prior.to(kind), backend=backend),
        "mask": lambda kind: (
            focusdpo.focus_mask(scores, prior.to(kind), images, reference_mask=mask.to(kind), backend=backend).mask,
        ),
        "loss": lambda kind: focusdpo.focus_dpo_loss(
            *six, focus=prior.to(kind), sample_weight=coverage.to(kind), timestep_weight=coverage.to(kind), backend=backend
        )[:-1],
    }
    for name, call in calls.items():
        for found, expected in zip(call(torch.float64), call(torch.float32), strict=True):
            assert found.dtype == expected.dtype and torch.equal(found, expected), name


def test_a_mask_in_float64_leaves_the_automatic_choice(monkeypatch):
    """On a device where Triton is the choice."""
    monkeypatch.delenv("FOCUSDPO_BACKEND", raising=False)
    monkeypatch.setattr(backends, "ACCELERATORS", ("cpu", "cuda"))
    for module, call in (
        (kernels.matching, lambda: kernels.structure_field(SCORES.to(DEVICE), 2, PRIOR.double().to(DEVICE))),
        (kernels.fusion, lambda: kernels.fuse_focus(*[x.to(DEVICE) for x in (PRIOR, PRIOR[:, 0], PRIOR, PRIOR.double())])),
        (kernels.similarity, lambda: kernels.cross_layer_similarity([T.to(DEVICE)], [Q.to(DEVICE)], MASK.double().to(DEVICE))),
        (kernels.residual, lambda: kernels.preference_residual(*[x.to(DEVICE) for x in SIX], PRIOR.double().to(DEVICE))),
    ):
        chosen = []

        def recorded(*arguments, chosen=chosen):
            chosen.append(backends.resolve_backend(*arguments))
            return chosen[-1]

        with monkeypatch.context() as patched:
            patched.setattr(module, "resolve_backend", recorded)
            call()
        assert chosen == ["triton"]


def test_tensors_whose_data_is_elsewhere(tmp_path):
    distributed = torch.distributed
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

        whole = distribute_tensor(SIX[2], init_device_mesh("cpu", (1,)), [Replicate()])
        for backend in ("triton", "torch"):
            with pytest.raises(
                TypeError, match=r"^reference_win: got a DTensor, .* pass reference_win.to_local\(\), or all of it"
            ):
                focusdpo.focus_dpo_loss(*SIX[:2], whole, *SIX[3:], backend=backend)
        assert torch.equal(
            kernels.preference_residual(*SIX[:2], whole.to_local(), *SIX[3:]).margin, kernels.preference_residual(*SIX).margin
        )
    finally:
        distributed.destroy_process_group()


def test_other_subclasses():
    from torch.testing._internal.two_tensor import TwoTensor

    with pytest.raises(TypeError, match="^scores: got a TwoTensor, whose data the kernels cannot read; pass a plain tensor"):
        kernels.topk_mask(TwoTensor(SCORES, SCORES), 2)
    assert (
        kernels.preference_residual(*[torch.nn.Parameter(x) if n < 2 else x for n, x in enumerate(SIX)]).margin.isfinite().all()
    )


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_fake_tensors_pass(backend):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        six = [mode.from_tensor(x).requires_grad_(n < 2) for n, x in enumerate(SIX)]
        loss = focusdpo.focus_dpo_loss(*six, focus=mode.from_tensor(PRIOR), backend=backend).loss
        loss.backward()
    assert loss.shape == () and six[0].grad.shape == SIX[0].shape
