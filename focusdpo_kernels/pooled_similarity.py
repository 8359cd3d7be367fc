"""Pooled cross-layer similarity, `pooling="reference"` (docs/method.md, E3 and E4).

    c[r, n] = sum_q m[r, q] h_ref[n, q] / sum_q m[r, q]
    S[r, p] = sum_n w[n] cos(c[r, n], h_tgt[n, p]) / sum_n w[n]

`_pool_kernel` reads each reference token once and writes the pooled tokens (N R D floats per sample), `_similarity_kernel`
reads each target token once. Few layers would leave most of a GPU idle while they are pooled: their tokens are then split
among programs, and `_combine_kernel` adds the parts in a fixed order. Bytes: N (P + Q) D itemsize + B R Q + 4 B R P, plus the
small pooled tokens. The N layers are reached through a table of pointers in device memory: they are never stacked, and each
may be a strided slice of a longer sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from focusdpo_kernels import reference as spec
from focusdpo_kernels.backend import device_guard
from focusdpo_kernels.launch import POINTERS, TRITON_DTYPES, Launch, Registers, next_power_of_2
from focusdpo_kernels.layers import COLUMNS, REFERENCE, TARGET, TYPES, LayerArguments, is_vectorizable, layer_rows, layer_weight

BLOCK_Q, BLOCK_D = 8, 256
TARGET_PROGRAMS = 256  # programs that pool at the same time: about two for each multiprocessor of a large GPU
MIN_SPAN = 64  # reference tokens below which a split is not worth its launch


@triton.jit(do_not_specialize=["N", "Q", "SPLITS", "SPAN"])
def _pool_kernel(
    table_ptr,
    direct_ptr,
    stride_b,
    stride_t,
    stride_d,
    mask_ptr,  # [B, R, Q] uint8
    pooled_ptr,  # [B, N, SPLITS, R, D] fp32: means where PARTIAL is off, else sums
    count_ptr,  # [B, SPLITS, R] fp32
    N,
    Q,
    D,
    SPLITS,
    SPAN,  # tokens of a split, a multiple of BLOCK_Q
    stride_mb,
    stride_mr,
    stride_mq,
    R: tl.constexpr,
    R_PAD: tl.constexpr,
    DTYPE: tl.constexpr,
    TABLE: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTIAL: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(1) // SPLITS
    split = tl.program_id(1) % SPLITS
    b = tl.program_id(0).to(tl.int64)
    reference, stride_q, width = layer_rows(
        table_ptr, direct_ptr, stride_b, stride_t, stride_d, n, b, 4, DTYPE, TABLE, CONTIGUOUS, COLUMNS
    )
    offs_d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    offs_r = tl.arange(0, R_PAD)
    mask_base = mask_ptr + b * stride_mb
    pooled = tl.zeros([R_PAD, BLOCK_D], tl.float32)
    count = tl.zeros([R_PAD], tl.float32)
    for q in range(split * SPAN, tl.minimum((split + 1) * SPAN, Q), BLOCK_Q):
        offs_q = q + tl.arange(0, BLOCK_Q)
        mask_q = offs_q < Q
        # 64-bit before the multiplication: a slice of a long batch passes 2^31 elements.
        offsets = offs_q.to(tl.int64)[:, None] * stride_q + offs_d[None, :] * width
        h = tl.load(reference + offsets, mask=mask_q[:, None] & mask_d[None, :], other=0.0).to(tl.float32)  # [BLOCK_Q, BLOCK_D]
        for r in tl.static_range(R):
            offsets_m = tl.cast(r, tl.int64) * stride_mr + offs_q.to(tl.int64) * stride_mq
            m = (tl.load(mask_base + offsets_m, mask=mask_q, other=0) != 0).to(tl.float32)
            row = offs_r == r
            pooled += tl.where(row[:, None], tl.sum(h * m[:, None], axis=0)[None, :], 0.0)
            count += tl.where(row, tl.sum(m, axis=0), 0.0)
    if not PARTIAL:
        pooled = pooled / tl.maximum(count, 1.0)[:, None]
    out = pooled_ptr + (((b * N + n) * SPLITS + split) * R + offs_r[:, None]) * D + offs_d[None, :]
    tl.store(out, pooled, mask=(offs_r < R)[:, None] & mask_d[None, :])
    if n == 0 and tl.program_id(2) == 0:
        tl.store(count_ptr + (b * SPLITS + split) * R + offs_r, count, mask=offs_r < R)


@triton.jit(do_not_specialize=["N", "SPLITS"])
def _combine_kernel(
    part_ptr,  # [B, N, SPLITS, R, D] fp32
    part_count_ptr,  # [B, SPLITS, R] fp32
    pooled_ptr,  # [B, N, R, D] fp32
    count_ptr,  # [B, R] fp32
    N,
    D,
    SPLITS,
    R: tl.constexpr,
    R_PAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(1)
    b = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_r = tl.arange(0, R_PAD)
    mask_r = offs_r < R
    mask = mask_r[:, None] & (offs_d < D)[None, :]
    pooled = tl.zeros([R_PAD, BLOCK_D], tl.float32)
    count = tl.zeros([R_PAD], tl.float32)
    for split in range(SPLITS):
        part = part_ptr + (((b * N + n) * SPLITS + split) * R + offs_r[:, None]) * D + offs_d[None, :]
        pooled += tl.load(part, mask=mask, other=0.0)
        count += tl.load(part_count_ptr + (b * SPLITS + split) * R + offs_r, mask=mask_r, other=0.0)
    pooled = pooled / tl.maximum(count, 1.0)[:, None]
    tl.store(pooled_ptr + ((b * N + n) * R + offs_r[:, None]) * D + offs_d[None, :], pooled, mask=mask)
    if n == 0 and tl.program_id(2) == 0:
        tl.store(count_ptr + b * R + offs_r, count, mask=mask_r)


@triton.jit(do_not_specialize=["N", "P"])
def _similarity_kernel(
    table_ptr,
    direct_ptr,
    stride_b,
    stride_t,
    stride_d,
    weight,
    pooled_ptr,  # [B, N, R, D] fp32
    count_ptr,  # [B, R] fp32
    out_ptr,  # [B, R, P] fp32
    N,
    P,
    D,
    R: tl.constexpr,
    R_PAD: tl.constexpr,
    DTYPE: tl.constexpr,
    TABLE: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    offs_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < P
    offs_r = tl.arange(0, R_PAD)
    total = tl.zeros([R_PAD, BLOCK_P], tl.float32)
    total_weight = 0.0
    for n in range(N):
        target, stride_p, width = layer_rows(
            table_ptr, direct_ptr, stride_b, stride_t, stride_d, n, b, 0, DTYPE, TABLE, CONTIGUOUS, COLUMNS
        )
        pooled = pooled_ptr + (b * N + n) * R * D
        rows = target + offs_p.to(tl.int64)[:, None] * stride_p
        dot = tl.zeros([R_PAD, BLOCK_P], tl.float32)
        target_square = tl.zeros([BLOCK_P], tl.float32)
        pooled_square = tl.zeros([R_PAD], tl.float32)
        for d in range(0, D, BLOCK_D):
            offs_d = d + tl.arange(0, BLOCK_D)
            mask_d = offs_d < D
            h = tl.load(rows + offs_d[None, :] * width, mask=mask_p[:, None] & mask_d[None, :], other=0.0)
            h = h.to(tl.float32)  # [BLOCK_P, BLOCK_D]
            target_square += tl.sum(h * h, axis=1)
            for r in tl.static_range(R):
                c = tl.load(pooled + r * D + offs_d, mask=mask_d, other=0.0)
                row = offs_r == r
                dot += tl.where(row[:, None], tl.sum(h * c[None, :], axis=1)[None, :], 0.0)
                pooled_square += tl.where(row, tl.sum(c * c, axis=0), 0.0)
        norm = tl.maximum(tl.sqrt(pooled_square), EPS)[:, None] * tl.maximum(tl.sqrt(target_square), EPS)[None, :]
        w = layer_weight(table_ptr, weight, n, TABLE, COLUMNS)
        total += w * (dot / norm)
        total_weight += w
    mask_out = (offs_r < R)[:, None] & mask_p[None, :]
    out = out_ptr + (b * R + offs_r[:, None]) * P + offs_p[None, :]
    if ACCUMULATE:
        total += tl.load(out, mask=mask_out, other=0.0)
    else:
        count = tl.load(count_ptr + b * R + offs_r, mask=offs_r < R, other=0.0)
        total = tl.where(count[:, None] > 0, total / total_weight, float("-inf"))
    tl.store(out, total, mask=mask_out)


def _launches(
    dtype: torch.dtype, subjects: int, contiguous: bool, table: bool, accumulate: bool, split: bool
) -> tuple[Launch, Launch, Launch]:
    """Launches that pool, combine and compare. Sizes that vary from batch to batch play no part."""
    rows = {"R": subjects, "R_PAD": next_power_of_2(subjects)}
    layers = {"DTYPE": TRITON_DTYPES[dtype], "TABLE": table, "CONTIGUOUS": contiguous, "COLUMNS": COLUMNS}
    floats = dict.fromkeys(("pooled_ptr", "count_ptr", "part_ptr", "part_count_ptr", "out_ptr"), "*fp32")
    types = {**TYPES, **floats, "direct_ptr": POINTERS[dtype], "mask_ptr": "*u8"}
    # One warp covers BLOCK_D with 16-byte loads, so that the sum over tokens stays inside a thread. Without unit stride
    # every element has a 64-bit address of its own: fewer rows, or registers spill.
    pool = Launch(
        _pool_kernel,
        {**rows, **layers, "PARTIAL": split, "BLOCK_Q": BLOCK_Q if contiguous else 2, "BLOCK_D": BLOCK_D},
        threads=32,
        registers=Registers(208, 208, 224, 176),
        types=types,
        aligned=("D", "stride_b", "stride_t"),
        ones=("stride_d", "stride_mq") if contiguous else ("stride_mq",),
    )
    combine = Launch(
        _combine_kernel,
        {**rows, "BLOCK_D": BLOCK_D},
        threads=64,
        registers=Registers(96, 96, 96, 56),
        types=types,
        aligned=("D",),
    )
    similarity = Launch(
        _similarity_kernel,
        {
            **rows,
            **layers,
            "ACCUMULATE": accumulate,
            "EPS": spec.EPS,
            "BLOCK_P": 16 if contiguous else 8,
            "BLOCK_D": BLOCK_D,
        },
        threads=128,
        registers=Registers(168, 168, 184, 120),
        types=types,
        aligned=("D", "stride_b", "stride_t"),
        ones=("stride_d",) if contiguous else (),
    )
    return pool, combine, similarity


def _splits(layers: int, blocks: int, tokens: int) -> int:
    """Programs that share a layer's tokens. It looks at no batch size, so that a sample's result does not depend on others."""
    wanted = triton.cdiv(TARGET_PROGRAMS, layers * blocks)
    return max(min(wanted, triton.cdiv(tokens, MIN_SPAN)), 1)


def launch_pooled(
    target: Sequence[Tensor], reference: Sequence[Tensor], mask: Tensor, weights: Sequence[float], out: Tensor, accumulate: bool
) -> None:
    """Writes S into `out` [B, R, P], or adds weighted cosines to it where `accumulate`. `mask` is uint8."""
    batch, subjects, patches = out.shape
    tokens, width = reference[0].shape[1:]
    layers, device = len(target), out.device
    contiguous = is_vectorizable([*target, *reference])
    arguments = LayerArguments(target, reference, weights)
    # At least one block along D: with D = 0 the counts are still needed.
    blocks = max(triton.cdiv(width, BLOCK_D), 1)
    splits = _splits(layers, blocks, tokens)
    span = triton.cdiv(triton.cdiv(tokens, splits), BLOCK_Q) * BLOCK_Q
    pool, combine, similarity = _launches(target[0].dtype, subjects, contiguous, not arguments.single, accumulate, splits > 1)
    parts = torch.empty((batch, layers, splits, subjects, width), dtype=torch.float32, device=device)
    part_count = torch.empty((batch, splits, subjects), dtype=torch.float32, device=device)
    with device_guard(out):
        sizes = (layers, tokens, width, splits, span, *mask.stride())
        pool((batch, layers * splits, blocks), *arguments.side(REFERENCE), mask, parts, part_count, *sizes)
        pooled, count = parts, part_count
        if splits > 1:
            pooled = torch.empty((batch, layers, subjects, width), dtype=torch.float32, device=device)
            count = torch.empty((batch, subjects), dtype=torch.float32, device=device)
            combine((batch, layers, blocks), parts, part_count, pooled, count, layers, width, splits)
        sides = (*arguments.side(TARGET), arguments.weight)
        grid = (batch, triton.cdiv(patches, similarity.constants["BLOCK_P"]))
        similarity(grid, *sides, pooled, count, out, layers, patches, width)


def launches() -> Iterator[Launch]:
    """Every shipped launch configuration, for ahead-of-time compilation."""
    for dtype in (torch.bfloat16, torch.float32):
        for subjects in range(1, 7):
            yield from _launches(dtype, subjects, contiguous=True, table=True, accumulate=False, split=False)
            yield from _launches(dtype, subjects, contiguous=True, table=False, accumulate=True, split=True)
        yield from _launches(dtype, 2, contiguous=False, table=True, accumulate=False, split=False)
    yield from _launches(torch.float16, 2, contiguous=True, table=True, accumulate=False, split=True)
