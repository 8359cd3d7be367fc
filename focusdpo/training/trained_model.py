"""A run's model outside of training: base, merged LoRA, quantised weights, and the adapter of one of its checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch

from focusdpo.models import Backbone
from focusdpo.models.base_lora import merge_base_lora
from focusdpo.models.quantization import quantize
from focusdpo.training.adapter import add_adapter, give_memory
from focusdpo.training.checkpoints import find_checkpoint, load_adapter
from focusdpo.training.config import TrainConfig
from focusdpo.training.loading import check_files_and_packages, load_backbone
from focusdpo.training.step import PreferenceStep


def add_policy(backbone: Backbone, config: TrainConfig, checkpoint: Path | None, device: torch.device) -> None:
    """Turns a freshly loaded backbone into the policy: merges the base LoRA, quantises, adds the adapter.

    Args:
        backbone: as its pipeline has it. A transformer on the meta device stays there; its adapter has memory, and values only
            once they come from another process.
        config: of the run.
        checkpoint: whose adapter; None takes a fresh one, which changes nothing yet.
        device: where quantised weights are made.
    """
    if config.model.base_lora is not None:
        backbone.merged_layers = merge_base_lora(backbone.pipeline, config.model.base_lora, config.model.base_lora_scale)
    if config.model.quantization is not None:
        quantize(backbone, config.model.quantization, device)
    add_adapter(backbone, config.lora, config.seed)
    give_memory(backbone.transformer)
    if checkpoint is not None:
        load_adapter(checkpoint, backbone.transformer)


def checkpoint_of(name: str, config: TrainConfig, chosen: str) -> Path | None:
    """The checkpoint of a run that a setting chooses: "latest", "none" (the model before training), or a folder.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is damaged.
    """
    if chosen == "none":
        return None
    folder = Path(config.output_dir) / "checkpoints"
    try:
        found = find_checkpoint(chosen, folder)
    except (FileNotFoundError, ValueError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{name}: {str(error).removeprefix('resume: ')}") from error
    if found is None:
        raise FileNotFoundError(f"{name}: no checkpoint under {folder} yet; expected one, or 'none' for the model without it")
    return found


def load_step(config: TrainConfig, checkpoint: Path | None) -> PreferenceStep:
    """The preference step of a run, its model in evaluation mode, on the accelerator where there is one.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: the model or the checkpoint cannot be used.
    """
    check_files_and_packages(config)
    device = torch.device("cpu" if config.cpu or not torch.cuda.is_available() else "cuda")
    whole = device if config.model.quantization is None else None  # quantised layers go there one by one
    backbone = load_backbone(config, "all", device, transformer_device=whole)
    add_policy(backbone, config, checkpoint, device)
    backbone.to(device)
    backbone.transformer.eval()
    return PreferenceStep(backbone, config.focus, config.loss, config.backend)
