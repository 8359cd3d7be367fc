"""Where metrics and images go beside the run's own files: TensorBoard, Weights & Biases."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

from focusdpo.foundation.files import write_whole
from focusdpo.training.callbacks import Callback, Row
from focusdpo.training.config import TrainConfig

if TYPE_CHECKING:
    from focusdpo.training.trainer import Trainer


def check_trackers(config: TrainConfig) -> None:
    """Refuses trackers that cannot be written to: ValueError. Where W&B has no key, and a terminal, it asks for one."""
    if "wandb" not in config.trackers:
        return
    try:
        import wandb
    except ImportError as error:
        raise ValueError(f"trackers: wandb cannot be imported ({error}); pip install wandb, or leave it out") from error
    try:
        wandb.login()
    except wandb.Error as error:
        hint = "set WANDB_MODE=offline, or leave wandb out"
        raise ValueError(f"trackers: wandb cannot log in ({error}); run `wandb login`, {hint}") from error


class Trackers(Callback):
    """Sends metrics to the trackers that a run names. `log_images` sends images to them."""

    def on_train_begin(self, trainer: Trainer) -> None:
        """Opens them; what TensorBoard has beyond the step is dropped, as it is about to be computed again."""
        config, folder = trainer.config, trainer.folder
        trackers: list[GeneralTracker] = []
        for name in config.trackers:
            if name == "tensorboard":
                trackers.append(TensorBoardTracker(name, str(folder), purge_step=trainer.progress.step + 1))
            else:
                # By one id a resumed run goes on in the same place; steps that W&B knows already it leaves as they are.
                run = {"id": _wandb_id(folder), "resume": "allow", "name": config.run_name or folder.resolve().name}
                trackers.append(WandBTracker(config.project, **run, dir=str(folder), config=asdict(config)))
        trainer.accelerator.log_with = trackers
        trainer.accelerator.init_trackers(config.project)

    def on_step_end(self, trainer: Trainer, row: Row) -> None:
        trainer.accelerator.log({name: value for name, value in row.items() if name != "step"}, step=int(row["step"]))

    def on_evaluate(self, trainer: Trainer, row: Row) -> None:
        self.on_step_end(trainer, {name if name == "step" else f"validation/{name}": value for name, value in row.items()})


def log_images(accelerator: Accelerator, images: Mapping[str, np.ndarray], step: int) -> None:
    """Sends images [H, W, 3] of 8 bits to every tracker, by name."""
    for tracker in accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({name: image[None] for name, image in images.items()}, step=step, **layout)


def _wandb_id(folder: Path) -> str:
    file = folder / "wandb" / "id"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, uuid.uuid4().hex)
    return file.read_text()
