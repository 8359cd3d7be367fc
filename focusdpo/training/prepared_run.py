"""All that comes before a run's first step: what is refused, opened, loaded and restored."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.distributed.checkpoint.stateful import Stateful

from focusdpo.foundation.launch import Launch
from focusdpo.models.base import Parts
from focusdpo.training.batches import TrainingBatches, check_match_count, load_datasets, sizes_vary
from focusdpo.training.cache import EncodingCache
from focusdpo.training.checkpoints import Checkpoints, Progress
from focusdpo.training.compilation import compile_blocks
from focusdpo.training.config import TrainConfig
from focusdpo.training.determinism import repeatable
from focusdpo.training.hub import check_hub
from focusdpo.training.loading import check_files_and_packages, load_backbone, make_policy
from focusdpo.training.memory import run_advice
from focusdpo.training.optimizers import build_optimizer
from focusdpo.training.prompts import load_sample_prompts
from focusdpo.training.reference_cache import ReferenceCache
from focusdpo.training.run_folder import RunFolder, shared_settings
from focusdpo.training.samples import Samples
from focusdpo.training.sharding import (
    check_devices,
    check_launch,
    is_deepspeed,
    limit_waits,
    load_parts_whole,
    place_of_transformer,
    prepare,
)
from focusdpo.training.step import PreferenceStep
from focusdpo.training.tracking import check_trackers
from focusdpo_kernels.backend import resolve_backend

logger = logging.getLogger(__name__)


class PreparedRun:
    """A run that is ready for its next step, in a folder that is locked for it; `Trainer` trains it.

    Everything that can be refused is refused here or before: configuration, output folder and data are looked at first, the
    model is loaded last. In a launch of several processes what one raises ends all of them: there is no second try.

    Args:
        config: all settings.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.launch = Launch.join()
        self.launch.timeout = config.collective_timeout
        with self.launch.together("the run is prepared"):
            run = RunFolder.prepare(config, self.launch)
            self._out = run.out  # of which the main process is the one writer
            self.folder = run.path
            try:
                settings = self._check_inputs(run)
                self.kernels = self._open_launch()
                self._encode_pairs(run)
                self._load_model(run)
                self._build_optimizer(run, settings)
                self._restore(run)
                self._begin_folder(run)
            except BaseException:
                self._out.release()
                raise

    def _check_inputs(self, run: RunFolder) -> dict[str, Any]:
        """Reads and checks all that machines may differ in, and returns what decides the run's numbers.

        It comes before the first collective operation, in which a failure is hard to see.
        """
        config, launch = self.config, self.launch
        with launch.together("files and settings are checked"):
            check_devices(launch, config.cpu)
            launch.once_a_machine("files and packages are checked", lambda: check_files_and_packages(config))
            datasets, left_out = load_datasets(config, launch)
            self.train_set, self.validation_set = datasets
            self._prompts = load_sample_prompts(config, launch)
            if launch.is_main:
                run.report_left_out(left_out)
            settings = shared_settings(config, launch, self.train_set)
            run.check_settings(settings)
            check_match_count(config.focus, datasets)
        return settings

    def _open_launch(self) -> str:
        """Starts accelerate, refuses what does not fit how the run was launched, and returns which kernels it uses."""
        config, launch = self.config, self.launch
        self.accelerator = Accelerator(
            cpu=config.cpu,
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation,
            project_config=ProjectConfiguration(project_dir=str(self.folder), logging_dir=str(self.folder)),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=config.collective_timeout))],
        )
        with launch.together("the launch is checked"):
            if self.accelerator.num_processes != launch.size:
                came = f"{self.accelerator.num_processes} processes without LOCAL_RANK, RANK and WORLD_SIZE for each"
                raise ValueError(f"the launcher: got {came}; expected `accelerate launch` or torchrun, which set them")
            check_launch(self.accelerator, config)
            limit_waits(self.accelerator, config.collective_timeout)
            load_parts_whole(self.accelerator)
            if launch.is_main:
                check_trackers(config)
                check_hub(config.push_to_hub)
            return resolve_backend(config.backend, torch.empty(0, device=self.accelerator.device))

    def _encode_pairs(self, run: RunFolder) -> None:
        """Plans batches and samples; with `data.cache` also encodes what they need, before the transformer takes memory."""
        config = self.config
        self.samples = Samples(config, self.validation_set.records, self._prompts, run.out)
        self.batches = TrainingBatches(self.train_set, config, self.accelerator)
        if config.data.cache is None:
            return
        cache = EncodingCache(config, self.accelerator, self.launch)
        cache.attach((self.train_set, self.validation_set, *self.samples.datasets))
        with self._explained("images and prompts were encoded", encoding=True):
            cache.fill(lambda: load_backbone(config, "encoders", self.accelerator.device))

    def _load_model(self, run: RunFolder) -> None:
        """Loads the pipeline, adds the adapter, of the checkpoint where there is one, and compiles."""
        config, device = self.config, self.accelerator.device
        with self._explained("the model was loaded"):
            parts: Parts = "all" if config.data.cache is None else "transformer"
            place = place_of_transformer(self.accelerator, config)
            self.backbone = load_backbone(config, parts, device, transformer_device=place)
        self.module = self.backbone.transformer
        with self._explained("the model was made ready"):
            make_policy(self.backbone, config, run.checkpoint, device)
        self.trainable = sum(p.numel() for p in self.module.parameters() if p.requires_grad)
        if config.model.gradient_checkpointing:
            self.module.enable_gradient_checkpointing()
        if config.model.compile:
            vary = sizes_vary((self.train_set, self.validation_set), config.data.batch_size)
            compile_blocks(self.backbone, sizes_vary=vary, activation_budget=config.model.activation_budget)
        self.step = PreferenceStep(self.backbone, config.focus, config.loss, config.backend)

    def _build_optimizer(self, run: RunFolder, settings: dict[str, Any]) -> None:
        """Makes optimiser and schedule, has accelerate wrap or split the model, and says what checkpoints hold."""
        config, optim = self.config, self.config.optim
        optimizer = build_optimizer([p for p in self.module.parameters() if p.requires_grad], optim)
        # Not prepared: accelerate would step it once per process, and a resume on others would miscount.
        self.scheduler = get_scheduler(
            optim.scheduler, optimizer, num_warmup_steps=optim.warmup_steps, num_training_steps=config.max_steps
        )
        limit = config.checkpoints_total_limit
        self.checkpoints = Checkpoints(self.accelerator, self.launch, run.out, self.backbone, settings, limit)
        self.launch.wait("the model is loaded")
        with self._explained(f"the model was moved to {self.accelerator.device}"):
            self.optimizer = prepare(self.accelerator, self.backbone, optimizer, config)
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.progress = Progress()
        self.ema = EMAModel(self.parameters, decay=optim.ema_decay) if optim.ema_decay else None
        # What a checkpoint keeps besides the adapter; DeepSpeed keeps its optimiser itself.
        self._stateful: dict[str, Stateful] = {"scheduler": self.scheduler, "progress": self.progress}
        if not is_deepspeed(self.accelerator):
            self._stateful["optimizer"] = self.optimizer
        if self.ema is not None:
            self._stateful["ema"] = self.ema

    def _restore(self, run: RunFolder) -> None:
        """Brings all but the adapter to where the checkpoint left it; with `data.reference_cache` computes what is to come."""
        config = self.config
        if run.checkpoint is not None:
            with self._explained("adapter and optimiser were restored"):
                self.checkpoints.load(run.checkpoint, self._stateful, self.parameters)
        # Of the last checkpoint, or without any the first, which is made anew.
        self._saved = self.progress.step if run.checkpoint is None or run.goes_on else -1
        if self.progress.beta is not None:
            self.step.beta = self.progress.beta
        self.references: ReferenceCache | None = None
        if config.data.reference_cache is not None:
            with self._explained("the reference's predictions were computed"), repeatable(config.deterministic):
                self.references = ReferenceCache(config, self.train_set, self.step, self.accelerator, self.launch)
                end = config.max_steps * config.gradient_accumulation
                self.references.fill(self.batches.pairs_of_draws(self.progress.batches, end))

    def _begin_folder(self, run: RunFolder) -> None:
        """Makes the folder ready to be written to, now that nothing can be refused any more."""
        self.launch.wait("the run is ready")
        if not self.launch.is_main:
            return
        run.start(self.config)
        run.record_start(
            self.progress.step,
            processes=self.launch.size,
            device=str(self.accelerator.device),
            kernels=self.kernels,
            training_pairs=len(self.train_set),
            held_out_pairs=len(self.validation_set),
        )
        self.checkpoints.tidy(self.progress.step)

    @contextmanager
    def _explained(self, doing: str, encoding: bool = False) -> Iterator[None]:
        """Adds to an out-of-memory error before the first step what was going on, and what to change."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            advice = run_advice(self.config, self.train_set, encoding)
            raise torch.OutOfMemoryError(f"out of memory while {doing}. {advice}") from error
