"""Patch entropy (docs/method.md, E7), alone or with the top-K of rows beside it.

    q[b]  proportional to  mean_{x in patch} exp(-((x - mu[b]) / sigma)^2 / 2)     kde
    q[b]  =                share of the patch's pixels in bin b                     histogram
    H[p]  = -sum_b q[b] log q[b]                                                    nats

A program takes a few patches, chunk by chunk of BLOCK pixels, so any patch size works. Selection needs none of it: its
programs come first in the same launch. Bytes: B C H W itemsize in, 4 B P out;
`normalize` reads and writes the 4 B P once more in a second launch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from focusdpo_kernels import cpu_mask
from focusdpo_kernels import reference as spec
from focusdpo_kernels.backend import device_guard, resolve_backend
from focusdpo_kernels.checks import METHODS, check_estimator, check_images
from focusdpo_kernels.launch import POINTERS, Launch, Registers, ceil_div, next_power_of_2
from focusdpo_kernels.matching import (
    SCORES_ALIGNED,
    Selected,
    count_types,
    counts_arguments,
    row_arguments,
    row_constants,
    row_types,
    write_matches,
)

PATCHES = 4  # of a program, one for each of its warps: what begins and ends a patch is done once
THREADS = 128


class Images(NamedTuple):
    """Images [B, C, H, W] as a kernel takes them: pointer and strides, patches in a row, in an image, and in all."""

    ptr: Any
    stride_b: Any
    stride_c: Any
    stride_h: Any
    stride_w: Any
    columns: Any
    patches: Any
    total: Any


class Estimator(NamedTuple):
    """How H is estimated; see `patch_entropy`."""

    patch_size: int
    bins: int
    sigma: float
    method: str


@triton.jit(do_not_specialize=["ROWS", "R", "k_value", "PIXELS"])
def _entropy_kernel(
    images,
    out_ptr,  # [B, P] fp32
    scores,  # [B, R, P], or None: nothing to select
    k,  # [B, R], or None where it is a number
    selected,  # where M' goes, or None
    k_value,
    R,
    ROWS,  # B R programs select, before those of the patches
    PIXELS,  # PATCH * PATCH, not known to the compiler
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    BINS: tl.constexpr,
    BINS_PAD: tl.constexpr,
    SCALE: tl.constexpr,
    HISTOGRAM: tl.constexpr,
    PIXEL_SCALE: tl.constexpr,
    TOLERANCE: tl.constexpr,
    LUMA_R: tl.constexpr,
    LUMA_G: tl.constexpr,
    LUMA_B: tl.constexpr,
    PATCHES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ONE: tl.constexpr,
):
    program = tl.program_id(0) - ROWS
    if scores is not None:  # noqa: SIM102  which the compiler knows
        if program < 0:
            write_matches(scores, k, k_value, selected, R, images.patches, tl.program_id(0), BLOCK_P=BLOCK_P, ONE=ONE)
    if program >= 0:
        patches = program * PATCHES + tl.arange(0, PATCHES)
        p = patches % images.patches
        b = (patches // images.patches).to(tl.int64)
        row = (p // images.columns).to(tl.int64) * PATCH
        column = (p % images.columns).to(tl.int64) * PATCH
        corner = b * images.stride_b + row * images.stride_h + column * images.stride_w
        offs_bin = tl.arange(0, BINS_PAD)
        # Counts of pixels by bin are whole numbers; one more tells of pixels that are none.
        weight = tl.zeros([PATCHES, BINS_PAD], tl.int32 if HISTOGRAM else tl.float32)
        broken = tl.zeros([BLOCK, PATCHES], tl.int32)
        # A histogram's loop of known length would be unrolled until the registers are gone.
        for start in range(0, PIXELS if HISTOGRAM else PATCH * PATCH, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            valid = (offs < PATCH * PATCH)[:, None] & (patches < images.total)[None, :]
            offsets = (offs // PATCH).to(tl.int64) * images.stride_h + (offs % PATCH).to(tl.int64) * images.stride_w
            ptr = images.ptr + (offsets[:, None] + corner[None, :])
            gray = tl.load(ptr, mask=valid, other=0).to(tl.float32)
            if CHANNELS == 3:
                green = tl.load(ptr + images.stride_c, mask=valid, other=0).to(tl.float32)
                blue = tl.load(ptr + 2 * tl.cast(images.stride_c, tl.int64), mask=valid, other=0).to(tl.float32)
                gray = LUMA_R * gray + LUMA_G * green + LUMA_B * blue
            gray = gray * PIXEL_SCALE
            # A pixel that is NaN or far out of range must not end as a plausible number.
            in_range = (gray >= -TOLERANCE) & (gray <= 1 + TOLERANCE)
            if HISTOGRAM:
                broken |= (in_range == 0).to(tl.int32)
                level = tl.minimum(tl.maximum(tl.floor(tl.where(in_range, gray, 0.0) * BINS), 0.0), BINS - 1.0)
                level = tl.where(valid, level, -1.0)
                weight += tl.sum((level.to(tl.int32)[:, :, None] == offs_bin[None, None, :]).to(tl.int32), axis=0)
            else:
                # exp(-((gray - mu) / sigma)^2 / 2) as a power of two, its factor folded into both numbers.
                gray = tl.where(valid, tl.where(in_range, gray, float("nan")), float("inf"))  # exp2(-inf) = 0
                distance = gray[:, :, None] * SCALE - (offs_bin.to(tl.float32) * (SCALE / (BINS - 1)))[None, None, :]
                # "-distance" would be 0 - distance, one instruction more.
                weight += tl.sum(tl.exp2((distance * -1.0) * distance), axis=0)
        weight = tl.where((offs_bin < BINS)[None, :], weight, 0).to(tl.float32)
        total = tl.sum(weight, axis=1)
        q = weight / total[:, None]
        entropy = -tl.sum(tl.where(q > 0, q * tl.log(tl.where(q > 0, q, 1.0)), 0.0), axis=1)
        whole = total > 0
        if HISTOGRAM:
            whole = tl.max(broken, axis=0) == 0
        tl.store(out_ptr + patches, tl.where(whole, entropy, float("nan")), mask=patches < images.total)


@triton.jit
def scale_complexity(entropy, minimum, maximum):
    """Entropies between their extremes as 0 and 1; zeros where all are equal, NaN where the maximum is."""
    span = maximum - minimum
    return tl.where(span == 0, 0.0, tl.div_rn(entropy - minimum, tl.where(span == 0, 1.0, span)))


@triton.jit(do_not_specialize=["P"])
def _normalize_kernel(entropy_ptr, out_ptr, P, BLOCK: tl.constexpr):
    """Min-max over the P patches of one image; zeros where all are equal, NaN where one is NaN."""
    b = tl.program_id(0).to(tl.int64)
    low = tl.full([BLOCK], float("inf"), tl.float32)
    high = tl.full([BLOCK], float("-inf"), tl.float32)
    broken = tl.zeros([BLOCK], tl.int32)
    for start in range(0, P, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        entropy = tl.load(entropy_ptr + b * P + offs, mask=offs < P, other=0.0)
        number = (offs < P) & (entropy == entropy)
        low = tl.minimum(low, tl.where(number, entropy, float("inf")))
        high = tl.maximum(high, tl.where(number, entropy, float("-inf")))
        broken += (entropy != entropy).to(tl.int32)
    minimum = tl.min(low, axis=0)
    maximum = tl.where(tl.sum(broken, axis=0) > 0, float("nan"), tl.max(high, axis=0))
    for start in range(0, P, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        entropy = tl.load(entropy_ptr + b * P + offs, mask=offs < P, other=0.0)
        tl.store(out_ptr + b * P + offs, scale_complexity(entropy, minimum, maximum), mask=offs < P)


@functools.cache
def entropy_launch(
    dtype: torch.dtype,
    channels: int,
    estimator: Estimator,
    scores: torch.dtype | None = None,
    patches: int = 0,
    k_tensor: bool = False,
) -> Launch:
    """The kernel for images of a dtype; with `scores`, a dtype, it selects in rows of so many patches as well."""
    patch_size, bins, sigma, method = estimator
    red, green, blue = spec.LUMA
    return Launch(
        _entropy_kernel,
        {
            "CHANNELS": channels,
            "PATCH": patch_size,
            "BINS": bins,
            "BINS_PAD": next_power_of_2(bins),
            "SCALE": math.sqrt(0.5 * math.log2(math.e)) / sigma if method == "kde" else 0.0,
            "HISTOGRAM": method == "histogram",
            "PIXEL_SCALE": 1.0 / 255.0 if dtype == torch.uint8 else 1.0,
            "TOLERANCE": spec.RANGE_TOLERANCE,
            "LUMA_R": red,
            "LUMA_G": green,
            "LUMA_B": blue,
            # 64 values of the pixel x bin tile per thread.
            "BLOCK": max(min(next_power_of_2(patch_size * patch_size), 2048 // next_power_of_2(bins)), 4),
            "PATCHES": PATCHES,
            **row_constants(patches, THREADS, held=8),  # few: the patches' programs have as many registers
        },
        threads=THREADS,
        registers=Registers(176, 176, 176, 128) if bins > 32 else Registers(128, 128, 128, 96),
        types={
            "images": Images(POINTERS[dtype], *["i32"] * 7),
            "out_ptr": "*fp32",
            "scores": None if scores is None else row_types(POINTERS[scores]),
            "k": count_types("*i64" if k_tensor else None),
            "selected": None if scores is None else Selected("*u8", "*i32"),
        },
        aligned=(
            *SCORES_ALIGNED,
            "images.stride_b",
            "images.stride_c",
            "images.stride_h",
            "images.columns",
            "images.patches",
        ),
        ones=("images.stride_w", "scores.stride_p", "k.stride_r"),
    )


@functools.cache
def _normalize_launch() -> Launch:
    return Launch(
        _normalize_kernel,
        {"BLOCK": 1024},
        threads=128,
        registers=Registers(56, 64, 56, 56),
        types={"entropy_ptr": "*fp32", "out_ptr": "*fp32"},
    )


def run_entropy(
    images: Tensor, estimator: Estimator, scores: Tensor | None = None, k: Tensor | None = None, k_value: int = 0
) -> tuple[Tensor, Selected | None]:
    """H [B, P] and, in the same launch, what `topk_mask` selects among scores [B, R, P]."""
    batch, channels, height, width = images.shape
    stride_b, stride_c, stride_h, stride_w = images.stride()
    columns = width // estimator.patch_size
    patches = height // estimator.patch_size * columns
    entropy = torch.empty((batch, patches), dtype=torch.float32, device=images.device)
    selected = None if scores is None else Selected.empty(scores)
    if entropy.numel():
        rows = 0 if scores is None else scores.shape[0] * scores.shape[1]
        kind = None if scores is None else scores.dtype
        launch = entropy_launch(images.dtype, channels, estimator, kind, patches, k is not None)
        with device_guard(images):
            launch(
                (rows + ceil_div(batch * patches, PATCHES),),
                Images(images, stride_b, stride_c, stride_h, stride_w, columns, patches, batch * patches),
                entropy,
                None if scores is None else row_arguments(scores),
                counts_arguments(k),
                selected,
                k_value,
                1 if scores is None else scores.shape[1],
                rows,
                estimator.patch_size**2,
            )
    return entropy, selected


@torch.library.custom_op("focusdpo::patch_entropy", mutates_args=())
def patch_entropy_op(images: Tensor, patch_size: int, bins: int, sigma: float, method: str, normalize: bool) -> Tensor:
    entropy, _ = run_entropy(images, Estimator(patch_size, bins, sigma, method))
    if entropy.numel() == 0 or not normalize:
        return entropy
    complexity = torch.empty_like(entropy)
    with device_guard(images):
        _normalize_launch()((entropy.shape[0],), entropy, complexity, entropy.shape[1])
    return complexity


@patch_entropy_op.register_fake
def _(images, patch_size, bins, sigma, method, normalize):
    batch, _, height, width = images.shape
    return images.new_empty((batch, (height // patch_size) * (width // patch_size)), dtype=torch.float32)


def patch_entropy(
    images: Tensor,
    patch_size: int = 16,
    *,
    bins: int = 32,
    sigma: float = 0.01,
    method: str = "kde",
    normalize: bool = False,
    check_range: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """Shannon entropy of the gray values of each patch (E7), in nats.

    Args:
        images: [B, C, H, W] in [0, 1] (uint8: 0 to 255), C = 3 (RGB) or 1 (gray); fp16, bf16, fp32 or uint8 (float64 on the
            torch backend).
        patch_size: pixels along a patch's side; must divide H and W. 16 is one FLUX token.
        bins: number of bins over [0, 1], 2 to 256.
        sigma: width of the Gaussian kernel around a bin's centre, in gray values: at most 1, and wide enough that a pixel
            between two bins reaches one, 0.0013 for 32 of them.
        method: "kde" (Gaussian kernel) or "histogram" (hard bins: the entropy of the patch quantised to `bins` levels).
        normalize: min-max over an image's patches, giving M_d before the prior; all zeros where every patch is alike.
        check_range: look at the values and refuse what is outside [0, 1]. None looks at CPU tensors only, because on an
            accelerator the look would wait for the device. Where nobody looks, a patch with such a pixel gives NaN.
        backend: "triton", "torch" or None; see `focusdpo_kernels.backend`.

    Returns:
        [B, H/p * W/p], row-major; fp32 (float64 for float64 images). Carries no gradient.

    Raises:
        TypeError, ValueError: arguments of wrong type, shape, dtype or range, each named.
    """
    images = check_images(images, patch_size, check_range).detach()
    check_estimator(method, bins, sigma)
    if resolve_backend(backend, images) == "torch":
        torch_backend = cpu_mask if cpu_mask.takes(images) else spec
        return torch_backend.patch_entropy(images, patch_size, bins, sigma, method, normalize)
    return patch_entropy_op(images, patch_size, bins, sigma, method, normalize)


def launches() -> Iterator[Launch]:
    """Every shipped launch configuration, for ahead-of-time compilation."""
    shipped = {method: Estimator(16, 32, 0.01, method) for method in METHODS}
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.uint8):
        for channels in (1, 3):
            for estimator in shipped.values():
                yield entropy_launch(dtype, channels, estimator)
    yield entropy_launch(torch.float32, 3, shipped["histogram"]._replace(bins=256))
    yield entropy_launch(torch.float32, 3, shipped["kde"]._replace(patch_size=32))
    for patches in (256, 1024, 4096, 16384):
        yield entropy_launch(torch.float32, 3, shipped["kde"], torch.float32, patches, True)
    for scores, k_tensor in ((torch.bfloat16, True), (torch.float32, False)):
        yield entropy_launch(torch.float32, 3, shipped["histogram"], scores, 4096, k_tensor)
    yield _normalize_launch()
