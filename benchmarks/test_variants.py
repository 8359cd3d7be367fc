"""The streaming kernels in other block sizes, pipeline depths and splits, beside the shipped ones: same gate, same clock.

python -m pytest benchmarks/test_variants.py --result FILE     # on a GPU; `bash benchmarks/gpu.sh deep OUTDIR` does it
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest

from benchmarks.cases import GROUPS, Group
from benchmarks.inputs import NAMED, Shape
from benchmarks.machine import DEVICE
from benchmarks.records import Recorder
from benchmarks.results import OURS
from benchmarks.timing import measured, plan
from focusdpo_kernels import pooled_similarity, residual_kernels
from focusdpo_kernels.backend import INTERPRETED
from focusdpo_kernels.launch import Launch

SHAPE = "uno-1024"


@dataclass(frozen=True)
class Variant:
    """Another way to launch one kernel.

    Args:
        kernel: "pool", "compare" or "residual forward".
        constants: that differ from the shipped ones.
        options: fields of its `Launch` that differ.
        splits: of the residual: at most so many programs a sample.
        batch: pairs in a call.
    """

    kernel: str
    constants: dict[str, int] = dataclasses.field(default_factory=dict)
    options: dict[str, int] = dataclasses.field(default_factory=dict)
    splits: int | None = None
    batch: int = 1

    @property
    def label(self) -> str:
        changed = {**self.constants, **self.options, **({} if self.splits is None else {"splits": self.splits})}
        named = ", ".join(f"{name}={value}" for name, value in changed.items()) or "as shipped"
        return f"{self.kernel}, B={self.batch}, {named}"

    @property
    def group(self) -> Group:
        name = "residual forward" if self.kernel == "residual forward" else "similarity"
        return next(group for group in GROUPS if group.name == name)

    @contextmanager
    def applied(self) -> Iterator[None]:
        with ExitStack() as patches:
            if self.kernel == "residual forward":
                # A launch is made once: nothing of a variant may be left behind, nor be there before.
                forget = residual_kernels.forward_launch.cache_clear
                forget()
                patches.callback(forget)
                changed = {
                    "FORWARD_BLOCK": self.constants.get("BLOCK", residual_kernels.FORWARD_BLOCK),
                    "MAX_SPLITS": self.splits or residual_kernels.MAX_SPLITS,
                    "forward_launch": _changing(residual_kernels.forward_launch, self._change),
                }
                patches.enter_context(mock.patch.multiple(residual_kernels, **changed))
            else:
                changed = _changing(pooled_similarity._launches, self._change_one)
                patches.enter_context(mock.patch.object(pooled_similarity, "_launches", changed))
            yield

    def _change(self, launch: Launch) -> Launch:
        return dataclasses.replace(launch, constants={**launch.constants, **self.constants}, **self.options)

    def _change_one(self, launches: Any) -> Any:
        return launches._replace(**{self.kernel: self._change(getattr(launches, self.kernel))})


def _changing(make: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: change(make(*args, **kwargs))


def _streams(kernel: str, rows: str, blocks: tuple[tuple[int, int, int, int], ...]) -> list[Variant]:
    made = [
        Variant(kernel, {rows: height, "BLOCK_D": width}, {"num_stages": stages, "threads": threads})
        for height, width, stages, threads in blocks
    ]
    return [Variant(kernel), *made]


VARIANTS = [
    *_streams(
        "compare",
        "BLOCK_P",
        ((64, 128, 3, 128), (64, 128, 4, 128), (128, 64, 4, 128), (128, 64, 4, 256), (32, 128, 4, 128), (64, 64, 6, 128)),
    ),
    *_streams(
        "pool", "BLOCK_Q", ((32, 256, 3, 128), (64, 128, 3, 128), (64, 64, 4, 128), (16, 128, 5, 128), (32, 128, 6, 128))
    ),
    *(
        Variant("residual forward", constants, options, splits, batch)
        for batch in (64, 1)
        for constants, options, splits in (
            ({}, {}, None),
            ({}, {}, 64),
            ({}, {}, 32),
            ({"BLOCK": 512}, {"threads": 64}, 256),
            ({"BLOCK": 2048}, {"threads": 256}, None),
            ({"BLOCK": 1024, "LANES": 4}, {"threads": 256}, None),
        )
    ),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.label)
def test_variant(recorder: Recorder, case: str, variant: Variant) -> None:
    if DEVICE.type == "cpu" and not INTERPRETED:
        pytest.skip("no GPU")
    shape, group = Shape(SHAPE, NAMED[SHAPE], variant.batch), variant.group
    inputs, run = group.inputs_in_turn(shape, DEVICE), group.providers[OURS]
    with variant.applied():
        error = group.error(run(inputs[0]), group.exact(inputs[0]))
        assert error <= group.tolerance_of(OURS, shape), f"error {error:.1e} against float64"
        how = plan([lambda x=x: run(x) for x in inputs], DEVICE)
        median, spread = measured(how)
    recorder.append(
        "variant",
        case=case,
        **dataclasses.asdict(variant),
        shape=shape.label,
        median=median,
        spread=spread,
        bytes=group.bytes_of(shape),
        error=error,
        method=how.method,
    )
