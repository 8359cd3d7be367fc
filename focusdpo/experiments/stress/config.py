"""Settings of the stress test."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from focusdpo.experiments.masks import require_times
from focusdpo.settings import require
from focusdpo.training.config import ModelConfig

Kind = Literal["alike", "easy"]
Pooling = Literal["reference", "max"]
KINDS: tuple[Kind, ...] = ("alike", "easy")


@dataclass
class StressConfig:
    """Two subjects that look alike in one scene, and two that do not: whose region does S match each reference with?

    Args:
        config: A training run, its folder or its settings as YAML, whose model and tapped blocks are tested.
        checkpoint: Of the run, whose adapter is tested: "latest", a folder, or "none" for the model before training.
        model: A pretrained model to test instead of a run; a trained LoRA is given as model.base_lora.
        dreambench: A DreamBench folder, whose dogs are the subjects; null takes scikit-image's photos, seven coins above all.
        scenes: Number of scenes of each kind.
        resolution: Side of a scene in pixels.
        reference_resolution: Longest side of a reference in pixels.
        timesteps: Times t between 0 (clean) and 1 (noise).
        poolings: "reference" compares with the mean reference token (E4), "max" with the best matching one (E4').
        match_counts: K per subject: "reference" (its reference tokens), "prior" (tokens of its region, so that precision and
            recall can both be 1), a number of tokens, or a fraction of the target's tokens.
        level: Of the intervals.
        resamples: Bootstrap resamples of an interval.
        seed: Of scenes and noise.
        output_dir: Folder for the scenes, the numbers and the pictures.
        overwrite: Delete what an earlier test left in output_dir.
        backend: Kernels: "triton", "torch", or chosen by device; null takes a run's own.
        cpu: Use the CPU even where there is a GPU.
    """

    config: str | None = None
    checkpoint: str = "latest"
    model: ModelConfig | None = None
    dreambench: str | None = None
    scenes: int = 24
    resolution: int = 512
    reference_resolution: int = 320
    timesteps: list[float] = field(default_factory=lambda: [0.1, 0.5, 0.9])
    poolings: list[Pooling] = field(default_factory=lambda: ["reference", "max"])
    match_counts: list[Literal["reference", "prior"] | int | float] = field(default_factory=lambda: ["reference", "prior"])
    level: float = 0.95
    resamples: int = 2000
    seed: int = 0
    output_dir: str = "stress"
    overwrite: bool = False
    backend: Literal["triton", "torch"] | None = None
    cpu: bool = False

    def __post_init__(self) -> None:
        if (self.config is None) == (self.model is None):
            raise ValueError(
                "config, model: got " + ("both" if self.config else "neither") + "; expected a run, or --model.path"
            )
        require(self.model is None or self.checkpoint == "latest", "checkpoint", self.checkpoint, "none without --config")
        require(self.scenes >= 2, "scenes", self.scenes, "at least 2, as intervals are over scenes")
        require(
            self.resolution >= 64 and self.resolution % 16 == 0, "resolution", self.resolution, "a multiple of 16, at least 64"
        )
        require(self.reference_resolution >= 32, "reference_resolution", self.reference_resolution, "at least 32")
        require_times(self.timesteps)
        for name in ("poolings", "match_counts"):
            values = getattr(self, name)
            require(bool(values) and len(set(values)) == len(values), name, values, "at least one, each once")
        tokens = (self.resolution // 16) ** 2
        for count in self.match_counts:
            number = round(count * tokens) if isinstance(count, float) else count
            fits = isinstance(number, str) or 1 <= number <= tokens
            require(fits, "match_counts", count, f"1 to {tokens} tokens, or a fraction of them in (0, 1] that is one at least")
        require(0 < self.level < 1, "level", self.level, "a number between 0 and 1, like 0.95")
        require(self.resamples >= 100, "resamples", self.resamples, "at least 100")
        require(0 <= self.seed < 2**32, "seed", self.seed, "0 <= seed < 2^32")
