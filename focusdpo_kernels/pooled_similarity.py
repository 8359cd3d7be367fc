"""Pooled cross-layer similarity, `pooling="reference"` (docs/method.md, E3 and E4).

    c[r, n] = sum_q m[r, q] h_ref[n, q] / sum_q m[r, q],    u[r, n] = c / |c|
    S[r, p] = sum_n w[n] <u[r, n], h_tgt[n, p]> / |h_tgt[n, p]| / sum_n w[n]

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

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from focusdpo_kernels import reference as spec
from focusdpo_kernels.backend import INTERPRETED, device_guard
from focusdpo_kernels.launch import POINTERS, TRITON_DTYPES, Launch, Registers, next_power_of_2
from focusdpo_kernels.layers import COLUMNS, REFERENCE, TARGET, TYPES, LayerArguments, is_vectorizable, layer_rows, layer_weight

FILL = 512  # programs that fill a large GPU: about four for each multiprocessor
MIN_SPAN, MAX_SPAN = 128, 2048  # reference tokens of a program: fewer are not worth a split, more leave a long tail
SCALE = 256.0  # of unit vectors, so that their smallest parts stay normal in fp16


@triton.jit(do_not_specialize=["N", "Q", "SPLITS", "SPAN"])
def _pool_kernel(
    table_ptr,
    direct_ptr,
    stride_b,
    stride_t,
    stride_d,
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
    TABLE: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UPCAST: tl.constexpr,
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
    mask_r = offs_r < R
    # 64-bit before the multiplication: a slice of a long batch passes 2^31 elements.
    mask_rows = mask_ptr + b * stride_mb + offs_r.to(tl.int64)[:, None] * stride_mr
    total = tl.zeros([R_PAD, BLOCK_D], tl.float32)
    count = tl.zeros([R_PAD, BLOCK_Q], tl.float32)
    for q in range(split * SPAN, tl.minimum((split + 1) * SPAN, Q), BLOCK_Q):
        offs_q = q + tl.arange(0, BLOCK_Q)
        mask_q = offs_q < Q
        offsets = offs_q.to(tl.int64)[:, None] * stride_q + offs_d[None, :] * width
        h = tl.load(reference + offsets, mask=mask_q[:, None] & mask_d[None, :], other=0.0)  # [BLOCK_Q, BLOCK_D]
        inside = tl.load(mask_rows + offs_q.to(tl.int64)[None, :] * stride_mq, mask=mask_r[:, None] & mask_q[None, :], other=0)
        if UPCAST:
            h = h.to(tl.float32)
        m = (inside != 0).to(h.dtype)  # [R_PAD, BLOCK_Q]
        total = tl.dot(m, h, total, input_precision="ieee")
        count += m.to(tl.float32)
    out = sum_ptr + (((b * N + n) * SPLITS + split) * R + offs_r[:, None]) * D + offs_d[None, :]
    tl.store(out, total, mask=mask_r[:, None] & mask_d[None, :])
    if n == 0 and tl.program_id(2) == 0:
        tl.store(count_ptr + (b * SPLITS + split) * R + offs_r, tl.sum(count, axis=1), mask=mask_r)


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
    table_ptr,
    direct_ptr,
    stride_b,
    stride_t,
    stride_d,
    weight,
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
    TABLE: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
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
        target, stride_p, width = layer_rows(
            table_ptr, direct_ptr, stride_b, stride_t, stride_d, n, b, 0, DTYPE, TABLE, CONTIGUOUS, COLUMNS
        )
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
        scale = tl.div_rn(layer_weight(table_ptr, weight, n, TABLE, COLUMNS), SCALE * tl.maximum(tl.sqrt_rn(square), EPS))
        total += tl.sum(tl.reshape(dot, [BLOCK_P, PARTS_PAD, R_PAD]), axis=1) * scale[:, None]
    offs_r = tl.arange(0, R_PAD)
    mask_out = mask_p[:, None] & (offs_r < R)[None, :]
    out = out_ptr + ((b * tl.num_programs(2) + split) * R + offs_r[None, :]) * P + offs_p[:, None]
    if ACCUMULATE:
        total += tl.load(out, mask=mask_out, other=0.0)
    tl.store(out, total, mask=mask_out)


@triton.jit(do_not_specialize=["P", "SPLITS"])
def _average_kernel(
    part_ptr,  # [B, SPLITS, R, P] fp32
    count_ptr,  # [B, R] fp32
    out_ptr,  # [B, R, P] fp32
    P,
    SPLITS,
    total_weight,
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
    tl.store(out_ptr + (b * R + r) * P + offs_p, tl.where(present, tl.div_rn(total, total_weight), float("-inf")), mask=mask_p)


class _Launches(NamedTuple):
    pool: Launch
    unit: Launch
    compare: Launch
    average: Launch


def _launches(dtype: torch.dtype, subjects: int, contiguous: bool, table: bool, accumulate: bool) -> _Launches:
    half = dtype != torch.float32
    parts = 3 if half else 1  # 3 x 8 bits of bf16 are all 24 of fp32
    parts_pad = next_power_of_2(parts)
    layers = {"DTYPE": TRITON_DTYPES[dtype], "TABLE": table, "CONTIGUOUS": contiguous, "COLUMNS": COLUMNS}
    # The interpreter's dot takes the bits of bf16 for integers; products of bf16 are exact in fp32 as well.
    upcast = {"UPCAST": INTERPRETED and dtype == torch.bfloat16}
    scaled = {"EPS": spec.EPS, "SCALE": SCALE}
    floats = dict.fromkeys(("sum_ptr", "part_count_ptr", "count_ptr", "part_ptr", "out_ptr", "total_weight"), "*fp32")
    types = {
        **TYPES,
        **floats,
        "total_weight": "fp32",
        "direct_ptr": POINTERS[dtype],
        "unit_ptr": POINTERS[dtype],
        "mask_ptr": "*u8",
    }
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
            **layers,
            **upcast,
            "BLOCK_Q": min(rows, 32),
            "BLOCK_D": 128 if large else 32,
        },
        threads=128,
        registers=Registers(112, 112, 112, 96),
        num_stages=4 if large else 3,
        types=types,
        aligned=("D", "stride_b", "stride_t"),
        ones=("stride_d", "stride_mq") if contiguous else ("stride_mq",),
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
            **layers,
            "ACCUMULATE": accumulate,
            **upcast,
            **scaled,
            "BLOCK_P": rows,
            "BLOCK_D": 64 if large else 32,
        },
        threads=128,
        registers=Registers(208, 160, 152, 208),
        num_stages=4 if large else 3,
        types=types,
        aligned=("D", "stride_b", "stride_t"),
        ones=("stride_d",) if contiguous else (),
    )
    average = Launch(
        _average_kernel,
        {"R": subjects, "BLOCK_P": 256},
        threads=128,
        registers=Registers(32, 32, 32, 32),
        types=types,
    )
    return _Launches(pool, unit, compare, average)


def _token_splits(layers: int, blocks: int, tokens: int) -> int:
    """Programs that share a layer's reference tokens. It looks at no batch size: a sample's result depends on no other."""
    wanted = max(FILL // (layers * blocks), triton.cdiv(tokens, MAX_SPAN))
    return max(min(wanted, triton.cdiv(tokens, MIN_SPAN)), 1)


def launch_pooled(
    target: Sequence[Tensor], reference: Sequence[Tensor], mask: Tensor, weights: Sequence[float], out: Tensor, accumulate: bool
) -> None:
    """Writes S into `out` [B, R, P], or adds weighted cosines to it where `accumulate`. `mask` is uint8."""
    batch, subjects, patches = out.shape
    tokens, width = reference[0].shape[1:]
    layers, device, dtype = len(target), out.device, target[0].dtype
    contiguous = is_vectorizable([*target, *reference])
    arguments = LayerArguments(target, reference, weights)
    pool, unit, compare, average = _launches(dtype, subjects, contiguous, not arguments.single, accumulate)

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    # At least one block along D: with D = 0 the counts are still needed.
    blocks = max(triton.cdiv(width, pool.constants["BLOCK_D"]), 1)
    splits = _token_splits(layers, blocks, tokens)
    span = triton.cdiv(triton.cdiv(tokens, splits), pool.constants["BLOCK_Q"]) * pool.constants["BLOCK_Q"]
    sums, part_count = floats(batch, layers, splits, subjects, width), floats(batch, splits, subjects)
    units = torch.empty((batch, layers, unit.constants["PARTS"], subjects, width), dtype=dtype, device=device)
    count = floats(batch, subjects)
    tiles = triton.cdiv(patches, compare.constants["BLOCK_P"])
    layers_each = triton.cdiv(layers, max(min(FILL // tiles, layers), 1))
    layer_splits = triton.cdiv(layers, layers_each)
    parts = out if accumulate else floats(batch, layer_splits, subjects, patches)
    with device_guard(out):
        sizes = (layers, tokens, width, splits, span, *mask.stride())
        pool((batch, layers * splits, blocks), *arguments.side(REFERENCE), mask, sums, part_count, *sizes)
        unit((batch, layers, subjects), sums, part_count, units, count, layers, width, splits)
        sides = (*arguments.side(TARGET), arguments.weight)
        compare((batch, tiles, layer_splits), *sides, units, parts, layers, patches, width, layers_each)
        if not accumulate:
            grid = (batch, subjects, triton.cdiv(patches, average.constants["BLOCK_P"]))
            average(grid, parts, count, out, patches, layer_splits, float(sum(weights)))


def launches() -> Iterator[Launch]:
    """Every shipped launch configuration, for ahead-of-time compilation."""
    for dtype in (torch.bfloat16, torch.float32):
        for subjects in (1, 2, 4, 6):
            yield from _launches(dtype, subjects, contiguous=True, table=True, accumulate=False)
            yield from _launches(dtype, subjects, contiguous=True, table=False, accumulate=True)
        yield from _launches(dtype, 2, contiguous=False, table=True, accumulate=False)
    yield from _launches(torch.float16, 2, contiguous=True, table=True, accumulate=False)
