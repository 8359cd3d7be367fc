"""Settings of an ablation."""

from __future__ import annotations

import typing
from dataclasses import dataclass, field
from typing import Literal

from focusdpo.settings import require

Variant = Literal["base", "sft", "dpo", "prior", "structure", "detail", "focus"]
Grid = Literal["tau", "gamma", "match_count", "layers", "mask_from", "feature_source"]


@dataclass
class AblationConfig:
    """A training run, and what is changed about it.

    Args:
        config: The run: its folder, or its settings as YAML. It needs held-out pairs.
        output_dir: Folder for all runs, the numbers and the page.
        variants: "base" is the model before training, "sft" supervised fine-tuning on winners, "dpo" Diffusion-DPO, "prior" the
            prior alone as mask, "structure" M_s alone, "detail" M_d alone, "focus" the whole method.
        grids: Settings of the whole method that are varied one at a time.
        tau: Values of the grid.
        gamma: Values of the grid.
        match_count: Values of the grid.
        layers: Values of the grid: "all", a third of the blocks as "early", "middle", "late", or their numbers such as "0,2,4".
        mask_from: Values of the grid.
        feature_source: Values of the grid.
        seeds: Each variant is trained once with each.
        baseline: The variant that differences are taken against.
        max_steps: Optimiser steps of each run; null takes the run's.
        points: How often the held-out pairs are judged in the course of a run, the last time at its end.
        times: Times at which errors of held-out pairs are taken.
        judged_pairs: How many held-out pairs are judged, the first ones; null takes all.
        samples: How many of them are also sampled at the end of each run.
        workers: Runs at the same time; null takes as many as there are GPUs, each with one of its own, which more would share.
        overwrite: Delete what an earlier ablation left in output_dir.
    """

    config: str
    output_dir: str = "ablation"
    variants: list[Variant] = field(default_factory=lambda: ["base", "sft", "dpo", "prior", "structure", "detail", "focus"])
    grids: list[Grid] = field(default_factory=list)
    tau: list[float] = field(default_factory=lambda: [0.05, 0.1, 0.2, 0.4])
    gamma: list[float] = field(default_factory=lambda: [0.0, 0.3, 0.6])
    match_count: list[Literal["reference", "prior"] | int | float] = field(
        default_factory=lambda: ["reference", "prior", 0.1, 0.25]
    )
    layers: list[str] = field(default_factory=lambda: ["all", "early", "middle", "late"])
    mask_from: list[Literal["winner", "each"]] = field(default_factory=lambda: ["winner", "each"])
    feature_source: list[Literal["policy", "reference"]] = field(default_factory=lambda: ["policy", "reference"])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    baseline: Variant = "dpo"
    max_steps: int | None = None
    points: int = 4
    times: list[float] = field(default_factory=lambda: [0.2, 0.4, 0.6, 0.8])
    judged_pairs: int | None = None
    samples: int = 4
    workers: int | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("variants", "grids", "seeds", "times", *typing.get_args(Grid)):
            values = getattr(self, name)
            require(len(set(values)) == len(values), name, values, "each once")
        require(bool(self.variants), "variants", self.variants, "at least one")
        require(self.baseline in self.variants, "baseline", self.baseline, f"one of the variants {self.variants}")
        require(bool(self.seeds) and all(0 <= seed < 2**32 for seed in self.seeds), "seeds", self.seeds, "0 <= seed < 2^32")
        require(bool(self.times) and all(0 < t < 1 for t in self.times), "times", self.times, "numbers between 0 and 1")
        require(self.max_steps is None or self.max_steps >= 1, "max_steps", self.max_steps, "at least 1, or null")
        require(self.points >= 1, "points", self.points, "at least 1")
        require(self.judged_pairs is None or self.judged_pairs >= 1, "judged_pairs", self.judged_pairs, "at least 1, or null")
        require(self.samples >= 0, "samples", self.samples, "0 or more")
        require(self.workers is None or self.workers >= 1, "workers", self.workers, "at least 1, or null")
        for name in self.grids:
            require(bool(getattr(self, name)), name, getattr(self, name), f"at least one value, as grids has {name!r}")
