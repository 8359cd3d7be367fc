"""Checkpoints: everything a run needs to go on to the same numbers.

A checkpoint is written under a temporary name and renamed when complete, so that a folder `step-000250` is always whole.
accelerate stores optimiser and random states; the adapter goes beside them, the frozen base does not. `lora/` in it is the
adapter in diffusers' format, ready to be loaded into a pipeline.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from focusdpo.models import Backbone
from focusdpo.training.adapter import adapter_state, load_adapter_state

logger = logging.getLogger(__name__)

ADAPTER_FILE = "adapter.safetensors"
SETTINGS_FILE = "settings.json"
NAME = re.compile(r"step-(\d+)")


class Checkpoints:
    """Writes and reads the checkpoints of a run.

    Args:
        accelerator: whose prepared objects are saved.
        folder: where checkpoints go.
        backbone: whose transformer carries the adapter.
        settings: what decides the run's numbers; kept in each checkpoint.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, backbone: Backbone, settings: dict[str, Any]) -> None:
        self._accelerator = accelerator
        self._folder = folder
        self._backbone = backbone
        self._transformer = backbone.transformer  # before it gets wrapped
        self._settings = settings
        accelerator.register_save_state_pre_hook(self._save_adapter)
        accelerator.register_load_state_pre_hook(self._load_adapter)

    def _save_adapter(self, models: list[Any], weights: list[Any], output_dir: str) -> None:
        weights.clear()  # keeps accelerate from writing the frozen base
        if self._accelerator.is_main_process:
            folder = Path(output_dir)
            state = {name: value.detach().contiguous().cpu() for name, value in adapter_state(self._transformer).items()}
            save_file(state, folder / ADAPTER_FILE)
            self._backbone.save_lora(folder / "lora")
            (folder / SETTINGS_FILE).write_text(json.dumps(self._settings, indent=1))

    def _load_adapter(self, models: list[Any], input_dir: str) -> None:
        models.clear()
        load_adapter_state(self._transformer, load_file(Path(input_dir) / ADAPTER_FILE))

    def save(self, step: int) -> Path:
        """Writes the checkpoint of a step; all processes call it."""
        final = self._folder / f"step-{step:06d}"
        partial = final.with_suffix(".partial")
        if self._accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self._accelerator.wait_for_everyone()
        self._accelerator.save_state(str(partial))
        self._accelerator.wait_for_everyone()
        if self._accelerator.is_main_process:
            # A complete checkpoint of this step can be there already: a resumed run that came by again.
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
        self._accelerator.wait_for_everyone()
        return final

    def load(self, checkpoint: Path) -> None:
        """Restores a checkpoint into everything that was prepared or registered.

        Raises:
            ValueError: a file of it is missing, cut short, or does not fit the model.
        """
        try:
            self._accelerator.load_state(str(checkpoint))
        except (OSError, EOFError, RuntimeError, KeyError) as error:
            raise ValueError(f"resume: {checkpoint} is damaged ({error}); resume from the one before it by its path") from error

    def retire_later(self, step: int) -> None:
        """Sets checkpoints beyond `step` aside: they belong to a continuation that is being given up."""
        for later in (path for path in complete_checkpoints(self._folder) if checkpoint_step(path) > step):
            target = later.with_suffix(".abandoned")
            shutil.rmtree(target, ignore_errors=True)
            later.rename(target)
            logger.warning("resume: %s lies beyond step %d, renamed to %s", later, step, target.name)


def checkpoint_step(checkpoint: Path) -> int:
    match = NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def complete_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a folder, by step."""
    found = [path for path in folder.glob("step-*") if checkpoint_step(path) >= 0 and (path / ADAPTER_FILE).is_file()]
    return sorted(found, key=checkpoint_step)


def find_checkpoint(resume: str, folder: Path) -> Path | None:
    """The checkpoint that `resume` names: "latest" of `folder` (None where there is none yet), or a checkpoint's own folder.

    Raises:
        FileNotFoundError: the named folder is no checkpoint.
    """
    if resume == "latest":
        complete = complete_checkpoints(folder)
        return complete[-1] if complete else None
    path = Path(resume)
    if not (path / ADAPTER_FILE).is_file():
        raise FileNotFoundError(f"resume: {path} is not a checkpoint (no {ADAPTER_FILE} in it); pass 'latest' or its folder")
    return path
