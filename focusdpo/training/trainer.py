"""The training loop: LoRA DPO through accelerate, from one CPU to many machines."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import torch

from focusdpo.data import PairBatch, PairDataset
from focusdpo.foundation.launch import tell_launcher
from focusdpo.models.sizes import Architecture
from focusdpo.training.adapter import adapter_state
from focusdpo.training.batches import in_order, in_rounds, load_batches
from focusdpo.training.callbacks import Callback, Journals, ProgressBar
from focusdpo.training.config import TrainConfig
from focusdpo.training.determinism import repeatable
from focusdpo.training.health import Health, skipped
from focusdpo.training.hub import upload
from focusdpo.training.memory import batch_advice, batch_text
from focusdpo.training.model_card import write_model_card
from focusdpo.training.optimizers import step_size
from focusdpo.training.prepared_run import PreparedRun
from focusdpo.training.seeding import batch_generators, round_robin_places
from focusdpo.training.signals import StopError, StopSignals
from focusdpo.training.step import StepResult
from focusdpo.training.step_metrics import Averager, peak_memory_mib, step_metrics
from focusdpo.training.tracking import Trackers

logger = logging.getLogger(__name__)

VALIDATION_SEED = 2**31  # held-out pairs see the same times and noise at every evaluation
BETA_RATE = 0.05  # of log beta a step, for each unit between the gradient factor and its target
BETA_RANGE = 100.0  # how far auto_beta may go from beta, up or down
MAX_SKIPPED = 10  # steps in a row without a finite gradient, after which a run stops


class Trainer(PreparedRun):
    """Trains an adapter on preference pairs.

    `train` is the loop, `_optimizer_step` a step of it, `_compute_loss` the loss of a batch.

    Args:
        config: all settings.
        callbacks: further ones (`focusdpo.training.callbacks`), called after the trainer's own.
        evaluation: done instead of the run's own evaluation of the held-out pairs, when that is due, before the checkpoint of
            that step.
        writes_card: write a model card beside the LoRA, with curves that take some seconds to draw.
    """

    def __init__(
        self,
        config: TrainConfig,
        callbacks: Sequence[Callback] = (),
        evaluation: Callable[[Trainer], None] | None = None,
        writes_card: bool = True,
    ) -> None:
        super().__init__(config)
        self._evaluation = evaluation
        self._writes_card = writes_card
        own = (Trackers(), Journals(), Health(config), ProgressBar(), self.samples)
        self.callbacks = [each for each in (*own, *callbacks) if self.launch.is_main or each.in_all_processes]
        self.stopped = False  # by a signal, before all was done
        self._signals = StopSignals(self.launch)
        self._of_step: list[tuple[list[int], torch.Tensor]] = []  # pairs and logits [B] of the batches of the running step
        self._running: tuple[PairDataset, list[int]] | None = None  # the batch, until it is through

    def notify(self, hook: str, *values: Any) -> None:
        """Calls a hook of all callbacks of this process."""
        for callback in self.callbacks:
            getattr(callback, hook)(self, *values)

    def check_stop(self) -> None:
        """Ends training after a signal, in all processes at the same place; all of them call this equally often."""
        self._signals.check()

    def is_due(self, every: int) -> bool:
        """Whether what comes every so many steps comes now, as before the first and after the last; 0 is these alone."""
        step = self.progress.step
        return step in (0, self.config.max_steps) or (every > 0 and step % every == 0)

    def train(self) -> None:
        """Runs to `max_steps`, then writes a checkpoint, the held-out evaluation, and the LoRA with its model card.

        Raises:
            UploadError: `push_to_hub` failed, after all else was done.
            SystemExit: after SIGTERM, SIGHUP or Ctrl-C, with the usual exit status; all steps are saved.
            ElsewhereError: another process of the launch failed.
            torch.OutOfMemoryError: says where; in the first step also what takes the memory, and what to change.
        """
        first = self.progress.step
        with self.launch.failing():
            try:
                # Loaders have processes, which pass over signals: they are to end before this one does.
                with (
                    self._signals,
                    repeatable(self.config.deterministic),
                    closing(self.batches.start(self.progress.batches)) as batches,
                ):
                    self._train(batches)
            except torch.OutOfMemoryError as error:
                raise torch.OutOfMemoryError(self._out_of_memory(first)) from error
            finally:
                if self.accelerator.is_main_process and self._out.is_unfinished:  # it was stopped, or has failed
                    self._out.finish(through=False)
                self._out.release()
        if self.stopped:
            raise SystemExit(128 + (self._signals.received or signal.SIGTERM))

    def _train(self, batches: Iterator[tuple[PairBatch, float]]) -> None:
        self.notify("on_train_begin")
        self.launch.wait("callbacks have begun")
        try:
            if self.progress.owes:
                self._between_steps()
            self.module.train()
            while self.progress.step < self.config.max_steps:
                self._optimizer_step(batches)
                self._between_steps()
        except StopError:
            self.stopped = True
            self._save()
            self._say_stopped()
        else:
            self._save_loras()
        self.notify("on_train_end")
        self.accelerator.end_training()
        if self.launch.is_main and not self.stopped:
            self._out.finish()
            # Last, when nothing can be lost any more.
            upload(self.config.push_to_hub, self.folder / "lora")

    def _optimizer_step(self, batches: Iterator[tuple[PairBatch, float]]) -> None:
        """One step of the optimiser. A stop between its batches leaves all as it was before the first."""
        accelerator, progress = self.accelerator, self.progress
        averager, started, first = Averager(accelerator), time.perf_counter(), progress.batches
        self._of_step = []
        gradient_norm = None
        while gradient_norm is None:
            try:
                self.check_stop()
            except StopError:
                progress.batches = first  # what the others have added up is computed again
                raise
            batch, factor = next(batches)
            self._running = self.train_set, batch.indices
            with accelerator.accumulate(self.backbone.transformer):
                result = self._compute_loss(batch)
                self._of_step.append((batch.indices, result.output.by_pair(result.output.logits)))
                accelerator.backward(result.output.loss * factor)
                if accelerator.sync_gradients:
                    gradient_norm = float(accelerator.clip_grad_norm_(self.parameters, self.config.optim.max_grad_norm))
                    if not self._is_finite(gradient_norm):
                        self.optimizer.zero_grad()
                self.optimizer.step()
                self.optimizer.zero_grad()
                if self.ema is not None and gradient_norm is not None and math.isfinite(gradient_norm):
                    self.ema.step(self.parameters)
            self._running = None
            averager.add(step_metrics(result), len(batch.prompts))
            progress.batches += 1
        progress.step += 1
        row = {"step": progress.step, **averager.result()}
        row |= {
            "gradient_norm": gradient_norm,
            "learning_rate": step_size(self.optimizer, self.scheduler.get_last_lr()[0]),
            "beta": self.step.beta,
            "skipped_in_a_row": progress.skipped_in_a_row,
            "pairs_per_second": row["pairs"] / (time.perf_counter() - started),
            "peak_memory_mib": peak_memory_mib(accelerator.device),
        }
        self.scheduler.step()
        self._adapt_beta(row["gradient_factor"])
        self.notify("on_step_end", row)

    def _compute_loss(self, batch: PairBatch) -> StepResult:
        """The loss of a training batch. Times, noise and dropout follow from seed, position and process, as a resume needs."""
        position, accelerator = self.progress.batches, self.accelerator
        draw = self.batches.draw_of(position)
        place = position * accelerator.num_processes + accelerator.process_index
        generators = batch_generators(self.config.seed, place, batch.indices, draw)
        places = self.batches.round_robin_places(position, batch)
        kept = None if self.references is None or draw is None else self.references.read(batch.indices, draw)
        with accelerator.autocast():
            return self.step(batch, generators, reference=kept, round_robin=places)

    def _between_steps(self) -> None:
        """What comes after a step, and before the first; where a stop comes between, after the resume.

        Evaluation and samples come before the checkpoint, which then never precedes a row that belongs before it. A stop does
        not wait for them: its checkpoint says that they are owed.
        """
        self.progress.owes = True
        self.check_stop()
        if self.is_due(self.config.validate_every):
            if self._evaluation is not None:
                self._evaluation(self)
            elif len(self.validation_set):
                self.notify("on_evaluate", {"step": self.progress.step, **self.evaluate()})
        self.notify("between_steps")
        self.progress.owes = False
        if self.progress.step and self.is_due(self.config.checkpoint_every):
            self._save(again=True)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Metrics of the held-out pairs, at the same times and noise whenever it is called."""
        dataset, accelerator = self.validation_set, self.accelerator
        plan = in_order(dataset, self.config.data.batch_size)
        rank, processes = self.launch.rank, self.launch.size
        averager = Averager(accelerator)
        was_training = self.module.training
        self.module.eval()
        mine = [batches[rank] for batches in in_rounds(plan, processes)]
        loader = load_batches(dataset, mine, self.config.data.num_workers, accelerator)
        for place, batch in zip(range(rank, len(mine) * processes, processes), loader, strict=True):
            self.check_stop()
            generator = torch.Generator().manual_seed(VALIDATION_SEED + place)
            self._running = dataset, batch.indices
            places = round_robin_places(sum(map(len, plan[: place % len(plan)])), 0, len(batch.prompts))
            with accelerator.autocast():
                result = self.step(batch.to(accelerator.device), generator, round_robin=places)
            self._running = None
            averager.add(step_metrics(result), len(batch.prompts) if place < len(plan) else 0)
        self.module.train(was_training)
        return averager.result()

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
        if self.launch.is_main and self._writes_card:
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
        if self.launch.is_main:
            self.notify("on_alarm", skipped(step, gradient_norm, pairs))
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

    def _say_stopped(self) -> None:
        step, last = self.progress.step, self.config.max_steps
        where = f"stopped at step {step} of {last}, which is saved" if step else "stopped before the first step"
        text = f"{where}, as {self.launch.why_stopped}; --resume latest goes on"
        tell_launcher(text)
        if self.launch.is_main:
            logger.info(text)

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
