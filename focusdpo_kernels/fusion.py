"""Fusion of structure and detail into the focus mask (docs/method.md, E8), alone or with all that leads to it.

    M = M_s                                     where A >  tau
    M = gamma M_s + (1 - gamma) M_d prior       where A <= tau

`fuse_focus` bytes: 4 B P for M_s, 4 B P for M_d, B P for the prior, 4 B P out. `focus_field` takes scores and entropies to M
in one launch, a program a sample: 4 B R P for the scores, 4 B P for H, B P or B R P for the prior, 13 B P out.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from focusdpo_kernels import cpu_mask
from focusdpo_kernels import reference as spec
from focusdpo_kernels.backend import device_guard, resolve_backend
from focusdpo_kernels.checks import (
    FLOATS,
    check_device,
    check_k,
    check_per_subject,
    check_prior,
    check_scores,
    check_shape,
    check_tensor,
    check_unit_interval,
)
from focusdpo_kernels.entropy import scale_complexity
from focusdpo_kernels.launch import POINTERS, Launch, Registers, ceil_div
from focusdpo_kernels.matching import (
    LONGEST,
    ROW_ALIGNED,
    ROW_ONES,
    counts_arguments,
    load_inside,
    ordered,
    row_arguments,
    row_constants,
    row_types,
    run_topk,
    share,
    uncovered,
    unordered,
)


class FieldOut(NamedTuple):
    """Where `_field_kernel` writes: fp32 [B, P] the first three, bool [B, P] the prior, [B] the others."""

    mask: Any
    structure: Any
    complexity: Any
    coverage: Any
    prior: Any
    coverage_floor: Any
    all_matched: Any


@triton.jit
def _blend(structure, complexity, union, coverage, tau, gamma):
    """E8."""
    blended = gamma * structure + (1 - gamma) * tl.where(union != 0, complexity, 0.0)
    return tl.where(coverage > tau, structure, blended)


@triton.jit(do_not_specialize=["P", "PRIOR_ROWS"])
def _fuse_kernel(
    structure_ptr,  # [B, P] fp32
    coverage_ptr,  # [B] fp32
    complexity_ptr,  # [B, P] fp32
    prior,  # [B, R or 1, P] of any type
    out_ptr,  # [B, P] fp32
    P,
    PRIOR_ROWS,
    tau,
    gamma,
    BLOCK_P: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    valid = offs < P
    union = tl.zeros([BLOCK_P], tl.int32)
    for r in range(PRIOR_ROWS):
        offsets = b * prior.stride_b + tl.cast(r, tl.int64) * prior.stride_r + offs.to(tl.int64) * prior.stride_p
        union |= load_inside(prior.ptr, offsets, valid)
    structure = tl.load(structure_ptr + b * P + offs, mask=valid, other=0.0)
    complexity = tl.load(complexity_ptr + b * P + offs, mask=valid, other=0.0)
    mask = _blend(structure, complexity, union, tl.load(coverage_ptr + b), tau, gamma)
    tl.store(out_ptr + b * P + offs, mask, mask=valid)


@triton.jit(do_not_specialize=["P", "k_value"])
def _field_kernel(
    scores,  # [B, R, P]
    k,  # [B, R] or None
    prior,  # [B, PRIOR_ROWS, P] of any type
    entropy_ptr,  # [B, P] fp32
    out,
    P,
    k_value,
    tau,
    gamma,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    PRIOR_ROWS: tl.constexpr,
    PER_SUBJECT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    FULL: tl.constexpr,
):
    if FULL:
        P = BLOCK_P
    b = tl.program_id(0).to(tl.int64)
    offs_p = tl.arange(0, BLOCK_P)
    mask_p = offs_p < P
    offsets = b * P + offs_p
    entropy = tl.load(entropy_ptr + offsets, mask=mask_p, other=0.0)
    # As integers, which a warp compares in one instruction; NaN is the largest.
    keys = tl.where(entropy == entropy, ordered(entropy), 0x7FFFFFFF)
    low = tl.min(tl.where(mask_p, keys, 0x7FFFFFFF), axis=0)
    high = tl.max(tl.where(mask_p, keys, -0x7FFFFFFF), axis=0)
    structure, union, matches, rest, all_matched = uncovered(
        scores, k, k_value, prior, b, P, R=R, ROWS=ROWS, PRIOR_ROWS=PRIOR_ROWS, PER_SUBJECT=PER_SUBJECT, BLOCK_P=BLOCK_P
    )
    coverage, size = share(structure, union)
    if not PER_SUBJECT:
        rest = tl.maximum(size - matches, 0)
    # Read again, so that the search has the registers.
    entropy = tl.load(entropy_ptr + offsets, mask=mask_p, other=0.0)
    complexity = scale_complexity(entropy, unordered(low), unordered(high))
    structure = structure.to(tl.float32)
    tl.store(out.mask + offsets, _blend(structure, complexity, union, coverage, tau, gamma), mask=mask_p)
    tl.store(out.structure + offsets, structure, mask=mask_p)
    tl.store(out.complexity + offsets, complexity, mask=mask_p)
    tl.store(out.prior + offsets, union.to(tl.uint8), mask=mask_p)
    tl.store(out.coverage + b, coverage)
    tl.store(out.coverage_floor + b, tl.div_rn(rest.to(tl.float32), tl.maximum(size, 1).to(tl.float32)))
    tl.store(out.all_matched + b, tl.cast(all_matched, tl.uint8))


@functools.cache
def _fuse_launch(prior: torch.dtype = torch.uint8) -> Launch:
    pointers = ("structure_ptr", "coverage_ptr", "complexity_ptr", "out_ptr")
    return Launch(
        _fuse_kernel,
        {"BLOCK_P": 1024},
        threads=128,
        registers=Registers(48, 48, 48, 48),
        types={
            **dict.fromkeys(pointers, "*fp32"),
            "prior": row_types("*fp32", POINTERS[prior], None)["prior"],
            "tau": "fp32",
            "gamma": "fp32",
        },
        aligned=ROW_ALIGNED,
        ones=ROW_ONES,
    )


@functools.cache
def _field_launch(
    subjects: int, patches: int, prior_rows: int, per_subject: bool, k_tensor: bool, dtype: torch.dtype
) -> Launch:
    constants, threads = row_constants(subjects, patches, prior_rows, per_subject)
    return Launch(
        _field_kernel,
        constants,
        threads=threads,
        registers=Registers(255, 255, 255, 264),  # AMD has 512
        types={
            **row_types(POINTERS[dtype], "*u8", "*i64" if k_tensor else None),
            "entropy_ptr": "*fp32",
            "out": FieldOut("*fp32", "*fp32", "*fp32", "*fp32", "*u8", "*fp32", "*u8"),
            "tau": "fp32",
            "gamma": "fp32",
        },
        aligned=ROW_ALIGNED,
        ones=ROW_ONES,
    )


@torch.library.custom_op("focusdpo::fuse_focus", mutates_args=())
def fuse_focus_op(structure: Tensor, coverage: Tensor, complexity: Tensor, prior: Tensor, tau: float, gamma: float) -> Tensor:
    batch, patches = structure.shape
    out = torch.empty((batch, patches), dtype=torch.float32, device=structure.device)
    if out.numel() == 0:
        return out
    fields = [x.to(torch.float32).contiguous() for x in (structure, coverage, complexity)]
    inside = row_arguments(prior)
    launch = _fuse_launch()
    with device_guard(structure):
        grid = (batch, ceil_div(patches, launch.constants["BLOCK_P"]))
        launch(grid, *fields, inside, out, patches, inside.ptr.shape[1], tau, gamma)
    return out


@fuse_focus_op.register_fake
def _(structure, coverage, complexity, prior, tau, gamma):
    return structure.new_empty(structure.shape, dtype=torch.float32)


def fuse_focus(
    structure: Tensor,
    coverage: Tensor,
    complexity: Tensor,
    prior: Tensor,
    *,
    tau: float = 0.1,
    gamma: float = 0.3,
    backend: str | None = None,
) -> Tensor:
    """The focus mask M (E8): structure alone while subjects are misaligned, structure and detail once they are aligned.

    Args:
        structure: M_s [B, P] from `structure_field`.
        coverage: A [B] from `structure_field`.
        complexity: M_d [B, P] in [0, 1] from `patch_entropy(..., normalize=True)`; multiplied by the prior here.
        prior: [B, P] or [B, R, P]; the union over subjects counts.
        tau: a sample with A above it uses structure alone, 0 to 1.
        gamma: weight of structure against detail at or below tau, 0 to 1.
        backend: "triton", "torch" or None; see `focusdpo_kernels.backend`.

    Returns:
        M [B, P] in [0, 1], fp32 (float64 for float64 fields on the torch backend). Carries no gradient.

    Raises:
        TypeError, ValueError: arguments of wrong type, shape, dtype, device or range, each named.
    """
    structure = check_tensor("structure", structure, ndim=2, dtypes=FLOATS, layout="[B, P]").detach()
    coverage = check_tensor("coverage", coverage, ndim=1, dtypes=FLOATS, layout="[B]").detach()
    complexity = check_tensor("complexity", complexity, ndim=2, dtypes=FLOATS, layout="[B, P]").detach()
    batch, patches = structure.shape
    check_shape("coverage", coverage, (batch,), "B of structure")
    check_shape("complexity", complexity, (batch, patches), "as structure")
    prior = check_prior(prior, batch, None, patches).detach()
    for name, value in (("coverage", coverage), ("complexity", complexity), ("prior", prior)):
        check_device(name, value, structure.device, "structure")
    check_unit_interval("tau", tau)
    check_unit_interval("gamma", gamma)
    if resolve_backend(backend, structure, coverage, complexity) == "torch":
        return spec.fuse_focus(structure, coverage, complexity, prior, tau, gamma)
    return fuse_focus_op(structure, coverage, complexity, prior, float(tau), float(gamma))


@torch.library.custom_op("focusdpo::focus_field", mutates_args=())
def focus_field_op(
    scores: Tensor,
    k: Tensor | None,
    k_value: int,
    prior: Tensor,
    entropy: Tensor,
    per_subject: bool,
    tau: float,
    gamma: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, subjects, patches = scores.shape
    if batch == 0 or not 0 < patches <= LONGEST:
        matched = run_topk(scores, k, k_value)
        counts = k_value if k is None else k
        field = spec.focus_field(matched, scores, counts, prior, entropy.float(), per_subject, tau, gamma)
        return _as_tuple(x.clone() if x is prior or x is entropy else x for x in field)  # an operator returns no argument
    out = _empty_field(scores)
    launch = _field_launch(
        subjects, patches, prior.shape[1] if prior.ndim == 3 else 1, per_subject, k is not None, scores.dtype
    )
    pointers = FieldOut(*(x.view(torch.uint8) if x.dtype == torch.bool else x for x in out))
    arguments = (row_arguments(scores), counts_arguments(k), row_arguments(prior), entropy.float().contiguous())
    with device_guard(scores):
        launch((batch,), *arguments, pointers, patches, k_value, tau, gamma)
    return _as_tuple(out)


def _as_tuple(field: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of a FocusField, which the schema of an operator does not know."""
    mask, structure, complexity, coverage, prior, floor, all_matched = field
    return mask, structure, complexity, coverage, prior, floor, all_matched


def _empty_field(scores: Tensor) -> spec.FocusField:
    batch, _, patches = scores.shape
    per_patch, per_sample = (batch, patches), (batch,)
    return spec.FocusField(
        mask=scores.new_empty(per_patch, dtype=torch.float32),
        structure=scores.new_empty(per_patch, dtype=torch.float32),
        complexity=scores.new_empty(per_patch, dtype=torch.float32),
        coverage=scores.new_empty(per_sample, dtype=torch.float32),
        prior=scores.new_empty(per_patch, dtype=torch.bool),
        coverage_floor=scores.new_empty(per_sample, dtype=torch.float32),
        all_matched=scores.new_empty(per_sample, dtype=torch.bool),
    )


@focus_field_op.register_fake
def _(scores, k, k_value, prior, entropy, per_subject, tau, gamma):
    return _as_tuple(_empty_field(scores))


def focus_field(
    scores: Tensor,
    k: int | Tensor,
    prior: Tensor,
    entropy: Tensor,
    *,
    per_subject: bool = False,
    tau: float = 0.1,
    gamma: float = 0.3,
    backend: str | None = None,
) -> spec.FocusField:
    """The focus mask and its parts from scores and entropies (E5 to E8): `structure_field`, the entropies' scaling and
    `fuse_focus` in one launch.

    Args:
        scores: S [B, R, P] fp16, bf16 or fp32 (float64 on the torch backend).
        k, prior, per_subject: see `structure_field`.
        entropy: H [B, P] from `patch_entropy`, not normalised.
        tau, gamma, backend: see `fuse_focus`.

    Returns:
        FocusField: M, M_s, M_d, A, the union of the priors, the lowest A that so many matches can reach, and whether one
        subject may match every token. fp32 (float64 for float64 scores) and bool. Carries no gradient.

    Raises:
        TypeError, ValueError: arguments of wrong type, shape, dtype, device or range, each named.
    """
    scores = check_scores("scores", scores, ndim=3).detach()
    k = check_k(k, scores)
    batch, subjects, patches = scores.shape
    prior = check_prior(prior, batch, subjects, patches).detach()
    entropy = check_tensor("entropy", entropy, ndim=2, dtypes=FLOATS, layout="[B, P]").detach()
    check_shape("entropy", entropy, (batch, patches), "B and P of scores")
    for name, value in (("prior", prior), ("entropy", entropy)):
        check_device(name, value, scores.device, "scores")
    check_per_subject(per_subject, prior)
    check_unit_interval("tau", tau)
    check_unit_interval("gamma", gamma)
    if resolve_backend(backend, scores, entropy) == "torch":
        matched = (cpu_mask if cpu_mask.takes(scores) else spec).topk_mask(scores, k)
        return spec.focus_field(matched, scores, k, prior, entropy, per_subject, tau, gamma)
    counts, k_value = (k, 0) if isinstance(k, Tensor) else (None, k)
    return spec.FocusField(*focus_field_op(scores, counts, k_value, prior, entropy, per_subject, float(tau), float(gamma)))


def launches() -> Iterator[Launch]:
    """Every shipped launch configuration, for ahead-of-time compilation."""
    for dtype in (torch.uint8, torch.float32):
        yield _fuse_launch(dtype)
    for patches in (256, 1024, 4000, 4096, 8192):
        for subjects in (1, 2, 4, 6):
            yield _field_launch(subjects, patches, 1, False, True, torch.float32)
    for subjects, patches in ((1, 4096), (2, 1024), (4, 4096), (6, 4096), (2, 8192)):
        yield _field_launch(subjects, patches, subjects, True, True, torch.float32)
    for k_tensor in (False, True):
        yield _field_launch(2, 4096, 1, False, k_tensor, torch.bfloat16)
