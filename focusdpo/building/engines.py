"""Runs the stages over all candidates, here or in several processes; ray_engine.py does it on Ray, with the same pairs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from focusdpo.building.candidate import Candidate, Stage, run_stages
from focusdpo.building.captioning import CaptionModel, ClassNames
from focusdpo.building.config import BuildConfig, SegmentationConfig
from focusdpo.building.disruption import Disruption, Embedded
from focusdpo.building.encoder import load_encoder
from focusdpo.building.gates import Gates
from focusdpo.building.loading import Load
from focusdpo.building.scenes import Scene
from focusdpo.building.segmentation import GivenMasks, GrabCut, Rembg, Sam, Segmentation
from focusdpo.building.writing import Write
from focusdpo.foundation.workers import Pool


@dataclass(frozen=True)
class Step:
    """A stage yet to be made, where it runs: a model is loaded in the worker that uses it."""

    device: str
    make: Callable[[], Stage]


def steps(config: BuildConfig, scenes: Sequence[Scene]) -> list[Step]:
    """The pipeline that the settings name."""
    segmentation, captioning, disruption = config.segmentation, config.captioning, config.disruption
    caption: dict[str, Callable[[], Stage]] = {"class": ClassNames, "model": partial(CaptionModel, captioning)}
    return [
        Step("cpu", partial(Load, scenes, config)),
        Step(segmentation.device, partial(segmentation_of, segmentation)),
        Step(captioning.device, caption[captioning.name]),
        Step(disruption.device, partial(_disruption, config)),
        Step(config.encoder.device, partial(Gates, config.gates, config.encoder)),
        Step("cpu", partial(Write, Path(config.output_dir).absolute())),
    ]


def segmentation_of(config: SegmentationConfig) -> Segmentation:
    """What finds the masks."""
    if config.name in ("sam", "rembg"):
        return {"sam": Sam, "rembg": Rembg}[config.name](config)
    return GivenMasks() if config.name == "given" else GrabCut()


def _disruption(config: BuildConfig) -> Disruption:
    # A worker of Ray sees the device of its own stages alone.
    device = config.disruption.device if config.engine == "ray" else config.encoder.device
    encoder = load_encoder(replace(config.encoder, device=device))
    if config.disruption.name == "embedded":
        return Embedded(encoder, config.gates.max_resemblance)
    from focusdpo.building.inpainting import Inpainting  # imports diffusers' pipelines

    return Inpainting(config.disruption, encoder, config.gates.max_resemblance)


class Worker:
    """Makes its stages when the first candidate comes, and applies them."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = steps
        self._stages: list[Stage] | None = None

    def __call__(self, candidate: Candidate) -> Candidate:
        if self._stages is None:
            self._stages = [step.make() for step in self._steps]
        return run_stages(self._stages, candidate)

    def outcome_of(self, candidate: Candidate) -> dict[str, Any]:
        """What the manifest keeps of a candidate."""
        return self(candidate).outcome()


def run_plain(steps: Sequence[Step], candidates: Sequence[Candidate], workers: int) -> Generator[dict[str, Any]]:
    """Here, or in `workers` processes. Yields each candidate's outcome when it is done.

    Raises:
        ChildProcessError: a process was killed.
    """
    work = Worker(steps).outcome_of
    count = min(workers, len(candidates))
    if count <= 1:
        yield from map(work, candidates)
        return
    with Pool(count, work, attrgetter("name")) as pool:
        for _, outcome in pool.run(candidates, tell_silence=True):
            yield outcome
