"""The LoRA adapter: the model with it is the policy, without it the reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import peft
import torch
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from focusdpo.models import Backbone
from focusdpo.training.config import LoraConfig
from focusdpo.training.sharding import gathered, whole

ADAPTER = "default"  # the name that diffusers' scripts and loaders use


def targets_of(config: LoraConfig, backbone: Backbone | type[Backbone]) -> list[str]:
    """Ends of the names of the layers that get an adapter: the settings', or else the backbone's own."""
    return list(backbone.adapted_layers if config.target_modules is None else config.target_modules)


def add_adapter(backbone: Backbone, config: LoraConfig, seed: int) -> list[nn.Parameter]:
    """Adds a fresh adapter (which changes nothing yet) to the transformer; returns its trainable parameters, in fp32.

    Raises:
        ValueError: a target names no layer of the model, or one that is not linear.
    """
    transformer, targets = backbone.transformer, targets_of(config, backbone)
    modules = dict(transformer.named_modules())
    for target in targets:
        _check_target(target, modules)
    # Of a model without weights the adapter has none either: to draw those of a large rank would take minutes.
    place = torch.device("meta") if next(transformer.parameters()).is_meta else nullcontext()
    with torch.random.fork_rng(), place:
        torch.manual_seed(seed)
        transformer.add_adapter(
            peft.LoraConfig(
                r=config.rank,
                lora_alpha=config.alpha,
                lora_dropout=config.dropout,
                init_lora_weights="gaussian",
                target_modules=targets,
            ),
            adapter_name=ADAPTER,
        )
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    return parameters


def give_memory(transformer: nn.Module) -> None:
    """Puts trainable parameters that are on the meta device on the CPU, as zeros.

    accelerate tells an optimiser's parameters apart by their addresses, of which those on the meta device have none.
    """
    for module in transformer.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta and parameter.requires_grad:
                setattr(module, name, nn.Parameter(torch.zeros_like(parameter, device="cpu")))


def _check_target(target: str, modules: dict[str, nn.Module]) -> None:
    """PEFT takes every module whose name ends so, whatever its kind."""
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    named = [name for name in modules if name == target or name.endswith(f".{target}")]
    if not named:
        known = sorted({".".join(n.split(".")[-2:]) if n.split(".")[-1].isdigit() else n.split(".")[-1] for n in linear})
        raise ValueError(f"lora.target_modules: the model has no linear layer {target!r}; it has {', '.join(known)}")
    for name in named:
        if name not in linear:
            inside = [other for other in linear if other.startswith(f"{name}.") or other.endswith(f".{target}")]
            kind, examples = type(modules[name]).__name__, ", ".join(inside[:3])
            raise ValueError(
                f"lora.target_modules: {target!r} also names {name}, a {kind}; an adapter fits linear layers alone, so write "
                f"more of the names that are meant, such as {examples}"
            )


@contextmanager
def reference_model(transformer: Any) -> Iterator[None]:
    """Switches the adapter off inside, and on again whatever happens: a backward pass with it off would be wrong."""
    trained = [p for p in transformer.parameters() if p.requires_grad]
    transformer.disable_adapters()
    # peft freezes them with it; FSDP2 decides in the first forward pass, which may be this one, what it averages gradients of.
    for parameter in trained:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        transformer.enable_adapters()


def adapter_state(transformer: nn.Module) -> dict[str, Tensor]:
    """The adapter's weights by name, whole and on the CPU; all processes call it."""
    with gathered([p for p in transformer.parameters() if p.requires_grad]):
        state = whole(get_peft_model_state_dict(transformer, adapter_name=ADAPTER))
    return {name: value.contiguous().clone() for name, value in state.items()}


def load_adapter_state(transformer: nn.Module, state: dict[str, Tensor]) -> None:
    """Puts weights back that `adapter_state` gave, before a transformer is split; ValueError names what does not fit."""
    expected = adapter_state(transformer)
    if expected.keys() != state.keys():
        sides = {"the checkpoint": state.keys() - expected.keys(), "the model": expected.keys() - state.keys()}
        only = "; ".join(f"only {side} has {min(names)} and {len(names) - 1} more" for side, names in sides.items() if names)
        raise ValueError(f"the adapter's layers differ: {only}; use the run's own model and lora.target_modules")
    for name, value in state.items():
        saved, present = list(value.shape), list(expected[name].shape)
        if saved != present:
            rank = 0 if "lora_A" in name else 1
            other = [i for i in range(len(present)) if i != rank and saved[i] != present[i]]
            setting = "model.path, it is of another size" if other else "lora.rank"
            raise ValueError(f"{name}: the checkpoint's shape is {saved}, the model's {present}; use the run's {setting}")
    set_peft_model_state_dict(transformer, state, adapter_name=ADAPTER)
