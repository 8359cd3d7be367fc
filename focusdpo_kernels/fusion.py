"""Fusion of structure and detail into the focus mask (docs/method.md, E8), alone or with all that leads to it.

    M = M_s                                     where A >  tau
    M = gamma M_s + (1 - gamma) M_d prior       where A <= tau

`fuse_focus` bytes: 4 B P for M_s, 4 B P for M_d, B P for the prior, 4 B P out. `focus_field` takes scores and entropies to M
in one launch, a program a sample: 4 B R P for the scores, 4 B P for H, B P or B R P for the prior, 13 B P out.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

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
    check_estimator,
    check_field,
    check_images,
    check_prior,
    check_shape,
    check_tensor,
    check_unit_interval,
)
from focusdpo_kernels.entropy import Estimator, run_entropy, scale_complexity
from focusdpo_kernels.launch import POINTERS, Launch, Registers, ceil_div
from focusdpo_kernels.matching import (
    PRIOR_ALIGNED,
    Selected,
    field_constants,
    load_inside,
    ordered,
    row_arguments,
    row_types,
    run_topk,
    share,
    uncovered,
    unordered,
)
from focusdpo_kernels.reference import FocusField


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


@triton.jit
def _field_kernel(
    selected,  # M' and how many are wanted
    prior,  # [B, PRIOR_ROWS, P] of any type
    entropy_ptr,  # [B, P] fp32
    out,  # FocusField: fp32, and bytes of 0 and 1 for what is bool
    P,
    tau,
    gamma,
    R: tl.constexpr,
    PRIOR_ROWS: tl.constexpr,
    PER_SUBJECT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    # As integers, which a warp compares in one instruction; NaN is the largest.
    low = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
    high = tl.full([BLOCK], -0x7FFFFFFF, tl.int32)
    structures = tl.zeros([BLOCK], tl.int32)
    unions = tl.zeros([BLOCK], tl.int32)
    for start in range(0, P, BLOCK):
        structure, union = uncovered(
            selected.matches, prior, b, start, P, R=R, PRIOR_ROWS=PRIOR_ROWS, PER_SUBJECT=PER_SUBJECT, BLOCK=BLOCK
        )
        structures += structure
        unions += union
        offs_p = start + tl.arange(0, BLOCK)
        entropy = tl.load(entropy_ptr + b * P + offs_p, mask=offs_p < P, other=0.0)
        keys = tl.where(entropy == entropy, ordered(entropy), 0x7FFFFFFF)
        low = tl.minimum(low, tl.where(offs_p < P, keys, 0x7FFFFFFF))
        high = tl.maximum(high, tl.where(offs_p < P, keys, -0x7FFFFFFF))
    least = unordered(tl.min(low, axis=0))
    largest = unordered(tl.max(high, axis=0))
    size = tl.sum(unions, axis=0)
    coverage = share(tl.sum(structures, axis=0), size)
    all_matched = 0
    rest = 0 if PER_SUBJECT and R > 0 else size
    for r in tl.static_range(R):
        wanted = tl.load(selected.wanted + b * R + r)
        all_matched |= (wanted >= P).to(tl.int32)
        if PER_SUBJECT:  # another's matches do not help: at least the neediest subject's rest remains
            inside = tl.zeros([BLOCK], tl.int32)
            for start in range(0, P, BLOCK):
                offs_p = start + tl.arange(0, BLOCK)
                offsets = b * prior.stride_b + tl.cast(r, tl.int64) * prior.stride_r + offs_p.to(tl.int64) * prior.stride_p
                inside += load_inside(prior.ptr, offsets, offs_p < P)
            rest = tl.maximum(rest, tl.sum(inside, axis=0) - wanted)
        else:
            rest -= wanted
    for start in range(0, P, BLOCK):
        structure, union = uncovered(
            selected.matches, prior, b, start, P, R=R, PRIOR_ROWS=PRIOR_ROWS, PER_SUBJECT=PER_SUBJECT, BLOCK=BLOCK
        )
        offs_p = start + tl.arange(0, BLOCK)
        offsets = b * P + offs_p
        mask_p = offs_p < P
        complexity = scale_complexity(tl.load(entropy_ptr + offsets, mask=mask_p, other=0.0), least, largest)
        structure = structure.to(tl.float32)
        tl.store(out.mask + offsets, _blend(structure, complexity, union, coverage, tau, gamma), mask=mask_p)
        tl.store(out.structure + offsets, structure, mask=mask_p)
        tl.store(out.complexity + offsets, complexity, mask=mask_p)
        tl.store(out.prior + offsets, union.to(tl.uint8), mask=mask_p)
    tl.store(out.coverage + b, coverage)
    tl.store(out.coverage_floor + b, share(tl.maximum(rest, 0), size))
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
            "prior": row_types(POINTERS[prior]),
            "tau": "fp32",
            "gamma": "fp32",
        },
        aligned=PRIOR_ALIGNED,
        ones=("prior.stride_p",),
    )


@functools.cache
def _field_launch(subjects: int, patches: int, prior_rows: int, per_subject: bool) -> Launch:
    constants, threads = field_constants(subjects, patches, prior_rows, per_subject)
    return Launch(
        _field_kernel,
        constants,
        threads=threads,
        registers=Registers(144, 144, 144, 128),
        types={
            "selected": Selected("*u8", "*i32"),
            "prior": row_types("*u8"),
            "entropy_ptr": "*fp32",
            "out": FocusField._make(["*fp32", "*fp32", "*fp32", "*fp32", "*u8", "*fp32", "*u8"]),
            "tau": "fp32",
            "gamma": "fp32",
        },
        aligned=(*PRIOR_ALIGNED, "P"),
        ones=("prior.stride_p",),
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
    return _fields(run_topk(scores, k, k_value), prior, entropy.float().contiguous(), per_subject, tau, gamma)


@torch.library.custom_op("focusdpo::image_field", mutates_args=())
def image_field_op(
    scores: Tensor,
    k: Tensor | None,
    k_value: int,
    prior: Tensor,
    images: Tensor,
    patch_size: int,
    bins: int,
    sigma: float,
    method: str,
    per_subject: bool,
    tau: float,
    gamma: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    entropy, selected = run_entropy(images, Estimator(patch_size, bins, sigma, method), scores, k, k_value)
    assert selected is not None
    return _fields(selected, prior, entropy, per_subject, tau, gamma)


def _fields(selected: Selected, prior: Tensor, entropy: Tensor, per_subject: bool, tau: float, gamma: float) -> FocusField:
    """E6 to E8 from matches and entropies."""
    batch, subjects, patches = selected.matches.shape
    out = _empty_field(selected.matches)
    if batch:
        inside = row_arguments(prior)
        launch = _field_launch(subjects, patches, inside.ptr.shape[1], per_subject)
        pointers = FocusField(*(x.view(torch.uint8) if x.dtype == torch.bool else x for x in out))
        with device_guard(entropy):
            launch((batch,), selected, inside, entropy, pointers, patches, tau, gamma)
    return out


def _empty_field(scores: Tensor) -> FocusField:
    batch, _, patches = scores.shape
    per_patch, per_sample = (batch, patches), (batch,)
    return FocusField(
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
    return _empty_field(scores)


@image_field_op.register_fake
def _(scores, k, k_value, prior, images, patch_size, bins, sigma, method, per_subject, tau, gamma):
    return _empty_field(scores)


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
) -> FocusField:
    """The focus mask and its parts from scores and entropies (E5 to E8): `structure_field`, the entropies' scaling and
    `fuse_focus` in two launches.

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
    scores, k, prior = check_field(scores, k, prior, per_subject)
    check_unit_interval("tau", tau)
    check_unit_interval("gamma", gamma)
    entropy = check_tensor("entropy", entropy, ndim=2, dtypes=FLOATS, layout="[B, P]").detach()
    check_shape("entropy", entropy, (scores.shape[0], scores.shape[2]), "B and P of scores")
    check_device("entropy", entropy, scores.device, "scores")
    if resolve_backend(backend, scores, entropy) == "torch":
        matched = (cpu_mask if cpu_mask.takes(scores) else spec).topk_mask(scores, k)
        return spec.focus_field(matched, scores, k, prior, entropy, per_subject, tau, gamma)
    counts, k_value = (k, 0) if isinstance(k, Tensor) else (None, k)
    return FocusField(*focus_field_op(scores, counts, k_value, prior, entropy, per_subject, float(tau), float(gamma)))


def focus_field_of_images(
    scores: Tensor,
    k: int | Tensor,
    prior: Tensor,
    images: Tensor,
    patch_size: int = 16,
    *,
    per_subject: bool = False,
    tau: float = 0.1,
    gamma: float = 0.3,
    bins: int = 32,
    sigma: float = 0.01,
    method: str = "kde",
    check_range: bool | None = None,
    backend: str | None = None,
) -> FocusField:
    """`focus_field` from scores and pixels, also in two launches: top-K runs beside the entropies of the patches.

    Args:
        scores, k, prior, per_subject, tau, gamma, backend: see `focus_field`.
        images: [B, C, H, W] with H/p * W/p = P patches.
        patch_size, bins, sigma, method, check_range: see `patch_entropy`.

    Returns:
        FocusField, see `focus_field`.

    Raises:
        TypeError, ValueError: arguments of wrong type, shape, dtype, device or range, each named.
    """
    scores, k, prior = check_field(scores, k, prior, per_subject)
    check_unit_interval("tau", tau)
    check_unit_interval("gamma", gamma)
    images = check_images(images, patch_size, check_range).detach()
    check_estimator(method, bins, sigma)
    wanted = [scores.shape[0], scores.shape[2]]
    tokens = [images.shape[0], (images.shape[2] // patch_size) * (images.shape[3] // patch_size)]
    if tokens != wanted:
        raise ValueError(
            f"images: {list(images.shape)} in patches of {patch_size} give {tokens} tokens, while scores "
            f"{list(scores.shape)} have {wanted}; resize the images to the target's size"
        )
    check_device("images", images, scores.device, "scores")
    if resolve_backend(backend, scores, images) == "torch":
        entropy = (cpu_mask if cpu_mask.takes(images) else spec).patch_entropy(images, patch_size, bins, sigma, method, False)
        return focus_field(scores, k, prior, entropy, per_subject=per_subject, tau=tau, gamma=gamma, backend="torch")
    counts, k_value = (k, 0) if isinstance(k, Tensor) else (None, k)
    fields = image_field_op(
        scores,
        counts,
        k_value,
        prior,
        images,
        patch_size=patch_size,
        bins=bins,
        sigma=sigma,
        method=method,
        per_subject=per_subject,
        tau=float(tau),
        gamma=float(gamma),
    )
    return FocusField(*fields)


def launches() -> Iterator[Launch]:
    """Every shipped launch configuration, for ahead-of-time compilation."""
    for dtype in (torch.uint8, torch.float32):
        yield _fuse_launch(dtype)
    for subjects in (1, 2, 4, 6):
        for patches in (256, 1024, 4096, 16384):
            yield _field_launch(subjects, patches, 1, False)
            yield _field_launch(subjects, patches, subjects, True)
