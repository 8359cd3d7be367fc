"""Settings of the studies: of `focusdpo masks`, `ablate`, `stress` and `microcosm`."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from focusdpo.foundation.choices import (
    FeatureSource,
    FocusSource,
    Granularity,
    KernelBackend,
    MaskFrom,
    MatchCount,
    Pooling,
    StructureSource,
)
from focusdpo.foundation.settings import require
from focusdpo.training.config import ModelConfig

Variant = Literal[
    "base", "sft", "dpo", "prior", "subject", "structure", "per_subject", "max", "random", "truth", "estimate", "detail",
    "focus", "focus_estimate",
]  # fmt: skip
Grid = Literal[
    "tau", "gamma", "match_count", "layers", "mask_from", "feature_source", "source", "kappa", "per_subject", "pooling",
    "granularity",
]  # fmt: skip
At = Literal["end", "equal drift"]
Kind = Literal["alike", "easy"]
KINDS: tuple[Kind, ...] = ("alike", "easy")


@dataclass
class MasksConfig:
    """The masks of one pair of a run.

    Args:
        config: The run: its folder, or its settings as YAML.
        pair: Number of the pair, from 0, in the order of its file.
        split: Which of the run's pairs are counted.
        timesteps: Times t between 0 (clean) and 1 (noise).
        layer_groups: Contiguous groups that the tapped blocks are cut into, beside all of them, which is what the loss uses; 0
            draws these alone.
        checkpoint: Whose adapter: "latest", a folder, or "none" for the model before training.
        seed: Of the noise, the same at each time.
        out: Folder for pictures and numbers.
        overwrite: Replace what an earlier call left in it.
        source: What the structure field is made of, as focus.source; null takes the run's.
    """

    config: str
    pair: int = 0
    split: Literal["train", "validation"] = "validation"
    timesteps: list[float] = field(default_factory=lambda: [0.1, 0.5, 0.9])
    layer_groups: int = 3
    checkpoint: str = "latest"
    seed: int = 0
    out: str = "masks"
    overwrite: bool = False
    source: StructureSource | None = None

    def __post_init__(self) -> None:
        require(self.pair >= 0, "pair", self.pair, "0 or more")
        require_times(self.timesteps)
        require(self.layer_groups >= 0, "layer_groups", self.layer_groups, "0 or more")
        require(0 <= self.seed < 2**32, "seed", self.seed, "0 <= seed < 2^32")


def require_times(times: Sequence[float]) -> None:
    """ValueError unless each is between 0 and 1, and there once."""
    require(bool(times) and all(0 < t < 1 for t in times), "timesteps", times, "numbers between 0 and 1, neither included")
    require(len(set(times)) == len(times), "timesteps", times, "each once")


@dataclass
class AblationConfig:
    """A training run, and what is changed about it.

    Args:
        config: The run: its folder, or its settings as YAML. It needs held-out pairs.
        output_dir: Folder for all runs, the numbers and the page.
        variants: "base" is the model before training, "sft" supervised fine-tuning on winners, "dpo" Diffusion-DPO, "prior" the
            prior alone as mask, "subject" the prior with a sigmoid for each subject, "structure" M_s alone, "per_subject" M_s
            of each subject's own prior, "max" M_s of the best reference token, "random" an M_s of that size anywhere in the
            prior, "truth" M_s of matches that are each subject's own prior, "estimate" the estimate field alone (E10),
            "detail" M_d alone, "focus" the whole method, "focus_estimate" the whole method on the estimate field.
        grids: Settings of the whole method that are varied one at a time.
        tau: Values of the grid.
        gamma: Values of the grid.
        match_count: Values of the grid.
        layers: Values of the grid: "all", a third of the blocks as "early", "middle", "late", or their numbers such as "0,2,4".
        mask_from: Values of the grid.
        feature_source: Values of the grid.
        source: Values of the grid.
        kappa: Values of the grid, with the estimate field.
        per_subject: Values of the grid.
        pooling: Values of the grid.
        granularity: Values of the grid.
        gradients: Train nothing, and compare the variants' mean gradients before training instead: two whose cosine is near 1
            take the same first step.
        gradient_pairs: Of how many training pairs those means are, the first ones.
        seeds: Each variant is trained once with each.
        prior_beta: Beta of the variants without a mask within the prior, "dpo", "prior" and "subject"; null takes the run's, as
            all others do.
        baseline: The variant that differences are taken against.
        primary: The comparison to the baseline that is judged by itself, as a variant and a measure; all others have Holm's
            correction. Its measure says at which drift variants are also compared.
        primary_at: Whether that is at the end of training, or where all have moved as far from the model before training.
        max_steps: Optimiser steps of each run; null takes the run's.
        points: How often the held-out pairs are judged in the course of a run: at its end, at a half of its steps, at a quarter
            of them and so on.
        judge_points: Ask the judge at each point as well, such as the microcosm's of what is drawn, and not at the end alone.
        times: Times at which errors of held-out pairs are taken.
        judged_pairs: How many held-out pairs are judged, the first ones; null takes all.
        samples: How many of them are also sampled at the end of each run.
        workers: Runs at the same time; null takes as many as there are GPUs, each with one of its own, which more would share.
        overwrite: Delete what an earlier ablation left in output_dir.
    """

    config: str
    output_dir: str = "ablation"
    variants: list[Variant] = field(
        default_factory=lambda: ["base", "sft", "dpo", "prior", "structure", "random", "estimate", "detail", "focus"]
    )
    grids: list[Grid] = field(default_factory=list)
    tau: list[float] = field(default_factory=lambda: [0.05, 0.1, 0.2, 0.4])
    gamma: list[float] = field(default_factory=lambda: [0.0, 0.3, 0.6])
    match_count: list[MatchCount] = field(default_factory=lambda: ["reference", "prior", 0.1, 0.25])
    layers: list[str] = field(default_factory=lambda: ["all", "early", "middle", "late"])
    mask_from: list[MaskFrom] = field(default_factory=lambda: ["winner", "each"])
    feature_source: list[FeatureSource] = field(default_factory=lambda: ["policy", "reference"])
    source: list[FocusSource] = field(default_factory=lambda: ["features", "estimate", "random"])
    kappa: list[float] = field(default_factory=lambda: [0.5, 0.75, 0.9])
    per_subject: list[bool] = field(default_factory=lambda: [False, True])
    pooling: list[Pooling] = field(default_factory=lambda: ["reference", "max"])
    granularity: list[Granularity] = field(default_factory=lambda: ["image", "subject"])
    gradients: bool = False
    gradient_pairs: int = 64
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    prior_beta: float | None = None
    baseline: Variant = "prior"
    primary: list[str] = field(default_factory=list)
    primary_at: At = "end"
    max_steps: int | None = None
    points: int = 4
    judge_points: bool = False
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
        require(self.prior_beta is None or self.prior_beta > 0, "prior_beta", self.prior_beta, "a positive number, or null")
        require(self.baseline in self.variants, "baseline", self.baseline, f"one of the variants {self.variants}")
        named = len(self.primary) == 2 and self.primary[0] != self.baseline
        require(named or not self.primary, "primary", self.primary, f"a variant other than {self.baseline!r}, and a measure")
        require(bool(self.primary) or self.primary_at == "end", "primary_at", self.primary_at, "end, as primary is not set")
        require(bool(self.seeds) and all(0 <= seed < 2**32 for seed in self.seeds), "seeds", self.seeds, "0 <= seed < 2^32")
        require(bool(self.times) and all(0 < t < 1 for t in self.times), "times", self.times, "numbers between 0 and 1")
        require(self.max_steps is None or self.max_steps >= 1, "max_steps", self.max_steps, "at least 1, or null")
        require(self.gradient_pairs >= 2, "gradient_pairs", self.gradient_pairs, "at least 2")
        require(self.points >= 1, "points", self.points, "at least 1")
        require(self.judged_pairs is None or self.judged_pairs >= 1, "judged_pairs", self.judged_pairs, "at least 1, or null")
        require(self.samples >= 0, "samples", self.samples, "0 or more")
        require(self.workers is None or self.workers >= 1, "workers", self.workers, "at least 1, or null")
        for name in self.grids:
            require(bool(getattr(self, name)), name, getattr(self, name), f"at least one value, as grids has {name!r}")


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
    match_counts: list[MatchCount] = field(default_factory=lambda: ["reference", "prior"])
    level: float = 0.95
    resamples: int = 2000
    seed: int = 0
    output_dir: str = "stress"
    overwrite: bool = False
    backend: KernelBackend | None = None
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


@dataclass(frozen=True)
class Size:
    """How large the world is and how long it learns.

    resolution, reference_resolution: sides of scenes and references in pixels. scenes, mismatched, pairs, tuning, held_out:
    numbers of composed scenes for pre-training, of those that are shown with other subjects as well, of preference pairs, of
    scenes that beta is chosen on, of held-out scenes. vae_channels, latent_channels: of the autoencoder. heads, layers: of the
    transformer, double and single blocks, 32 wide each head. flow_steps: of the pretrained model, from it to the early one,
    from that to the middle one, from that to the late one. *_steps, *_batch: of each training.
    lr, beta, rank: of the preference training. points: at which it is judged. sampler_steps: of a generated image. samples:
    images generated a held-out scene.
    """

    resolution: int
    reference_resolution: int
    scenes: int
    mismatched: int
    pairs: int
    tuning: int
    held_out: int
    vae_channels: tuple[int, int, int, int]
    latent_channels: int
    vae_steps: int
    vae_batch: int
    judge_steps: int
    heads: int
    layers: tuple[int, int]
    flow_steps: tuple[int, int, int, int]
    flow_batch: int
    flow_lr: float
    tuning_steps: int
    tuning_batch: int
    lr: float
    beta: float
    rank: int
    points: int
    sampler_steps: int
    samples: int


SIZES = {
    "smoke": Size(
        resolution=64, reference_resolution=32, scenes=24, mismatched=8, pairs=12, tuning=2, held_out=4,
        vae_channels=(8, 8, 8, 8), latent_channels=4, vae_steps=4, vae_batch=4, judge_steps=4,
        heads=1, layers=(1, 1), flow_steps=(2, 1, 1, 1), flow_batch=4, flow_lr=1e-3,
        tuning_steps=2, tuning_batch=2, lr=1e-3, beta=100.0, rank=4, points=2, sampler_steps=2, samples=1,
    ),
    "decisive": Size(
        resolution=192, reference_resolution=96, scenes=2400, mismatched=800, pairs=160, tuning=48, held_out=24,
        vae_channels=(8, 16, 32, 64), latent_channels=4, vae_steps=1500, vae_batch=4, judge_steps=1500,
        heads=3, layers=(2, 3), flow_steps=(1200, 250, 200, 200), flow_batch=8, flow_lr=2e-3,
        tuning_steps=32, tuning_batch=4, lr=1e-3, beta=1000.0, rank=16, points=5, sampler_steps=3, samples=1,
    ),
    "full": Size(
        resolution=256, reference_resolution=128, scenes=8000, mismatched=4000, pairs=960, tuning=96, held_out=192,
        vae_channels=(32, 64, 128, 128), latent_channels=16, vae_steps=2000, vae_batch=64, judge_steps=3000,
        heads=12, layers=(4, 8), flow_steps=(2400, 600, 600, 600), flow_batch=64, flow_lr=1e-3,
        tuning_steps=80, tuning_batch=16, lr=1e-4, beta=2000.0, rank=32, points=5, sampler_steps=20, samples=2,
    ),
}  # fmt: skip
Base = Literal["early", "middle", "late"]
BASES: tuple[Base, ...] = typing.get_args(Base)
MIDDLE: Base = "middle"  # on which beta is chosen, and everything is compared


@dataclass
class MicrocosmConfig:
    """A small world, three models that have learnt it less and more, and an ablation on each.

    Args:
        out: Folder for everything: photographs composed, models, runs, numbers, pictures.
        size: "smoke" only runs the code, "decisive" is for two CPU cores, "full" for a GPU.
        dreambench: A DreamBench folder whose subjects are taken instead of scikit-image's photographs.
        bases: The models that variants are trained on, which have learnt the world for a short, a longer or a long time.
        variants: As in `focusdpo ablate`, on the middle model.
        everywhere: Of them, those that are trained on the early and the late model as well.
        grids: As in `focusdpo ablate`; on the middle model.
        seeds: Each variant is trained once with each; world and models are the same for all.
        seed: Of the world and of the models.
        tuning_steps: Optimiser steps of each variant; null takes the size's.
        lr: Learning rate of each variant; null takes the size's.
        beta: Of the preference loss; null chooses, once for the prior alone and once for masks within it, the size's, or a
            quarter or four times that where it draws more by over one standard error, on pairs of their own and the middle
            model, with a seed of its own.
        reduction: Of the errors in the loss. "masked_mean" divides by the mask's size, which multiplies beta by another factor
            for each mask.
        primary: As in `focusdpo ablate`.
        primary_at: As in `focusdpo ablate`.
        judge_points: As in `focusdpo ablate`.
        workers: Runs at the same time; null takes as many as there are GPUs.
        backend: Kernels: "triton", "torch", or chosen by device.
        cpu: Use the CPU even where there is a GPU.
        overwrite: Delete what an earlier microcosm left in `out`.
    """

    out: str = "microcosm"
    size: Literal["smoke", "decisive", "full"] = "decisive"
    dreambench: str | None = None
    bases: list[Base] = field(default_factory=lambda: list(BASES))
    variants: list[Variant] = field(
        default_factory=lambda: [
            "base", "sft", "dpo", "prior", "subject", "structure", "per_subject", "random", "truth", "estimate", "detail",
            "focus", "focus_estimate",
        ]
    )  # fmt: skip
    everywhere: list[Variant] = field(default_factory=lambda: ["base", "prior", "truth", "estimate", "focus"])
    grids: list[Grid] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    seed: int = 0
    tuning_steps: int | None = None
    lr: float | None = None
    beta: float | None = None
    reduction: Literal["mean", "masked_mean"] = "mean"
    primary: list[str] = field(default_factory=lambda: ["focus", "identity"])
    primary_at: At = "equal drift"
    judge_points: bool = True
    workers: int | None = None
    backend: KernelBackend | None = None
    cpu: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        self.sizes = SIZES[self.size]
        self.steps = self.sizes.tuning_steps if self.tuning_steps is None else self.tuning_steps
        require(self.steps >= 1, "tuning_steps", self.tuning_steps, "at least 1, or null")
        require(len(set(self.bases)) == len(self.bases) > 0, "bases", self.bases, "at least one, each once")
        once = len(set(self.everywhere)) == len(self.everywhere)
        require(once, "everywhere", self.everywhere, "each once")
        require(not self.grids or MIDDLE in self.bases, "grids", self.grids, "none without the middle model among bases")
        self.baseline: Variant = "prior" if "prior" in self.variants else self.variants[0] if self.variants else "prior"
        elsewhere = any(base != MIDDLE for base in self.bases) and bool(self.variants)
        held = self.baseline in self.everywhere
        require(
            held or not elsewhere,
            "everywhere",
            self.everywhere,
            f"{self.baseline!r} among them, which others are compared with",
        )
        for name in ("lr", "beta"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "a positive number, or null")
        require(0 <= self.seed < 2**32, "seed", self.seed, "0 <= seed < 2^32")
        for base in self.bases:
            self.ablation(base)  # whose settings have their own checks

    def ablation(self, base: Base, prior_beta: float | None = None) -> AblationConfig:
        """The ablation on a base."""
        variants = [name for name in self.variants if base == MIDDLE or name in self.everywhere]
        return AblationConfig(
            config=str(Path(self.out) / base / "train.yaml"),
            output_dir=str(Path(self.out) / base / "ablation"),
            variants=variants,
            grids=self.grids if base == MIDDLE else [],
            seeds=self.seeds,
            prior_beta=prior_beta,
            baseline=self.baseline,
            primary=self.primary,
            primary_at=self.primary_at,
            judge_points=self.judge_points,
            points=min(self.sizes.points, self.steps),
            times=[0.6],
            judged_pairs=-(-2 * self.sizes.held_out // 3),  # the judge sees all; this saves time
            samples=0,  # all held-out scenes are drawn for the judge
            workers=self.workers,
        )
