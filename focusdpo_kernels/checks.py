"""Argument checks shared by both backends.

Every message names the argument, what came, what is allowed and the likely fix. The checks read shapes, dtypes and
devices only; none waits for a device (the value range of images is looked at on the CPU, or when asked for).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import get_args

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from focusdpo_kernels.autograd import has_tangent, is_traced, is_transformed
from focusdpo_kernels.choices import EntropyMethod, Reduction
from focusdpo_kernels.reference import binary_prior

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What a mask, a prior or a weight may be made of.
REALS = (*FLOATS, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
METHODS: tuple[str, ...] = get_args(EntropyMethod)
REDUCTIONS: tuple[str, ...] = get_args(Reduction)
PATCH = 2  # latents along the side of a token
# exp(-x^2 / 2) stays a normal fp32 number up to here; a pixel must be this near (in sigmas) to some bin.
MAX_SIGMAS = 13.0
MAX_SIGMA = 1.0  # wider, and rounding is all that tells one patch's entropy from another's
MAX_BINS = 256  # as many as there are gray values in 8 bits


def describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


def check_tensor(
    name: str, value: object, *, ndim: int | tuple[int, ...], dtypes: Sequence[torch.dtype] | None = None, layout: str
) -> torch.Tensor:
    """A tensor of the given rank (and dtypes); `layout` names the axes in the message."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor {layout}, got {type(value).__name__}")
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        _check_data(name, value)
    if value.layout != torch.strided:
        kind = str(value.layout).removeprefix("torch.")
        raise TypeError(f"{name}: expected a dense tensor {layout}, got layout {kind}; pass {name}.to_dense()")
    ranks = (ndim,) if isinstance(ndim, int) else ndim
    if value.ndim not in ranks:
        raise ValueError(f"{name}: expected a tensor {layout}, got {describe(value)}")
    if dtypes is not None and value.dtype not in dtypes:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name}: got dtype {str(value.dtype).removeprefix('torch.')}; allowed are {allowed}")
    return value


def _check_data(name: str, value: torch.Tensor) -> None:
    """A subclass holds its data where a plain tensor does, or is what PyTorch traces with."""
    if hasattr(value, "to_local"):
        raise TypeError(
            f"{name}: got a {type(value).__name__}, of which each device holds a part; pass {name}.to_local(), or all of it by "
            f"{name}.full_tensor()"
        )
    own_dispatch = type(value).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    if own_dispatch and not isinstance(value, (FakeTensor, FunctionalTensor)):
        raise TypeError(f"{name}: got a {type(value).__name__}, whose data the kernels cannot read; pass a plain tensor")


def check_shape(name: str, value: torch.Tensor, shape: Sequence[int], why: str) -> None:
    if value.shape != shape and tuple(value.shape) != tuple(shape):  # the latter for lists, and slower
        raise ValueError(f"{name}: expected shape {list(shape)} ({why}), got {describe(value)}")


def check_device(name: str, value: torch.Tensor, device: torch.device, other: str) -> None:
    if value.device != device:
        raise ValueError(f"{name}: is on {value.device} while {other} is on {device}; move both to one device")


def check_no_grad(name: str, value: torch.Tensor, why: str) -> None:
    if value.requires_grad:
        raise ValueError(f"{name}: requires grad, but {why}; pass {name}.detach() or compute it under torch.no_grad()")
    if not torch.compiler.is_compiling() and has_tangent(value):
        raise ValueError(f"{name}: has a tangent, but {why}; pass {name}.detach()")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    # `1 == True`: without the type test, a stray boolean would pass as a number.
    if not any(type(value) is type(c) and value == c for c in choices):
        raise ValueError(f"{name}: got {value!r}; expected one of {', '.join(repr(c) for c in choices)}")


def check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name}: got {value!r}; expected a number")


def check_integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"{name}: got {value!r}; expected an int")


def check_unit_interval(name: str, value: float) -> None:
    check_number(name, value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: got {value!r}; expected a number from 0 to 1")


def check_layers(name: str, layers: object, layout: str) -> tuple[torch.Tensor, ...]:
    """A sequence of N tensors, or one tensor with a leading N, as a tuple of views. Never stacks, never copies."""
    if isinstance(layers, torch.Tensor):
        if layers.ndim != 4:
            raise ValueError(
                f"{name}: expected a sequence of N tensors {layout} or one tensor with a leading N, got {describe(layers)}; "
                f"wrap a single layer in a list"
            )
        layers = layers.unbind(0)
    if not isinstance(layers, Sequence):
        raise TypeError(f"{name}: expected a sequence of N tensors {layout}, got {type(layers).__name__}")
    if len(layers) == 0:
        raise ValueError(f"{name}: got no layer; at least one is needed")
    tensors = tuple(check_tensor(f"{name}[{n}]", layer, ndim=3, dtypes=FLOATS, layout=layout) for n, layer in enumerate(layers))
    first = tensors[0]
    for n, layer in enumerate(tensors):
        check_shape(f"{name}[{n}]", layer, first.shape, f"as {name}[0]")
        check_device(f"{name}[{n}]", layer, first.device, f"{name}[0]")
        if layer.dtype != first.dtype:
            raise TypeError(f"{name}[{n}]: got dtype {layer.dtype}, while {name}[0] has {first.dtype}; use one for all layers")
    return tensors


def check_similarity(
    target: object, reference: object, reference_mask: object
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...], torch.Tensor]:
    """Arguments of E3/E4: N x [B, P, D], N x [B, Q, D] and [B, R, Q]."""
    targets = check_layers("target", target, "[B, P, D]")
    references = check_layers("reference", reference, "[B, Q, D]")
    mask = check_tensor("reference_mask", reference_mask, ndim=3, dtypes=REALS, layout="[B, R, Q]")
    if len(targets) != len(references):
        raise ValueError(
            f"reference: got {len(references)} layers, while target has {len(targets)}; pass one of each per layer"
        )
    batch, _, width = targets[0].shape
    check_shape("reference[0]", references[0], (batch, references[0].shape[1], width), "B and D as target[0]")
    check_shape("reference_mask", mask, (batch, mask.shape[1], references[0].shape[1]), "B of target, Q of reference")
    if references[0].dtype != targets[0].dtype:
        raise TypeError(f"reference: got dtype {references[0].dtype}, while target has {targets[0].dtype}; use one for both")
    for name, value in (("reference", references[0]), ("reference_mask", mask)):
        check_device(name, value, targets[0].device, "target")
    return targets, references, mask


def check_scores(value: object) -> torch.Tensor:
    return check_tensor("scores", value, ndim=3, dtypes=FLOATS, layout="[B, R, P]")


def check_k(k: object, scores: torch.Tensor) -> int | torch.Tensor:
    """k of a top-K over the last axis: an int in 0..P, or an integer tensor that broadcasts to the leading axes."""
    patches = scores.shape[-1]
    if isinstance(k, torch.Tensor):
        if k.dtype not in (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8):
            raise TypeError(f"k: got dtype {k.dtype}; expected an integer tensor, e.g. mask.sum(-1)")
        check_device("k", k, scores.device, "scores")
        try:
            return k.expand(scores.shape[:-1])
        except RuntimeError:
            raise ValueError(
                f"k: shape {list(k.shape)} does not broadcast to {list(scores.shape[:-1])}, scores without P"
            ) from None
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k: expected an int or an integer tensor, got {type(k).__name__}")
    if not 0 <= k <= patches:
        raise ValueError(f"k: got {k}; expected 0 to P = {patches}, the number of scores in a row")
    return k


def check_prior(prior: object, batch: int, subjects: int | None, patches: int) -> torch.Tensor:
    """A prior [B, P], or [B, R, P] with one per subject."""
    value = check_tensor("prior", prior, ndim=(2, 3), dtypes=REALS, layout="[B, P] or [B, R, P]")
    if value.ndim == 2 or subjects is None:
        check_shape("prior", value, (batch, *value.shape[1:-1], patches), "B and P as the scores")
    else:
        check_shape("prior", value, (batch, subjects, patches), "B, R and P as the scores")
    return value


def check_field(
    scores: object, k: object, prior: object, per_subject: bool
) -> tuple[torch.Tensor, int | torch.Tensor, torch.Tensor]:
    """Arguments of E5 and E6: scores [B, R, P], their k, and a prior; detached."""
    scores = check_scores(scores).detach()
    k = check_k(k, scores)
    prior = check_prior(prior, *scores.shape).detach()
    check_device("prior", prior, scores.device, "scores")
    if per_subject and prior.ndim == 2:
        raise ValueError("prior: per_subject=True needs one prior per subject [B, R, P], got [B, P]")
    return scores, k, prior


def check_images(images: object, patch_size: int, check_range: bool | None) -> torch.Tensor:
    """Images [B, 1 or 3, H, W] that patches divide, floats in [0, 1] or uint8."""
    value = check_tensor("images", images, ndim=4, dtypes=(*FLOATS, torch.uint8), layout="[B, 1 or 3, H, W]")
    if value.shape[1] not in (1, 3):
        raise ValueError(f"images: expected 1 (gray) or 3 (RGB) channels, got {describe(value)}")
    check_integer("patch_size", patch_size)
    if patch_size < 1:
        raise ValueError(f"patch_size: got {patch_size}; expected at least 1 pixel")
    height, width = value.shape[2:]
    if height % patch_size or width % patch_size:
        raise ValueError(f"patch_size: {patch_size} does not divide images of {height}x{width} pixels; crop or resize them")
    if check_range is None:
        check_range = value.device.type == "cpu"
    # What traces or transforms sees no values.
    if check_range and value.dtype != torch.uint8 and value.numel() and not is_traced() and not is_transformed(value):
        low, high = (float(x) for x in value.aminmax())
        if not (low >= 0.0 and high <= 1.0):
            raise ValueError(
                f"images: values from {low:.4g} to {high:.4g}; expected [0, 1]. For images in [-1, 1] pass (images + 1) / 2 "
                "(and clamp what a decoder overshoots)"
            )
    return value


def check_estimator(method: str, bins: int, sigma: float, prefix: str = "") -> None:
    """The settings of E7's entropy fit each other; ValueError names them with `prefix` in front."""
    check_choice(f"{prefix}method", method, METHODS)
    check_integer(f"{prefix}bins", bins)
    check_number(f"{prefix}sigma", sigma)
    if not 2 <= bins <= MAX_BINS:
        limit = "at least 2" if bins < 2 else f"at most {MAX_BINS}, the gray values of 8 bits"
        raise ValueError(f"{prefix}bins: got {bins}; expected {limit}")
    least = 0.5 / (bins - 1) / MAX_SIGMAS
    if method == "kde" and not least <= sigma <= MAX_SIGMA:
        why = f"no more than {MAX_SIGMA:g}, the width of all gray values"
        if sigma < least:
            enough = math.ceil(least * 1e6) / 1e6  # rounded up, so that it is
            why = f"at least {enough:g} with {bins} bins, or a pixel between two of them would reach neither"
        raise ValueError(f"{prefix}sigma: got {sigma!r}; expected {why}")


def count_tokens(name: str, prediction: torch.Tensor, remedy: str = "") -> int:
    """P of a prediction [B, P, C], or [B, C, H, W] whose tokens are 2x2 latents."""
    if prediction.ndim == 3:
        return prediction.shape[1]
    height, width = prediction.shape[2:]
    if height % PATCH or width % PATCH:
        raise ValueError(
            f"{name}: latents of {height}x{width} have no whole 2x2 patches; height and width must be even{remedy}"
        )
    return (height // PATCH) * (width // PATCH)


def _check_weight(name: str, weight: object, prediction: torch.Tensor) -> torch.Tensor:
    """M [B, P], or of latents [B, H, W]."""
    latents = prediction.ndim == 4
    layout = "[B, P] or, one value per latent, [B, H, W]" if latents else "[B, P]"
    kinds = (*FLOATS, torch.bool, torch.uint8)
    value = check_tensor(name, weight, ndim=(2, 3, 4) if latents else 2, dtypes=kinds, layout=layout)
    if value.ndim == 4 and value.shape[1] == 1:
        value = value[:, 0]
    if value.ndim > 2:
        check_shape(name, value, (prediction.shape[0], *prediction.shape[2:]), "B, H and W of the predictions")
    else:
        why = "B of the predictions, one value per 2x2 latents; or [B, H, W]" if latents else "B and P of the predictions"
        tokens = count_tokens(name, prediction, ", or give one value per latent, [B, H, W]")
        check_shape(name, value, (prediction.shape[0], tokens), why)
    check_device(name, value, prediction.device, "policy_win")
    check_no_grad(name, value, "the mask carries no gradient (E9)")
    return value


def _check_subjects(subjects: object, prediction: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Where subjects are, as bool: [B, R, P], or [B, R, H, W] as the masks are."""
    latents = prediction.ndim == 4
    layout = "[B, R, P] or, one value per latent, [B, R, H, W]" if latents else "[B, R, P]"
    value = check_tensor("subjects", subjects, ndim=(3, 4) if latents else 3, dtypes=REALS, layout=layout)
    if value.ndim == 4:
        shape: Sequence[int] = (*value.shape[:2], *prediction.shape[2:])
    else:
        shape = (*value.shape[:2], count_tokens("subjects", prediction, ", or give one value per latent, [B, R, H, W]"))
    check_shape("subjects", value, (prediction.shape[0], *shape[1:]), "B of the predictions, and where each of R subjects is")
    if value.shape[1] == 0:
        raise ValueError(f"subjects: got {describe(value)}, without a subject; pass None for results of the whole image")
    if weights and weights[0].ndim != value.ndim - 1:
        raise ValueError(f"subjects: got {describe(value)}, while masks are {describe(weights[0])}; use one layout for both")
    check_device("subjects", value, prediction.device, "policy_win")
    return binary_prior(value.detach())


def check_residual(
    predictions: Mapping[str, torch.Tensor],
    masks: Mapping[str, torch.Tensor | None],
    subjects: torch.Tensor | None,
    reduction: str,
    mask_power: int,
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Arguments of E9: six predictions of one shape by name, of which the policy's alone may require grad, M of both sides, or
    of winner and loser, by the names that the caller gave them, if any, and where subjects are. Returns those masks that are
    not None, and the subjects as bool.
    """
    for name, value in predictions.items():
        check_tensor(name, value, ndim=(3, 4), dtypes=FLOATS, layout="[B, P, C] or [B, C, H, W]")
    policy = predictions["policy_win"]
    shape, device = policy.shape, policy.device
    for name, value in predictions.items():
        check_shape(name, value, shape, "as policy_win")
        check_device(name, value, device, "policy_win")
        if not name.startswith("policy"):
            check_no_grad(name, value, "gradient reaches the two policy predictions only (E9)")
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("mask_power", mask_power, (1, 2))
    both = next(iter(masks), "")
    weights: list[torch.Tensor] = []
    for name, mask in masks.items():
        if mask is not None:
            if masks[both] is None:
                raise ValueError(f"{name}: given without {both}; pass {both} for the winner as well")
            weights.append(_check_weight(name, mask, policy))
            check_shape(name, weights[-1], weights[0].shape, f"as {both}")
    return weights, None if subjects is None else _check_subjects(subjects, policy, weights)


def check_estimate(latents: Mapping[str, torch.Tensor], scales: Mapping[str, torch.Tensor | None]) -> None:
    """Arguments of E10: four tensors of one shape, and one number for each sample; by name."""
    first, like = None, ""
    for name, value in latents.items():
        check_tensor(name, value, ndim=(3, 4), dtypes=FLOATS, layout="[B, P, C] or [B, C, H, W]")
        if first is None:
            first, like = value, name
            count_tokens(name, value)
        check_shape(name, value, first.shape, f"as {like}")
        check_device(name, value, first.device, like)
    assert first is not None
    for name, scale in scales.items():
        if scale is not None:
            check_tensor(name, scale, ndim=1, dtypes=FLOATS, layout="[B]")
            check_shape(name, scale, (first.shape[0],), f"B of {like}")
            check_device(name, scale, first.device, like)
