"""What is changed about a run, by name."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from focusdpo.foundation.settings import require
from focusdpo.models import BACKBONES
from focusdpo.models.base import pipeline_folder
from focusdpo.studies.config import AblationConfig
from focusdpo.studies.masks import parts_of
from focusdpo.training.config import FocusConfig, LossConfig, ModelConfig, TrainConfig

THIRDS = ("early", "middle", "late")


@dataclass(frozen=True)
class Change:
    """A variant: what it is called, its settings of mask and loss, and whether it is trained at all."""

    name: str
    label: str
    focus: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    trained: bool = True

    def of(self, config: TrainConfig) -> TrainConfig:
        """The run with this change; ValueError where a value is out of range."""
        return replace(
            config,
            focus=FocusConfig(**{**vars(config.focus), **self.focus}),
            loss=LossConfig(**{**vars(config.loss), **self.loss}),
        )


SFT = {"loss_type": "sft", "label_smoothing": 0.0, "auto_beta": None, "winner_anchor": 0.0, "loser_scale": None}
IMAGE = {"granularity": "image"}
# M_s and M_d alone are ends of the fusion (E8): gamma = 1 leaves M_s in both branches, tau = 1 and gamma = 0 M_d in all cases.
M_S = {"mask": "focus", "gamma": 1.0}
M_D = {"mask": "focus", "tau": 1.0, "gamma": 0.0}
FEATURES = {"source": "features"}
ESTIMATE = {"source": "estimate", "per_subject": False, "mask_from": "winner"}
_ALL = (
    Change("base", "before training", trained=False),
    Change("sft", "SFT on winners", {"mask": "none"}, SFT | IMAGE),
    Change("dpo", "Diffusion-DPO (M = 1)", {"mask": "none"}, IMAGE),
    Change("prior", "the prior alone", {"mask": "prior"}),
    Change("subject", "the prior, a sigmoid for each subject", {"mask": "prior"}, {"granularity": "subject"}),
    Change("structure", "M_s alone", M_S),
    Change("per_subject", "M_s alone, per subject", M_S | FEATURES | {"per_subject": True}),
    Change("max", "M_s alone, best reference token", M_S | FEATURES | {"pooling": "max"}),
    Change("random", "M_s random, of that size", M_S | {"source": "random"}),
    Change("truth", "M_s of the true places", M_S | {"source": "truth"}),
    Change("estimate", "the estimate field alone", M_S | ESTIMATE),
    Change("detail", "M_d alone", M_D),
    Change("focus", "FocusDPO", {"mask": "focus"}),
    Change("focus_estimate", "FocusDPO with the estimate field", {"mask": "focus"} | ESTIMATE),
)
VARIANTS = {change.name: change for change in _ALL}
OF_PRIOR = ("dpo", "prior", "subject")  # variants without a mask within the prior
OF_LOSS = ("granularity",)  # grids over settings of the loss


def changes_of(config: AblationConfig, run: TrainConfig) -> list[Change]:
    """All variants of an ablation, those of its grids behind the others; ValueError names a value out of range."""
    known = [VARIANTS[name] for name in config.variants]
    own = {} if config.prior_beta is None else {"beta": config.prior_beta}
    changes = [replace(change, loss=change.loss | own) if change.name in OF_PRIOR else change for change in known]
    for grid in config.grids:
        for value in getattr(config, grid):
            setting = blocks_of(value, run.model) if grid == "layers" else value
            own = getattr(run.loss if grid in OF_LOSS else run.focus, grid)
            applies = grid != "kappa" or run.focus.source == "estimate"  # which the grid's values all have
            if own == setting and type(own) is type(setting) and applies and "focus" in config.variants:
                continue  # the run's own value is the variant "focus"
            changed: dict[str, Any] = {grid: setting}
            focus, loss = ({}, changed) if grid in OF_LOSS else (changed, {})
            if grid == "kappa" or setting == "estimate":
                focus = ESTIMATE | focus
            changes.append(Change(f"{grid}={value}", f"FocusDPO, {grid} = {value}", {"mask": "focus"} | focus, loss))
    for change in changes:
        try:
            change.of(run)
        except ValueError as error:
            raise ValueError(f"{change.name.partition('=')[0]}: {error}") from error
    return changes


def blocks_of(text: str, model: ModelConfig) -> str | list[int]:
    """`focus.layers` of a value of the grid: "all", a third of the tapped blocks, or their numbers."""
    if text == "all":
        return "all"
    count = BACKBONES[model.backbone].count_tapped(pipeline_folder(model.path, model.revision))
    if text in THIRDS:
        require(count >= len(THIRDS), "layers", text, f"no thirds of a model with {count} blocks")
        return list(parts_of(count, len(THIRDS))[THIRDS.index(text)])
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f'layers: got {text!r}; expected "all", {", ".join(THIRDS)}, or numbers such as "0,2,4"') from error
    require(all(0 <= number < count for number in numbers), "layers", text, f"blocks from 0 to {count - 1}")
    return numbers
