"""Pooled cross-layer similarity, `pooling="reference"` (docs/method.md, E3 and E4).

    c[r, n] = sum_q m[r, q] h_ref[n, q] / sum_q m[r, q],    u[r, n] = c / |c|
    S[r, p] = sum_n <u[r, n], h_tgt[n, p]> / |h_tgt[n, p]| / N

`_pool_kernel` reads each reference token once and sums it into its subjects, `_unit_kernel` turns the sums into unit vectors,
`_compare_kernel` reads each target token once. The sums over tokens and over widths are matrix products of a tile of hidden
states with a few columns: on tensor cores for fp16 and bf16, with tiles that arrive in shared memory while earlier ones are
used. A unit vector is split into three parts of the hidden states' type, so that nothing of it is rounded away; a mask is 0 or
1 anyway.

The work is split among programs until a large GPU is full: tokens of a layer while it is pooled, layers while they are
compared. Parts are added in a fixed order. Bytes: N (P + Q) D itemsize + B R Q + 4 B R P, plus the small unit vectors. The N
layers are reached through a table of pointers in device memory: they are never stacked, and each may be a strided slice of a
longer sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from focusdpo_kernels import reference as spec
from focusdpo_kernels.backend import device_guard
from focusdpo_kernels.launch import POINTERS, Launch, Registers, ceil_div, next_power_of_2
from focusdpo_kernels.layers import REFERENCE, SHIPPED, TARGET, hidden_constants, is_vectorizable, pointer_table, table_rows

FILL = 512  # programs that fill a large GPU: about four for each multiprocessor
MIN_SPAN, MAX_SPAN = 128, 2048  # reference tokens of a program: fewer are not worth a split, more leave a long tail
SCALE = 256.0  # of unit vectors, so that their smallest parts stay normal in fp16


@triton.jit
def pool_tokens(
    reference,  # pointer of the sample's first token
    stride_q,
    width,
    mask,  # pointer of the sample's [R, Q] uint8
    stride_mr,
    stride_mq,
    first,
    last,
    offs_d,
    D,
    R: tl.constexpr,
    R_PAD: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Sums over the tokens from first to last: [R_PAD, BLOCK_D] of their elements, [R_PAD] of their number."""
    offs_r = tl.arange(0, R_PAD)
    mask_r = offs_r < R
    mask_d = offs_d < D
    # 64-bit before the multiplication: a slice of a long batch passes 2^31 elements.
    mask_rows = mask + offs_r.to(tl.int64)[:, None] * stride_mr
    total = tl.zeros([R_PAD, offs_d.shape[0]], tl.float32)
    count = tl.zeros([R_PAD, BLOCK_Q], tl.float32)
    for q in range(first, last, BLOCK_Q):
        offs_q = q + tl.arange(0, BLOCK_Q)
        mask_q = offs_q < last
        offsets = offs_q.to(tl.int64)[:, None] * stride_q + offs_d[None, :] * width
        h = tl.load(reference + offsets, mask=mask_q[:, None] & mask_d[None, :], other=0.0)  # [BLOCK_Q, BLOCK_D]
        inside = tl.load(mask_rows + offs_q.to(tl.int64)[None, :] * stride_mq, mask=mask_r[:, None] & mask_q[None, :], other=0)
        if UPCAST:
            h = h.to(tl.float32)
        m = (inside != 0).to(h.dtype)  # [R_PAD, BLOCK_Q]
        total = tl.dot(m, h, total, input_precision="ieee")
        count += m.to(tl.float32)
    return total, tl.sum(count, axis=1)


@triton.jit(do_not_specialize=["N", "Q", "SPLITS", "SPAN"])
def _pool_kernel(
    table_ptr,  # [N, COLUMNS] int64
    mask_ptr,  # [B, R, Q] uint8
    sum_ptr,  # [B, N, SPLITS, R, D] fp32
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
    CONTIGUOUS: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(1) // SPLITS
    split = tl.program_id(1) % SPLITS
    b = tl.program_id(0).to(tl.int64)
    reference, stride_q, width = table_rows(table_ptr, n, b, REFERENCE, DTYPE, CONTIGUOUS)
    offs_d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_r = tl.arange(0, R_PAD)
    mask_r = offs_r < R
    mask = mask_ptr + b * stride_mb
    first = split * SPAN
    last = tl.minimum(first + SPAN, Q)
    total, count = pool_tokens(
        reference,
        stride_q,
        width,
        mask,
        stride_mr,
        stride_mq,
        first,
        last,
        offs_d,
        D,
        R=R,
        R_PAD=R_PAD,
        UPCAST=UPCAST,
        BLOCK_Q=BLOCK_Q,
    )
    out = sum_ptr + (((b * N + n) * SPLITS + split) * R + offs_r[:, None]) * D + offs_d[None, :]
    tl.store(out, total, mask=mask_r[:, None] & (offs_d < D)[None, :])
    if n == 0 and tl.program_id(2) == 0:
        tl.store(count_ptr + (b * SPLITS + split) * R + offs_r, count, mask=mask_r)


@triton.jit
def _mean(sums, offs_d, D, SPLITS, stride_split, count, BLOCK_D: tl.constexpr):
    """A block of a subject's mean token: its splits, added in order."""
    mask_d = offs_d < D
    total = tl.zeros([BLOCK_D], tl.float32)
    for split in range(SPLITS):
        total += tl.load(sums + split * stride_split + offs_d, mask=mask_d, other=0.0)
    return tl.div_rn(total, tl.maximum(count, 1.0))


@triton.jit(do_not_specialize=["N", "SPLITS"])
def _unit_kernel(
    sum_ptr,  # [B, N, SPLITS, R, D] fp32
    part_count_ptr,  # [B, SPLITS, R] fp32
    unit_ptr,  # [B, N, PARTS, R, D] in the hidden states' type
    count_ptr,  # [B, R] fp32
    N,
    D,
    SPLITS,
    R: tl.constexpr,
    PARTS: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1)
    r = tl.program_id(2)
    count = 0.0
    for split in range(SPLITS):
        count += tl.load(part_count_ptr + (b * SPLITS + split) * R + r)
    sums = sum_ptr + ((b * N + n) * SPLITS * R + r) * D
    stride_split = tl.cast(R, tl.int64) * D
    square = tl.zeros([BLOCK_D], tl.float32)
    for d in range(0, D, BLOCK_D):
        c = _mean(sums, d + tl.arange(0, BLOCK_D), D, SPLITS, stride_split, count, BLOCK_D)
        square += c * c
    norm = tl.maximum(tl.sqrt_rn(tl.sum(square, axis=0)), EPS)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        c = _mean(sums, offs_d, D, SPLITS, stride_split, count, BLOCK_D)
        rest = SCALE * tl.div_rn(c, norm)
        for i in tl.static_range(PARTS):
            part = rest.to(unit_ptr.dtype.element_ty)
            tl.store(unit_ptr + (((b * N + n) * PARTS + i) * R + r) * D + offs_d, part, mask=offs_d < D)
            rest -= part.to(tl.float32)
    if n == 0:
        tl.store(count_ptr + b * R + r, count)


@triton.jit(do_not_specialize=["N", "P", "LAYERS"])
def _compare_kernel(
    table_ptr,  # [N, COLUMNS] int64
    unit_ptr,  # [B, N, PARTS, R, D] in the hidden states' type
    out_ptr,  # [B, SPLITS, R, P] fp32
    N,
    P,
    D,
    LAYERS,  # of a split
    R: tl.constexpr,
    R_PAD: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_PAD: tl.constexpr,
    DTYPE: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    UPCAST: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    offs_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < P
    split = tl.program_id(2)
    # A column for each part of each subject's unit vector.
    part = tl.arange(0, PARTS_PAD * R_PAD) // R_PAD
    subject = tl.arange(0, PARTS_PAD * R_PAD) % R_PAD
    mask_c = (part < PARTS) & (subject < R)
    columns = (part * R + subject).to(tl.int64) * D
    total = tl.zeros([BLOCK_P, R_PAD], tl.float32)
    for n in range(split * LAYERS, tl.minimum((split + 1) * LAYERS, N)):
        target, stride_p, width = table_rows(table_ptr, n, b, TARGET, DTYPE, CONTIGUOUS)
        rows = target + offs_p.to(tl.int64)[:, None] * stride_p
        unit = unit_ptr + (b * N + n) * PARTS * R * D + columns[None, :]
        dot = tl.zeros([BLOCK_P, PARTS_PAD * R_PAD], tl.float32)
        square = tl.zeros([BLOCK_P], tl.float32)
        for d in range(0, D, BLOCK_D):
            offs_d = d + tl.arange(0, BLOCK_D)
            mask_d = offs_d < D
            h = tl.load(rows + offs_d[None, :] * width, mask=mask_p[:, None] & mask_d[None, :], other=0.0)
            u = tl.load(unit + offs_d[:, None], mask=mask_d[:, None] & mask_c[None, :], other=0.0)
            x = h.to(tl.float32)  # [BLOCK_P, BLOCK_D]
            if UPCAST:
                h = x
                u = u.to(tl.float32)
            dot = tl.dot(h, u, dot, input_precision="ieee")
            square += tl.sum(x * x, axis=1)
        scale = tl.div_rn(1.0, SCALE * tl.maximum(tl.sqrt_rn(square), EPS))
        total += tl.sum(tl.reshape(dot, [BLOCK_P, PARTS_PAD, R_PAD]), axis=1) * scale[:, None]
    offs_r = tl.arange(0, R_PAD)
    mask_out = mask_p[:, None] & (offs_r < R)[None, :]
    out = out_ptr + ((b * tl.num_programs(2) + split) * R + offs_r[None, :]) * P + offs_p[:, None]
    tl.store(out, total, mask=mask_out)


@triton.jit(do_not_specialize=["N", "P", "SPLITS"])
def _average_kernel(
    part_ptr,  # [B, SPLITS, R, P] fp32
    count_ptr,  # [B, R] fp32
    out_ptr,  # [B, R, P] fp32
    N,
    P,
    SPLITS,
    R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    r = tl.program_id(1)
    offs_p = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < P
    total = tl.zeros([BLOCK_P], tl.float32)
    for split in range(SPLITS):
        total += tl.load(part_ptr + ((b * SPLITS + split) * R + r) * P + offs_p, mask=mask_p, other=0.0)
    present = tl.load(count_ptr + b * R + r) > 0
    mean = tl.div_rn(total, tl.cast(N, tl.float32))
    tl.store(out_ptr + (b * R + r) * P + offs_p, tl.where(present, mean, float("-inf")), mask=mask_p)


class _Launches(NamedTuple):  # by name, as benchmarks/test_variants.py changes one of them
    pool: Launch
    unit: Launch
    compare: Launch
    average: Launch


@functools.cache
def _launches(dtype: torch.dtype, subjects: int, contiguous: bool) -> _Launches:
    half = dtype != torch.float32
    parts = 3 if half else 1  # 3 x 8 bits of bf16 are all 24 of fp32
    parts_pad = next_power_of_2(parts)
    hidden = hidden_constants(dtype, contiguous)
    scaled = {"EPS": spec.EPS, "SCALE": SCALE}
    floats = dict.fromkeys(("sum_ptr", "part_count_ptr", "count_ptr", "part_ptr", "out_ptr"), "*fp32")
    types = {**floats, "table_ptr": "*i64", "unit_ptr": POINTERS[dtype], "mask_ptr": "*u8"}
    # Rows of 128 bytes and more, four tiles deep: some 100 KiB on their way to a multiprocessor (docs/performance.md).
    # Without unit stride every element has a 64-bit address of its own, and fp32 runs on ordinary cores: fewer rows, or
    # registers spill.
    large = half and contiguous
    rows = 64 if large else 32 if half or contiguous else 16
    pool = Launch(
        _pool_kernel,
        {
            "R": subjects,
            "R_PAD": max(next_power_of_2(subjects), 16),
            **hidden,
            "BLOCK_Q": min(rows, 32),
            "BLOCK_D": 128 if large else 32,
        },
        threads=128,
        registers=Registers(112, 112, 112, 96),
        num_stages=4 if large else 3,
        types=types,
        aligned=("D",),
        ones=("stride_mq",),
    )
    unit = Launch(
        _unit_kernel,
        {"R": subjects, "PARTS": parts, **scaled, "BLOCK_D": 1024},
        threads=128,
        registers=Registers(96, 96, 96, 88),
        types=types,
        aligned=("D",),
    )
    compare = Launch(
        _compare_kernel,
        {
            "R": subjects,
            "R_PAD": max(next_power_of_2(subjects), 16 // parts_pad),
            "PARTS": parts,
            "PARTS_PAD": parts_pad,
            **hidden,
            **scaled,
            "BLOCK_P": rows,
            "BLOCK_D": 64 if large else 32,
        },
        threads=128,
        registers=Registers(208, 160, 152, 208),
        num_stages=4 if large else 3,
        types=types,
        aligned=("D",),
    )
    average = Launch(
        _average_kernel,
        {"R": subjects, "BLOCK_P": 256},
        threads=128,
        registers=Registers(32, 32, 32, 32),
        types=types,
    )
    return _Launches(pool, unit, compare, average)


def token_splits(layers: int, blocks: int, tokens: int) -> int:
    """Programs that share a layer's reference tokens. It looks at no batch size: a sample's result depends on no other."""
    wanted = max(FILL // (layers * blocks), ceil_div(tokens, MAX_SPAN))
    return max(min(wanted, ceil_div(tokens, MIN_SPAN)), 1)


def launch_pooled(target: Sequence[Tensor], reference: Sequence[Tensor], mask: Tensor, out: Tensor) -> None:
    """Writes S into `out` [B, R, P]. `mask` is uint8."""
    batch, subjects, patches = out.shape
    tokens, width = reference[0].shape[1:]
    layers, device, dtype = len(target), out.device, target[0].dtype
    pool, unit, compare, average = _launches(dtype, subjects, is_vectorizable([*target, *reference]))
    table = pointer_table(target, reference)

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    # At least one block along D: with D = 0 the counts are still needed.
    blocks = max(ceil_div(width, pool.constants["BLOCK_D"]), 1)
    splits = token_splits(layers, blocks, tokens)
    span = ceil_div(ceil_div(tokens, splits), pool.constants["BLOCK_Q"]) * pool.constants["BLOCK_Q"]
    sums, part_count = floats(batch, layers, splits, subjects, width), floats(batch, splits, subjects)
    units = torch.empty((batch, layers, unit.constants["PARTS"], subjects, width), dtype=dtype, device=device)
    count = floats(batch, subjects)
    tiles = ceil_div(patches, compare.constants["BLOCK_P"])
    layers_each = ceil_div(layers, max(min(FILL // tiles, layers), 1))
    layer_splits = ceil_div(layers, layers_each)
    parts = floats(batch, layer_splits, subjects, patches)
    with device_guard(out):
        sizes = (layers, tokens, width, splits, span)
        pool((batch, layers * splits, blocks), table, mask, sums, part_count, *sizes, *mask.stride())
        unit((batch, layers, subjects), sums, part_count, units, count, layers, width, splits)
        compare((batch, tiles, layer_splits), table, units, parts, layers, patches, width, layers_each)
        grid = (batch, subjects, ceil_div(patches, average.constants["BLOCK_P"]))
        average(grid, parts, count, out, layers, patches, layer_splits)


def launches() -> Iterator[Launch]:
    """Every shipped launch configuration, for ahead-of-time compilation."""
    for variant in SHIPPED:
        yield from _launches(*variant)
