"""Callbacks of a training run: their base class, the run's journals and its progress bar.

Others stand where their subject is: `Health` (alarms), `Samples`, `Trackers`, and `Announcements`, which `focusdpo train`
gives its run. `Trainer` lists them in the order in which they are called, those of its caller last.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING

from tqdm.auto import tqdm
from tqdm.std import EMA  # type: ignore[attr-defined]  # its stubs lack it

from focusdpo.foundation.journals import Journal, up_to
from focusdpo.training.run_files import ALARMS_FILE, METRICS_FILE, VALIDATION_FILE

if TYPE_CHECKING:
    from focusdpo.training.health import Alarm
    from focusdpo.training.trainer import Trainer

Row = dict[str, float]  # metrics by name, and "step"


class Callback:
    """Its hooks are called as a run goes on; a subclass overrides those it needs.

    They are called in the main process alone, unless `in_all_processes` is true: then in all at the same places, which it takes
    to run the model or to gather tensors. What a hook raises ends the run.
    """

    in_all_processes = False

    def on_train_begin(self, trainer: Trainer) -> None:
        """Training begins, or goes on from `trainer.progress.step`: what lies beyond that step is about to come again."""

    def on_step_end(self, trainer: Trainer, row: Row) -> None:
        """An optimiser step was taken; its metrics, as metrics.jsonl has them."""

    def on_evaluate(self, trainer: Trainer, row: Row) -> None:
        """The held-out pairs were evaluated; their metrics, as validation.jsonl has them."""

    def between_steps(self, trainer: Trainer) -> None:
        """Before the first step, and after each one and its evaluation, but before its checkpoint.

        `trainer.is_due(every)` says whether something is due. A callback of all processes that takes long calls
        `trainer.check_stop()` meanwhile, equally often in all. A run that is stopped here comes back to it when it is resumed.
        """

    def on_alarm(self, trainer: Trainer, alarm: Alarm) -> None:
        """An alarm (`focusdpo.training.health`) was raised and stands in alarms.jsonl; called in the main process alone."""

    def on_train_end(self, trainer: Trainer) -> None:
        """Training ends: all is done and the LoRA is written, or the run was told to stop (`trainer.stopped`)."""


class Journals(Callback):
    """metrics.jsonl, validation.jsonl and alarms.jsonl."""

    def on_train_begin(self, trainer: Trainer) -> None:
        reached = up_to(trainer.progress.step)
        self._metrics, self._alarms = (Journal(trainer.folder / name, reached) for name in (METRICS_FILE, ALARMS_FILE))
        if (trainer.folder / VALIDATION_FILE).exists():
            Journal(trainer.folder / VALIDATION_FILE, reached).close()

    def on_step_end(self, trainer: Trainer, row: Row) -> None:
        self._metrics.write(row)

    def on_evaluate(self, trainer: Trainer, row: Row) -> None:
        # A kill after the row and before the checkpoint has the same row come again.
        file = Journal(trainer.folder / VALIDATION_FILE, up_to(row["step"] - 1))
        file.write(row)
        file.close()

    def on_alarm(self, trainer: Trainer, alarm: Alarm) -> None:
        self._alarms.write(asdict(alarm))

    def on_train_end(self, trainer: Trainer) -> None:
        self._metrics.close()
        self._alarms.close()


class ProgressBar(Callback):
    """Steps, loss, and a moving average of the accuracy, which for one batch is one of few values."""

    def on_train_begin(self, trainer: Trainer) -> None:
        total, done = trainer.config.max_steps, trainer.progress.step
        self.bar = tqdm(total=total, initial=done, desc="training", unit="step")
        self._accuracy = EMA(0.05)

    def on_step_end(self, trainer: Trainer, row: Row) -> None:
        if math.isfinite(row["accuracy"]):  # one that is not would hide all later ones
            self._accuracy(row["accuracy"])
        accuracy = self._accuracy() if self._accuracy.calls else math.nan
        self.bar.update()
        self.bar.set_postfix(loss=f"{row['loss']:.4f}", accuracy=f"{accuracy:.2f}")

    def on_train_end(self, trainer: Trainer) -> None:
        self.bar.close()
