"""Where a pipeline's parts are read to, and the transformer of a process that is given its weights by another."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from focusdpo.models import BACKBONES, base
from focusdpo.models.sizes import META
from focusdpo.models.tiny_flux import write_tiny_flux
from focusdpo.training import sharding
from focusdpo.training.config import DataConfig, LoraConfig, ModelConfig, TrainConfig
from focusdpo.training.loading import make_policy
from tests.tiny_flux2 import write_tiny_flux2
from tests.tiny_qwen import write_tiny_qwen

WRITE = {"flux": write_tiny_flux, "flux2": write_tiny_flux2, "qwen-edit-plus": write_tiny_qwen}


@pytest.fixture(scope="module", params=WRITE)
def pipeline(request, tmp_path_factory):
    """A backbone's name and the folder of a tiny pipeline."""
    return request.param, str(WRITE[request.param](tmp_path_factory.mktemp("model") / "tiny"))


def described(transformer):
    tensors = (*transformer.named_parameters(), *transformer.named_buffers())
    return {name: (tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in tensors}


def test_a_transformer_without_weights_is_the_same_otherwise(pipeline):
    name, folder = pipeline
    config = TrainConfig(ModelConfig(folder, backbone=name), DataConfig("pairs"), "run", lora=LoraConfig(rank=4, alpha=4))
    backbones = []
    for place in (None, META):
        backbone = BACKBONES[name].from_pretrained(folder, dtype=torch.bfloat16, parts="transformer", transformer_device=place)
        assert backbone.device == (place or torch.device("cpu"))
        make_policy(backbone, config, None, torch.device("cpu"))
        backbones.append(backbone)
    whole, empty = backbones
    assert described(empty.transformer) == described(whole.transformer)
    assert {p.device.type for p in empty.transformer.parameters() if p.requires_grad} == {"cpu"}, "told apart by address"
    assert {p.device.type for p in empty.transformer.parameters() if not p.requires_grad} == {"meta"}
    # Qwen-Image keeps its rotary frequencies in attributes that are no buffers.
    for (path, module), other in zip(whole.transformer.named_modules(), empty.transformer.modules(), strict=True):
        for key, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, getattr(other, key)), f"{path}.{key}"


def test_a_base_lora_leaves_a_transformer_without_weights_alone(pipeline, tmp_path):
    """What it changes is known all the same, and comes with the weights of the process that has them."""
    name, folder = pipeline
    config = TrainConfig(ModelConfig(folder, backbone=name), DataConfig("pairs"), "run", lora=LoraConfig(rank=4, alpha=4))
    backbone = BACKBONES[name].from_pretrained(folder, dtype=torch.float32, parts="transformer")
    make_policy(backbone, config, None, torch.device("cpu"))
    backbone.save_lora(tmp_path, peft=False)
    config.model.base_lora = str(tmp_path)
    merged = []
    for place in (None, META):
        backbone = BACKBONES[name].from_pretrained(folder, dtype=torch.float32, parts="transformer", transformer_device=place)
        make_policy(backbone, config, None, torch.device("cpu"))
        merged.append(backbone.merged_layers)
    assert merged[0] and merged[0] == merged[1]


@pytest.mark.parametrize("parts", ["all", "encoders", "transformer", "vae"])
def test_parts_are_read_to_a_device(pipeline, parts, monkeypatch):
    """Through diffusers' device_map; the CPU takes the place of a GPU."""
    name, folder = pipeline
    plain = BACKBONES[name].from_pretrained(folder, dtype=torch.bfloat16, parts=parts)
    places = []
    monkeypatch.setattr(base, "_device_map", lambda device: places.append(device) or (None if device is None else device.type))
    device = torch.device("cpu")
    for place in (device, None, META):
        backbone = BACKBONES[name].from_pretrained(
            folder, dtype=torch.bfloat16, parts=parts, device=device, transformer_device=place
        )
        for part, expected in plain.pipeline.components.items():
            found = backbone.pipeline.components[part]
            if not isinstance(expected, nn.Module):
                assert type(found) is type(expected)
            elif part == "transformer" and place is META:
                assert all(p.is_meta for p in found.parameters())
            else:
                weights = dict(expected.state_dict())
                assert found.state_dict().keys() == weights.keys() and not any(p.requires_grad for p in found.parameters())
                assert all(torch.equal(value, weights[key]) for key, value in found.state_dict().items())
    assert device in places


def test_only_kinds_of_other_devices_are_told_to_diffusers():
    assert [base._device_map(d) for d in (None, torch.device("cpu"), torch.device("cuda", 3))] == [None, None, "cuda"]


class Launch:
    """What `place_of_transformer` asks an accelerator for."""

    def __init__(self, kind, is_main_process=True):
        self.distributed_type = kind
        self.is_main_process = is_main_process
        self.device = torch.device("cuda", 1)


def test_one_process_reads_what_is_split():
    config = TrainConfig(ModelConfig("model"), DataConfig("pairs"), "run")
    nf4 = dataclasses.replace(config, model=ModelConfig("model", quantization="nf4"))
    place = sharding.place_of_transformer
    assert place(Launch("MULTI_GPU", False), config) == place(Launch("NO"), config) == torch.device("cuda", 1)
    assert place(Launch("FSDP"), config) is None and place(Launch("FSDP", False), config) == META
    assert place(Launch("DEEPSPEED", False), config) is None, "DeepSpeed asks every process for the whole"
    assert place(Launch("MULTI_GPU", False), nf4) is None, "quantised layer by layer"


@pytest.mark.parametrize("other", [nn.Linear(3, 2), nn.Linear(2, 2, bias=False), nn.Linear(2, 2, dtype=torch.float64)])
def test_another_model_in_another_process_is_refused(other, monkeypatch):
    """In the first process as well, which would wait for the others."""
    first = nn.Linear(2, 2)
    described = {name: (list(value.shape), str(value.dtype)) for name, value in first.named_parameters()}
    monkeypatch.setattr(sharding, "broadcast_object_list", lambda objects: [described])
    monkeypatch.setattr(sharding, "gather_object", lambda mine: [None, *mine])
    sharding._check_alike(first)
    with pytest.raises(ValueError, match="model.path: process 1 has another model than process 0: (weight|bias) is"):
        sharding._check_alike(other)
    monkeypatch.setattr(sharding, "gather_object", lambda mine: [*mine, "weight is other"])
    with pytest.raises(ValueError, match="process 1 has another model than process 0: weight is other; expected the same"):
        sharding._check_alike(first)
