"""What is measured: for each group its inputs, the exact result, the bytes that have to move, and the providers.

A provider is one way to compute the group's results: ours, the PyTorch specification as it is or compiled, or the well-known
pieces that a user would otherwise put together.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import pieces
from benchmarks.inputs import (
    NAMED,
    FocusInputs,
    Shape,
    estimate_inputs,
    field_inputs,
    image_inputs,
    mask_inputs,
    prediction_inputs,
    shapes,
    similarity_inputs,
    step_inputs,
    subject_prediction_inputs,
)
from benchmarks.results import COMPILE, COMPILE_MAX, EAGER, OURS, PIECES
from benchmarks.timing import rotations
from focusdpo import focus_dpo_loss, focus_mask
from focusdpo.mask import FocusMask
from focusdpo_kernels import (
    cross_layer_similarity,
    estimate_alignment,
    patch_entropy,
    preference_residual,
    structure_field,
)
from focusdpo_kernels import reference as spec
from focusdpo_kernels.backend import INTERPRETED
from focusdpo_kernels.shapes import bytes_moved

Provider = Callable[[FocusInputs], tuple[Tensor, ...]]
Function = Callable[..., Any]
Call = Callable[[Function, FocusInputs], Any]  # a function with what it takes of the inputs

TAU = 1.0  # of the focus step: every field of the mask takes part in it
OUR_BACKEND = "triton" if INTERPRETED else None  # None: as a user gets it, on a CPU the PyTorch backend


@dataclass(frozen=True)
class Group:
    """One thing to compute.

    Args:
        name: of the group.
        inputs: makes random inputs of a shape on a device.
        exact: the results in float64.
        bytes: keys of `bytes_moved` that have to move, each once.
        formula: those bytes in words.
        providers: by name.
        sweeps: sizes that its cost depends on.
        batches: pairs in a call.
        tolerance: largest relative error of our own and the specification's result, by the number of patches.
        loose: the same for the pieces, which compute in the inputs' own precision.
        scales: what the error of each result is relative to, from the exact results; None takes each result's own norm.
    """

    name: str
    inputs: Callable[[Shape, torch.device], FocusInputs]
    exact: Provider
    bytes: tuple[str, ...]
    formula: str
    providers: dict[str, Provider]
    sweeps: tuple[str, ...]
    batches: tuple[int, ...] = (1,)
    tolerance: Callable[[int], float] = lambda patches: 1e-5
    loose: Callable[[int], float] = lambda patches: 2e-2
    scales: Callable[[tuple[Tensor, ...]], list[Tensor]] | None = None

    def bytes_of(self, shape: Shape) -> int:
        moved = bytes_moved(**shape.sizes)
        return shape.batch * sum(moved[name] for name in self.bytes)

    def inputs_in_turn(self, shape: Shape, device: torch.device) -> list[FocusInputs]:
        """Inputs that differ, so many that none is still in the cache when its turn comes again."""
        torch.manual_seed(0)
        first = self.inputs(shape, device)
        return [first, *(self.inputs(shape, device) for _ in range(rotations(first.bytes, device) - 1))]

    def tolerance_of(self, provider: str, shape: Shape) -> float:
        return (self.loose if provider in LOOSE else self.tolerance)(shape.sizes["P"])

    def error(self, actual: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
        """Largest |actual - exact| over its scale, in the Euclidean norm; NaN where finite values differ in place."""
        scales = list(exact) if self.scales is None else self.scales(exact)
        return max(relative_error(a, e, scale) for a, e, scale in zip(actual, exact, scales, strict=True))


COMPILED = (COMPILE, COMPILE_MAX)
LOOSE = (PIECES, "kornia", "scikit-image")


def unavailable(provider: str, shape: Shape, device: torch.device) -> str | None:
    """Why a provider is not measured there, or None."""
    if provider == COMPILE_MAX and device.type == "cpu":
        return "tuned on a GPU only"
    module = {"kornia": "kornia", "scikit-image": "skimage"}.get(provider)
    if module and importlib.util.find_spec(module) is None:
        return f"{provider} is not installed"
    if provider == "scikit-image" and (device.type != "cpu" or shape.sizes["P"] > 4096):
        return "scikit-image works on a CPU, patch by patch"
    return None


def _double(x: FocusInputs) -> FocusInputs:
    def up(value: Any) -> Any:
        if isinstance(value, list):
            return [up(v) for v in value]
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return FocusInputs(**{name: up(value) for name, value in vars(x).items()})


def _our_similarity(x: FocusInputs) -> tuple[Tensor, ...]:
    return (cross_layer_similarity(x.target, x.reference, x.reference_mask, backend=OUR_BACKEND),)


def _eager_similarity(x: FocusInputs) -> tuple[Tensor, ...]:
    return (spec.cross_layer_similarity(x.target, x.reference, x.reference_mask),)


def _exact_similarity(x: FocusInputs) -> tuple[Tensor, ...]:
    layers = zip(x.target, x.reference, strict=True)
    total = sum(spec.layer_similarity(t.double(), r.double(), x.reference_mask) for t, r in layers)  # a layer at a time
    return (spec.finish_similarity(total, len(x.target), x.reference_mask),)


@functools.cache
def _compiled(function: Callable[..., Any], mode: str | None) -> Callable[..., Any]:
    # Whole or not at all: what cannot be compiled would run as it is, and be measured as compiled.
    return torch.compile(function, mode=mode, dynamic=False, fullgraph=True)


def _compiled_similarity(mode: str | None) -> Provider:
    def provider(x: FocusInputs) -> tuple[Tensor, ...]:
        layer = _compiled(spec.layer_similarity, mode)
        total = sum(layer(t, r, x.reference_mask) for t, r in zip(x.target, x.reference, strict=True))
        return (spec.finish_similarity(total, len(x.target), x.reference_mask),)

    return provider


def _plain_residual(*args: Tensor) -> tuple[Tensor, ...]:
    *predictions, mask = args
    return tuple(spec.preference_residual(predictions, [mask], None, "mean", 1)[:5])


def _our_residual(*args: Tensor, backend: str | None = OUR_BACKEND) -> tuple[Tensor, ...]:
    return tuple(preference_residual(*args, backend=backend)[:5])


@torch.no_grad()
def _forward(residual: Function, x: FocusInputs) -> tuple[Tensor, ...]:
    return residual(*x.predictions, x.mask)


def _backward(residual: Function, x: FocusInputs) -> tuple[Tensor, ...]:
    policy = [p.detach().requires_grad_() for p in x.predictions[:2]]
    margin = residual(*policy, *x.predictions[2:], x.mask)[4]
    return torch.autograd.grad(margin, policy, torch.ones_like(margin))


def _plain_subjects(*args: Tensor) -> tuple[Tensor, ...]:
    *predictions, mask, subjects = args
    return tuple(spec.preference_residual(predictions, [mask], subjects, "mean", 1)[:5])


def _our_subjects(*args: Tensor, backend: str | None = OUR_BACKEND) -> tuple[Tensor, ...]:
    *predictions, mask, subjects = args
    return tuple(preference_residual(*predictions, mask, subjects=subjects, backend=backend)[:5])


def _backward_of_subjects(residual: Function, x: FocusInputs) -> tuple[Tensor, ...]:
    policy = [p.detach().requires_grad_() for p in x.predictions[:2]]
    margin = residual(*policy, *x.predictions[2:], x.mask, x.subjects)[4]
    return torch.autograd.grad(margin, policy, torch.ones_like(margin))


def _focus_mask(scores: Tensor, k: int, prior: Tensor, images: Tensor, backend: str | None = "torch") -> FocusMask:
    return focus_mask(scores, prior, images, match_count=k, tau=TAU, check_range=False, backend=backend)


def _pieces_mask(scores: Tensor, k: int, prior: Tensor, images: Tensor) -> Tensor:
    structure, coverage = pieces.structure(scores, k, prior)
    return pieces.fuse(structure, coverage, pieces.entropy(images), prior, tau=TAU, gamma=0.3)


def _focus_loss(
    scores: Tensor, k: int, prior: Tensor, images: Tensor, predictions: list[Tensor], backend: str | None = "torch"
) -> Tensor:
    focus = _focus_mask(scores, k, prior, images, backend)
    return focus_dpo_loss(*predictions, focus=focus, backend=backend).loss


def _pieces_loss(scores: Tensor, k: int, prior: Tensor, images: Tensor, predictions: list[Tensor]) -> Tensor:
    mask = _pieces_mask(scores, k, prior, images)
    return pieces.dpo_loss(*predictions, mask, beta=2000.0)


def _step(x: FocusInputs, scores: Tensor, loss: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    """A loss and its gradients."""
    policy = [p.detach().requires_grad_() for p in x.predictions[:2]]
    value = loss(scores, x.k, x.prior, x.images, [*policy, *x.predictions[2:]])
    return (value.detach(), *torch.autograd.grad(value, policy))


def _our_step(x: FocusInputs) -> tuple[Tensor, ...]:
    return _step(x, *_our_similarity(x), functools.partial(_focus_loss, backend=OUR_BACKEND))


def _eager_step(x: FocusInputs) -> tuple[Tensor, ...]:
    # On a CPU mask and loss are what the torch backend takes there; similarity, nearly all of it, is the specification.
    return _step(x, *_eager_similarity(x), _focus_loss)


def _exact_step(x: FocusInputs) -> tuple[Tensor, ...]:
    (scores,) = _exact_similarity(x)
    return _step(_double(FocusInputs(prior=x.prior, images=x.images, k=x.k, predictions=x.predictions)), scores, _focus_loss)


def _compiled_step(mode: str | None) -> Provider:
    return lambda x: _step(x, *_compiled_similarity(mode)(x), _compiled(_focus_loss, mode))


def _pieces_step(x: FocusInputs) -> tuple[Tensor, ...]:
    return _step(x, pieces.similarity(x.target, x.reference, x.reference_mask), _pieces_loss)


def _compile_modes(make: Callable[[str | None], Function]) -> dict[str, Function]:
    # Without its own CUDA graphs: ours captures all providers alike.
    return {COMPILE: make(None), COMPILE_MAX: make("max-autotune-no-cudagraphs")}


def _results(call: Call, function: Function, x: FocusInputs) -> tuple[Tensor, ...]:
    found = call(function, x)
    if isinstance(found, FocusMask):
        found = found.mask
    return (found,) if isinstance(found, Tensor) else tuple(found)


def _group(
    name: str,
    inputs: Callable[[Shape, torch.device], FocusInputs],
    call: Call,
    ours: Function,
    plain: Function,
    *settings: Any,
    others: dict[str, Function],
    exact: Function | None = None,
    **facts: Any,
) -> Group:
    """A group whose providers are functions of the same inputs.

    Args:
        name, inputs, facts: of the group.
        call: gives a function what it takes of the inputs.
        ours: the library's function.
        plain: the specification, which is measured as it is and compiled.
        settings: that the specification takes after the inputs.
        others: more functions, by provider.
        exact: gives the exact results of inputs in float64; None is the specification.
    """

    def specified(*args: Any) -> Any:
        return plain(*args, *settings)

    def compiled(mode: str | None) -> Function:
        return lambda *args: _compiled(plain, mode)(*args, *settings)

    functions = {OURS: ours, EAGER: specified, **_compile_modes(compiled), **others}
    providers = {provider: functools.partial(_results, call, function) for provider, function in functions.items()}
    return Group(name, inputs, lambda x: _results(call, exact or specified, _double(x)), providers=providers, **facts)


def _residual_group(name: str, call: Call, moved: tuple[str, ...], formula: str, **facts: Any) -> Group:
    return _group(
        name,
        prediction_inputs,
        call,
        _our_residual,
        _plain_residual,
        others={PIECES: pieces.residual},
        exact=functools.partial(_our_residual, backend="torch"),
        bytes=moved,
        formula=formula,
        sweeps=("P",),
        batches=(1, 64),
        **facts,
    )


def _residual_scales(exact: tuple[Tensor, ...]) -> list[Tensor]:
    """Errors count relative to themselves, the margin to the two differences that it is made of: it may be near zero."""
    win, lose, win_reference, lose_reference, _ = exact
    return [*exact[:4], (win - win_reference).abs() + (lose - lose_reference).abs()]


GROUPS = (
    Group(
        "similarity",
        similarity_inputs,
        _exact_similarity,
        ("similarity",),
        "2 N (P + Q) D + R Q + 4 R P",
        {
            OURS: _our_similarity,
            EAGER: _eager_similarity,
            **_compile_modes(_compiled_similarity),
            PIECES: lambda x: (pieces.similarity(x.target, x.reference, x.reference_mask),),
        },
        sweeps=("N", "P", "R"),
        # Tensor cores cut sums off where fp32 rounds: half a unit in the last place each, for up to 384 products of 16.
        tolerance=lambda patches: 5e-5,
    ),
    _group(
        "structure field",
        field_inputs,
        lambda function, x: function(x.scores, x.k, x.prior),
        functools.partial(structure_field, backend=OUR_BACKEND),
        spec.structure_field,
        False,
        others={PIECES: pieces.structure},
        bytes=("structure field",),
        formula="4 R P + P + 4 P",
        sweeps=("P", "R"),
        tolerance=lambda patches: 1e-6,  # of the coverage; a patch on the wrong side shows as more than 1e-3
        loose=lambda patches: 1e-6,
    ),
    *(
        _group(
            name,
            image_inputs,
            lambda function, x: function(x.images),
            functools.partial(patch_entropy, method=method, check_range=False, backend=OUR_BACKEND),
            spec.patch_entropy,
            *(16, 32, 0.01, method, False),
            others=others,
            bytes=("entropy",),
            formula="4 * 3 * 256 P + 4 P",
            sweeps=("P",),
            tolerance=tolerance,
        )
        for name, method, tolerance, others in (
            ("entropy", "kde", lambda patches: 1e-5, {PIECES: pieces.entropy, "kornia": pieces.kornia_entropy}),
            # A pixel on the edge of a bin falls to either side of it by its last bit: about 1 % of a patch's entropy.
            (
                "entropy, histogram",
                "histogram",
                lambda patches: 0.03 / patches**0.5,
                {"scikit-image": pieces.skimage_entropy},
            ),
        )
    ),
    _group(
        "focus mask",
        mask_inputs,
        lambda function, x: function(x.scores, x.k, x.prior, x.images),
        functools.partial(_focus_mask, backend=OUR_BACKEND),
        _focus_mask,
        others={PIECES: _pieces_mask},
        bytes=("structure field", "entropy", "fusion"),
        formula="(4 R P + P + 4 P) + (4 * 3 * 256 P + 4 P) + 13 P",
        sweeps=("P",),
        tolerance=lambda patches: 1e-4,  # as the entropies, whose range it divides by
    ),
    _residual_group("residual forward", _forward, ("residual forward",), "6 * 2 P C + 4 P", scales=_residual_scales),
    _residual_group(
        "residual forward+backward",
        _backward,
        ("residual forward", "residual backward"),
        "(6 * 2 P C + 4 P) + (4 * 2 P C + 4 P + 2 * 2 P C)",
        tolerance=lambda patches: 4e-3,  # gradients are rounded to bf16
    ),
    _group(
        "residual of subjects, forward+backward",
        subject_prediction_inputs,
        _backward_of_subjects,
        _our_subjects,
        _plain_subjects,
        others={},
        exact=functools.partial(_our_subjects, backend="torch"),
        bytes=("residual forward", "residual backward", "where subjects are", "where subjects are"),
        formula="(6 * 2 P C + 4 P + R P) + (4 * 2 P C + 4 P + 2 * 2 P C + R P)",
        sweeps=("P", "R"),
        tolerance=lambda patches: 4e-3,  # gradients are rounded to bf16
    ),
    _group(
        "estimate",
        estimate_inputs,
        lambda function, x: function(*x.latents, x.prediction_scale),
        functools.partial(estimate_alignment, backend=OUR_BACKEND),
        spec.estimate_alignment,
        None,
        others={},
        bytes=("estimate",),
        formula="2 P C + 3 * 4 P C + 4 P",
        sweeps=("P",),
        tolerance=lambda patches: 1e-5,
    ),
    Group(
        "focus step",
        step_inputs,
        _exact_step,
        ("similarity", "structure field", "entropy", "fusion", "residual forward", "residual backward"),
        "the sum of the groups above",
        {
            OURS: _our_step,
            EAGER: _eager_step,
            **_compile_modes(_compiled_step),
            PIECES: _pieces_step,
        },
        sweeps=("N", "P", "R"),
        # A few patches at the edge of the K best may fall to either side; in bf16 many do.
        tolerance=lambda patches: 4e-3 + 1.5 / patches**0.5,
        loose=lambda patches: 0.5,
    ),
)


def cases(device: torch.device, compile_shapes: Collection[str] = tuple(NAMED)) -> Iterator[tuple[Group, Shape, str]]:
    """Every (group, shape, provider), compiled ones at the named shapes given; those of a shape follow each other."""
    # Last what takes long to compile: a run that is cut short has the rest.
    for compiled in (False, True):
        for shape in shapes(device):
            if compiled and shape.name not in compile_shapes:
                continue
            for group in GROUPS:
                if shape.sweep is not None and shape.sweep not in group.sweeps:
                    continue
                for batch in group.batches if shape.sweep is None else (1,):
                    for provider in group.providers:
                        if (provider in COMPILED) == compiled:
                            yield group, Shape(shape.name, shape.sizes, batch, shape.sweep), provider


def relative_error(actual: Tensor, exact: Tensor, scale: Tensor) -> float:
    """|actual - exact| / |scale| in the Euclidean norm; NaN where finite values differ in place."""
    a, e = actual.double(), exact.double()
    finite = e.isfinite()
    if a.shape != e.shape or not torch.equal(a.isfinite(), finite):
        return float("nan")
    size, difference = scale.double()[scale.isfinite()].norm(), (a - e)[finite].norm()
    return float(difference / size) if size > 0 else float(difference)
