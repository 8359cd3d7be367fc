"""Cross-layer patch similarity (docs/method.md, E3 and E4): the public functions.

The kernels are in pooled_similarity.py (a subject's mean token, all layers at once), streamed_similarity.py (the same, layer by
layer) and dense_similarity.py (its best matching token).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from focusdpo_kernels import cpu_similarity
from focusdpo_kernels import reference as spec
from focusdpo_kernels.backend import resolve_backend
from focusdpo_kernels.checks import check_choice, check_no_grad, check_similarity
from focusdpo_kernels.choices import Pooling
from focusdpo_kernels.dense_similarity import launch_dense
from focusdpo_kernels.pooled_similarity import launch_pooled
from focusdpo_kernels.streamed_similarity import StreamedSimilarity

POOLINGS: tuple[str, ...] = get_args(Pooling)


def _as_bytes(mask: Tensor) -> Tensor:
    return (mask if mask.dtype == torch.bool else mask != 0).view(torch.uint8)


@torch.library.custom_op("focusdpo::cross_layer_similarity", mutates_args=())
def cross_layer_similarity_op(
    target: Sequence[Tensor], reference: Sequence[Tensor], reference_mask: Tensor, pooling: str
) -> Tensor:
    mask = _as_bytes(reference_mask)
    shape = (target[0].shape[0], mask.shape[1], target[0].shape[1])
    if len(target) == 1 and pooling == "reference":
        layers = StreamedSimilarity(shape, target[0].device)
        layers.add(target[0], reference[0], mask)
        return layers.average()
    out = torch.empty(shape, dtype=torch.float32, device=target[0].device)
    if out.numel():
        if pooling == "reference":
            launch_pooled(target, reference, mask, out)
        else:
            launch_dense(target, reference, mask, out, accumulate=False)
    return out


@cross_layer_similarity_op.register_fake
def _(target, reference, reference_mask, pooling):
    batch, patches, _ = target[0].shape
    return target[0].new_empty((batch, reference_mask.shape[1], patches), dtype=torch.float32)


def _description(target: object, reference: object) -> object:
    """What the checks of a layer depend on; None, which equals no description, where it is not two tensors."""
    if not (isinstance(target, Tensor) and isinstance(reference, Tensor)):
        return None
    return (target.shape, target.dtype, target.device, reference.shape, reference.dtype, reference.device)


def cross_layer_similarity(
    target: Sequence[Tensor] | Tensor,
    reference: Sequence[Tensor] | Tensor,
    reference_mask: Tensor,
    *,
    pooling: str = "reference",
    backend: str | None = None,
) -> Tensor:
    """Cosine of each subject's pooled reference token with every target token, averaged over layers (E3, E4).

    Args:
        target: N hidden states [B, P, D] of the target tokens (a sequence, or one tensor [N, B, P, D]); fp16, bf16, fp32
            (float64 on the torch backend). Any strides; slices of a longer sequence are not copied.
        reference: N hidden states [B, Q, D] of the reference tokens, dtype as `target`.
        reference_mask: [B, R, Q]; not zero where token q shows subject r.
        pooling: "reference" compares with the mean over a subject's tokens; "max" takes the best match among them, for
            dense correspondence and look-alike subjects.
        backend: "triton", "torch" or None; see `focusdpo_kernels.backend`.

    Returns:
        S [B, R, P] fp32 (float64 for float64 input); a subject without a reference token gets -inf. Carries no gradient.

    Raises:
        TypeError, ValueError: arguments of wrong type, shape, dtype or device, each named.
    """
    targets, references, mask = check_similarity(target, reference, reference_mask)
    check_choice("pooling", pooling, POOLINGS)
    with torch.no_grad():
        if resolve_backend(backend, *targets, *references) == "torch":
            shape = (targets[0].shape[0], mask.shape[1], targets[0].shape[1])
            summed = _SummedSimilarity(shape, targets[0], mask, pooling, "torch")
            for target_n, reference_n in zip(targets, references, strict=True):
                summed.add(target_n, reference_n, mask)
            return summed.average()
        return cross_layer_similarity_op(targets, references, mask, pooling)


class _SummedSimilarity:
    """The same interface as `StreamedSimilarity`, for the PyTorch backend and for pooling "max"."""

    def __init__(self, shape: tuple[int, int, int], target: Tensor, mask: Tensor, pooling: str, backend: str) -> None:
        self.total = torch.zeros(shape, dtype=spec.accumulation_dtype(target.dtype), device=target.device)
        self._mask = mask
        self._pooling = pooling
        self._backend = backend
        self._layers = 0

    def add(self, target: Tensor, reference: Tensor, mask: Tensor) -> None:
        self._layers += 1
        if self._backend == "torch":
            target, reference = target.detach(), reference.detach()  # from a tangent as well
            if cpu_similarity.takes(target, self._pooling):
                similarity = cpu_similarity.layer_similarity(target, reference, mask)
            else:
                similarity = spec.layer_similarity(target, reference, mask, self._pooling)
            self.total = self.total + similarity  # in place it could not follow a layer of inference mode
        elif self.total.numel():
            launch_dense([target], [reference], mask, self.total, accumulate=True)

    def average(self) -> Tensor:
        return spec.finish_similarity(self.total, self._layers, self._mask)


class SimilarityAccumulator:
    """The same S layer by layer, so that no layer's hidden states are kept (E3, E4).

    Layers share scratch memory, so updates and the result belong on one CUDA stream, or on streams that wait for each other.

    Args:
        reference_mask: [B, R, Q]; not zero where token q shows subject r.
        pooling, backend: as in `cross_layer_similarity`.

    Example:
        >>> similarity = SimilarityAccumulator(reference_mask)
        >>> for target_n, reference_n in layers:
        ...     similarity.update(target_n, reference_n)
        >>> scores = similarity.result()  # [B, R, P]
    """

    def __init__(self, reference_mask: Tensor, *, pooling: str = "reference", backend: str | None = None) -> None:
        check_choice("pooling", pooling, POOLINGS)
        check_no_grad("reference_mask", reference_mask, "masks carry no gradient")
        self._mask = self._mask_bytes = reference_mask
        self._pooling = pooling
        self._backend = backend
        self._sum: StreamedSimilarity | _SummedSimilarity | None = None
        self._used_backend: str | None = None
        self._checked: object = None  # what the last layer was like
        self.layers = 0

    @torch.compiler.disable  # hooks of compiled blocks: a graph break here, not a trace into the launcher
    @torch.no_grad()
    def update(self, target: Tensor, reference: Tensor) -> None:
        """Adds one layer: target [B, P, D], reference [B, Q, D].

        Raises:
            TypeError, ValueError: arguments of wrong type, shape, dtype or device, or unlike those of earlier layers.
        """
        if self._checked is None or self._checked != _description(target, reference):
            self._check(target, reference)
        assert self._sum is not None
        if target.is_neg() or reference.is_neg():  # what is launched here reads memory as it is
            target, reference = target.resolve_neg(), reference.resolve_neg()
        self._sum.add(target, reference, self._mask_bytes)
        self.layers += 1

    def _check(self, target: Tensor, reference: Tensor) -> None:
        """Looks at what most layers have in common: the checks take more host time than the launches."""
        check_similarity([target], [reference], self._mask)
        self._mask_bytes = _as_bytes(self._mask)
        backend = resolve_backend(self._backend, target, reference)
        shape = (target.shape[0], self._mask.shape[1], target.shape[1])
        if self._sum is None:
            self._used_backend = backend
            if backend == "triton" and self._pooling == "reference":
                self._sum = StreamedSimilarity(shape, target.device)
            else:
                self._sum = _SummedSimilarity(shape, target, self._mask, self._pooling, backend)
        elif self._sum.total.shape != shape:
            raise ValueError(f"target: got {shape[2]} tokens, while earlier layers had {self._sum.total.shape[2]}")
        elif backend != self._used_backend:
            raise TypeError(
                f"target: got dtype {target.dtype}, which the {backend} backend computes, while earlier layers ran on "
                f"{self._used_backend}; use one dtype for all layers"
            )
        self._checked = _description(target, reference)

    def result(self) -> Tensor:
        """S [B, R, P] of the layers so far; raises RuntimeError before the first."""
        if self._sum is None:
            raise RuntimeError("SimilarityAccumulator.result: no layer was added; call update(target, reference) first")
        return self._sum.average()
