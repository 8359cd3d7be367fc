"""Exact top-K and structure field: kernel against a plain Python selection."""

from __future__ import annotations

import math

import pytest
import torch

from focusdpo_kernels import matching, structure_field, topk_mask
from tests.conftest import DEVICE, HALF_AND_FULL

pytestmark = pytest.mark.usefixtures("poisoned")
BACKENDS = ["triton", "torch"]


def select(row: list[float], k: int) -> list[bool]:
    """E5 in plain Python: sort by score, then by index; NaN and -inf are out."""
    valid = [i for i, x in enumerate(row) if not math.isnan(x) and x != -math.inf]
    chosen = set(sorted(valid, key=lambda i: (-row[i], i))[:k])
    return [i in chosen for i in range(len(row))]


def hard_scores(rows: int, patches: int) -> torch.Tensor:
    """Rows with ties, both zeros, infinities, NaN, denormals."""
    scores = torch.randn(rows, patches, device=DEVICE)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-42, -1e-42, 3.5, 3.5, -7.0], device=DEVICE)
    where = torch.rand(rows, patches, device=DEVICE) < 0.5
    picks = special[torch.randint(len(special), (rows, patches), device=DEVICE)]
    return torch.where(where, picks, scores)


@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("patches", [1, 7, 100, 300])
def test_topk_is_exact(patches, backend, dtype):
    scores = hard_scores(6, patches).to(dtype)
    for k in sorted({0, 1, patches // 3, patches}):
        expected = torch.tensor([select(row.tolist(), k) for row in scores.float()], device=DEVICE)
        assert torch.equal(topk_mask(scores, k, backend=backend), expected), k


@pytest.mark.parametrize("backend", BACKENDS)
def test_k_per_row_from_a_tensor(backend):
    scores = hard_scores(6, 50).reshape(2, 3, 50)
    k = torch.tensor([[0, 1, 50], [7, 90, -2]], device=DEVICE)
    expected = [select(row.tolist(), max(int(n), 0)) for row, n in zip(scores.reshape(6, 50), k.reshape(6), strict=True)]
    actual = topk_mask(scores, k, backend=backend)
    assert torch.equal(actual, torch.tensor(expected, device=DEVICE).reshape(2, 3, 50))
    huge = torch.tensor([2**32, 2**31 + 3], device=DEVICE)[:, None]
    assert torch.equal(topk_mask(scores, huge, backend=backend), topk_mask(scores, 50, backend=backend))
    column = topk_mask(scores, k[:, :1], backend=backend)
    assert torch.equal(column[1], topk_mask(scores[1], 7, backend=backend))


def test_rows_longer_than_a_block(monkeypatch, request):
    row_constants = matching.row_constants
    monkeypatch.setattr(
        matching, "row_constants", lambda *args, **more: {**row_constants(*args, **more), "BLOCK_P": 256, "ONE": False}
    )
    field_constants = matching.field_constants
    monkeypatch.setattr(matching, "field_constants", lambda *args: ({**field_constants(*args)[0], "BLOCK": 256}, 128))
    for launch in (matching._topk_launch, matching._structure_launch):
        launch.cache_clear()
        request.addfinalizer(launch.cache_clear)
    assert matching._topk_launch(700, True, torch.float32).constants["BLOCK_P"] == 256
    scores = hard_scores(2, 700)
    scores[1] = 1.0  # ties across blocks
    k = torch.tensor([300, 513], device=DEVICE)
    assert torch.equal(topk_mask(scores, k, backend="triton"), topk_mask(scores, k, backend="torch"))
    prior = torch.rand(1, 700, device=DEVICE) > 0.5
    for actual, expected in zip(
        structure_field(scores[None], k[None], prior, backend="triton"),
        structure_field(scores[None], k[None], prior, backend="torch"),
        strict=True,
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("patches", [16384, 65536])
def test_long_rows(patches):
    scores = torch.randn(1, 2, patches, device=DEVICE).half()  # half precision: many ties
    k = torch.tensor([[patches // 3, patches - 1]], device=DEVICE)
    prior = torch.rand(1, patches, device=DEVICE) > 0.5
    assert torch.equal(topk_mask(scores, k, backend="triton"), topk_mask(scores, k, backend="torch"))
    fields = [structure_field(scores, k, prior, backend=backend) for backend in BACKENDS]
    assert torch.equal(fields[0][0], fields[1][0])
    torch.testing.assert_close(fields[0][1], fields[1][1], rtol=1e-6, atol=0)


def test_strided_scores():
    scores = torch.randn(9, 3, 2, device=DEVICE).permute(2, 1, 0)
    assert torch.equal(topk_mask(scores, 4, backend="triton"), topk_mask(scores.contiguous(), 4, backend="torch"))
    prior = (torch.rand(9, 2, device=DEVICE) > 0.5).T
    actual, _ = structure_field(scores, 4, prior, backend="triton")
    expected, _ = structure_field(scores.contiguous(), 4, prior.contiguous(), backend="torch")
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["union", "union of per-subject priors", "per subject"])
def test_structure_field(backend, kind):
    batch, subjects, patches = 3, 3, 40
    scores = hard_scores(batch * subjects, patches).reshape(batch, subjects, patches)
    scores[2, 1] = -math.inf  # an absent subject
    k = torch.randint(0, patches, (batch, subjects), device=DEVICE)
    prior = torch.rand(batch, subjects, patches, device=DEVICE) > 0.6
    if kind == "union":
        prior = prior[:, 0]
    structure, coverage = structure_field(scores, k, prior, per_subject=kind == "per subject", backend=backend)
    for b in range(batch):
        matched = [select(scores[b, r].tolist(), int(k[b, r])) for r in range(subjects)]
        expected, size = [], 0
        for p in range(patches):
            regions = [bool(prior[b, p])] * subjects if prior.ndim == 2 else [bool(prior[b, r, p]) for r in range(subjects)]
            size += any(regions)
            if kind == "per subject":
                expected.append(float(any(regions[r] and not matched[r][p] for r in range(subjects))))
            else:
                expected.append(float(any(regions) and not any(m[p] for m in matched)))
        assert structure[b].tolist() == expected
        assert float(coverage[b]) == pytest.approx(sum(expected) / max(size, 1), abs=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_prior_and_no_subject(backend):
    scores = torch.randn(2, 2, 10, device=DEVICE)
    structure, coverage = structure_field(scores, 3, torch.zeros(2, 10, device=DEVICE), backend=backend)
    assert not structure.any() and not coverage.any()
    prior = torch.rand(2, 10, device=DEVICE) > 0.5
    prior[:, 0] = True
    structure, coverage = structure_field(scores[:, :0], 3, prior, backend=backend)
    assert torch.equal(structure, prior.float()) and (coverage == 1).all()
    structure, coverage = structure_field(scores[:0], 3, prior[:0], backend=backend)
    assert structure.shape == (0, 10) and coverage.shape == (0,)


def test_soft_prior_counts_above_one_half():
    scores = torch.full((1, 1, 4), -math.inf, device=DEVICE)
    prior = torch.tensor([[0.2, 0.5, 0.51, 1.0]], device=DEVICE)
    for backend in BACKENDS:
        assert structure_field(scores, 0, prior, backend=backend)[0].tolist() == [[0, 0, 1, 1]]


def test_a_structure_of_float64_scores_is_float64():
    structure, coverage = structure_field(torch.randn(2, 3, 9).double(), 2, torch.ones(2, 9), backend="torch")
    assert structure.dtype == coverage.dtype == torch.float64
