"""Checkpoints: everything a run needs to go on to the same numbers.

A checkpoint is written under a temporary name and renamed when complete, so that a folder `step-000250` is always whole.
accelerate stores optimiser, schedule and random states; the adapter goes beside them, the frozen base does not.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

from focusdpo.training.adapter import adapter_state, load_adapter_state

PREFIX = "step-"
ADAPTER_FILE = "adapter.safetensors"


class Checkpoints:
    """Writes and reads the checkpoints of a run.

    Args:
        accelerator: whose prepared objects are saved.
        folder: where checkpoints go.
        transformer: the unwrapped module that carries the adapter.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, transformer: nn.Module) -> None:
        self._accelerator = accelerator
        self._folder = folder
        self._transformer = transformer
        accelerator.register_save_state_pre_hook(self._save_adapter)
        accelerator.register_load_state_pre_hook(self._load_adapter)

    def _save_adapter(self, models: list[Any], weights: list[Any], output_dir: str) -> None:
        weights.clear()  # keeps accelerate from writing the frozen base
        if self._accelerator.is_main_process:
            state = {name: value.detach().contiguous().cpu() for name, value in adapter_state(self._transformer).items()}
            save_file(state, Path(output_dir) / ADAPTER_FILE)

    def _load_adapter(self, models: list[Any], input_dir: str) -> None:
        models.clear()
        load_adapter_state(self._transformer, load_file(Path(input_dir) / ADAPTER_FILE))

    def save(self, step: int) -> Path:
        """Writes the checkpoint of a step; all processes call it."""
        final = self._folder / f"{PREFIX}{step:06d}"
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
        """Restores a checkpoint into everything that was prepared or registered."""
        self._accelerator.load_state(str(checkpoint))


def find_checkpoint(resume: str, folder: Path) -> Path:
    """The checkpoint that `resume` names: "latest" of `folder`, or a checkpoint's own folder.

    Raises:
        FileNotFoundError: there is none.
    """
    if resume == "latest":
        complete = sorted(path for path in folder.glob(f"{PREFIX}*") if path.suffix != ".partial")
        if not complete:
            raise FileNotFoundError(f"resume: no checkpoint under {folder}; start without --resume")
        return complete[-1]
    path = Path(resume)
    if not (path / ADAPTER_FILE).is_file():
        raise FileNotFoundError(f"resume: {path} is not a checkpoint (no {ADAPTER_FILE} in it); pass 'latest' or its folder")
    return path
