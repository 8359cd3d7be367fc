"""Patch entropy (docs/method.md, E7).

    q[b]  proportional to  mean_{x in patch} exp(-((x - mu[b]) / sigma)^2 / 2)     kde
    q[b]  =                share of the patch's pixels in bin b                     histogram
    H[p]  = -sum_b q[b] log q[b]                                                    nats

A program takes one patch, chunk by chunk of BLOCK pixels, so any patch size works. Bytes: B C H W itemsize in, 4 B P out;
`normalize` reads and writes the 4 B P once more in a second launch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from focusdpo_kernels import cpu_mask
from focusdpo_kernels import reference as spec
from focusdpo_kernels.backend import device_guard, resolve_backend
from focusdpo_kernels.checks import METHODS, check_estimator, check_images
from focusdpo_kernels.launch import POINTERS, Launch, Registers, next_power_of_2

PROGRAMS = 65535  # CUDA's limit on a grid's second axis


@triton.jit(do_not_specialize=["COLUMNS", "P"])
def _entropy_kernel(
    images_ptr,  # [B, C, H, W]
    out_ptr,  # [B, P] fp32
    COLUMNS,  # patches in a row of the image
    P,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
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
    BLOCK: tl.constexpr,
):
    p = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    row = (p // COLUMNS).to(tl.int64) * PATCH
    column = (p % COLUMNS).to(tl.int64) * PATCH
    corner = images_ptr + b * stride_b + row * stride_h + column * stride_w
    offs_bin = tl.arange(0, BINS_PAD)
    # Counts of pixels by bin are whole numbers; one more tells of pixels that are none.
    weight = tl.zeros([BINS_PAD], tl.int32 if HISTOGRAM else tl.float32)
    broken = tl.zeros([BLOCK], tl.int32)
    for start in range(0, PATCH * PATCH, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        valid = offs < PATCH * PATCH
        offsets = (offs // PATCH).to(tl.int64) * stride_h + (offs % PATCH).to(tl.int64) * stride_w
        gray = tl.load(corner + offsets, mask=valid, other=0).to(tl.float32)
        if CHANNELS == 3:
            green = tl.load(corner + stride_c + offsets, mask=valid, other=0).to(tl.float32)
            blue = tl.load(corner + 2 * tl.cast(stride_c, tl.int64) + offsets, mask=valid, other=0).to(tl.float32)
            gray = LUMA_R * gray + LUMA_G * green + LUMA_B * blue
        gray = gray * PIXEL_SCALE
        # A pixel that is NaN or far out of range must not end as a plausible number.
        in_range = (gray >= -TOLERANCE) & (gray <= 1 + TOLERANCE)
        if HISTOGRAM:
            broken |= (in_range == 0).to(tl.int32)
            level = tl.minimum(tl.maximum(tl.floor(tl.where(in_range, gray, 0.0) * BINS), 0.0), BINS - 1.0)
            level = tl.where(valid, level, -1.0)
            weight += tl.sum((level.to(tl.int32)[:, None] == offs_bin[None, :]).to(tl.int32), axis=0)
        else:
            # exp(-((gray - mu) / sigma)^2 / 2) as a power of two, its factor folded into both numbers.
            gray = tl.where(valid, tl.where(in_range, gray, float("nan")), float("inf"))  # exp2(-inf) = 0
            distance = gray[:, None] * SCALE - (offs_bin.to(tl.float32) * (SCALE / (BINS - 1)))[None, :]
            # "-distance" would be 0 - distance, one instruction more.
            weight += tl.sum(tl.exp2((distance * -1.0) * distance), axis=0)
    weight = tl.where(offs_bin < BINS, weight, 0).to(tl.float32)
    total = tl.sum(weight, axis=0)
    q = weight / total
    entropy = -tl.sum(tl.where(q > 0, q * tl.log(tl.where(q > 0, q, 1.0)), 0.0), axis=0)
    whole = total > 0
    if HISTOGRAM:
        whole = tl.max(broken, axis=0) == 0
    tl.store(out_ptr + b * P + p, tl.where(whole, entropy, float("nan")))


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
def _entropy_launch(dtype: torch.dtype, channels: int, patch_size: int, bins: int, sigma: float, method: str) -> Launch:
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
            "BLOCK": max(min(next_power_of_2(patch_size * patch_size), 2048 // next_power_of_2(bins)), 16),
        },
        threads=32,  # one warp: what begins and ends a patch is done once, and no warp waits for another
        registers=Registers(176, 176, 176, 96),
        types={"images_ptr": POINTERS[dtype], "out_ptr": "*fp32"},
        aligned=("stride_b", "stride_c", "stride_h"),
        ones=("stride_w",),
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


@torch.library.custom_op("focusdpo::patch_entropy", mutates_args=())
def patch_entropy_op(images: Tensor, patch_size: int, bins: int, sigma: float, method: str, normalize: bool) -> Tensor:
    batch, channels, height, width = images.shape
    columns = width // patch_size
    patches = (height // patch_size) * columns
    entropy = torch.empty((batch, patches), dtype=torch.float32, device=images.device)
    if entropy.numel() == 0:
        return entropy
    launch = _entropy_launch(images.dtype, channels, patch_size, bins, sigma, method)
    with device_guard(images):
        for start in range(0, batch, PROGRAMS):
            part = images[start : start + PROGRAMS]
            launch((patches, len(part)), part, entropy[start:], columns, patches, *part.stride())
        if not normalize:
            return entropy
        complexity = torch.empty_like(entropy)
        _normalize_launch()((batch,), entropy, complexity, patches)
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
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.uint8):
        for channels in (1, 3):
            for method in METHODS:
                yield _entropy_launch(dtype, channels, 16, 32, 0.01, method)
    yield _entropy_launch(torch.float32, 3, 16, 256, 0.01, "histogram")
    yield _entropy_launch(torch.float32, 3, 32, 32, 0.01, "kde")
    yield _normalize_launch()
