"""The files in configs/ load, through the readers that users start them with."""

from __future__ import annotations

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

from focusdpo.commands import cli
from focusdpo.models import TokenLayout
from focusdpo.models.sizes import RELEASED
from focusdpo.training.image_sizes import reference_rules
from focusdpo.training.memory import estimate, launched
from tests import ROOT

CONFIGS = ROOT / "configs"

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
    architecture, side = RELEASED[name], config.data.resolution // 16
    assert architecture.backbone.name == config.model.backbone
    _, several = reference_rules(config.data, config.model.backbone)
    width, height = several.place((1024, 1024), 2).size
    layout = TokenLayout((side, side), ((height // 16, width // 16),) * 2)
    precision, optimizer = config.mixed_precision, config.optim.optimizer
    need = estimate(architecture, config.model, config.lora, precision, layout, config.data.batch_size, optimizer)
    needed = need.total - (need.companions if config.data.cache else 0)
    if gpus > 1:
        assert config.data.cache
        needed = launched(architecture, config.model, config.lora, need, config.optim.optimizer, gpus).device_fsdp2
    assert needed < 0.9e9 * gigabytes, "the GPU that the file's comment names, with a tenth left for what is not estimated"
    assert f"{'one GPU' if gpus == 1 else 'eight GPUs'} of {gigabytes} GB" in file.read_text()


@files("accelerate-*.yaml")
def test_accelerate_settings(file):
    config = load_config_from_file(str(file))  # refuses unknown names
    assert isinstance(config, ClusterConfig)
    assert f"--config_file configs/{file.name}" in file.read_text(), "how to launch it"
    expected = {"fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}.get(file.stem.rsplit("-")[-1], "MULTI_GPU")
    assert config.distributed_type == expected and config.num_processes == 8 * config.num_machines
    text, machines = file.read_text(), config.num_machines
    if machines == 1:
        assert "One machine, so that every path may be on its own disk." in text
    else:
        assert (
            "the same output_dir (with its checkpoints), data.cache and data.reference_cache: folders of a shared disk" in text
        )
        assert "the same content at the same path on each machine" in text
    sizes = config.parallelism_config
    if sizes:
        within, copies = (sizes[f"parallelism_config_dp_{name}_size"] for name in ("shard", "replicate"))
        assert (within, copies) == (config.num_processes // machines, machines), "split within a machine, whole on each"


@pytest.mark.parametrize(
    ("launch", "train", "own", "one"),
    [
        ("8x80gb-ddp", "flux1-uno", 64, 8),
        ("8x80gb-zero2", "flux1-uno", 64, 8),
        ("4nodes", "flux1-uno", 256, 32),
        ("4nodes-fsdp2", "flux2-dev", 32, 32),
    ],
)
def test_pairs_a_step(launch, train, own, one):
    """What a file's comments say of the batch, with the training file that they name and with an accumulation of 1."""
    file = CONFIGS / f"accelerate-{launch}.yaml"
    text, processes = file.read_text().replace("\n#", ""), load_config_from_file(str(file)).num_processes
    _, config = cli.parse_config(["train", "--config", str(CONFIGS / f"train-{train}.yaml")])
    pairs = processes * config.data.batch_size
    assert (pairs * config.gradient_accumulation, pairs) == (own, one)
    assert f"train-{train}.yaml" in text
    for number in {own, one}:
        assert f" {number} " in text or f" {number}." in text
