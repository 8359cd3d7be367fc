"""Cross-layer patch similarity (docs/method.md, E3 and E4): the public functions.

The kernels are in pooled_similarity.py (a subject's mean token, all layers at once), streamed_similarity.py (the same, layer by
layer) and dense_similarity.py (its best matching token).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from focusdpo_kernels import cpu_similarity
from focusdpo_kernels import reference as spec
from focusdpo_kernels.backend import resolve_backend
from focusdpo_kernels.checks import check_choice, check_no_grad, check_number, check_similarity
from focusdpo_kernels.dense_similarity import launch_dense
from focusdpo_kernels.pooled_similarity import launch_pooled
from focusdpo_kernels.streamed_similarity import StreamedSimilarity

MAX_WEIGHT = 1e30  # of a layer: sums of such and of their inverses are normal fp32 numbers
POOLINGS = ("reference", "max")


def _as_bytes(mask: Tensor) -> Tensor:
    return (mask if mask.dtype == torch.bool else mask != 0).view(torch.uint8)


@torch.library.custom_op("focusdpo::cross_layer_similarity", mutates_args=())
def cross_layer_similarity_op(
    target: Sequence[Tensor], reference: Sequence[Tensor], reference_mask: Tensor, layer_weights: Sequence[float], pooling: str
) -> Tensor:
    mask = _as_bytes(reference_mask)
    shape = (target[0].shape[0], mask.shape[1], target[0].shape[1])
    if len(target) == 1 and pooling == "reference":
        layers = StreamedSimilarity(shape, target[0].device)
        layers.add(target[0], reference[0], mask, 1.0)
        return layers.average(1.0)
    out = torch.empty(shape, dtype=torch.float32, device=target[0].device)
    if out.numel():
        if pooling == "reference":
            launch_pooled(target, reference, mask, layer_weights, out)
        else:
            launch_dense(target, reference, mask, layer_weights, out, accumulate=False)
    return out


@cross_layer_similarity_op.register_fake
def _(target, reference, reference_mask, layer_weights, pooling):
    batch, patches, _ = target[0].shape
    return target[0].new_empty((batch, reference_mask.shape[1], patches), dtype=torch.float32)


def _check_weights(layer_weights: Sequence[float] | None, layers: int) -> list[float]:
    if layer_weights is None:
        return [1.0] * layers
    numbers = [w.item() if isinstance(w, Tensor) else w for w in layer_weights]
    for number in numbers:
        check_number("layer_weights", number)
    weights = [float(number) for number in numbers]
    if len(weights) != layers:
        raise ValueError(f"layer_weights: got {len(weights)} weights for {layers} layers; pass one per layer")
    if not all(1 / MAX_WEIGHT <= w <= MAX_WEIGHT for w in weights):
        raise ValueError(
            f"layer_weights: got {weights}; expected positive numbers from {1 / MAX_WEIGHT:g} to {MAX_WEIGHT:g} (leave a layer "
            "out instead of weighting it 0)"
        )
    return weights


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
    layer_weights: Sequence[float] | None = None,
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
        layer_weights: N positive weights of the average; None weights all layers alike.
        backend: "triton", "torch" or None; see `focusdpo_kernels.backend`.

    Returns:
        S [B, R, P] fp32 (float64 for float64 input); a subject without a reference token gets -inf. Carries no gradient.

    Raises:
        TypeError, ValueError: arguments of wrong type, shape, dtype or device, each named.
    """
    targets, references, mask = check_similarity(target, reference, reference_mask)
    check_choice("pooling", pooling, POOLINGS)
    weights = _check_weights(layer_weights, len(targets))
    with torch.no_grad():
        if resolve_backend(backend, *targets, *references) == "torch":
            targets, references = (tuple(x.detach() for x in layers) for layers in (targets, references))  # from tangents too
            if cpu_similarity.takes(targets[0], pooling):
                return cpu_similarity.cross_layer_similarity(targets, references, mask, weights)
            return spec.cross_layer_similarity(targets, references, mask, weights, pooling)
        return cross_layer_similarity_op(targets, references, mask, weights, pooling)


class _SummedSimilarity:
    """The same interface as `StreamedSimilarity`, for the PyTorch backend and for pooling "max"."""

    def __init__(self, shape: tuple[int, int, int], target: Tensor, mask: Tensor, pooling: str, backend: str) -> None:
        self.total = torch.zeros(shape, dtype=spec.accumulation_dtype(target.dtype), device=target.device)
        self._mask = mask
        self._pooling = pooling
        self._backend = backend

    def add(self, target: Tensor, reference: Tensor, mask: Tensor, weight: float) -> None:
        if self._backend == "torch":
            target, reference = target.detach(), reference.detach()  # from a tangent as well
            if cpu_similarity.takes(target, self._pooling):
                similarity = cpu_similarity.layer_similarity(target, reference, mask)
            else:
                similarity = spec.layer_similarity(target, reference, mask, self._pooling)
            self.total = self.total + weight * similarity  # in place it could not follow a layer of inference mode
        elif self.total.numel():
            launch_dense([target], [reference], mask, [weight], self.total, accumulate=True)

    def average(self, total_weight: float) -> Tensor:
        return spec.finish_similarity(self.total, total_weight, self._mask)


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
        self._total_weight = 0.0
        self.layers = 0

    @torch.compiler.disable  # hooks of compiled blocks: a graph break here, not a trace into the launcher
    @torch.no_grad()
    def update(self, target: Tensor, reference: Tensor, weight: float = 1.0) -> None:
        """Adds one layer: target [B, P, D], reference [B, Q, D], its positive weight in the average.

        Raises:
            TypeError, ValueError: arguments of wrong type, shape, dtype or device, or unlike those of earlier layers.
        """
        if self._checked is None or self._checked != _description(target, reference):
            self._check(target, reference)
        (weight,) = _check_weights((weight,), 1)
        assert self._sum is not None
        if target.is_neg() or reference.is_neg():  # what is launched here reads memory as it is
            target, reference = target.resolve_neg(), reference.resolve_neg()
        self._sum.add(target, reference, self._mask_bytes, weight)
        self._total_weight += weight
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
        return self._sum.average(self._total_weight)
