"""How far the model's own estimate of the clean winner has come, by token (docs/method.md, E10): forward only, one pass.

    x0   = noised_scale x_t + prediction_scale v         the estimate
    s[p] = <x0[p] - x_l[p], x_w[p] - x_l[p]> / |x_w[p] - x_l[p]|^2

A program takes some tokens of a sample and adds up over their latents in fp32, in one order: the same bits every time and for
every batch size. Bytes: prediction, noised latents and the two clean ones once, 4 B P out.
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
from focusdpo_kernels.backend import device_guard, resolve_backend
from focusdpo_kernels.checks import PATCH, check_estimate, count_tokens
from focusdpo_kernels.launch import POINTERS, Launch, Registers, by_sample, ceil_div, next_power_of_2

TILE = 1024  # elements of a program at a time, of each tensor
MAX_ELEMENTS = 64  # of a token at a time
THREADS = 128


class Samples(NamedTuple):
    """A pointer to [B, ...], samples contiguous, and the stride between them."""

    ptr: Any
    stride: Any


@triton.jit
def _load_at(samples, b, offsets, valid):
    return tl.load(samples.ptr + b * samples.stride + offsets, mask=valid, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["P"])
def _estimate_kernel(
    prediction,  # Samples of one shape
    noised,
    winner,
    loser,
    prediction_scale_ptr,  # [B] fp32
    noised_scale_ptr,  # [B] fp32, or None for 1
    out_ptr,  # [B, P] fp32
    P,
    E,  # elements of a token
    WIDTH,  # of latents, and their pixels in a channel
    AREA,
    SIDE: tl.constexpr,  # of a patch of latents; 0 for tokens
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    offs_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    prediction_scale = tl.load(prediction_scale_ptr + b)
    noised_scale = 1.0
    if noised_scale_ptr is not None:
        noised_scale = tl.load(noised_scale_ptr + b)
    inner = tl.zeros([BLOCK_P], tl.float32)
    norm = tl.zeros([BLOCK_P], tl.float32)
    for start in range(0, E, BLOCK_E):
        offs_e = start + tl.arange(0, BLOCK_E)
        if SIDE > 0:
            columns = WIDTH // SIDE
            first = (offs_p // columns * WIDTH + offs_p % columns) * SIDE
            place = offs_e % (SIDE * SIDE)
            steps = offs_e // (SIDE * SIDE) * AREA + place // SIDE * WIDTH + place % SIDE
        else:
            first = offs_p * E
            steps = offs_e
        offsets = first[:, None] + steps[None, :]
        valid = (offs_p < P)[:, None] & (offs_e < E)[None, :]
        x_l = _load_at(loser, b, offsets, valid)
        direction = _load_at(winner, b, offsets, valid) - x_l
        v = _load_at(prediction, b, offsets, valid)
        estimate = noised_scale * _load_at(noised, b, offsets, valid) + prediction_scale * v
        inner += tl.sum((estimate - x_l) * direction, axis=1)
        norm += tl.sum(direction * direction, axis=1)
    # Where winner and loser coincide the estimate is as near to the one as to the other.
    differs = norm != 0
    share = tl.div_rn(inner, tl.where(differs, norm, 1.0))
    tl.store(out_ptr + b * P + offs_p, tl.where(differs, share, 0.5), mask=offs_p < P)


@functools.cache
def _launch(dtypes: tuple[torch.dtype, ...], side: int, elements: int, is_scaled: bool) -> Launch:
    """`dtypes` of prediction, noised, winner and loser; `elements` of a token, at most so many at once."""
    names = ("prediction", "noised", "winner", "loser")
    return Launch(
        _estimate_kernel,
        {"SIDE": side, "BLOCK_P": TILE // elements, "BLOCK_E": elements},
        threads=THREADS,
        registers=Registers(96, 96, 96, 96),
        types={
            **{name: Samples(POINTERS[dtype], "i32") for name, dtype in zip(names, dtypes, strict=True)},
            "prediction_scale_ptr": "*fp32",
            "noised_scale_ptr": "*fp32" if is_scaled else None,
            "out_ptr": "*fp32",
        },
        aligned=(*names, "E"),
    )


def _elements(count: int) -> int:
    return min(next_power_of_2(count), MAX_ELEMENTS)


@torch.library.custom_op("focusdpo::estimate_alignment", mutates_args=())
def estimate_alignment_op(
    prediction: Tensor, noised: Tensor, winner: Tensor, loser: Tensor, prediction_scale: Tensor, noised_scale: Tensor | None
) -> Tensor:
    batch, patches = prediction.shape[0], count_tokens("prediction", prediction)
    out = torch.empty((batch, patches), dtype=torch.float32, device=prediction.device)
    if out.numel() == 0:
        return out
    tensors = (prediction, noised, winner, loser)
    side = 0 if prediction.ndim == 3 else PATCH
    elements = prediction[0].numel() // patches
    if elements == 0:
        return out.fill_(0.5)
    width, area = (0, 0) if side == 0 else (prediction.shape[3], prediction.shape[2] * prediction.shape[3])
    launch = _launch(tuple(x.dtype for x in tensors), side, _elements(elements), noised_scale is not None)
    with device_guard(prediction):
        grid = (batch, ceil_div(patches, launch.constants["BLOCK_P"]))
        rows = [Samples(x, x.stride(0)) for x in map(by_sample, tensors)]
        launch(grid, *rows, prediction_scale, noised_scale, out, patches, elements, width, area)
    return out


@estimate_alignment_op.register_fake
def _(prediction, noised, winner, loser, prediction_scale, noised_scale):
    return prediction.new_empty((prediction.shape[0], count_tokens("prediction", prediction)), dtype=torch.float32)


@torch.no_grad()
def estimate_alignment(
    prediction: Tensor,
    noised: Tensor,
    winner: Tensor,
    loser: Tensor,
    prediction_scale: Tensor,
    noised_scale: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Where the model's estimate of the clean winner stands between loser (0) and winner (1), by token: s of E10.

    The estimate is x0 = noised_scale x_t + prediction_scale v. Of flow matching, x_t = (1 - t) x_0 + t eps, it is x_t - t v:
    `prediction_scale=-t`. Of a model that predicts the noise of x_t = alpha x_0 + sigma eps the scales are 1 / alpha and
    -sigma / alpha; of one that predicts alpha eps - sigma x_0 they are alpha and -sigma.

    Args:
        prediction: the model's prediction on the noised winner, [B, P, C] tokens or [B, C, H, W] latents, of which 2x2 are a
            token, row-major: P = (H/2)(W/2). fp16, bf16, fp32 (float64 on the torch backend); its gradient is left alone.
        noised: x_t of the winner, the same shape.
        winner, loser: the clean latents of both, the same shape.
        prediction_scale: [B].
        noised_scale: [B]; None is 1.
        backend: "triton", "torch" or None; see `focusdpo_kernels.backend`.

    Returns:
        s [B, P], fp32 (float64 for a float64 prediction): 1 at the winner's latent, 0 at the loser's, one half where the two
        coincide. Exchanging winner and loser gives 1 - s. NaN where a value is. Carries no gradient.

    Raises:
        TypeError, ValueError: arguments of wrong type, shape, dtype or device, each named.
    """
    tensors = {"prediction": prediction, "noised": noised, "winner": winner, "loser": loser}
    check_estimate(tensors, {"prediction_scale": prediction_scale, "noised_scale": noised_scale})
    values = [x.detach() for x in tensors.values()]
    scales = [None if x is None else x.detach() for x in (prediction_scale, noised_scale)]
    if resolve_backend(backend, *values) == "torch":
        return spec.estimate_alignment(*values, *scales)
    return estimate_alignment_op(*values, *(None if x is None else x.to(torch.float32).contiguous() for x in scales))


def launches() -> Iterator[Launch]:
    """Every shipped launch configuration, for ahead-of-time compilation."""
    half, full = torch.bfloat16, torch.float32
    for dtypes in ((torch.float16,) * 4, (half,) * 4, (full,) * 4, (half, full, full, full)):
        yield _launch(dtypes, 0, MAX_ELEMENTS, False)
        yield _launch(dtypes, PATCH, _elements(4 * PATCH**2), True)
    yield _launch((full,) * 4, PATCH, MAX_ELEMENTS, False)
