"""Settings of the microcosm."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from focusdpo.experiments.ablation.config import AblationConfig, Grid, Variant
from focusdpo.settings import require


@dataclass(frozen=True)
class Size:
    """How large the world is and how long it learns.

    resolution, reference_resolution: sides of scenes and references in pixels. scenes, pairs, held_out: numbers of composed
    scenes for pre-training, of preference pairs, of held-out scenes. vae_channels, latent_channels: of the autoencoder. heads,
    layers: of the transformer, double and single blocks, 32 wide each head. *_steps, *_batch: of each training. lr, beta, rank:
    of the preference training. sampler_steps: of a generated image. samples: images generated a held-out scene.
    """

    resolution: int
    reference_resolution: int
    scenes: int
    pairs: int
    held_out: int
    vae_channels: tuple[int, int, int, int]
    latent_channels: int
    vae_steps: int
    vae_batch: int
    classifier_steps: int
    heads: int
    layers: tuple[int, int]
    flow_steps: int
    flow_batch: int
    flow_lr: float
    tuning_steps: int
    tuning_batch: int
    lr: float
    beta: float
    rank: int
    sampler_steps: int
    samples: int


SIZES = {
    "smoke": Size(
        resolution=64, reference_resolution=32, scenes=24, pairs=12, held_out=4,
        vae_channels=(8, 8, 8, 8), latent_channels=4, vae_steps=4, vae_batch=4, classifier_steps=4,
        heads=1, layers=(1, 1), flow_steps=4, flow_batch=4, flow_lr=1e-3,
        tuning_steps=2, tuning_batch=2, lr=1e-3, beta=100.0, rank=4, sampler_steps=2, samples=1,
    ),
    "small": Size(
        resolution=128, reference_resolution=64, scenes=4000, pairs=480, held_out=96,
        vae_channels=(12, 24, 64, 128), latent_channels=16, vae_steps=3000, vae_batch=4, classifier_steps=500,
        heads=6, layers=(2, 4), flow_steps=1800, flow_batch=16, flow_lr=1e-3,
        tuning_steps=40, tuning_batch=8, lr=1e-4, beta=2000.0, rank=16, sampler_steps=10, samples=2,
    ),
    "full": Size(
        resolution=256, reference_resolution=128, scenes=8000, pairs=960, held_out=128,
        vae_channels=(32, 64, 128, 128), latent_channels=16, vae_steps=2000, vae_batch=64, classifier_steps=800,
        heads=12, layers=(4, 8), flow_steps=3000, flow_batch=64, flow_lr=1e-3,
        tuning_steps=80, tuning_batch=16, lr=1e-4, beta=2000.0, rank=32, sampler_steps=20, samples=2,
    ),
}  # fmt: skip


@dataclass
class MicrocosmConfig:
    """A small world, a model that learns it, and the ablation on that model.

    Args:
        out: Folder for everything: photographs composed, models, runs, numbers, pictures.
        size: "smoke" only runs the code, "small" is for a CPU, "full" for a GPU.
        dreambench: A DreamBench folder whose subjects are taken instead of scikit-image's photographs.
        variants: As in `focusdpo ablate`.
        grids: As in `focusdpo ablate`.
        seeds: Each variant is trained once with each; world and model are the same for all.
        seed: Of the world and of the model.
        tuning_steps: Optimiser steps of each variant; null takes the size's.
        lr: Learning rate of each variant; null takes the size's.
        beta: Of the preference loss; null takes the size's.
        reduction: Of the errors in the loss. "masked_mean" divides by the mask's size, so that one beta serves masks of all
            sizes; with "mean" a small mask makes small margins.
        workers: Runs at the same time; null takes as many as there are GPUs.
        backend: Kernels: "triton", "torch", or chosen by device.
        cpu: Use the CPU even where there is a GPU.
        overwrite: Delete what an earlier microcosm left in `out`.
    """

    out: str = "microcosm"
    size: Literal["smoke", "small", "full"] = "small"
    dreambench: str | None = None
    variants: list[Variant] = field(default_factory=lambda: ["base", "sft", "dpo", "prior", "structure", "detail", "focus"])
    grids: list[Grid] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    seed: int = 0
    tuning_steps: int | None = None
    lr: float | None = None
    beta: float | None = None
    reduction: Literal["mean", "masked_mean"] = "mean"
    workers: int | None = None
    backend: Literal["triton", "torch"] | None = None
    cpu: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        self.sizes = SIZES[self.size]
        self.steps = self.sizes.tuning_steps if self.tuning_steps is None else self.tuning_steps
        require(self.steps >= 1, "tuning_steps", self.tuning_steps, "at least 1, or null")
        for name in ("lr", "beta"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "a positive number, or null")
        require(0 <= self.seed < 2**32, "seed", self.seed, "0 <= seed < 2^32")
        # The settings of the ablation have their own checks.
        baseline: Variant = "dpo" if "dpo" in self.variants else self.variants[0] if self.variants else "dpo"
        self.ablation = AblationConfig(
            config=str(Path(self.out) / "train.yaml"),
            output_dir=str(Path(self.out) / "ablation"),
            variants=self.variants,
            grids=self.grids,
            seeds=self.seeds,
            baseline=baseline,
            points=2,
            times=[0.4, 0.8],
            samples=0,  # all held-out scenes are drawn for the judge
            workers=self.workers,
        )
