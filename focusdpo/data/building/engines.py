"""Runs the stages over all drafts, here or in several processes; ray_engine.py does it on Ray, with the same pairs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
from torch.utils.data import DataLoader, Dataset

from focusdpo.data.building.captioning import CaptionModel, ClassNames
from focusdpo.data.building.config import BuildConfig, DisruptionConfig
from focusdpo.data.building.disruption import Disruption, Embedded
from focusdpo.data.building.draft import Draft, Stage, run_stages
from focusdpo.data.building.gates import Gates
from focusdpo.data.building.loading import Load
from focusdpo.data.building.scenes import Scene
from focusdpo.data.building.segmentation import GivenMasks, GrabCut, Sam
from focusdpo.data.building.writing import Write


@dataclass(frozen=True)
class Step:
    """A stage yet to be made, where it runs: a model is loaded in the worker that uses it."""

    device: str
    make: Callable[[], Stage]


def steps(config: BuildConfig, scenes: Sequence[Scene]) -> list[Step]:
    """The pipeline that the settings name."""
    segmentation, captioning, disruption = config.segmentation, config.captioning, config.disruption
    sam = segmentation.path, segmentation.detector, segmentation.threshold, segmentation.device
    model = captioning.path, captioning.prompt, captioning.max_new_tokens, captioning.device
    segment: dict[str, Callable[[], Stage]] = {"given": GivenMasks, "grabcut": GrabCut, "sam": partial(Sam, *sam)}  # type: ignore[arg-type]
    caption: dict[str, Callable[[], Stage]] = {"class": ClassNames, "model": partial(CaptionModel, *model)}  # type: ignore[arg-type]
    disrupt: dict[str, Callable[[], Stage]] = {
        "embedded": Embedded,
        "inpaint": partial(_inpainting, disruption),
    }
    return [
        Step("cpu", partial(Load, scenes, config.resolution, config.reference_resolution, disruption)),
        Step(segmentation.device, segment[segmentation.name]),
        Step(captioning.device, caption[captioning.name]),
        Step(disruption.device, disrupt[disruption.name]),
        Step(config.gates.device, partial(Gates, config.gates)),
        Step("cpu", partial(Write, Path(config.output_dir).absolute())),
    ]


def _inpainting(config: DisruptionConfig) -> Disruption:
    from focusdpo.data.building.inpainting import Inpainting  # imports diffusers' pipelines

    return Inpainting(config)


class Worker:
    """Makes its stages when the first draft comes, and applies them."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = steps
        self._stages: list[Stage] | None = None

    def __call__(self, draft: Draft) -> Draft:
        if self._stages is None:
            cv2.setNumThreads(1)  # the workers are what runs at once
            self._stages = [step.make() for step in self._steps]
        return run_stages(self._stages, draft)


class _Drafts(Dataset[dict[str, Any]]):
    def __init__(self, drafts: Sequence[Draft], worker: Worker) -> None:
        self._drafts = drafts
        self._worker = worker

    def __len__(self) -> int:
        return len(self._drafts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._worker(self._drafts[index]).outcome()


def run_plain(steps: Sequence[Step], drafts: Sequence[Draft], workers: int) -> Generator[dict[str, Any]]:
    """Here, or in `workers` processes: they end when this one is killed. Yields each draft's outcome."""
    yield from DataLoader(_Drafts(drafts, Worker(steps)), batch_size=None, num_workers=0 if workers == 1 else workers)
