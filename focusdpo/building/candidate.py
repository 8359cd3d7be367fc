"""A pair in the making, and what a stage is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from focusdpo.building.scenes import Scene, SceneSubject, View

Pixels = NDArray[np.uint8]  # [H, W, 3], RGB
Mask = NDArray[np.bool_]  # [H, W]

IMAGES = "images"  # a folder per pair in it
KEPT = ("index", "variant", "seed", "record", "rejected", "failed", "pair", "hash")  # of a candidate that is done


class Rejected(Exception):  # noqa: N818  a verdict, not an error
    """A stage will not make a pair of this candidate; the message is the reason that is counted and listed."""


@dataclass
class Photo:
    """A photo of one subject, at the builder's size. `mask` is there once it is known."""

    subject: SceneSubject
    view: View
    pixels: Pixels
    mask: Mask | None = None

    @property
    def region(self) -> Mask:
        """The mask, where a segmentation has given it."""
        assert self.mask is not None
        return self.mask


@dataclass
class Candidate:
    """One pair in the making: every stage adds its part.

    Attributes:
        index, variant: which scene, and which of the pairs that are built from it.
        seed: of the build; with index and variant it decides every random choice.
        scene: the winner. subjects: its subjects as photos of their own, which share the scene's pixels.
        background: the scene without its subjects, where there is such an image.
        references: one photo per subject.
        changing: which subjects are to change. kinds: for each of them, the embedded disruptions in the order to try them in.
        donors: for those that may need them, photos of other instances of the class.
        captions: a text per subject. loser: the scene after the disruption. priors: what changed, a mask per subject.
        notes: what goes into the pair's meta.
        rejected, failed: why there will be no pair: by a stage's judgement, or by an exception.
        pair, hash: its line of pairs.jsonl, and the perceptual hash of its images, once these are written.
    """

    index: int
    variant: int
    seed: int
    record: Scene
    subjects: list[Photo] = field(default_factory=list)
    references: list[Photo] = field(default_factory=list)
    changing: Sequence[int] = ()
    kinds: dict[int, list[str]] = field(default_factory=dict)
    donors: dict[int, list[Photo]] = field(default_factory=dict)
    scene: Pixels | None = None
    background: Pixels | None = None
    captions: list[str] = field(default_factory=list)
    loser: Pixels | None = None
    priors: list[Mask] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    rejected: str | None = None
    failed: str | None = None
    pair: dict[str, Any] | None = None
    hash: str | None = None

    @property
    def name(self) -> str:
        return f"{self.index:07d}-{self.variant}"

    @property
    def done(self) -> bool:
        return bool(self.rejected or self.failed or self.pair)

    def outcome(self) -> dict[str, Any]:
        """What the manifest keeps."""
        verdicts = {"rejected": self.rejected, "failed": self.failed, "pair": self.pair, "hash": self.hash}
        kept = {name: value for name, value in verdicts.items() if value is not None}
        return {"name": self.name, "line": self.record.line, "variant": self.variant, **kept}

    def rng(self, purpose: str) -> np.random.Generator:
        """A generator of its own for each purpose, so that no stage's draws depend on another's."""
        return np.random.default_rng([self.seed, self.index, self.variant, *purpose.encode()])


class Stage(Protocol):
    """A step of the pipeline: reads and completes a candidate.

    `device` says where it runs: stages of one device that follow each other share a worker. Raises Rejected to give up a
    candidate.
    """

    device: str

    def __call__(self, candidate: Candidate) -> None: ...


def run_stages(stages: Sequence[Stage], candidate: Candidate) -> Candidate:
    """Applies the stages, up to the first that gives the candidate up. An exception fails this candidate, not the build."""
    for stage in stages:
        if candidate.done:
            break
        try:
            stage(candidate)
        except Rejected as reason:
            candidate.rejected = str(reason)
        except Exception as error:
            candidate.failed = f"{type(stage).__name__}: {type(error).__name__}: {error}"
    if candidate.done:  # nobody needs the pixels any more, and they would travel
        candidate = Candidate(**{name: getattr(candidate, name) for name in KEPT})
    return candidate
