"""Dense cross-layer similarity, `pooling="max"`: the best match among a subject's tokens (docs/method.md, E4').

    S[r, p] = sum_n max_{q: m[r, q]} cos(h_ref[n, q], h_tgt[n, p]) / N

Tiled like flash attention: a program keeps the running maximum of its target tokens while tiles of reference tokens pass, so
the Q x P matrix never reaches memory. Products run on tensor cores for fp16 and bf16, in full precision for fp32, and
accumulate in fp32. A first launch writes inverse norms, N (P + Q) floats per sample. 2 N P Q D operations.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from focusdpo_kernels import reference as spec
from focusdpo_kernels.backend import device_guard
from focusdpo_kernels.launch import Launch, Registers, ceil_div, next_power_of_2
from focusdpo_kernels.layers import REFERENCE, SHIPPED, TARGET, hidden_constants, is_vectorizable, pointer_table, table_rows


@triton.jit(do_not_specialize=["N", "T"])
def _norm_kernel(
    table_ptr,  # [N, COLUMNS] int64
    inverse_ptr,  # [B, N, T] fp32
    N,
    T,
    D,
    SIDE: tl.constexpr,
    DTYPE: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(1)
    b = tl.program_id(0).to(tl.int64)
    base, stride, width = table_rows(table_ptr, n, b, SIDE, DTYPE, CONTIGUOUS)
    offs_t = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    square = tl.zeros([BLOCK_T], tl.float32)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        offsets = offs_t.to(tl.int64)[:, None] * stride + offs_d[None, :] * width
        h = tl.load(base + offsets, mask=mask_t[:, None] & (offs_d < D)[None, :], other=0.0).to(tl.float32)
        square += tl.sum(h * h, axis=1)
    tl.store(inverse_ptr + (b * N + n) * T + offs_t, tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(square), EPS)), mask=mask_t)


@triton.jit(do_not_specialize=["N", "P", "Q"])
def _dense_kernel(
    table_ptr,  # [N, COLUMNS] int64
    mask_ptr,  # [B, R, Q] uint8
    target_inverse_ptr,  # [B, N, P] fp32
    reference_inverse_ptr,  # [B, N, Q] fp32
    out_ptr,  # [B, R, P] fp32
    N,
    P,
    Q,
    D,
    stride_mb,
    stride_mr,
    stride_mq,
    R: tl.constexpr,
    R_PAD: tl.constexpr,
    DTYPE: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    offs_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < P
    offs_r = tl.arange(0, R_PAD)
    total = tl.zeros([R_PAD, BLOCK_P], tl.float32)
    for n in range(N):
        target, stride_p, width_p = table_rows(table_ptr, n, b, TARGET, DTYPE, CONTIGUOUS)
        reference, stride_q, width_q = table_rows(table_ptr, n, b, REFERENCE, DTYPE, CONTIGUOUS)
        inverse_p = tl.load(target_inverse_ptr + (b * N + n) * P + offs_p, mask=mask_p, other=0.0)
        best = tl.full([R_PAD, BLOCK_P], float("-inf"), tl.float32)
        for q in range(0, Q, BLOCK_Q):
            offs_q = q + tl.arange(0, BLOCK_Q)
            mask_q = offs_q < Q
            dot = tl.zeros([BLOCK_P, BLOCK_Q], tl.float32)
            for d in range(0, D, BLOCK_D):
                offs_d = d + tl.arange(0, BLOCK_D)
                mask_d = offs_d < D
                offsets_p = offs_p.to(tl.int64)[:, None] * stride_p + offs_d[None, :] * width_p
                offsets_q = offs_q.to(tl.int64)[None, :] * stride_q + offs_d[:, None] * width_q
                h_p = tl.load(target + offsets_p, mask=mask_p[:, None] & mask_d[None, :], other=0.0)
                h_q = tl.load(reference + offsets_q, mask=mask_d[:, None] & mask_q[None, :], other=0.0)
                if UPCAST:
                    h_p = h_p.to(tl.float32)
                    h_q = h_q.to(tl.float32)
                dot = tl.dot(h_p, h_q, dot, input_precision="ieee")
            inverse_q = tl.load(reference_inverse_ptr + (b * N + n) * Q + offs_q, mask=mask_q, other=0.0)
            cosine = dot * inverse_p[:, None] * inverse_q[None, :]
            for r in tl.static_range(R):
                offsets = b * stride_mb + tl.cast(r, tl.int64) * stride_mr + offs_q.to(tl.int64) * stride_mq
                m = tl.load(mask_ptr + offsets, mask=mask_q, other=0)
                # A NaN token is never the best match.
                found = tl.where((m != 0)[None, :] & (cosine == cosine), cosine, float("-inf"))
                best = tl.where((offs_r == r)[:, None], tl.maximum(best, tl.max(found, axis=1)[None, :]), best)
        total += best
    mask_out = (offs_r < R)[:, None] & mask_p[None, :]
    out = out_ptr + (b * R + offs_r[:, None]) * P + offs_p[None, :]
    if ACCUMULATE:
        total += tl.load(out, mask=mask_out, other=0.0)
    else:
        total = tl.div_rn(total, tl.cast(N, tl.float32))
    tl.store(out, total, mask=mask_out)


@functools.cache
def _launches(dtype: torch.dtype, subjects: int, contiguous: bool, accumulate: bool) -> tuple[Launch, Launch, Launch]:
    """Launches of the target's norms, the reference's norms, and the matches."""
    hidden = hidden_constants(dtype, contiguous)
    layers = {name: hidden[name] for name in ("DTYPE", "CONTIGUOUS")}
    floats = ("inverse_ptr", "target_inverse_ptr", "reference_inverse_ptr", "out_ptr")
    types = {"table_ptr": "*i64", "mask_ptr": "*u8", **dict.fromkeys(floats, "*fp32")}
    norms = [
        Launch(
            _norm_kernel,
            {"SIDE": side.value, **layers, "EPS": spec.EPS, "BLOCK_T": 16, "BLOCK_D": 256},
            threads=128,
            registers=Registers(120, 128, 120, 64),
            types=types,
            aligned=("D",),
        )
        for side in (TARGET, REFERENCE)
    ]
    # Tensor cores want large tiles. Small ones keep fp32 (on ordinary cores) and strided rows (64-bit addresses) in registers.
    half = dtype != torch.float32
    large = half and contiguous
    blocks = (
        {"BLOCK_P": 64, "BLOCK_Q": 64, "BLOCK_D": 64}
        if large
        else {"BLOCK_P": 32, "BLOCK_Q": 32, "BLOCK_D": 32 if half else 16}
    )
    dense = Launch(
        _dense_kernel,
        {
            "R": subjects,
            "R_PAD": max(next_power_of_2(subjects), 2),
            **hidden,
            "ACCUMULATE": accumulate,
            **blocks,
        },
        threads=128,
        registers=Registers(216, 216, 208, 216),
        num_stages=3 if large else 2 if half or not contiguous else 1,
        types=types,
        aligned=("D",),
        ones=("stride_mq",),
    )
    return norms[0], norms[1], dense


def launch_dense(target: Sequence[Tensor], reference: Sequence[Tensor], mask: Tensor, out: Tensor, accumulate: bool) -> None:
    """Writes S into `out` [B, R, P], or adds cosines to it where `accumulate`. `mask` is uint8."""
    batch, subjects, patches = out.shape
    tokens, width = reference[0].shape[1:]
    layers, device = len(target), out.device
    contiguous = is_vectorizable([*target, *reference])
    norm_target, norm_reference, dense = _launches(target[0].dtype, subjects, contiguous, accumulate)
    table = pointer_table(target, reference)
    inverse_target = torch.empty((batch, layers, patches), dtype=torch.float32, device=device)
    inverse_reference = torch.empty((batch, layers, tokens), dtype=torch.float32, device=device)
    with device_guard(out):
        for norm, inverse in ((norm_target, inverse_target), (norm_reference, inverse_reference)):
            count = inverse.shape[2]
            if count:
                blocks = ceil_div(count, norm.constants["BLOCK_T"])
                norm((batch, layers, blocks), table, inverse, layers, count, width)
        grid = (batch, ceil_div(patches, dense.constants["BLOCK_P"]))
        sizes = (layers, patches, tokens, width, *mask.stride())
        dense(grid, table, mask, inverse_target, inverse_reference, out, *sizes)


def launches() -> Iterator[Launch]:
    """Every shipped launch configuration, for ahead-of-time compilation."""
    for variant in SHIPPED:
        yield from _launches(*variant, accumulate=False)
    for dtype in (torch.bfloat16, torch.float32):
        yield from _launches(dtype, 2, contiguous=True, accumulate=True)
