"""Pooled similarity layer by layer, in two launches each (docs/method.md, E3 and E4).

    c[r] = sum_q m[r, q] h_ref[q] / sum_q m[r, q]
    S[r, p] = sum_n <c[r, n], h_tgt[n, p]> / |c[r, n]| / |h_tgt[n, p]| / N

One layer has few tokens for a large GPU, so both launches split the width as well. `_pool_layer_kernel` sums the reference
tokens into their subjects. A program of `_compare_layer_kernel` makes the mean tokens of its slice of the width from those
sums, once, and streams target tokens past them. What its slice adds to dots and squares goes to memory, because a cosine needs
the sums over all slices. The next launch forms it: `_pool_layer_kernel` of the next layer, in programs of its own, or
`_average_layers_kernel`, which also averages. All sums have a fixed order, and splits depend on sizes of a sample only.

Bytes of a layer: B (P + Q) D itemsize + B R Q, and what stays in cache: B (R + 1) P floats for each slice of D (128 wide, or 32
in fp32 and of strided rows), written and read.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from focusdpo_kernels import reference as spec
from focusdpo_kernels.backend import device_guard
from focusdpo_kernels.launch import POINTERS, Launch, Registers, Relaunch, ceil_div, next_power_of_2
from focusdpo_kernels.layers import SHIPPED, direct_rows, hidden_constants, is_vectorizable
from focusdpo_kernels.pooled_similarity import FILL, pool_tokens, token_splits

BLOCK_P = 64  # target tokens of a program that forms cosines
MIN_ROWS = 128  # target tokens of a program: fewer are not worth making the mean tokens


class Strided(NamedTuple):
    """A pointer to a tensor of three axes, and its strides."""

    ptr: Any
    stride_0: Any
    stride_1: Any
    stride_2: Any


class Sums(NamedTuple):
    """Pointers to the sums [B, SPLITS, R, D] of each split's reference tokens, and their number [B, SPLITS, R], fp32."""

    total: Any
    counts: Any


class Parts(NamedTuple):
    """Pointers to what each slice of D adds, fp32: dots with the mean tokens and below them the target tokens' squares
    [B, SLICES, R + 1, P], and the mean tokens' squares [B, SLICES, R].
    """

    dots: Any
    squares: Any


@triton.jit
def _cosines(
    parts,  # Parts
    b,
    offs_p,
    P,
    SLICES,
    R: tl.constexpr,
    ROWS: tl.constexpr,  # at least R + 1
    EPS: tl.constexpr,
):
    """[ROWS, BLOCK_P], of which the first R rows are a layer's cosines."""
    row = tl.arange(0, ROWS)
    mask_p = offs_p < P
    sums = tl.zeros([ROWS, offs_p.shape[0]], tl.float32)
    square = tl.zeros([ROWS], tl.float32)
    for s in range(SLICES):
        part = parts.dots + ((b * SLICES + s) * (R + 1) + row[:, None]) * P + offs_p[None, :]
        sums += tl.load(part, mask=(row <= R)[:, None] & mask_p[None, :], other=0.0)
        square += tl.load(parts.squares + (b * SLICES + s) * R + row, mask=row < R, other=0.0)
    square_p = tl.sum(tl.where((row == R)[:, None], sums, 0.0), axis=0)
    cosine = tl.div_rn(sums, tl.maximum(tl.sqrt_rn(square), EPS)[:, None])
    return tl.div_rn(cosine, tl.maximum(tl.sqrt_rn(square_p), EPS)[None, :])


@triton.jit(do_not_specialize=["Q", "P", "SPLITS", "SPAN", "SLICES", "TILES", "layers"])
def _pool_layer_kernel(
    reference,  # Strided [B, Q, D]
    mask,  # Strided [B, R, Q] uint8
    sums,  # Sums
    parts,  # Parts of the previous layer
    total_ptr,  # [B, R, P] fp32: the layers before the previous one
    layers,  # before this one
    SLICES,  # of the previous layer
    TILES,  # programs for it, none at the first layer
    Q,
    P,
    D,
    SPLITS,
    SPAN,  # tokens of a split, a multiple of BLOCK_Q
    R: tl.constexpr,
    R_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    DTYPE: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    UPCAST: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    if program < TILES:
        offs_p = program * BLOCK_P + tl.arange(0, BLOCK_P)
        cosine = _cosines(parts, b, offs_p, P, SLICES, R, ROWS, EPS)
        row = tl.arange(0, ROWS)
        mask_p = (row < R)[:, None] & (offs_p < P)[None, :]
        so_far = total_ptr + (b * R + row[:, None]) * P + offs_p[None, :]
        cosine += tl.load(so_far, mask=mask_p & (layers > 1), other=0.0)
        tl.store(so_far, cosine, mask=mask_p)
    else:
        split = (program - TILES) % SPLITS
        block = (program - TILES) // SPLITS
        rows, stride_q, width = direct_rows(*reference, b, CONTIGUOUS)
        offs_d = block * BLOCK_D + tl.arange(0, BLOCK_D)
        offs_r = tl.arange(0, R_PAD)
        first = split * SPAN
        last = tl.minimum(first + SPAN, Q)
        total, count = pool_tokens(
            rows,
            stride_q,
            width,
            mask.ptr + b * mask.stride_0,
            mask.stride_1,
            mask.stride_2,
            first,
            last,
            offs_d,
            D,
            R=R,
            R_PAD=R_PAD,
            UPCAST=UPCAST,
            BLOCK_Q=BLOCK_Q,
        )
        out = sums.total + ((b * SPLITS + split) * R + offs_r[:, None]) * D + offs_d[None, :]
        tl.store(out, total, mask=(offs_r < R)[:, None] & (offs_d < D)[None, :])
        if block == 0:
            tl.store(sums.counts + (b * SPLITS + split) * R + offs_r, count, mask=offs_r < R)


@triton.jit(do_not_specialize=["P", "SPLITS", "SPAN"])
def _compare_layer_kernel(
    target,  # Strided [B, P, D]
    sums,  # Sums
    parts,  # Parts
    P,
    D,
    SPLITS,
    SPAN,  # target tokens of a program, a multiple of BLOCK_P
    R: tl.constexpr,
    R_PAD: tl.constexpr,
    PARTS: tl.constexpr,  # 4 or 1
    DTYPE: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    part = b * tl.num_programs(1) + tl.program_id(1)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    offs_r = tl.arange(0, R_PAD)
    mask_r = offs_r < R
    c = tl.zeros([BLOCK_D, R_PAD], tl.float32)
    count = tl.zeros([R_PAD], tl.float32)
    for split in range(SPLITS):
        total = sums.total + ((b * SPLITS + split) * R + offs_r[None, :]) * D + offs_d[:, None]
        c += tl.load(total, mask=mask_d[:, None] & mask_r[None, :], other=0.0)
        count += tl.load(sums.counts + (b * SPLITS + split) * R + offs_r, mask=mask_r, other=0.0)
    c = tl.div_rn(c, tl.maximum(count, 1.0)[None, :])
    if tl.program_id(2) == 0:
        tl.store(parts.squares + part * R + offs_r, tl.sum(c * c, axis=0), mask=mask_r)
    if PARTS == 1:
        columns = c
    else:
        # A power of two that brings the largest element near 256, so that the smallest parts stay normal in fp16.
        exponent = (tl.max(tl.abs(c), axis=0).to(tl.int32, bitcast=True) >> 23) & 255
        exponent = tl.minimum(tl.maximum(exponent, 16), 254)
        scale = ((262 - exponent) << 23).to(tl.float32, bitcast=True)
        unscale = ((exponent - 8) << 23).to(tl.float32, bitcast=True)
        rest = c * scale[None, :]
        first = rest.to(DTYPE).to(tl.float32)
        second = (rest - first).to(DTYPE).to(tl.float32)
        third = rest - first - second
        columns = tl.join(tl.join(first, second), tl.join(third, tl.zeros_like(third)))
        # Rounded last: Triton 3.6 and 3.7 cannot compile a product with a reshaped operand in every layout.
        columns = tl.reshape(columns, [BLOCK_D, R_PAD * PARTS]).to(DTYPE)
    if UPCAST:
        columns = columns.to(tl.float32)
    rows, stride_p, width = direct_rows(*target, b, CONTIGUOUS)
    out = parts.dots + part * (R + 1) * P
    begin = tl.program_id(2) * SPAN
    for p in range(begin, tl.minimum(begin + SPAN, P), BLOCK_P):
        offs_p = p + tl.arange(0, BLOCK_P)
        mask_p = offs_p < P
        offsets = offs_p.to(tl.int64)[:, None] * stride_p + offs_d[None, :] * width
        h = tl.load(rows + offsets, mask=mask_p[:, None] & mask_d[None, :], other=0.0)
        x = h.to(tl.float32)
        if UPCAST:
            h = x
        dot = tl.dot(h, columns, input_precision="ieee")
        if PARTS > 1:
            dot = tl.sum(tl.reshape(dot, [BLOCK_P, R_PAD, PARTS]), axis=2) * unscale[None, :]
        tl.store(out + offs_r[None, :] * P + offs_p[:, None], dot, mask=mask_p[:, None] & mask_r[None, :])
        tl.store(out + R * P + offs_p, tl.sum(x * x, axis=1), mask=mask_p)


@triton.jit(do_not_specialize=["P", "SPLITS", "SLICES", "layers"])
def _average_layers_kernel(
    parts,  # Parts of the last layer
    count_ptr,  # as in Sums
    total_ptr,
    out_ptr,  # [B, R, P] fp32
    layers,
    P,
    SPLITS,
    SLICES,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, ROWS)
    offs_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    total = _cosines(parts, b, offs_p, P, SLICES, R, ROWS, EPS)
    mask_out = (row < R)[:, None] & (offs_p < P)[None, :]
    offsets = (b * R + row[:, None]) * P + offs_p[None, :]
    total += tl.load(total_ptr + offsets, mask=mask_out & (layers > 1), other=0.0)
    count = tl.zeros([ROWS], tl.float32)
    for split in range(SPLITS):
        count += tl.load(count_ptr + (b * SPLITS + split) * R + row, mask=row < R, other=0.0)
    mean = tl.div_rn(total, tl.cast(layers, tl.float32))
    tl.store(out_ptr + offsets, tl.where((count > 0)[:, None], mean, float("-inf")), mask=mask_out)


@functools.cache
def _launches(dtype: torch.dtype, subjects: int, contiguous: bool) -> tuple[Launch, Launch, Launch]:
    """Launches of the sums, the comparison and the average."""
    half = dtype != torch.float32
    large = half and contiguous
    parts = 4 if half else 1
    hidden = hidden_constants(dtype, contiguous)
    rows = {"R": subjects, "ROWS": next_power_of_2(subjects + 1)}
    fp32, strides = "*fp32", ("i32",) * 3
    buffers: dict[str, Any] = {"sums": Sums(fp32, fp32), "parts": Parts(fp32, fp32), "total_ptr": fp32}
    pool = Launch(
        _pool_layer_kernel,
        {
            **rows,
            "R_PAD": max(next_power_of_2(subjects), 16),
            **hidden,
            "EPS": spec.EPS,
            "BLOCK_Q": 32 if half or contiguous else 16,
            "BLOCK_D": 128 if large else 32,
            "BLOCK_P": BLOCK_P,
        },
        threads=128,
        registers=Registers(104, 104, 104, 96),
        num_stages=4 if large else 3,
        types={**buffers, "reference": Strided(POINTERS[dtype], *strides), "mask": Strided("*u8", *strides)},
        aligned=("D", "reference.stride_0", "reference.stride_1"),
        ones=("reference.stride_2", "mask.stride_2") if contiguous else ("mask.stride_2",),
    )
    compare = Launch(
        _compare_layer_kernel,
        {
            "R": subjects,
            "R_PAD": max(next_power_of_2(subjects), 16 // parts),
            "PARTS": parts,
            **hidden,
            "BLOCK_P": 64 if large else 32 if half or contiguous else 16,
            "BLOCK_D": 128 if large else 32,
        },
        threads=128,
        registers=Registers(96, 96, 112, 320),
        num_stages=3,
        types={**buffers, "target": Strided(POINTERS[dtype], *strides)},
        aligned=("D", "target.stride_0", "target.stride_1"),
        ones=("target.stride_2",) if contiguous else (),
    )
    average = Launch(
        _average_layers_kernel,
        {**rows, "EPS": spec.EPS, "BLOCK_P": BLOCK_P},
        threads=128,
        registers=Registers(64, 64, 72, 32),
        types={**buffers, "count_ptr": fp32, "out_ptr": fp32},
    )
    return pool, compare, average


class _Plan:
    """How layers of one width, type and kind of strides are launched, and their buffers."""

    def __init__(self, target: Tensor, reference: Tensor, subjects: int, contiguous: bool) -> None:
        batch, patches, width = target.shape
        tokens = reference.shape[1]
        pool, compare, self.average = _launches(target.dtype, subjects, contiguous)
        self.pool, self.compare = Relaunch(pool), Relaunch(compare)
        # At least one block along D: with D = 0 the counts are still needed.
        blocks = max(ceil_div(width, pool.constants["BLOCK_D"]), 1)
        self.splits = token_splits(1, blocks, tokens)
        span = _even(tokens, self.splits, pool.constants["BLOCK_Q"])
        self.pool_programs = blocks * self.splits
        self.pool_sizes = (tokens, patches, width, self.splits, span)
        self.slices = max(ceil_div(width, compare.constants["BLOCK_D"]), 1)
        rows = _even(patches, max(min(FILL // self.slices, ceil_div(patches, MIN_ROWS)), 1), compare.constants["BLOCK_P"])
        self.compare_grid = (batch, self.slices, ceil_div(patches, rows))
        self.compare_sizes = (patches, width, self.splits, rows)
        self.tiles = ceil_div(patches, BLOCK_P)

        def floats(*shape: int) -> Tensor:
            return torch.empty((batch, *shape), dtype=torch.float32, device=target.device)

        self.sums = Sums(floats(self.splits, subjects, width), floats(self.splits, subjects))
        self.parts = Parts(floats(self.slices, subjects + 1, patches), floats(self.slices, subjects))


def _even(count: int, splits: int, block: int) -> int:
    """Tokens of each of so many splits, in whole blocks."""
    return ceil_div(ceil_div(count, splits), block) * block


class StreamedSimilarity:
    """S of layers that come one by one, all with the same B, R, P and Q on one device.

    Scratch memory and launches are made once. Of a layer only its part of the sums stays.
    """

    def __init__(self, shape: tuple[int, int, int], device: torch.device) -> None:
        self.total = torch.empty(shape, dtype=torch.float32, device=device)  # [B, R, P]: all layers but the last
        self._plans: dict[tuple[bool, int, torch.dtype], _Plan] = {}
        self._last: _Plan | None = None
        self._layers = 0

    def add(self, target: Tensor, reference: Tensor, mask: Tensor) -> None:
        """Adds a layer: target [B, P, D], reference [B, Q, D], mask [B, R, Q] uint8."""
        if self.total.numel() == 0:
            return
        kind = (is_vectorizable((target, reference)), target.shape[2], target.dtype)
        plan = self._plans.get(kind)
        if plan is None:
            plan = self._plans[kind] = _Plan(target, reference, self.total.shape[1], contiguous=kind[0])
        last = self._last or plan
        tiles = last.tiles if self._layers else 0
        previous = (self._layers, last.slices, tiles)
        # All else that a kernel gets here is the same for all layers of a plan, or not specialised on.
        hidden, tokens, taken = (Strided(tensor, *tensor.stride()) for tensor in (target, reference, mask))
        key = (*hidden[1:], *tokens[1:], *taken[1:], *(tensor.data_ptr() % 16 == 0 for tensor in (target, reference, mask)))
        batch = target.shape[0]
        with device_guard(target):
            grid = (batch, tiles + plan.pool_programs, 1)
            plan.pool(key, grid, tokens, taken, plan.sums, last.parts, self.total, *previous, *plan.pool_sizes)
            plan.compare(key, plan.compare_grid, hidden, plan.sums, plan.parts, *plan.compare_sizes)
        self._last = plan
        self._layers += 1

    def average(self) -> Tensor:
        """S [B, R, P] of the layers so far; more may follow."""
        out = torch.empty_like(self.total)
        plan = self._last
        if plan is not None:
            batch, _, patches = out.shape
            sizes = (self._layers, patches, plan.splits, plan.slices)
            with device_guard(out):
                plan.average((batch, plan.tiles), plan.parts, plan.sums.counts, self.total, out, *sizes)
        return out


def launches() -> Iterator[Launch]:
    """Every shipped launch configuration, for ahead-of-time compilation."""
    for variant in SHIPPED:
        yield from _launches(*variant)
