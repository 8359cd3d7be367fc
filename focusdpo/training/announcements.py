"""What a run says of itself: a block when it begins, its pace after ten steps, a block when it is done."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch
from accelerate.utils import DistributedType

from focusdpo.data.formats import METADATA
from focusdpo.data.records import FILE_NAME
from focusdpo.foundation.journals import read_metrics
from focusdpo.foundation.progress_bars import terminal_width
from focusdpo.foundation.text import block, counted, duration, size
from focusdpo.training.callbacks import Callback, Row
from focusdpo.training.config import TrainConfig
from focusdpo.training.memory import run_estimate
from focusdpo.training.run_files import METRICS_FILE, VALIDATION_FILE

if TYPE_CHECKING:
    from focusdpo.training.trainer import Trainer

logger = logging.getLogger(__name__)

MAX_LAYOUTS = 8
MEASURED = 10  # steps, the first of which compiles and warms up


class Announcements(Callback):
    """Logs the blocks. A run is given it by whoever starts one; those of a study have their study to speak for them."""

    def on_train_begin(self, trainer: Trainer) -> None:
        logger.info("%s", begun(trainer))
        self._seconds: list[float] = []

    def on_step_end(self, trainer: Trainer, row: Row) -> None:
        if len(self._seconds) == MEASURED:
            return
        self._seconds.append(row["pairs"] / row["pairs_per_second"])
        left = trainer.config.max_steps - trainer.progress.step
        if len(self._seconds) == MEASURED and left:
            logger.info("%s", pace(median(self._seconds[1:]), left, row["peak_memory_mib"], trainer.accelerator.device))

    def on_train_end(self, trainer: Trainer) -> None:
        if not trainer.stopped:
            logger.info("%s", finished(trainer.config, trainer.progress.step))


def begun(trainer: Trainer) -> str:
    """The run as it begins, or goes on: model, device, pairs, batches."""
    config, device, step = trainer.config, trainer.accelerator.device, trainer.progress.step
    model, data, plan = config.model, config.data, trainer.batches.plan
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    kept = model.dtype if model.quantization is None else f"{model.quantization} and {model.dtype}"
    processes, full = trainer.launch.size, data.batch_size
    smaller = sum(count % full > 0 for count in plan.layouts.values())
    parts = [f"data.batch_size={full}", *([f"{processes} processes"] * (processes > 1))]
    parts += [f"gradient_accumulation={config.gradient_accumulation}"] * (config.gradient_accumulation > 1)
    pairs = full * processes * config.gradient_accumulation
    layouts = [f"{count} of {layout}" for layout, count in list(plan.layouts.items())[:MAX_LAYOUTS]]
    if len(plan.layouts) > MAX_LAYOUTS:
        rest = sum(list(plan.layouts.values())[MAX_LAYOUTS:])
        layouts.append(f"{rest} of {counted(len(plan.layouts) - MAX_LAYOUTS, 'other layout')}")
    epochs = f"{trainer.batches.epochs(config.max_steps):,.2f}".rstrip("0").rstrip(".")
    rows = {
        "model": f"{model.path}: {model.backbone}, frozen in {kept}" + (f", with {model.base_lora}" if model.base_lora else ""),
        "adapter": f"LoRA of rank {config.lora.rank}, {counted(trainer.trainable, 'trainable parameter')}",
        "device": f"{device}{name}, {counted(processes, 'process', 'processes')}",
        "precision": f"{'bf16 autocast' if config.mixed_precision == 'bf16' else 'no autocast'}; kernels: {trainer.kernels}",
        "pairs": f"{counted(len(trainer.train_set), 'pair')} in {counted(len(plan.layouts), 'layout')}, "
        f"{len(trainer.validation_set) or 'none'} held out\n" + "\n".join(layouts),
        "batch": f"{'up to ' * bool(smaller)}{counted(pairs, 'pair')} a step ({', '.join(parts)})",
        "length": f"{counted(config.max_steps, 'step')}, {epochs} epoch{'s' * (epochs != '1')}; an epoch has "
        f"{counted(plan.batches, 'batch', 'batches')}, {smaller or 'none'} of them smaller than data.batch_size",
    }
    if device.type == "cuda" and trainer.accelerator.distributed_type in (DistributedType.NO, DistributedType.MULTI_GPU):
        whole = torch.cuda.get_device_properties(device).total_memory
        try:
            estimated = run_estimate(config, trainer.train_set).total
            rows["memory"] = f"estimated at {size(estimated)} of {size(whole)} for the largest batch"
        except Exception as error:  # a run that is ready does not end for a line about it
            logger.debug("no estimate of the memory: %s", error)
    rows["output"] = str(trainer.folder)
    title = f"training goes on from step {step}" if step else "training begins"
    return block(title, rows, terminal_width())


def pace(seconds: float, left: int, peak: float, device: torch.device) -> str:
    """Time and memory, as the first steps have them.

    Args:
        seconds: of a step.
        left: steps that are left.
        peak: MiB.
        device: the memory is of; on a CPU that of the process.
    """
    each = f"{seconds:.3g} s" if seconds < 100 else duration(seconds)
    whole = f" of {size(torch.cuda.get_device_properties(device).total_memory)}" if device.type == "cuda" else ""
    return (
        f"a step takes {each}, the {counted(left, 'step')} left about {duration(seconds * left)}, and evaluations, "
        f"samples and checkpoints on top; peak memory so far: {size(round(peak * 2**20))}{whole}"
    )


def finished(config: TrainConfig, step: int) -> str:
    """Where everything is of a run that has finished, and the commands that come next."""
    folder = Path(config.output_dir)
    names = ["lora", "lora_ema"] if config.optim.ema_decay else ["lora"]
    rows = {"LoRA": "\n".join(str(folder / name) for name in names), "card": str(folder / "lora" / "README.md")}
    rows["metrics"] = str(folder / METRICS_FILE)
    if (folder / VALIDATION_FILE).is_file():
        # One's own evaluation may measure something else.
        evaluated = [row for row in read_metrics(folder / VALIDATION_FILE) if isinstance(row.get("accuracy"), int | float)]
        ends = (*evaluated[:1], *evaluated[1:][-1:])
        if ends:
            rows["held out"] = "accuracy " + ", ".join(f"{row['accuracy']:.2f} at step {row['step']}" for row in ends)
    beside = folder if folder.name not in ("", "..") else folder.resolve()
    run, images = shlex.quote(str(folder)), shlex.quote(f"{beside}-images")
    manifest = manifest_of(config)
    asked = "--prompt TEXT --references IMAGE ..." if manifest is None else f"--manifest {shlex.quote(str(manifest))}"
    sample = f"focusdpo sample --config {run} {asked} --compare true --output_dir {images}"
    commands = [f"focusdpo report {run}", sample]
    if manifest is not None:
        generated, results = shlex.quote(f"{beside}-images/images"), shlex.quote(f"{beside}-evaluation")
        commands.append(f"focusdpo evaluate --images {generated} {asked} --output_dir {results} --clip CLIP_FOLDER")
    text = block(f"training is done, at step {step} of {config.max_steps}", rows, terminal_width())
    return f"{text}\n  next\n" + "\n".join(f"    {command}" for command in commands)


def manifest_of(config: TrainConfig) -> Path | None:
    """Prompts with references that a run's LoRA may be tried on: those of its samples, or its held-out pairs."""
    for name in (config.samples.manifest, config.data.validation):
        path = None if name is None else Path(name)
        if path is None or path.name in METADATA:
            continue
        if (path / FILE_NAME).is_file() or (path.suffix == ".jsonl" and path.is_file()):
            return path
    return None
