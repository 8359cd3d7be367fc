"""The training loop: LoRA DPO through accelerate, from one CPU to many machines."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers.optimization import get_scheduler
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from focusdpo.data import DatasetError, PairBatch, PairDataset, PairRecord, Problem, SizeBatches, collate, load_pairs
from focusdpo.models import BACKBONES, Backbone
from focusdpo.models.base import check_pipeline_path
from focusdpo.training.adapter import add_adapter
from focusdpo.training.checkpoints import Checkpoints, find_checkpoint
from focusdpo.training.config import TrainConfig
from focusdpo.training.metrics import FILE_NAME, Averager, MetricsFile, peak_memory_mib, step_metrics
from focusdpo.training.step import PreferenceStep

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
RUN_FILES = (CONFIG_FILE, FILE_NAME, "validation.jsonl", "checkpoints", "tensorboard", "lora")
VALIDATION_SEED = 2**31  # held-out pairs see the same times and noise at every evaluation


class Progress:
    """Where a run stands; saved in its checkpoints."""

    def __init__(self) -> None:
        self.step = 0
        self.batches = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step, "batches": self.batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step, self.batches = state["step"], state["batches"]


def prepare_output(config: TrainConfig) -> Path:
    """The output folder, ready to be written.

    Raises:
        FileExistsError: an earlier run is there, and neither resume nor overwrite was asked for.
        FileNotFoundError: resume was asked for, and there is nothing to resume.
    """
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output_dir: {folder} is a file; name a folder")
    existing = [name for name in RUN_FILES if (folder / name).exists()]
    if config.resume:
        find_checkpoint(config.resume, folder / "checkpoints")
    elif existing and not config.overwrite:
        raise FileExistsError(
            f"output_dir: {folder} holds an earlier run ({', '.join(existing)}); "
            "continue it with --resume latest, delete it with --overwrite true, or name another folder"
        )
    return folder


def load_records(config: TrainConfig) -> tuple[list[PairRecord], list[PairRecord]]:
    """Checked training and held-out records; DatasetError lists the problems of both."""
    records: list[list[PairRecord]] = []
    problems: list[Problem] = []
    for path in (config.data.train, config.data.validation):
        try:
            records.append(load_pairs(path, config.data.check) if path is not None else [])
        except DatasetError as error:
            problems += error.problems
            records.append([])
    if config.focus.mask == "focus" and config.focus.per_subject:
        message = "is one mask, but focus.per_subject needs a list with one per reference"
        flat = [r for part in records for r in part if not r.per_subject]
        problems += [Problem(r.file, r.line, "prior", message) for r in flat]
    if problems:
        raise DatasetError(problems)
    return records[0], records[1]


class Trainer:
    """Trains an adapter on preference pairs.

    Everything that can be refused is refused here or before: configuration, output folder and data are looked at first, the
    model is loaded last.

    Args:
        config: all settings.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.folder = prepare_output(config)
        check_pipeline_path(config.model.path)
        train, validation = load_records(config)
        self.accelerator = Accelerator(
            cpu=config.cpu,
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation,
            log_with="tensorboard",
            project_config=ProjectConfiguration(project_dir=str(self.folder), logging_dir=str(self.folder)),
        )
        self.train_set, self.validation_set = self._dataset(train), self._dataset(validation)
        self.backbone = self._load_backbone()
        self.module = self.backbone.transformer
        parameters = add_adapter(self.module, config.lora, config.seed)
        if config.model.gradient_checkpointing:
            self.module.enable_gradient_checkpointing()
        self.step = PreferenceStep(self.backbone, config.focus, config.loss, config.backend)
        optim = config.optim
        optimizer = torch.optim.AdamW(
            parameters, lr=optim.lr, betas=(optim.beta1, optim.beta2), weight_decay=optim.weight_decay, eps=optim.eps
        )
        # accelerate steps the schedule once per process.
        processes = self.accelerator.num_processes
        scheduler = get_scheduler(
            optim.scheduler,
            optimizer,
            num_warmup_steps=optim.warmup_steps * processes,
            num_training_steps=config.max_steps * processes,
        )
        self._init_output()
        self.backbone.to(self.accelerator.device)
        prepared = self.accelerator.prepare(self.module, optimizer, scheduler)
        self.backbone.transformer, self.optimizer, self.scheduler = prepared
        self.parameters = parameters
        self.progress = Progress()
        self.accelerator.register_for_checkpointing(self.progress)
        self.checkpoints = Checkpoints(self.accelerator, self.folder / "checkpoints", self.module)
        if config.resume:
            checkpoint = find_checkpoint(config.resume, self.folder / "checkpoints")
            self.checkpoints.load(checkpoint)
            logger.info("resumed from %s at step %d", checkpoint, self.progress.step)
        self._warned_unreachable = False

    def _dataset(self, records: list[PairRecord]) -> PairDataset:
        data = self.config.data
        return PairDataset(
            records,
            resolution=data.resolution,
            reference_resolution=data.reference_resolution,
            reference_resolution_multiple=data.reference_resolution_multiple,
        )

    def _init_output(self) -> None:
        if self.accelerator.is_main_process:
            if self.config.overwrite:
                for name in RUN_FILES:
                    path = self.folder / name
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / CONFIG_FILE).write_text(yaml.safe_dump(asdict(self.config), sort_keys=False))
        self.accelerator.wait_for_everyone()

    def _load_backbone(self) -> Backbone:
        model = self.config.model
        return BACKBONES[model.backbone].from_pretrained(
            model.path,
            dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[model.dtype],
            revision=model.revision,
            guidance=model.guidance,
            max_sequence_length=model.max_sequence_length,
        )

    @property
    def _is_local_main(self) -> bool:
        return bool(self.accelerator.is_local_main_process)

    def _loader(self, dataset: PairDataset, batches: list[list[int]]) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=self.config.data.num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def _batches(self) -> Iterator[PairBatch]:
        """Endless training batches from where the run stands."""
        batches = SizeBatches(
            self.train_set,
            self.config.data.batch_size,
            shuffle=self.config.data.shuffle,
            seed=self.config.seed,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )
        epoch, start = divmod(self.progress.batches, len(batches.epoch(0)))
        while True:
            for batch in self._loader(self.train_set, batches.epoch(epoch)[start:]):
                yield batch.to(self.accelerator.device)
            epoch, start = epoch + 1, 0

    def _generator(self) -> torch.Generator:
        """Times, noise and dropout of a batch depend on seed, position and process alone: a resumed run draws the same."""
        position = self.progress.batches * self.accelerator.num_processes + self.accelerator.process_index
        seed = (self.config.seed << 32) + position
        torch.manual_seed(seed)  # dropout draws from the global generator
        return torch.Generator().manual_seed(seed)

    def train(self) -> None:
        """Runs to `max_steps`, then writes a checkpoint, the held-out evaluation and the LoRA."""
        config, accelerator = self.config, self.accelerator
        metrics_file = None
        if accelerator.is_main_process:
            metrics_file = MetricsFile(self.folder / FILE_NAME, self.progress.step)
        accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": self.progress.step + 1}})
        bar = tqdm(
            total=config.max_steps, initial=self.progress.step, desc="training", unit="step", disable=not self._is_local_main
        )
        if self.progress.step == 0:
            self._validate()
        averager, started = Averager(accelerator), time.perf_counter()
        batches = self._batches()
        self.module.train()
        while self.progress.step < config.max_steps:
            batch = next(batches)
            with accelerator.accumulate(self.backbone.transformer):
                with accelerator.autocast():
                    result = self.step(batch, self._generator())
                accelerator.backward(result.output.loss)
                gradient_norm = None
                if accelerator.sync_gradients:
                    gradient_norm = accelerator.clip_grad_norm_(self.parameters, config.optim.max_grad_norm)
                learning_rate = self.scheduler.get_last_lr()[0]
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            averager.add(step_metrics(result), len(batch.prompts))
            self.progress.batches += 1
            if gradient_norm is None:
                continue
            self.progress.step += 1
            row = averager.result()
            elapsed = time.perf_counter() - started
            row |= {
                "gradient_norm": float(gradient_norm),
                "learning_rate": learning_rate,
                "pairs_per_second": row["pairs"] / elapsed,
                "peak_memory_mib": peak_memory_mib(accelerator.device),
            }
            self._log(row, metrics_file)
            bar.update()
            bar.set_postfix(loss=f"{row['loss']:.4f}", accuracy=f"{row['accuracy']:.2f}")
            last = self.progress.step == config.max_steps
            # Evaluation first: a checkpoint then never precedes a row that belongs before it.
            if last or (config.validate_every and self.progress.step % config.validate_every == 0):
                self._validate()
            if last or (config.checkpoint_every and self.progress.step % config.checkpoint_every == 0):
                self.checkpoints.save(self.progress.step)
            started = time.perf_counter()
        bar.close()
        if metrics_file is not None:
            metrics_file.close()
            self.backbone.save_lora(self.folder / "lora")
        accelerator.end_training()

    def _log(self, row: dict[str, float], metrics_file: MetricsFile | None) -> None:
        self.accelerator.log(row, step=self.progress.step)
        if metrics_file is not None:
            metrics_file.write({"step": self.progress.step, **row})
        if row.get("focus/detail_unreachable", 0) > 0 and not self._warned_unreachable and self._is_local_main:
            self._warned_unreachable = True
            logger.warning(
                "%.0f %% of this step's pairs have fewer matches than their prior has tokens, so that coverage cannot fall to "
                "tau and details never get weight there (docs/method.md, E8); raise focus.match_count or focus.tau, or use "
                "larger references",
                100 * row["focus/detail_unreachable"],
            )

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Metrics of the held-out pairs, at the same times and noise whenever it is called."""
        dataset, accelerator = self.validation_set, self.accelerator
        plan = SizeBatches(dataset, self.config.data.batch_size, shuffle=False, seed=0).epoch(0)
        rank, processes = accelerator.process_index, accelerator.num_processes
        averager = Averager(accelerator)
        was_training = self.module.training
        self.module.eval()
        mine = plan[rank::processes] or plan[:1]  # every process has to take part in the gathering
        for position, batch in enumerate(self._loader(dataset, mine)):
            generator = torch.Generator().manual_seed(VALIDATION_SEED + rank + position * processes)
            with accelerator.autocast():
                result = self.step(batch.to(accelerator.device), generator)
            averager.add(step_metrics(result), len(batch.prompts) if rank < len(plan) else 0)
        self.module.train(was_training)
        return averager.result()

    def _validate(self) -> None:
        if not len(self.validation_set):
            return
        row = self.evaluate()
        self.accelerator.log({f"validation/{name}": value for name, value in row.items()}, step=self.progress.step)
        if self.accelerator.is_main_process:
            file = MetricsFile(self.folder / "validation.jsonl", self.progress.step - 1)
            file.write({"step": self.progress.step, **row})
            file.close()
