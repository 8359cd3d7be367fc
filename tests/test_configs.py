"""The files in configs/ load, through the readers that users start them with."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

from focusdpo import cli
from focusdpo.models import TokenLayout
from focusdpo.models.sizes import released
from focusdpo.training.layouts import reference_rules
from focusdpo.training.memory import estimate

CONFIGS = Path(__file__).parents[1] / "configs"

FITS = {  # released model, gigabytes of a GPU, GPUs that share the frozen weights
    "train-flux1-uno": ("FLUX.1 dev", 80, 1),
    "train-flux2-dev": ("FLUX.2 dev", 80, 8),
    "train-klein-4b": ("FLUX.2 klein 4B", 24, 1),
}


def files(pattern):
    found = sorted(CONFIGS.glob(pattern))
    assert found
    return pytest.mark.parametrize("file", found, ids=lambda file: file.stem)


@files("train-*.yaml")
def test_training_settings(file):
    _, config = cli.parse_config(["train", "--config", str(file)])
    assert f"--config configs/{file.name}" in file.read_text(), "how to launch it"
    name, gigabytes, gpus = FITS[file.stem]
    architecture, side = released(name), config.data.resolution // 16
    assert architecture.backbone.name == config.model.backbone
    _, several = reference_rules(config.data, config.model.backbone)
    width, height = several.place((1024, 1024), 2).size
    layout = TokenLayout((side, side), ((height // 16, width // 16),) * 2)
    precision, optimizer = config.mixed_precision, config.optim.optimizer
    need = estimate(architecture, config.model, config.lora, precision, layout, config.data.batch_size, optimizer)
    companions = 0 if config.data.cache else need.companions
    needed = need.total - need.frozen_weights * (1 - 1 / gpus) - (need.companions - companions)
    assert needed < 0.9e9 * gigabytes, "the GPU that the file's comment names, with a tenth left for what is not estimated"
    assert f"{'one GPU' if gpus == 1 else 'eight GPUs'} of {gigabytes} GB" in file.read_text()


@files("accelerate-*.yaml")
def test_accelerate_settings(file):
    config = load_config_from_file(str(file))  # refuses unknown names
    assert isinstance(config, ClusterConfig)
    assert f"--config_file configs/{file.name}" in file.read_text(), "how to launch it"
    expected = {"fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}.get(file.stem.rsplit("-")[-1], "MULTI_GPU")
    assert config.distributed_type == expected and config.num_processes == 8 * config.num_machines
