"""The model of a run: what can be refused before it is loaded, loading it, and the adapter of one of its checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from focusdpo.foundation.tensor_files import TensorFiles
from focusdpo.models import BACKBONES, Backbone
from focusdpo.models.base import Parts, check_pipeline_path
from focusdpo.models.base_lora import NAME, merge_base_lora
from focusdpo.models.lora_reading import read_lora
from focusdpo.models.precision import DTYPES, check_quantization, quantize
from focusdpo.training.adapter import add_adapter, give_memory
from focusdpo.training.checkpoints import find_checkpoint, load_adapter
from focusdpo.training.config import ModelConfig, TrainConfig
from focusdpo.training.optimizers import check_optimizer
from focusdpo.training.run_files import CHECKPOINTS_FOLDER
from focusdpo.training.step import PreferenceStep


def check_model(model: ModelConfig) -> None:
    """Looks at what the settings of a model name: its folder, the base LoRA's file, optional packages.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: each names the setting.
    """
    check_pipeline_path(model.path)
    if model.base_lora is not None:
        read_lora(NAME, model.base_lora, model.backbone)  # all of its values
    if model.quantization is not None:
        check_quantization(model.quantization)


def check_files_and_packages(config: TrainConfig) -> None:
    """The same of a run, its optimiser and its caches.

    Raises:
        FileNotFoundError, NotADirectoryError, ModuleNotFoundError, ValueError: each names the setting.
    """
    check_model(config.model)
    check_optimizer(config.optim.optimizer)
    for name in ("cache", "reference_cache"):
        folder = getattr(config.data, name)
        if folder is not None:
            TensorFiles(f"data.{name}", Path(folder)).check()


def load_backbone(
    config: TrainConfig,
    parts: Parts,
    device: torch.device | None = None,
    transformer_device: torch.device | None = None,
) -> Backbone:
    """Loads a run's pipeline, or parts of it, as `Backbone.from_pretrained` does; ValueError where it cannot be."""
    model = config.model
    try:
        return BACKBONES[model.backbone].from_pretrained(
            model.path,
            dtype=DTYPES[model.dtype],
            revision=model.revision,
            guidance=model.guidance,
            max_sequence_length=model.max_sequence_length,
            parts=parts,
            device=device,
            transformer_device=transformer_device,
        )
    except OSError as error:
        raise ValueError(f"model.path: {model.path} cannot be loaded: {error}") from error


def make_policy(backbone: Backbone, config: TrainConfig, checkpoint: Path | None, device: torch.device) -> None:
    """Turns a freshly loaded backbone into the policy: merges the base LoRA, quantises, adds the adapter.

    Args:
        backbone: as its pipeline has it. A transformer on the meta device stays there; its adapter has memory, and values only
            once they come from another process.
        config: of the run.
        checkpoint: whose adapter; None takes a fresh one, which changes nothing yet.
        device: where quantised weights are made.
    """
    make_base(backbone, config.model, device)
    add_adapter(backbone, config.lora, config.seed)
    give_memory(backbone.transformer)
    if checkpoint is not None:
        load_adapter(checkpoint, backbone.transformer)


def make_base(backbone: Backbone, model: ModelConfig, device: torch.device) -> None:
    """Turns a freshly loaded backbone into what a LoRA stands on: merges the base LoRA, quantises. `make_policy` has more."""
    if model.base_lora is not None:
        backbone.merged_layers = merge_base_lora(backbone.pipeline, model.base_lora, model.base_lora_scale)
    if model.quantization is not None:
        quantize(backbone, model.quantization, device)


def checkpoint_of(name: str, config: TrainConfig, chosen: str) -> Path | None:
    """The checkpoint of a run that a setting chooses: "latest", "none" (the model before training), or a folder.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is damaged.
    """
    if chosen == "none":
        return None
    folder = Path(config.output_dir) / CHECKPOINTS_FOLDER
    found = find_checkpoint(chosen, folder, name)
    if found is None:
        raise FileNotFoundError(f"{name}: no checkpoint under {folder} yet; expected one, or 'none' for the model without it")
    return found


def load_whole(config: TrainConfig, device: torch.device, adapt: Callable[[Backbone], None]) -> Backbone:
    """A run's whole pipeline on a device, in evaluation mode, after `adapt` has made of it what is run."""
    whole = device if config.model.quantization is None else None  # quantised layers go there one by one
    backbone = load_backbone(config, "all", device, transformer_device=whole)
    adapt(backbone)
    backbone.to(device)
    backbone.transformer.eval()
    return backbone


def load_step(config: TrainConfig, checkpoint: Path | None) -> PreferenceStep:
    """The preference step of a run, its model in evaluation mode, on the accelerator where there is one.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: the model or the checkpoint cannot be used.
    """
    check_files_and_packages(config)
    device = torch.device("cpu" if config.cpu or not torch.cuda.is_available() else "cuda")
    backbone = load_whole(config, device, lambda loaded: make_policy(loaded, config, checkpoint, device))
    return PreferenceStep(backbone, config.focus, config.loss, config.backend)
