"""focus_field, scores and entropies (or pixels) to M, against the specification in float64 and against its own parts."""

from __future__ import annotations

import math

import pytest
import torch

from focusdpo_kernels import focus_field, focus_field_of_images, fuse_focus, patch_entropy, reference, structure_field
from tests.conftest import DEVICE, LONG, default_dtype
from tests.kernels.test_matching import hard_scores

pytestmark = pytest.mark.usefixtures("poisoned")


def make(batch=2, subjects=3, patches=300, prior_dtype=torch.bool, per_subject=False):
    scores = hard_scores(batch * subjects, patches).reshape(batch, subjects, patches)
    k = torch.randint(0, patches, (batch, subjects), device=DEVICE)
    prior = torch.rand(batch, subjects, patches, device=DEVICE) > 0.6
    prior = prior if per_subject else prior[:, 0]
    if prior_dtype.is_floating_point:
        soft = torch.rand(prior.shape, device=DEVICE) * 0.5  # up to one half: outside
        prior = torch.where(prior, 0.51 + 0.5 * soft, soft)
    return scores, k, prior.to(prior_dtype), 3 * torch.rand(batch, patches, device=DEVICE)


def exact(scores, k, prior, entropy, per_subject, tau, gamma):
    scores, entropy = scores.double(), entropy.double()
    return reference.focus_field(reference.topk_mask(scores, k), scores, k, prior, entropy, per_subject, tau, gamma)


def assert_field(actual, expected):
    for name, a, e in zip(actual._fields, actual, expected, strict=True):
        assert a.dtype == (torch.bool if e.dtype == torch.bool else torch.float32), name
        torch.testing.assert_close(a.double(), e.double(), rtol=0, atol=1e-6, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("patches", [1, 100, 256, 300, 9000])
@pytest.mark.parametrize("per_subject", [False, True])
def test_against_the_specification(patches, per_subject):
    """Also as many patches as a block has, and more than one program takes."""
    if patches > 1000 and not per_subject and not LONG:
        pytest.skip("a minute of the interpreter, of which the other form takes one already; FOCUSDPO_LONG_TESTS=1 runs it")
    scores, k, prior, entropy = make(patches=patches, per_subject=per_subject)
    scores[1, 1] = -math.inf  # an absent subject
    k[0] = torch.tensor([-3, 2 * patches, 0])
    for counts in (k, patches // 3) if patches < 1000 else (k,):  # long rows take the interpreter seconds
        arguments = (scores, counts, prior, entropy)
        actual = focus_field(*arguments, per_subject=per_subject, tau=0.7, gamma=0.3, backend="triton")
        assert_field(actual, exact(*arguments, per_subject, 0.7, 0.3))


PRIORS = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int64]
PRIORS += [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_prior_just_above_one_half(backend):
    """In float64 it is not rounded before it is compared."""
    prior = torch.full((1, 8), 0.5 + 1e-9, dtype=torch.float64, device=DEVICE)
    _, coverage = structure_field(torch.rand(1, 1, 8, device=DEVICE), 0, prior, backend=backend)
    assert coverage.tolist() == [1.0]


@pytest.mark.parametrize("dtype", PRIORS, ids=str)
@pytest.mark.parametrize("per_subject", [False, True])
def test_a_prior_of_any_type(dtype, per_subject):
    arguments = make(prior_dtype=dtype, per_subject=per_subject)
    actual = focus_field(*arguments, per_subject=per_subject, tau=1.0, backend="triton")
    assert_field(actual, exact(*arguments, per_subject, 1.0, 0.3))
    structure, coverage = structure_field(*arguments[:3], per_subject=per_subject, backend="triton")
    assert torch.equal(structure, actual.structure) and torch.equal(coverage, actual.coverage)
    mask = fuse_focus(structure, coverage, actual.complexity, arguments[2], tau=1.0, backend="triton")
    torch.testing.assert_close(mask, actual.mask, rtol=0, atol=1e-7)  # a compiler may fuse products into sums as it likes


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_counts_of_any_type_and_stride(dtype):
    scores, _, prior, entropy = make(subjects=2, patches=200)
    k = torch.tensor([[5, 60], [0, 120]], device=DEVICE).to(dtype)
    for counts in (k, k.T.contiguous().T, k[:, :1], k[1]):
        arguments = (scores, counts, prior, entropy)
        wide = (scores, counts.long(), prior, entropy)
        assert_field(focus_field(*arguments, backend="triton"), exact(*wide, False, 0.1, 0.3))


@pytest.mark.parametrize("per_subject", [False, True])
@pytest.mark.parametrize(("batch", "shape", "side"), [(3, (3, 48, 80), 16), (1, (1, 132, 128), 4)])
def test_of_images(batch, shape, side, per_subject):
    """Selection beside the patches: of rows that a program holds, and of longer ones; patches that fill no whole program."""
    patches = shape[1] * shape[2] // side**2
    scores, k, prior, _ = make(batch=batch, subjects=5, patches=patches, per_subject=per_subject)
    scores[-1, 1] = -math.inf
    images = torch.rand(batch, *shape, device=DEVICE).mul(torch.rand(batch, 1, 1, 1, device=DEVICE))
    entropy = patch_entropy(images, side, backend="triton")
    options = {"per_subject": per_subject, "tau": 1.0, "backend": "triton"}
    for counts in (k, patches // 3) if batch > 1 else (k,):
        expected = focus_field(scores, counts, prior, entropy, **options)
        actual = focus_field_of_images(scores, counts, prior, images, side, **options)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_of_images_without_subjects():
    scores, _, prior, _ = make(subjects=1, patches=4)
    field = focus_field_of_images(scores[:, :0], 3, prior, torch.rand(2, 3, 32, 32, device=DEVICE), backend="triton")
    assert torch.equal(field.structure, prior.float()) and not field.all_matched.any()


@pytest.mark.parametrize("kind", ["mostly zero", "outlier", "heavy tails", "two values", "denormal", "widest"])
def test_scores_that_do_not_interpolate(kind):
    """The search by counts ends at the exact set also where its guesses are of no use."""
    scores, _, prior, entropy = make(batch=1, subjects=2, patches=400)
    scores = torch.randn(1, 2, 400, device=DEVICE)
    if kind == "mostly zero":
        scores = torch.where(torch.rand_like(scores) < 0.9, torch.randint(0, 2, scores.shape, device=DEVICE) * -0.0, scores)
    elif kind == "outlier":
        scores = 1e-3 * scores
        scores[..., 7] = 1e30
    elif kind == "heavy tails":
        scores = scores / torch.randn_like(scores)
    elif kind == "two values":
        scores = (scores > 0).float()
    elif kind == "denormal":
        scores = 1e-42 * scores
    else:
        largest = torch.finfo(torch.float32).max
        scores[..., ::2] = scores[..., ::2].sign() * largest
        scores[..., 1] = math.inf
    for k in (1, 40, 200, 399):
        arguments = (scores, k, prior, entropy)
        assert_field(focus_field(*arguments, backend="triton"), exact(*arguments, False, 0.1, 0.3))


def test_entropies_that_are_alike_negative_or_broken():
    scores, k, prior, entropy = make(batch=3)
    entropy[0] = 1.5
    entropy[1, 3] = -0.0
    entropy[1, 4:] -= 1
    entropy[2, 5] = math.nan
    prior[2, 5] = False
    for sign in (1, -1):  # a NaN of either sign
        arguments = (scores, k, prior, torch.copysign(entropy, torch.tensor(float(sign))) if sign < 0 else entropy)
        actual = focus_field(*arguments, tau=1.0, backend="triton")
        assert actual.complexity.isnan().tolist() == [[False] * 300] * 2 + [[True] * 300]
        assert_field(actual, exact(*arguments, False, 1.0, 0.3))
        assert actual.mask[2, 5] == 0


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_nothing_to_do(backend):
    scores, k, prior, entropy = make()
    assert focus_field(scores[:0], k[:0], prior[:0], entropy[:0], backend=backend).mask.shape == (0, 300)
    empty = focus_field(scores[..., :0], 0, prior[:, :0], entropy[:, :0], backend=backend)
    assert empty.mask.shape == (2, 0) and not empty.coverage.any()
    alone = focus_field(scores[:, :0], 7, prior, entropy, backend=backend)
    assert torch.equal(alone.structure, prior.float()) and (alone.coverage == 1).all() and (alone.coverage_floor == 1).all()
    assert not alone.all_matched.any()


def test_a_sample_does_not_depend_on_its_batch():
    scores, k, prior, entropy = make(batch=4)
    together = focus_field(scores, k, prior, entropy, tau=1.0, backend="triton")
    for b in range(4):
        alone = focus_field(*(x[b : b + 1] for x in (scores, k, prior, entropy)), tau=1.0, backend="triton")
        assert all(torch.equal(a[0], t[b]) for a, t in zip(alone, together, strict=True))


def test_strided_inputs():
    scores, k, prior, entropy = make(per_subject=True)
    expected = focus_field(scores, k, prior, entropy, per_subject=True, backend="triton")
    strided = [x.transpose(-1, 0).contiguous().transpose(-1, 0) for x in (scores, prior, entropy)]
    actual = focus_field(strided[0], k, strided[1], strided[2], per_subject=True, backend="triton")
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_compiled_is_the_same():
    arguments = make()
    for backend in ("triton", "torch"):

        def field(*x, backend=backend):
            return focus_field(*x, tau=1.0, backend=backend)

        compiled = torch.compile(field, fullgraph=True, backend="aot_eager")(*arguments)
        assert all(torch.equal(a, e) for a, e in zip(compiled, field(*arguments), strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"entropy": torch.rand(2, 299)}, r"entropy: expected shape \[2, 300\] \(B and P of scores\), got float32 \[2, 299\]"),
        ({"entropy": torch.ones(2, 300, dtype=torch.int64)}, "entropy: got dtype int64; allowed are"),
        ({"prior": torch.rand(2, 299)}, r"prior: expected shape \[2, 300\]"),
        ({"per_subject": True}, "prior: per_subject=True needs one prior per subject"),
        ({"tau": 1.5}, "tau: got 1.5; expected a number from 0 to 1"),
        ({"gamma": -0.5}, "gamma: got -0.5"),
        ({"k": 301}, "k: got 301; expected 0 to P = 300"),
    ],
)
def test_refused_by_name(changes, message):
    arguments = dict(zip(("scores", "k", "prior", "entropy"), make(), strict=True))
    changes = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in changes.items()}
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        focus_field(**(arguments | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_counts_in_bytes_of_many_patches(dtype):
    """300 patches do not fit the type of k."""
    scores, _, prior, entropy = make(subjects=2, patches=300)
    k = torch.tensor([[9, 100], [-1, 127]], dtype=torch.int8, device=DEVICE)
    fields = [focus_field(scores.to(dtype), k.to(of), prior, entropy, backend="torch") for of in (torch.int8, torch.int64)]
    assert all(torch.equal(one, other) for one, other in zip(*fields, strict=True))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_dtypes_are_those_of_the_scores(backend):
    """Neither the entropy's nor PyTorch's default."""
    scores, k, prior, entropy = make(patches=61)
    for default in (torch.bfloat16, torch.float64):
        with default_dtype(default):
            fields = [focus_field(scores, k, prior, entropy.to(x), backend=backend) for x in (torch.float32, torch.bfloat16)]
        assert_field(fields[0], exact(scores, k, prior, entropy, False, 0.1, 0.3))
        assert_field(fields[1], exact(scores, k, prior, entropy.bfloat16(), False, 0.1, 0.3))
    doubled = focus_field(scores.double(), k, prior, entropy, backend="torch")
    assert {x.dtype for x in doubled} == {torch.float64, torch.bool}
