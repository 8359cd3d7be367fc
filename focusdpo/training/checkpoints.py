"""Checkpoints: everything a run needs to go on to the same numbers.

A checkpoint is written under a temporary name and renamed when complete, with checksums of all its files: a kill leaves no
`step-000250` behind that is not whole, and a disk that lost something shows. It holds

- `adapter.safetensors`, the weights that are trained; the frozen base is not in it;
- `state.pt`: optimiser, schedule, position and moving average, by name;
- `random_states_N.pkl`, the generators of process N;
- `lora/`, the adapter in diffusers' format, ready to be loaded into a pipeline;
- under DeepSpeed `deepspeed/`, the optimiser's parts, as it writes them.

Tensors are whole in it, however the run was split over processes (except for DeepSpeed's).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.checkpointing import load_accelerator_state, save_accelerator_state
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful

from focusdpo.foundation.files import checksum, partial_of
from focusdpo.foundation.launch import Launch
from focusdpo.foundation.output_folder import OutputFolder, free_name, step_folders
from focusdpo.models import Backbone
from focusdpo.training.adapter import adapter_state, load_adapter_state
from focusdpo.training.run_files import CHECKPOINTS_FOLDER
from focusdpo.training.sharding import is_deepspeed, split_like, split_optimizer_state, whole

logger = logging.getLogger(__name__)

ADAPTER_FILE = "adapter.safetensors"
SETTINGS_FILE = "settings.json"
CHECKSUMS_FILE = "checksums.json"
STATE_FILE = "state.pt"
DEEPSPEED_FOLDER = "deepspeed"
LAST_CHECKPOINT = "checkpoint"  # the name of the latest, a note beside the list of the run's files


class Progress:
    """Where a run stands; saved in its checkpoints."""

    def __init__(self) -> None:
        self.step = 0
        self.batches = 0
        self.skipped_in_a_row = 0
        self.owes = True  # what comes after the step: its evaluation, its samples
        self.beta: float | None = None  # where loss.auto_beta has brought it

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update({"owes": False} | state_dict)  # earlier versions saved after all of that


class Checkpoints:
    """Writes and reads the checkpoints of a run.

    Args:
        accelerator, launch: of the run.
        out: the run's folder.
        backbone: whose transformer carries the adapter.
        settings: what decides the run's numbers; kept in each checkpoint.
        limit: how many are kept; None keeps all.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        launch: Launch,
        out: OutputFolder,
        backbone: Backbone,
        settings: dict[str, Any],
        limit: int | None = None,
    ) -> None:
        self._accelerator = accelerator
        self._launch = launch
        self._out = out
        self._folder = out.path / CHECKPOINTS_FOLDER
        self._backbone = backbone
        self._transformer = backbone.transformer  # before it gets wrapped
        self._settings = settings
        self._limit = limit

    def save(self, step: int, parts: Mapping[str, Stateful]) -> None:
        """Writes the checkpoint of a step; all processes call it.

        Args:
            step: its number.
            parts: by name; an optimiser's or a moving average's tensors may be split over processes.
        """
        final = self._folder / f"step-{step:06d}"  # of a resumed run that came by again, in the earlier one's place
        is_main = self._accelerator.is_main_process
        with self._out.writing_folder(final) if is_main else nullcontext(partial_of(final)) as partial:
            self._launch.wait("the checkpoint's folder is made")
            adapter = adapter_state(self._transformer)
            state = {name: whole(part.state_dict()) for name, part in parts.items()}
            if is_main:
                save_file(adapter, partial / ADAPTER_FILE)
                torch.save(state, partial / STATE_FILE)
                self._backbone.save_lora(partial / "lora", adapter, peft=False)
                (partial / SETTINGS_FILE).write_text(json.dumps(self._settings, indent=1))
            if is_deepspeed(self._accelerator):
                self._backbone.transformer.save_checkpoint(str(partial), DEEPSPEED_FOLDER, exclude_frozen_parameters=True)
            save_accelerator_state(str(partial), [], [], [], [], self._accelerator.process_index, self._accelerator.step)
            self._launch.wait("the checkpoint's parts are written")
            if is_main:
                checksums = {name: checksum(partial / name) for name in _files(partial)}
                (partial / CHECKSUMS_FILE).write_text(json.dumps(checksums, indent=1))
                for path in (*(partial / name for name in _files(partial)), partial):
                    _to_disk(path)  # before the name says that it is whole
        if is_main:
            _to_disk(self._folder)
            self._out.remember(LAST_CHECKPOINT, final.name)
            self._keep_to_limit()
        self._launch.wait("the checkpoint is written")

    def load(self, checkpoint: Path, parts: Mapping[str, Stateful], parameters: Sequence[nn.Parameter]) -> None:
        """Restores everything but the adapter, after the transformer was wrapped or split.

        Args:
            checkpoint: its folder.
            parts: as in `save`; what the checkpoint has no state of stays as it is.
            parameters: the adapter's, in the optimiser's order.

        Raises:
            ValueError: a file of it does not fit, or cannot be read by these versions of the libraries.
        """
        try:
            state = torch.load(checkpoint / STATE_FILE, map_location="cpu", weights_only=True)
            if "optimizer" in state:
                state["optimizer"] = split_optimizer_state(state["optimizer"], parameters)
            if "ema" in state:
                shadows = zip(state["ema"]["shadow_params"], parameters, strict=True)
                state["ema"]["shadow_params"] = [split_like(shadow, parameter) for shadow, parameter in shadows]
            for name, part in parts.items():
                part.load_state_dict(state[name])
            if is_deepspeed(self._accelerator):
                self._backbone.transformer.load_checkpoint(str(checkpoint), DEEPSPEED_FOLDER, load_module_strict=False)
            rank = self._accelerator.process_index
            load_accelerator_state(str(checkpoint), [], [], [], [], rank)
        except torch.OutOfMemoryError:
            raise
        except (OSError, EOFError, RuntimeError, KeyError, ValueError, UnpicklingError) as error:
            raise ValueError(f"resume: {checkpoint} cannot be restored: {error}") from error

    def tidy(self, step: int) -> None:
        """Deletes what a kill left of a checkpoint that was being deleted, and sets checkpoints beyond `step` aside.

        The latter belong to a continuation that is being given up.
        """
        for number, later in step_folders(self._folder):
            if not (later / ADAPTER_FILE).is_file():
                self._out.remove(later)
            elif number > step:
                self._out.remove(later.with_suffix(".abandoned"))
                target = free_name(later.with_suffix(".abandoned"))
                later.rename(target)
                logger.warning("resume: %s lies beyond step %d, renamed to %s", later, step, target.name)
        self._keep_to_limit()

    def _keep_to_limit(self) -> None:
        for old in complete_checkpoints(self._folder)[: -self._limit] if self._limit else []:
            self._out.remove(old)  # the adapter's file first, without which it is no checkpoint


def _files(folder: Path) -> list[str]:
    """All files of a checkpoint but the checksums, relative to it."""
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in files if name != CHECKSUMS_FILE)


def _to_disk(path: Path) -> None:
    """Waits until a file's content, or a folder's names, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        checksums = json.loads((checkpoint / CHECKSUMS_FILE).read_bytes())
        if not isinstance(checksums, dict) or not {ADAPTER_FILE, STATE_FILE, SETTINGS_FILE} <= checksums.keys():
            return f"{CHECKSUMS_FILE} does not list the files of a checkpoint"
        for name, expected in checksums.items():
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
            if checksum(checkpoint / name) != expected:
                return f"{name} is not what was written"
    except (OSError, ValueError, RecursionError) as error:
        return f"it cannot be read: {error}"
    return None


def load_adapter(checkpoint: Path, transformer: nn.Module) -> None:
    """Puts a checkpoint's adapter into a transformer that is not yet wrapped or split; ValueError where it does not fit."""
    load_adapter_state(transformer, load_file(checkpoint / ADAPTER_FILE))


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder that were written to their end, by step."""
    return [path for _, path in step_folders(folder) if (path / ADAPTER_FILE).is_file()]


def find_checkpoint(chosen: str, folder: Path, name: str = "resume") -> Path | None:
    """The checkpoint that a setting names: the latest undamaged one of `folder`, or a checkpoint's own folder.

    Args:
        chosen: "latest", or the folder of a checkpoint.
        folder: where "latest" looks.
        name: of the setting, for messages.

    Returns:
        None where "latest" finds none, because there is none yet.

    Raises:
        FileNotFoundError: the named folder is no checkpoint.
        ValueError: it is damaged, or all that "latest" found are.
    """
    if chosen != "latest":
        path = Path(chosen)
        if not (path / ADAPTER_FILE).is_file():
            raise FileNotFoundError(
                f"{name}: {path} is not a checkpoint (no {ADAPTER_FILE} in it); pass 'latest' or its folder"
            )
        if wrong := damage(path):
            raise ValueError(f"{name}: {path} is damaged ({wrong}); resume from the one before it, or from 'latest'")
        return path
    complete = complete_checkpoints(folder)
    for path in reversed(complete):
        wrong = damage(path)
        if wrong is None:
            return path
        logger.warning("%s: %s is damaged (%s), going back to the one before it", name, path, wrong)
    if complete:
        raise ValueError(
            f"{name}: all {len(complete)} checkpoints under {folder} are damaged; start anew with --overwrite true"
        )
    return None
