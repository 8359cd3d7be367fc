"""The model of a run: what can be refused before it is loaded, and loading it."""

from __future__ import annotations

from pathlib import Path

import torch

from focusdpo.foundation.tensor_files import TensorFiles
from focusdpo.models import BACKBONES, Backbone
from focusdpo.models.base import Parts, check_pipeline_path
from focusdpo.models.base_lora import check_base_lora
from focusdpo.models.quantization import check_quantization
from focusdpo.training.config import TrainConfig
from focusdpo.training.memory import DTYPES
from focusdpo.training.optimizers import check_optimizer


def check_files_and_packages(config: TrainConfig) -> None:
    """Looks at what the settings of the model name: folders, the base LoRA's file, optional packages.

    Raises:
        FileNotFoundError, NotADirectoryError, ModuleNotFoundError, ValueError: each names the setting.
    """
    check_pipeline_path(config.model.path)
    if config.model.base_lora is not None:
        check_base_lora(config.model.base_lora, config.model.backbone)
    if config.model.quantization is not None:
        check_quantization(config.model.quantization)
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
