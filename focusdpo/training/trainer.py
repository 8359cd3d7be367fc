"""The training loop: LoRA DPO through accelerate, from one CPU to many machines."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from focusdpo.data import PairBatch, PairDataset, SizeBatches
from focusdpo.foundation.journals import Journal, read_steps, up_to
from focusdpo.foundation.launch import Launch, tell_launcher
from focusdpo.models.base import Parts
from focusdpo.models.sizes import Architecture
from focusdpo.training.adapter import adapter_state
from focusdpo.training.batches import (
    TrainingBatches,
    check_match_count,
    in_rounds,
    load_batches,
    load_datasets,
    sizes_vary,
)
from focusdpo.training.cache import EncodingCache
from focusdpo.training.checkpoints import Checkpoints, Progress, Stateful
from focusdpo.training.compilation import compile_blocks
from focusdpo.training.config import TrainConfig
from focusdpo.training.determinism import repeatable
from focusdpo.training.health import Alarm, Health
from focusdpo.training.hub import check_hub, upload
from focusdpo.training.loading import check_files_and_packages, load_backbone, make_policy
from focusdpo.training.memory import batch_advice, batch_text, explained, run_advice
from focusdpo.training.model_card import write_model_card
from focusdpo.training.optimizers import build_optimizer, step_size
from focusdpo.training.reference_cache import ReferenceCache
from focusdpo.training.run_files import ALARMS_FILE, CHECKPOINTS_FOLDER, METRICS_FILE, SAMPLES_FOLDER, VALIDATION_FILE
from focusdpo.training.run_folder import RunFolder, shared_settings
from focusdpo.training.samples import Samples
from focusdpo.training.seeding import batch_generators, fixed_round_robin_places, round_robin_places
from focusdpo.training.sharding import (
    check_devices,
    check_launch,
    is_deepspeed,
    limit_waits,
    load_parts_whole,
    place_of_transformer,
    prepare,
)
from focusdpo.training.signals import StopError, StopSignals
from focusdpo.training.step import PreferenceStep, StepResult
from focusdpo.training.step_metrics import Averager, Smoothed, peak_memory_mib, step_metrics
from focusdpo.training.tracking import check_trackers, start_trackers
from focusdpo_kernels.backend import resolve_backend

logger = logging.getLogger(__name__)

VALIDATION_SEED = 2**31  # held-out pairs see the same times and noise at every evaluation
BETA_RATE = 0.05  # of log beta a step, for each unit between the gradient factor and its target
BETA_RANGE = 100.0  # how far auto_beta may go from beta, up or down
MAX_SKIPPED = 10  # steps in a row without a finite gradient, after which a run stops


class Trainer:
    """Trains an adapter on preference pairs.

    Everything that can be refused is refused here or before: configuration, output folder and data are looked at first, the
    model is loaded last. In a launch of several processes what one raises ends all of them: there is no second try.

    Args:
        config: all settings.
        on_alarm: called in the main process with each alarm (`focusdpo.training.health`), after it was logged and written to
            alarms.jsonl.
        evaluation: done instead of the run's own evaluation of the held-out pairs, when that is due, before the checkpoint of
            that step.
    """

    def __init__(
        self,
        config: TrainConfig,
        on_alarm: Callable[[Alarm], None] | None = None,
        evaluation: Callable[[Trainer], None] | None = None,
    ) -> None:
        self.config = config
        self._evaluation = evaluation
        self._on_alarm = on_alarm
        self.launch = Launch.join()
        self.launch.timeout = config.collective_timeout
        with self.launch.together("the run is prepared"):
            run = RunFolder.prepare(config, self.launch)
            self._out = run.out  # of which the main process is the one writer
            self.folder = run.path
            try:
                self._prepare(run)
            except BaseException:
                self._out.release()
                raise

    def _prepare(self, run: RunFolder) -> None:
        """All that comes before the first step."""
        config, launch = self.config, self.launch
        # What machines may differ in comes before the first collective operation, in which a failure is hard to see.
        with launch.together("files and settings are checked"):
            check_devices(launch, config.cpu)
            launch.once_a_machine("files and packages are checked", lambda: check_files_and_packages(config))
            datasets, left_out = load_datasets(config, launch)
            self.train_set, self.validation_set = datasets
            if launch.is_main:
                run.report_left_out(left_out)
            settings = shared_settings(config, launch, self.train_set)
            run.check_settings(settings)
            check_match_count(config.focus, datasets)
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
            kernels = resolve_backend(config.backend, torch.empty(0, device=self.accelerator.device))
        self.samples = Samples(
            config, self.validation_set.records, run.out, self.folder / SAMPLES_FOLDER, lambda: load_backbone(config, "vae")
        )
        self.batches = TrainingBatches(self.train_set, config, self.accelerator)
        if config.data.cache is not None:
            cache = EncodingCache(config, self.accelerator, launch)
            encoded = (*datasets, *self.samples.datasets)
            for dataset, reader in zip(encoded, cache.readers(encoded), strict=True):
                dataset.encodings = reader
            with self._explained("images and prompts were encoded", encoding=True):
                cache.fill(lambda: load_backbone(config, "encoders", self.accelerator.device))
        with self._explained("the model was loaded"):
            parts: Parts = "all" if config.data.cache is None else "transformer"
            place = place_of_transformer(self.accelerator, config)
            self.backbone = load_backbone(config, parts, self.accelerator.device, transformer_device=place)
        self.module = self.backbone.transformer
        with self._explained("the model was made ready"):
            make_policy(self.backbone, config, run.checkpoint, self.accelerator.device)
        if config.model.gradient_checkpointing:
            self.module.enable_gradient_checkpointing()
        if config.model.compile:
            vary, budget = sizes_vary(datasets, config.data.batch_size), config.model.activation_budget
            compile_blocks(self.backbone, sizes_vary=vary, activation_budget=budget)
        self.step = PreferenceStep(self.backbone, config.focus, config.loss, config.backend)
        optim = config.optim
        optimizer = build_optimizer([p for p in self.module.parameters() if p.requires_grad], optim)
        # Not prepared: accelerate would step it once per process, and a resume on others would miscount.
        self.scheduler = get_scheduler(
            optim.scheduler, optimizer, num_warmup_steps=optim.warmup_steps, num_training_steps=config.max_steps
        )
        limit = config.checkpoints_total_limit
        self.checkpoints = Checkpoints(
            self.accelerator, launch, run.out, self.folder / CHECKPOINTS_FOLDER, self.backbone, settings, limit
        )
        launch.wait("the model is loaded")
        with self._explained(f"the model was moved to {self.accelerator.device}"):
            self.optimizer = prepare(self.accelerator, self.backbone, optimizer, config)
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.progress = Progress()
        self.ema = EMAModel(self.parameters, decay=optim.ema_decay) if optim.ema_decay else None
        if run.checkpoint is not None:
            with self._explained("adapter and optimiser were restored"):
                self.checkpoints.load(run.checkpoint, self._stateful, self.parameters)
            logger.info("resumed from %s at step %d", run.checkpoint, self.progress.step)
        # Of the last checkpoint, or without any the first, which is made anew.
        self._saved = self.progress.step if run.checkpoint is None or run.goes_on else -1
        if self.progress.beta is not None:
            self.step.beta = self.progress.beta
        self.references = None
        if config.data.reference_cache is not None:
            with self._explained("the reference's predictions were computed"), repeatable(config.deterministic):
                self.references = self._fill_references()
        launch.wait("the run is ready")
        if launch.is_main:
            run.start(config)
            run.record_start(
                self.progress.step,
                processes=launch.size,
                device=str(self.accelerator.device),
                kernels=kernels,
                training_pairs=len(self.train_set),
                held_out_pairs=len(self.validation_set),
            )
            self.checkpoints.tidy(self.progress.step)
            self.samples.tidy(self.progress.step)
        self.health = Health(config, self._hear)
        self._alarms_file: Journal | None = None  # of the main process, while it trains
        self._of_step: list[tuple[list[int], torch.Tensor]] = []  # pairs and logits [B] of the batches of the running step
        self._signals = StopSignals(launch)
        self._running: tuple[PairDataset, list[int]] | None = None  # the batch, until it is through

    @property
    def _stateful(self) -> dict[str, Stateful]:
        """What a checkpoint keeps besides the adapter; DeepSpeed keeps its optimiser itself."""
        parts: dict[str, Stateful] = {"scheduler": self.scheduler, "progress": self.progress}
        if not is_deepspeed(self.accelerator):
            parts["optimizer"] = self.optimizer
        if self.ema is not None:
            parts["ema"] = self.ema
        return parts

    def _run_step(self, batch: PairBatch) -> StepResult:
        """The step of a training batch. What it draws depends on seed, position and process alone, as a resume needs it."""
        config, accelerator = self.config, self.accelerator
        draw = self._draw_of(self.progress.batches) if config.loss.draws else None
        position = self.progress.batches * accelerator.num_processes + accelerator.process_index
        drawn = batch_generators(config.seed, position, batch.indices, draw)
        places = self.batches.round_robin_places(self.progress.batches, batch)
        if draw is not None:
            places = fixed_round_robin_places(batch.indices, draw)
        kept = None if self.references is None or draw is None else self.references.read(batch.indices, draw)
        with accelerator.autocast():
            return self.step(batch, drawn, reference=kept, round_robin=places)

    def _draw_of(self, position: int) -> int:
        """Number of the fixed draw at a position: another one each epoch."""
        return self.batches.epoch_of(position) % (self.config.loss.draws or 1)

    def _fill_references(self) -> ReferenceCache:
        """Computes the reference's predictions for all that this run is going to draw."""
        cache = ReferenceCache(self.config, self.train_set, self.step, self.accelerator, self.launch)
        end = self.config.max_steps * self.config.gradient_accumulation
        wanted: dict[int, set[int]] = {}
        for epoch, pairs in self.batches.pairs_of_epochs(self.progress.batches, end).items():
            wanted.setdefault(epoch % (self.config.loss.draws or 1), set()).update(pairs)
        cache.fill(wanted)
        return cache

    def train(self) -> None:
        """Runs to `max_steps`, then writes a checkpoint, the held-out evaluation, and the LoRA with its model card.

        Raises:
            UploadError: `push_to_hub` failed, after all else was done.
            SystemExit: after SIGTERM, SIGHUP or Ctrl-C, with the usual exit status; all steps are saved.
            ElsewhereError: another process of the launch failed.
            torch.OutOfMemoryError: says where; in the first step also what takes the memory, and what to change.
        """
        with self.launch.failing():
            stopped = self._train_explained()
        if stopped:
            raise SystemExit(128 + (self._signals.received or signal.SIGTERM))

    def _train_explained(self) -> bool:
        config, first = self.config, self.progress.step
        try:
            # Loaders have processes, which pass over signals: they are to end before this one does.
            with self._signals, repeatable(config.deterministic), ExitStack() as self._open:
                return self._train()
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(self._out_of_memory(first)) from error
        finally:
            self._leave()

    def _leave(self) -> None:
        """Lists what a run has written that was stopped; one that is through has done so."""
        if self.accelerator.is_main_process and self._out.is_unfinished:
            self._out.finish(through=False)
        self._out.release()

    def _out_of_memory(self, first: int) -> str:
        """What to tell a user whose batch did not fit; later steps fit before, so that theirs is another size of batch."""
        if self._running is None:
            hint = "; samples.every=0 makes no samples there" if self.config.samples.every else ""
            return f"out of memory between batches, after step {self.progress.step}{hint}"
        dataset, indices = self._running
        where = f"step {self.progress.step + 1}" if dataset is self.train_set else "the evaluation of the held-out pairs"
        message = f"out of memory in {where}, {batch_text(dataset, indices)}"
        if self.progress.step > first:
            return message
        return f"{message}. {batch_advice(Architecture.of(self.backbone), self.config, dataset, indices)}"

    def _explained(self, doing: str, encoding: bool = False) -> AbstractContextManager[None]:
        """Adds to an out-of-memory error before the first step what was going on, and what to change."""
        return explained(doing, lambda: run_advice(self.config, self.train_set, encoding))

    def _train(self) -> bool:
        """The loop; whether it was stopped before all was done."""
        config, accelerator = self.config, self.accelerator
        self._metrics_file: Journal | None = None
        if self.launch.is_main:
            self._metrics_file = Journal(self.folder / METRICS_FILE, up_to(self.progress.step))
            self._alarms_file = Journal(self.folder / ALARMS_FILE, up_to(self.progress.step))
            if (self.folder / VALIDATION_FILE).exists():
                Journal(self.folder / VALIDATION_FILE, up_to(self.progress.step)).close()
            self.health.restore(read_steps(self.folder / METRICS_FILE))
        start_trackers(accelerator, config, self.progress.step)
        self.launch.wait("trackers are started")
        bar = tqdm(
            total=config.max_steps,
            initial=self.progress.step,
            desc="training",
            unit="step",
            disable=not self.launch.is_main,
        )
        accuracy = Smoothed()  # of a batch it is one of few values
        stopped = False
        try:
            if self.progress.owes:
                self._end_step()
            batches = self.batches.start(self.progress.batches)  # which `train` closes
            self._open.callback(batches.close)
            self.module.train()
            while self.progress.step < config.max_steps:
                row = self._take_step(batches)
                bar.update()
                bar.set_postfix(loss=f"{row['loss']:.4f}", accuracy=f"{accuracy.add(row['accuracy']):.2f}")
                self._end_step()
        except StopError:
            stopped = True
            self._save()
            where = f"stopped at step {self.progress.step} of {config.max_steps}, which is saved"
            if self.progress.step == 0:
                where = "stopped before the first step"
            text = f"{where}, as {self.launch.why_stopped}; --resume latest goes on"
            tell_launcher(text)
            if self.launch.is_main:
                logger.info(text)
        bar.close()
        if self._metrics_file is not None:
            self._metrics_file.close()
        if self._alarms_file is not None:
            self._alarms_file.close()
        if not stopped:
            self._save_loras()
        accelerator.end_training()
        if self.launch.is_main and not stopped:
            self._out.finish()
            logger.info("%s has the LoRA and its card", self.folder / "lora")
            # Last, when nothing can be lost any more.
            upload(config.push_to_hub, self.folder / "lora")
        return stopped

    def _take_step(self, batches: Iterator[tuple[PairBatch, float]]) -> dict[str, float]:
        """One optimiser step; its row of the metrics. A stop between its batches leaves all as it was before the first."""
        config, accelerator = self.config, self.accelerator
        averager, started, first = Averager(accelerator), time.perf_counter(), self.progress.batches
        self._of_step = []
        gradient_norm = None
        while gradient_norm is None:
            try:
                self._signals.check()
            except StopError:
                self.progress.batches = first  # what the others have added up is computed again
                raise
            batch, factor = next(batches)
            self._running = self.train_set, batch.indices
            with accelerator.accumulate(self.backbone.transformer):
                result = self._run_step(batch)
                self._of_step.append((batch.indices, result.output.logits.detach()))
                accelerator.backward(result.output.loss * factor)
                if accelerator.sync_gradients:
                    gradient_norm = float(accelerator.clip_grad_norm_(self.parameters, config.optim.max_grad_norm))
                    if not self._is_finite(gradient_norm):
                        self.optimizer.zero_grad()
                self.optimizer.step()
                self.optimizer.zero_grad()
                if self.ema is not None and gradient_norm is not None and math.isfinite(gradient_norm):
                    self.ema.step(self.parameters)
            self._running = None
            averager.add(step_metrics(result), len(batch.prompts))
            self.progress.batches += 1
        self.progress.step += 1
        row = averager.result()
        row |= {
            "gradient_norm": gradient_norm,
            "learning_rate": step_size(self.optimizer, self.scheduler.get_last_lr()[0]),
            "beta": self.step.beta,
            "skipped_in_a_row": self.progress.skipped_in_a_row,
            "pairs_per_second": row["pairs"] / (time.perf_counter() - started),
            "peak_memory_mib": peak_memory_mib(accelerator.device),
        }
        self.scheduler.step()
        self._adapt_beta(row["gradient_factor"])
        self._log(row)
        return row

    def _end_step(self) -> None:
        """What comes after a step, and before the first; where a stop comes between, after the resume.

        Evaluation and samples come before the checkpoint, which then never precedes a row that belongs before it. A stop does
        not wait for them: its checkpoint says that they are owed.
        """
        config, step = self.config, self.progress.step
        self.progress.owes = True
        self._signals.check()
        last = step == config.max_steps
        if step == 0 or last or (config.validate_every and step % config.validate_every == 0):
            self._validate()
        if step == 0 or last or (config.samples.every and step % config.samples.every == 0):
            self.samples.draw(step, self.step, self.accelerator, self.launch, self._signals.check)
        self.progress.owes = False
        if step and (last or (config.checkpoint_every and step % config.checkpoint_every == 0)):
            self._save(again=True)

    def _save(self, again: bool = False) -> None:
        """Writes the checkpoint of the last step, unless nothing was computed since there is one."""
        if again or self.progress.step > self._saved:
            self.checkpoints.save(self.progress.step, self._stateful)
            self._saved = self.progress.step

    def _save_loras(self) -> None:
        self._save_lora("lora")
        if self.ema is not None:
            self.ema.store(self.parameters)
            self.ema.copy_to(self.parameters)
            self._save_lora("lora_ema")
            self.ema.restore(self.parameters)
        if self.launch.is_main:
            write_model_card(self.config, self.folder, self.train_set, self.validation_set)

    def _save_lora(self, name: str) -> None:
        state = adapter_state(self.module)  # of all processes
        if self.launch.is_main:
            self.backbone.save_lora(self.folder / name, state)
        self.launch.wait("the LoRA is written")

    def _adapt_beta(self, factor: float) -> None:
        """Raises beta while pairs have more gradient than `loss.auto_beta` wants, and lowers it while they have less."""
        target, start = self.config.loss.auto_beta, self.config.loss.beta
        if target is None or not math.isfinite(factor):
            return
        beta = self.step.beta * math.exp(BETA_RATE * (factor - target))
        self.step.beta = self.progress.beta = min(max(beta, start / BETA_RANGE), start * BETA_RANGE)

    def _is_finite(self, gradient_norm: float) -> bool:
        """Whether a step may be taken; a step without a finite gradient is skipped, and too many in a row stop the run."""
        if math.isfinite(gradient_norm):
            self.progress.skipped_in_a_row = 0
            return True
        self.progress.skipped_in_a_row += 1
        step = self.progress.step + 1
        pairs = [pair for of_process in self.launch.gather("pairs are named", self._pairs_of_step()) for pair in of_process]
        lines = ", ".join(place for place, _ in pairs)
        spoilt = [place for place, is_finite in pairs if not is_finite]
        message = f"skipped, the gradient norm is {gradient_norm}; its pairs: {lines}"
        if 0 < len(spoilt) < len(pairs):
            message += f"; without a finite loss: {', '.join(spoilt)}"
        if self.launch.is_main:
            self.health.report(Alarm("non_finite_gradient", step, message))
        if self.progress.skipped_in_a_row >= MAX_SKIPPED:
            sound = all(bool(parameter.detach().isfinite().all()) for parameter in self.parameters)
            raise FloatingPointError(
                f"{MAX_SKIPPED} steps in a row up to step {step} had no finite gradient; the adapter is as step "
                f"{step - MAX_SKIPPED} left it{'' if sound else ', which is not finite either'}. "
                f"{'Start anew' if sound else 'Go on from an earlier checkpoint, or start anew,'} with a lower optim.lr or "
                "loss.beta, and look at the data of these steps"
            )
        return False

    def _pairs_of_step(self) -> list[tuple[str, bool]]:
        """This process's pairs of the running step by file and line, and whether the loss of each is finite."""
        records = self.train_set.records
        return [
            (f"{records[index].file}:{records[index].line}", is_finite)
            for indices, logits in self._of_step
            for index, is_finite in zip(indices, logits.isfinite().tolist(), strict=True)
        ]

    def _hear(self, alarm: Alarm) -> None:
        if self._alarms_file is not None:
            self._alarms_file.write(asdict(alarm))
        if self._on_alarm is not None:
            self._on_alarm(alarm)

    def _log(self, row: dict[str, float]) -> None:
        self.accelerator.log(row, step=self.progress.step)
        if self._metrics_file is not None:
            self._metrics_file.write({"step": self.progress.step, **row})
            self.health.update({"step": self.progress.step, **row})

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Metrics of the held-out pairs, at the same times and noise whenever it is called."""
        dataset, accelerator = self.validation_set, self.accelerator
        plan = SizeBatches(dataset, self.config.data.batch_size, shuffle=False, seed=0).epoch(0)
        rank, processes = self.launch.rank, self.launch.size
        averager = Averager(accelerator)
        was_training = self.module.training
        self.module.eval()
        mine = [batches[rank] for batches in in_rounds(plan, processes)]
        loader = load_batches(dataset, mine, self.config.data.num_workers, accelerator)
        for place, batch in zip(range(rank, len(mine) * processes, processes), loader, strict=True):
            self._signals.check()
            generator = torch.Generator().manual_seed(VALIDATION_SEED + place)
            self._running = dataset, batch.indices
            places = round_robin_places(sum(map(len, plan[: place % len(plan)])), 0, len(batch.prompts))
            with accelerator.autocast():
                result = self.step(batch.to(accelerator.device), generator, round_robin=places)
            self._running = None
            averager.add(step_metrics(result), len(batch.prompts) if place < len(plan) else 0)
        self.module.train(was_training)
        return averager.result()

    def _validate(self) -> None:
        if self._evaluation is not None:
            return self._evaluation(self)
        if not len(self.validation_set):
            return None
        row = self.evaluate()
        self.accelerator.log({f"validation/{name}": value for name, value in row.items()}, step=self.progress.step)
        if self.launch.is_main:
            file = Journal(self.folder / VALIDATION_FILE, up_to(self.progress.step - 1))
            file.write({"step": self.progress.step, **row})
            file.close()
