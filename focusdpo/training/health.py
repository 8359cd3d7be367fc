"""Alarms: what goes wrong in preference training without an error message.

An alarm looks at a window of the rows that metrics.jsonl holds, so that a resumed run sees the same as one that never stopped.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from focusdpo.foundation.journals import read_steps
from focusdpo.training.callbacks import Callback, Row
from focusdpo.training.config import TrainConfig
from focusdpo.training.run_files import METRICS_FILE

if TYPE_CHECKING:
    from focusdpo.training.trainer import Trainer

logger = logging.getLogger(__name__)

WINDOW = 50  # steps
RISEN = 1.05  # of the reference's errors
SATURATED = 0.05  # of the gradient that a pair has at a logit of 0
STUCK = 1e-4  # from ln 2
KNOWING = 0.1  # of the way from A by chance to its lowest: below it S hardly finds the subjects
READ = (  # of every row
    "loss", "gradient_factor", "error/policy_win", "error/policy_lose", "error/reference_win", "error/reference_lose",
)  # fmt: skip
# Shares of pairs that should be 0, and what it means where they are not.
UNWANTED = {
    "focus/detail_unreachable": "have fewer matches than their prior has tokens: coverage cannot fall to tau, and details "
    "never get weight there (docs/method.md, E8); look at the references' masks first, as one that marks a few tokens only is "
    "wrong, then raise focus.match_count or focus.tau, or use larger references",
    "focus/all_matched": "match every target token: no structure is left to look at (docs/method.md, E5); give the references "
    "masks, use smaller ones, or set focus.match_count",
}


@dataclass(frozen=True)
class Alarm:
    """Something that is probably wrong.

    Args:
        name: "errors_rising", "saturated", "stuck", "tau_never_reached", "coverage_at_chance", "detail_unreachable",
            "all_matched" or "non_finite_gradient".
        step: of the last row that it looked at.
        message: what was seen, and what may help.
    """

    name: str
    step: int
    message: str


def skipped(step: int, gradient_norm: float, pairs: Sequence[tuple[str, bool]]) -> Alarm:
    """The alarm of a step that is skipped for its gradient; its pairs by file and line, and whether each has a finite loss."""
    spoilt = [place for place, is_finite in pairs if not is_finite]
    message = f"skipped, the gradient norm is {gradient_norm}; its pairs: {', '.join(place for place, _ in pairs)}"
    if 0 < len(spoilt) < len(pairs):
        message += f"; without a finite loss: {', '.join(spoilt)}"
    return Alarm("non_finite_gradient", step, message)


class Health(Callback):
    """Watches a run's rows, and raises and logs alarms."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._rows: deque[Row] = deque(maxlen=WINDOW)
        self._read = READ + (("focus/coverage", "focus/detail_share") if config.focus.mask == "focus" else ())
        self._raised: set[str] = set()
        self._unwanted: set[str] = set()  # raised once in a run

    def on_train_begin(self, trainer: Trainer) -> None:
        self.restore(read_steps(trainer.folder / METRICS_FILE))  # which `Journals` has cut to the step

    def on_step_end(self, trainer: Trainer, row: Row) -> None:
        for alarm in self.update(row):
            trainer.notify("on_alarm", alarm)

    def on_alarm(self, trainer: Trainer, alarm: Alarm) -> None:
        logger.warning("step %d, %s: %s", alarm.step, alarm.name, alarm.message)

    def restore(self, rows: Iterable[Row]) -> None:
        """Takes the rows before a resume, one after the other; what they raise was raised before."""
        for row in rows:
            lost = [name for name in self._read if not isinstance(row.get(name), int | float)]
            if lost:
                logger.warning("the row of step %g has no number for %s, and is passed over", row["step"], ", ".join(lost))
                continue
            self._rows.append(row)
            self._unwanted |= {name for name in UNWANTED if row.get(name, 0) > 0}
        self._raised = set(self._found())

    def update(self, row: Row) -> list[Alarm]:
        """Looks at a new row: the alarms that begin with it. One that goes on is raised once."""
        self._rows.append(row)
        found = self._found()
        step = int(row["step"])
        alarms = [Alarm(name, step, message) for name, message in found.items() if name not in self._raised]
        self._raised = set(found)
        for name, message in UNWANTED.items():
            if row.get(name, 0) > 0 and name not in self._unwanted:
                self._unwanted.add(name)
                alarms.append(Alarm(name.removeprefix("focus/"), step, f"{100 * row[name]:.0f} % of its pairs {message}"))
        return alarms

    def _mean(self, name: str) -> float:
        return sum(row[name] for row in self._rows) / len(self._rows)

    def _found(self) -> dict[str, str]:
        """What is wrong now, by name; nothing before the window is full."""
        if len(self._rows) < WINDOW:
            return {}
        found: dict[str, str] = {}
        win, lose = (self._mean(f"error/policy_{side}") / self._mean(f"error/reference_{side}") for side in ("win", "lose"))
        if win > RISEN and lose > RISEN:
            found["errors_rising"] = (
                f"over {WINDOW} steps the policy's error is {win:.2f} times the reference's on winners and {lose:.2f} times "
                "on losers: the margin grows by spoiling both; lower optim.lr or loss.beta, or set loss.winner_anchor or "
                "loss.loser_scale=sdpo"
            )
        is_sigmoid, factor = self._config.loss.loss_type == "sigmoid", self._mean("gradient_factor")
        if is_sigmoid and factor < SATURATED:
            found["saturated"] = (
                f"the sigmoid leaves {100 * factor:.1f} % of the gradient: the pairs are told apart and teach no more; stop, "
                "or lower loss.beta"
            )
        if is_sigmoid and all(abs(row["loss"] - math.log(2)) < STUCK for row in self._rows):
            found["stuck"] = (
                f"the loss has stayed at ln 2 for {WINDOW} steps: the adapter has no effect; raise optim.lr or loss.beta, "
                "and look at lora.target_modules"
            )
        if self._config.focus.mask == "focus" and all(row["focus/detail_share"] == 0 for row in self._rows):
            found["tau_never_reached"] = (
                f"for {WINDOW} steps no pair's coverage fell to focus.tau={self._config.focus.tau:g} (mean "
                f"{self._mean('focus/coverage'):.2f}): details get no weight; raise focus.tau or "
                + ("lower focus.kappa" if self._config.focus.source == "estimate" else "focus.match_count")
            )
        levels = ("focus/coverage_chance", "focus/coverage_floor")
        known = all(isinstance(row.get(level), int | float) for row in self._rows for level in levels)
        if self._config.focus.taps_features and known:
            coverage, chance, floor = (self._mean(f"focus/coverage{end}") for end in ("", "_chance", "_floor"))
            if chance - floor > 0.02 and chance - coverage < KNOWING * (chance - floor):
                found["coverage_at_chance"] = (
                    f"over {WINDOW} steps coverage was {coverage:.2f}, and an S that knows nothing has {chance:.2f}: hidden "
                    "states do not find the subjects, and the structure field is noise; choose other blocks with focus.layers "
                    "(focusdpo masks and focusdpo stress show which find them), or set focus.source=estimate "
                    "and focus.per_subject=false"
                )
        return found
