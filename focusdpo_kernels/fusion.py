"""Fusion of structure and detail into the focus mask (docs/method.md, E8).

    M = M_s                                     where A >  tau
    M = gamma M_s + (1 - gamma) M_d prior       where A <= tau

Bytes: 4 B P for M_s, 4 B P for M_d, B P for the prior, 4 B P out.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from focusdpo_kernels import reference as spec
from focusdpo_kernels.backend import device_guard, resolve_backend
from focusdpo_kernels.checks import (
    FLOATS,
    check_device,
    check_prior,
    check_shape,
    check_tensor,
    check_unit_interval,
)
from focusdpo_kernels.launch import Launch, Registers


@triton.jit(do_not_specialize=["P", "PRIOR_ROWS"])
def _fuse_kernel(
    structure_ptr,  # [B, P] fp32
    coverage_ptr,  # [B] fp32
    complexity_ptr,  # [B, P] fp32
    prior_ptr,  # [B, R or 1, P] uint8
    out_ptr,  # [B, P] fp32
    P,
    PRIOR_ROWS,
    tau,
    gamma,
    stride_mb,
    stride_mr,
    stride_mp,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = offs < P
    union = tl.zeros([BLOCK], tl.int32)
    for r in range(PRIOR_ROWS):
        offsets = b * stride_mb + tl.cast(r, tl.int64) * stride_mr + offs.to(tl.int64) * stride_mp
        prior = tl.load(prior_ptr + offsets, mask=valid, other=0)
        union |= (prior != 0).to(tl.int32)
    structure = tl.load(structure_ptr + b * P + offs, mask=valid, other=0.0)
    complexity = tl.load(complexity_ptr + b * P + offs, mask=valid, other=0.0)
    blended = gamma * structure + (1 - gamma) * tl.where(union != 0, complexity, 0.0)
    tl.store(out_ptr + b * P + offs, tl.where(tl.load(coverage_ptr + b) > tau, structure, blended), mask=valid)


def _fuse_launch() -> Launch:
    pointers = ("structure_ptr", "coverage_ptr", "complexity_ptr", "out_ptr")
    return Launch(
        _fuse_kernel,
        {"BLOCK": 1024},
        threads=128,
        registers=Registers(32, 32, 32, 40),
        types={**dict.fromkeys(pointers, "*fp32"), "prior_ptr": "*u8", "tau": "fp32", "gamma": "fp32"},
        aligned=("stride_mb", "stride_mr"),
        ones=("stride_mp",),
    )


@torch.library.custom_op("focusdpo::fuse_focus", mutates_args=())
def fuse_focus_op(structure: Tensor, coverage: Tensor, complexity: Tensor, prior: Tensor, tau: float, gamma: float) -> Tensor:
    batch, patches = structure.shape
    out = torch.empty((batch, patches), dtype=torch.float32, device=structure.device)
    if out.numel() == 0:
        return out
    inside = spec.binary_prior(prior).view(torch.uint8)
    inside = inside if inside.ndim == 3 else inside[:, None]
    fields = [x.to(torch.float32).contiguous() for x in (structure, coverage, complexity)]
    launch = _fuse_launch()
    with device_guard(structure):
        grid = (batch, triton.cdiv(patches, launch.constants["BLOCK"]))
        launch(grid, *fields, inside, out, patches, inside.shape[1], tau, gamma, *inside.stride())
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


def launches() -> Iterator[Launch]:
    """Every shipped launch configuration, for ahead-of-time compilation."""
    yield _fuse_launch()
