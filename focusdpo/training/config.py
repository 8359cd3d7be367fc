"""Every setting of a training run, with its default and meaning.

The docstrings are the `--help` of `focusdpo train`. Values are checked here, before anything is loaded.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from focusdpo.foundation.choices import (
    Autocast,
    BackboneName,
    Check,
    EntropyMethod,
    FeatureSource,
    Granularity,
    KernelBackend,
    LoserScale,
    LossType,
    MaskFrom,
    MatchCount,
    Optimizer,
    Pooling,
    Quantization,
    Reduction,
    StructureSource,
    WeightDtype,
)
from focusdpo.foundation.settings import require as _require


def parse_ratios(name: str, texts: list[str] | None) -> list[tuple[int, int]] | None:
    """Aspect ratios as (width, height); ValueError for anything else."""
    if texts is None:
        return None
    _require(len(texts) > 0, name, texts, "at least one aspect ratio, or null")
    ratios = []
    for text in texts:
        match = re.fullmatch(r"([1-9]\d{0,5}):([1-9]\d{0,5})", text)
        _require(match is not None, name, text, 'an aspect ratio such as "4:3"')
        assert match is not None
        ratios.append((int(match[1]), int(match[2])))
    return ratios


@dataclass
class ModelConfig:
    """The pretrained model.

    Args:
        path: A diffusers pipeline, as a local folder or hub id.
        backbone: Which model family it is.
        revision: Revision on the hub.
        base_lora: A LoRA that is merged into the frozen weights before the adapter is added: a file or its folder, in
            the form of diffusers, PEFT, ComfyUI, kohya's tools or UNO. The reference model is then the base with it.
        base_lora_scale: Factor of its update.
        dtype: Precision of the frozen weights.
        quantization: Keep the frozen weights of the blocks in fewer bits: "nf4" (bitsandbytes) or "fp8" (torchao).
        guidance: Guidance value fed to guidance-distilled models; UNO trains with 1.
        max_sequence_length: Text tokens of a prompt.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        compile: Compile the transformer's blocks with torch.compile: the first steps take minutes, all others less time.
        activation_budget: Share of the activations inside a compiled block that is kept for the backward pass: 0 recomputes
            all, 1 keeps what PyTorch keeps by default. Needs compile=true, gradient_checkpointing=false and no dropout.
    """

    path: str
    backbone: BackboneName = "flux"
    revision: str | None = None
    base_lora: str | None = None
    base_lora_scale: float = 1.0
    dtype: WeightDtype = "bf16"
    quantization: Quantization | None = None
    guidance: float = 1.0
    max_sequence_length: int = 512
    gradient_checkpointing: bool = True
    compile: bool = False
    activation_budget: float | None = None

    def __post_init__(self) -> None:
        _require(1 <= self.max_sequence_length <= 512, "model.max_sequence_length", self.max_sequence_length, "1 to 512")
        _require(0 <= self.guidance < math.inf, "model.guidance", self.guidance, "0 or more")
        scale, name = self.base_lora_scale, "model.base_lora_scale"
        _require(math.isfinite(scale) and scale != 0, name, scale, "a finite number other than 0")
        _require(scale == 1 or self.base_lora is not None, name, scale, "1 without model.base_lora")
        budget, name = self.activation_budget, "model.activation_budget"
        if budget is not None:
            _require(0 <= budget <= 1, name, budget, "0 to 1")
            _require(self.compile, name, budget, "none without model.compile=true")
            _require(not self.gradient_checkpointing, name, budget, "none unless model.gradient_checkpointing=false")


@dataclass
class DataConfig:
    """Preference pairs and how they are brought to size.

    Args:
        train: Training pairs: pairs.jsonl or its folder, shards, parquet files or an image folder, or a pattern of files.
        validation: Held-out pairs, likewise; none are needed.
        resolution: Longest side of winner and loser in pixels; sides are cut to multiples of 16.
        reference_resolution: Longest side of a reference image in pixels. null brings references to size as the backbone's own
            pipeline does: for flux as UNO, to 512 px, or 320 px where there are several; for kontext and qwen-edit-plus to
            about a megapixel, for flux2 to at most that, where a number such as 512 takes less memory and time.
        reference_resolution_multiple: Another longest side for pairs that have several references; null is
            reference_resolution's value, whatever it is.
        buckets: Aspect ratios such as ["1:1", "4:3", "3:4"]: winner and loser are cut at the centre to the nearest, so that
            photos of many shapes share few layouts. null leaves each image its own shape.
        reference_buckets: The same for reference images.
        max_crop: Share of an image's area that a bucket may cut away. A pair with an image that would lose more, or with a mask
            of which nothing would be left, is not trained on; left_out.jsonl in output_dir lists these pairs.
        batch_size: Pairs per process and forward pass; all pairs of a batch share one layout of image sizes.
        num_workers: Processes that load images; 0 loads in the main one.
        shuffle: Draw the pairs in a new random order each epoch.
        check: What is looked at before training starts: "full" decodes every image, "headers" reads sizes only.
        cache: Folder in which the images' latents and the prompts' embeddings are kept; runs may share it. What it lacks is
            encoded before training: VAE and text encoders are loaded for that alone, and freed before the transformer comes.
        reference_cache: Folder in which the reference model's predictions are kept, computed before training for all draws that
            the run needs; a step then runs the policy alone. Needs loss.draws and data.cache.
    """

    train: str
    validation: str | None = None
    resolution: int = 512
    reference_resolution: int | None = None
    reference_resolution_multiple: int | None = None
    buckets: list[str] | None = None
    reference_buckets: list[str] | None = None
    max_crop: float = 0.2
    batch_size: int = 1
    num_workers: int = 2
    shuffle: bool = True
    check: Check = "full"
    cache: str | None = None
    reference_cache: str | None = None

    def __post_init__(self) -> None:
        for name in ("resolution", "reference_resolution", "reference_resolution_multiple"):
            value, expected = getattr(self, name), "at least 16 pixels (one token)"
            expected += "" if name == "resolution" else ", or null"
            _require(value is None or value >= 16, f"data.{name}", value, expected)
        for name in ("buckets", "reference_buckets"):
            parse_ratios(f"data.{name}", getattr(self, name))
        _require(0 <= self.max_crop < 1, "data.max_crop", self.max_crop, "0 <= max_crop < 1, a share of the area")
        _require(self.batch_size >= 1, "data.batch_size", self.batch_size, "at least 1")
        _require(self.num_workers >= 0, "data.num_workers", self.num_workers, "0 or more")
        _require(self.cache != "", "data.cache", self.cache, "a folder, or null")


@dataclass
class LoraConfig:
    """The adapter. The model without it is the reference model.

    Args:
        rank: Rank of the update matrices.
        alpha: The update is scaled by alpha / rank.
        dropout: Dropout on the adapter's input.
        target_modules: Ends of the names of the linear layers that get an adapter; null takes the backbone's own choice, the
            image stream's attention projections.
    """

    rank: int = 32
    alpha: float = 64.0
    dropout: float = 0.0
    target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        _require(self.rank >= 1, "lora.rank", self.rank, "at least 1")
        _require(0 < self.alpha < math.inf, "lora.alpha", self.alpha, "a positive number")
        _require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "0 <= dropout < 1")
        targets = self.target_modules
        named = targets is None or (len(targets) > 0 and all(targets))
        _require(named, "lora.target_modules", targets, "at least one name and none empty, or null for the backbone's own")


@dataclass
class FocusConfig:
    """The spatial mask of the loss (docs/method.md, E3 to E8, E10).

    Args:
        mask: "focus" is the method; "prior" uses the prior alone; "none" is plain Diffusion-DPO.
        source: What the structure field is made of: "features" compares hidden states with the references' (E5); "estimate" the
            model's own estimate of the clean winner with winner and loser (E10), which needs no reference tokens; "random" is
            as large as the features' field, but lies anywhere in the prior; "truth" matches each subject with its own prior.
            The last two are controls.
        kappa: How far from loser (0) to winner (1) an estimate has come that counts as aligned (E10).
        tau: Share of the prior that may be misaligned before details count (E8).
        gamma: Weight of structure against detail once subjects are aligned (E8).
        match_count: Matches per subject: "reference" (its reference tokens), "prior" (tokens of its prior), a number of
            tokens, or a fraction of the target's tokens (E5).
        per_subject: Compare each subject's matches with its own prior instead of the unions; needs per-subject priors (E6).
        pooling: "reference" compares target tokens with a subject's mean reference token (E4), "max" with the one most like
            them (E4').
        layers: Numbers of the tapped blocks in the order they run, or "all".
        mask_from: One mask from the winner for both images, or "each" its own.
        feature_source: Whose hidden states are compared, or whose estimate: the policy's, or the reference model's.
        entropy_method: Estimator of patch entropy (E7).
        entropy_bins: Bins over gray values from 0 to 1.
        entropy_sigma: Width of the Gaussian kernel around a bin.
    """

    mask: Literal["focus", "prior", "none"] = "focus"
    source: StructureSource = "features"
    kappa: float = 0.75
    tau: float = 0.1
    gamma: float = 0.3
    match_count: MatchCount = "reference"
    per_subject: bool = False
    pooling: Pooling = "reference"
    layers: Literal["all"] | list[int] = "all"
    mask_from: MaskFrom = "winner"
    feature_source: FeatureSource = "policy"
    entropy_method: EntropyMethod = "kde"
    entropy_bins: int = 32
    entropy_sigma: float = 0.01

    def __post_init__(self) -> None:
        _require(0 <= self.tau <= 1, "focus.tau", self.tau, "0 to 1")
        _require(0 <= self.gamma <= 1, "focus.gamma", self.gamma, "0 to 1")
        count, name = self.match_count, "focus.match_count"
        if isinstance(count, float):
            _require(0 < count <= 1, name, count, "a fraction in (0, 1], or a whole number")
        elif isinstance(count, int):
            _require(count >= 0, name, count, "0 or more tokens")
        _require(math.isfinite(self.kappa), "focus.kappa", self.kappa, "a finite number; 0 is the loser, 1 the winner")
        compares = self.source != "estimate" or not self.per_subject
        _require(compares, "focus.per_subject", True, 'false with source="estimate", which compares a token with no subject')
        winners = self.source != "estimate" or self.mask_from == "winner"
        _require(winners, "focus.mask_from", self.mask_from, '"winner" with source="estimate", whose field is the winner\'s')
        distinct = self.layers == "all" or 0 < len(set(self.layers)) == len(self.layers)
        _require(distinct, "focus.layers", self.layers, '"all", or at least one block, each once')

    @property
    def reads_features(self) -> bool:
        """Whether the structure field is made of hidden states."""
        return self.source in ("features", "random")

    @property
    def taps_features(self) -> bool:
        """Whether the loss's mask is."""
        return self.mask == "focus" and self.reads_features

    @property
    def counts_matches(self) -> bool:
        """Whether the loss's mask has a number of matches, K."""
        return self.mask == "focus" and self.source != "estimate"


@dataclass
class LossConfig:
    """The preference loss (docs/method.md, E1, E2, E9).

    Args:
        beta: Strength of the preference, for the chosen reduction.
        granularity: "image" has one sigmoid for a pair; "subject" one for each subject, of the errors within its own prior
            (E1'): a subject that is told apart leaves the others their gradient. Needs priors per subject.
        auto_beta: Gradient factor to hold by changing beta step by step from where it starts: the mean of 2 sigmoid(-logit),
            1 at the start and near 0 where pairs teach no more; 0.5 is a usual target. None leaves beta alone.
        reduction: How a sample's weighted squared errors become one number.
        mask_power: 1, or 2 to put the mask inside the norm.
        loss_type: Shape of the loss over the logit; "sft" trains on winners alone.
        label_smoothing: Assumed share of pairs with winner and loser exchanged (with "sigmoid").
        winner_anchor: Weight of the winner's own error, added to keep it from rising.
        reference_anchor: Weight of the mean squared difference between policy and reference model, over the whole image of
            winner and loser, added to keep the policy near.
        loser_scale: "sdpo" scales the loser's gradient so that the winner's error does not grow to first order, in each pair;
            "sdpo_batch" by one factor for all pairs of a batch, as Diffusion-SDPO's code does.
        sdpo_mu: Share of the winner's descent that `loser_scale` keeps, 0 to 1.
        timestep_weight: "none" weights all times alike; "noise" weights by (1 - t)^2, which turns velocity errors into noise
            errors.
        draws: Times and noise of a pair come from this many fixed draws, another one each epoch; none draws anew each time.
        times: Distribution of t, which is 0 for clean and 1 for noise: "logit_normal", "uniform", or a list of times.
        time_order: Which of a list's times a pair gets: "random", or "round_robin", one after the other from pair to pair.
        logit_mean: Mean of the logit-normal distribution of t. diffusers' scripts count from the other end: theirs is its
            negative.
        logit_std: Its standard deviation.
        shift: Times drawn are moved to s t / (1 + (s - 1) t); 1 leaves them. "auto" takes the pipeline's own shift, which as a
            rule grows with the image.
    """

    beta: float = 2000.0
    granularity: Granularity = "image"
    auto_beta: float | None = None
    reduction: Reduction = "mean"
    mask_power: Literal[1, 2] = 1
    loss_type: LossType = "sigmoid"
    label_smoothing: float = 0.0
    winner_anchor: float = 0.0
    reference_anchor: float = 0.0
    loser_scale: LoserScale | None = None
    sdpo_mu: float = 0.0
    timestep_weight: Literal["none", "noise"] = "none"
    draws: int | None = None
    times: Literal["logit_normal", "uniform"] | list[float] = "logit_normal"
    time_order: Literal["random", "round_robin"] = "random"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    shift: float | Literal["auto"] = 1.0

    def __post_init__(self) -> None:
        _require(0 < self.beta < math.inf, "loss.beta", self.beta, "a positive number")
        held = self.auto_beta is None or 0 < self.auto_beta < 1
        _require(held, "loss.auto_beta", self.auto_beta, "0 < auto_beta < 1, or null")
        fits = self.auto_beta is None or self.loss_type == "sigmoid"
        _require(fits, "loss.auto_beta", self.auto_beta, f"null with loss_type={self.loss_type!r}")
        _require(0 <= self.label_smoothing < 0.5, "loss.label_smoothing", self.label_smoothing, "0 <= label_smoothing < 0.5")
        split = self.granularity == "image" or self.loss_type != "sft"
        _require(split, "loss.granularity", self.granularity, "'image' with loss_type='sft', which has no sigmoid")
        smooths = self.label_smoothing == 0 or self.loss_type == "sigmoid"
        _require(smooths, "loss.label_smoothing", self.label_smoothing, f"0 with loss_type={self.loss_type!r}")
        for name in ("winner_anchor", "reference_anchor"):
            anchor = getattr(self, name)
            _require(math.isfinite(anchor) and anchor >= 0, f"loss.{name}", anchor, "0 or more")
        _require(0 <= self.sdpo_mu <= 1, "loss.sdpo_mu", self.sdpo_mu, "0 to 1")
        scales = self.sdpo_mu == 0 or self.loser_scale is not None
        _require(scales, "loss.sdpo_mu", self.sdpo_mu, "0 without loss.loser_scale")
        _require(self.draws is None or self.draws >= 1, "loss.draws", self.draws, "at least 1, or null")
        self._check_times()

    def _check_times(self) -> None:
        times, shift = self.times, self.shift
        listed = isinstance(times, list)
        if isinstance(times, list):
            fits = len(times) > 0 and all(0 <= t <= 1 for t in times)
            _require(fits, "loss.times", times, "at least one time, each from 0 (clean) to 1 (noise)")
        ordered = listed or self.time_order == "random"
        _require(ordered, "loss.time_order", self.time_order, "'random' unless loss.times is a list")
        _require(math.isfinite(self.logit_mean), "loss.logit_mean", self.logit_mean, "a finite number")
        _require(0 < self.logit_std < math.inf, "loss.logit_std", self.logit_std, "a positive number")
        for name, unused in (("logit_mean", 0.0), ("logit_std", 1.0)):
            value = getattr(self, name)
            _require(times == "logit_normal" or value == unused, f"loss.{name}", value, f"{unused:g} with loss.times={times!r}")
        _require(shift == "auto" or 0 < shift <= 1000, "loss.shift", shift, 'a positive number up to 1000, or "auto"')
        _require(not listed or shift == 1, "loss.shift", shift, "1 with a list as loss.times, which is taken as it is")


@dataclass
class OptimConfig:
    """Optimiser and schedule.

    Args:
        optimizer: "adamw"; "adamw8bit" keeps its moments in 8 bits (bitsandbytes); "prodigy" finds its step size (prodigyopt).
        lr: Peak learning rate; with Prodigy a factor of what it finds, 1 as a rule.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        weight_decay: Decoupled weight decay.
        eps: Added to the root of the second moment.
        max_grad_norm: Gradients are clipped to this norm.
        scheduler: Learning-rate schedule, by its name in diffusers.
        warmup_steps: Optimiser steps of linear warm-up.
        ema_decay: Decay of a moving average of the adapter, which is saved beside it as lora_ema; 0 keeps none.
    """

    optimizer: Optimizer = "adamw"
    lr: float = 2e-5
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.01
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    scheduler: Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"] = (
        "constant_with_warmup"
    )
    warmup_steps: int = 0
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        _require(0 < self.lr < math.inf, "optim.lr", self.lr, "a positive number")
        factor = self.optimizer == "prodigy" and self.lr < 0.1
        _require(not factor, "optim.lr", self.lr, "about 1 with optimizer='prodigy', which finds the step size itself")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, f"optim.{name}", getattr(self, name), "0 <= value < 1")
        _require(0 <= self.weight_decay < math.inf, "optim.weight_decay", self.weight_decay, "0 or more")
        _require(0 < self.eps < math.inf, "optim.eps", self.eps, "a positive number")
        _require(0 < self.max_grad_norm < math.inf, "optim.max_grad_norm", self.max_grad_norm, "a positive number")
        _require(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, "0 or more")
        _require(0 <= self.ema_decay < 1, "optim.ema_decay", self.ema_decay, "0 <= ema_decay < 1")
        constant = self.scheduler == "constant" and self.warmup_steps > 0
        _require(not constant, "optim.warmup_steps", self.warmup_steps, "0 with scheduler='constant' (or constant_with_warmup)")
        ends = self.scheduler == "polynomial" and self.lr <= 1e-7
        _require(not ends, "optim.lr", self.lr, "more than 1e-7 with scheduler='polynomial', which ends there")


@dataclass
class SamplesConfig:
    """Images of held-out pairs and of prompts while training, from the same noise each time, and the masks of the pairs.

    Args:
        every: Optimiser steps between them; they are also made before the first step and after the last. 0 makes none.
        count: How many of the held-out pairs, the first ones.
        manifest: File with a prompt and its references a line, as `focusdpo sample` takes it: its prompts are sampled as well,
            in squares of data.resolution.
        steps: Steps of the sampler.
        guidance: Guidance value fed to guidance-distilled models; null takes their pipeline's default.
        cfg_scale: Scale of classifier-free guidance, which 1 switches off; null takes the pipeline's default.
        seed: Seed of the noise.
    """

    every: int = 0
    count: int = 4
    manifest: str | None = None
    steps: int = 28
    guidance: float | None = None
    cfg_scale: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.every >= 0, "samples.every", self.every, "0 or more")
        fewest = 1 if self.manifest is None else 0
        _require(self.count >= fewest, "samples.count", self.count, f"at least {fewest}")
        _require(self.steps >= 1, "samples.steps", self.steps, "at least 1")
        for name in ("guidance", "cfg_scale"):
            scale = getattr(self, name)
            fits = scale is None or (math.isfinite(scale) and scale >= 0)
            _require(fits, f"samples.{name}", scale, "0 or more, or null")
        _require(0 <= self.seed < 2**32, "samples.seed", self.seed, "0 <= seed < 2^32")


@dataclass
class HubConfig:
    """Upload of the finished LoRA, with its model card, to the Hugging Face hub. Off without a name.

    Args:
        repo_id: Repository to upload to, owner/name; it is made if it does not exist. Null uploads nothing.
        private: Whether a repository that is made is private.
    """

    repo_id: str | None = None
    private: bool = True


@dataclass
class TrainConfig:
    """A FocusDPO training run.

    Args:
        model: The pretrained model.
        data: Preference pairs.
        output_dir: Folder for metrics, checkpoints and the LoRA.
        lora: The adapter.
        focus: The spatial mask of the loss.
        loss: The preference loss.
        optim: Optimiser and schedule.
        samples: Images of held-out pairs and prompts while training, and masks of the pairs.
        push_to_hub: Upload of the finished LoRA.
        max_steps: Optimiser steps.
        gradient_accumulation: Batches per optimiser step.
        mixed_precision: Autocast of the forward pass.
        seed: Seed of the adapter, the order of the pairs, times and noise.
        deterministic: Take only algorithms that always give the same bits, so that a resumed run comes to the same numbers on
            a GPU.
        collective_timeout: Seconds after which processes give up waiting for each other in a collective operation of the
            training. Before and between these they wait as long as the others live.
        checkpoint_every: Optimiser steps between checkpoints; 0 writes one at the end only.
        checkpoints_total_limit: How many checkpoints are kept, the latest; none keeps all.
        validate_every: Optimiser steps between evaluations of the held-out pairs; 0 evaluates at the end only.
        trackers: Where metrics and samples go beside the run's own files. "wandb" has to be installed.
        project: Project of the run on W&B.
        run_name: Name of the run on W&B; null takes that of output_dir.
        resume: Checkpoint folder to go on from, or "latest".
        overwrite: Delete what an earlier run left in output_dir and start anew.
        backend: Kernels: "triton", "torch", or chosen by device.
        cpu: Train on the CPU even where there is a GPU.
    """

    model: ModelConfig
    data: DataConfig
    output_dir: str
    lora: LoraConfig = field(default_factory=LoraConfig)
    focus: FocusConfig = field(default_factory=FocusConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    push_to_hub: HubConfig = field(default_factory=HubConfig)
    max_steps: int = 1000
    gradient_accumulation: int = 1
    mixed_precision: Autocast = "bf16"
    seed: int = 0
    deterministic: bool = True
    collective_timeout: float = 600.0
    checkpoint_every: int = 250
    checkpoints_total_limit: int | None = None
    validate_every: int = 0
    trackers: list[Literal["tensorboard", "wandb"]] = field(default_factory=lambda: ["tensorboard"])
    project: str = "focusdpo"
    run_name: str | None = None
    resume: str | None = None
    overwrite: bool = False
    backend: KernelBackend | None = None
    cpu: bool = False

    def __post_init__(self) -> None:
        # Here, not with the mask's other settings, whose defaults --help builds: it would wait for torch.
        from focusdpo_kernels.checks import check_estimator

        entropy = self.focus.entropy_method, self.focus.entropy_bins, self.focus.entropy_sigma
        check_estimator(*entropy, prefix="focus.entropy_")
        _require(bool(self.output_dir), "output_dir", self.output_dir, "a folder")
        _require(self.max_steps >= 1, "max_steps", self.max_steps, "at least 1")
        _require(self.gradient_accumulation >= 1, "gradient_accumulation", self.gradient_accumulation, "at least 1")
        _require(0 <= self.seed < 2**32, "seed", self.seed, "0 <= seed < 2^32")
        seconds, name = self.collective_timeout, "collective_timeout"
        _require(10 <= seconds <= 1e7, name, seconds, "10 to 1e7 seconds")
        _require(self.checkpoint_every >= 0, "checkpoint_every", self.checkpoint_every, "0 or more")
        limit = self.checkpoints_total_limit
        _require(limit is None or limit >= 1, "checkpoints_total_limit", limit, "at least 1, or null to keep all")
        _require(self.validate_every >= 0, "validate_every", self.validate_every, "0 or more")
        shown = self.samples.every == 0 or self.data.validation is not None or self.samples.manifest is not None
        expected = "0 without data.validation, whose first pairs are sampled, and without samples.manifest"
        _require(shown, "samples.every", self.samples.every, expected)
        _require(len(set(self.trackers)) == len(self.trackers), "trackers", self.trackers, "each once")
        _require(not (self.resume and self.overwrite), "overwrite", self.overwrite, "false together with resume")
        cached, name = self.data.reference_cache, "data.reference_cache"
        if cached is not None:
            _require(self.loss.draws is not None, name, cached, "null without loss.draws: no draw would come again")
            _require(self.data.cache is not None, name, cached, "null without data.cache, whose keys it uses")
        # PyTorch recomputes dropout with other random numbers (pytorch/pytorch#190758): gradients would be wrong in silence.
        redrawn = self.model.activation_budget is not None and self.lora.dropout > 0
        _require(not redrawn, "lora.dropout", self.lora.dropout, "0 with model.activation_budget")
