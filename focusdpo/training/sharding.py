"""A model split over processes, as `accelerate launch` asks for it: FSDP2 and DeepSpeed's ZeRO.

accelerate does the splitting. Here is what a LoRA in fp32 on a frozen model in bf16 needs on top, and how a split tensor
becomes whole again: checkpoints hold whole tensors, so that they do not depend on how a run was split.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    broadcast_object_list,
    disable_fsdp_ram_efficient_loading,
    gather_object,
    parse_flag_from_env,
)
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from focusdpo.foundation.launch import Launch
from focusdpo.models import Backbone
from focusdpo.models.sizes import META
from focusdpo.training.config import TrainConfig


def is_deepspeed(accelerator: Accelerator) -> bool:
    return bool(accelerator.distributed_type == DistributedType.DEEPSPEED)


def is_split(accelerator: Accelerator) -> bool:
    """Whether a process may hold a part of the model only."""
    return is_deepspeed(accelerator) or bool(accelerator.distributed_type == DistributedType.FSDP)


def check_devices(launch: Launch, cpu: bool) -> None:
    """Refuses a launch in which some processes have a GPU and others none: ValueError, before they meet on these."""
    if launch.size == 1 or cpu or parse_flag_from_env("ACCELERATE_USE_CPU"):
        return
    gpus = torch.cuda.device_count()
    with_gpu = sum(launch.gather("GPUs are counted", gpus > 0))
    if gpus == 0 and with_gpu:
        raise ValueError(f"this process sees no GPU, and {with_gpu} of {launch.size} processes see one; expected all or none")
    if 1 < gpus <= launch.local_rank:  # one that is seen may be another one in each process
        raise ValueError(
            f"the launcher: got process {launch.local_rank + 1} of a machine that has {gpus} GPUs; expected one for each"
        )


def device_of(launch: Launch, cpu: bool) -> torch.device:
    """The device of a process that shares none with others and is in no collective operation: its own GPU, or the CPU."""
    if cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", launch.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def limit_waits(accelerator: Accelerator, seconds: float) -> None:
    """Has the groups that a model is split over wait as long as that of all processes: a mesh makes them with defaults."""
    mesh = getattr(accelerator, "torch_device_mesh", None)
    if mesh is not None:
        for name in mesh.mesh_dim_names:
            _set_pg_timeout(timedelta(seconds=seconds), mesh.get_group(name))


def check_launch(accelerator: Accelerator, config: TrainConfig) -> None:
    """Refuses what cannot work together with a split model: ValueError names the setting, before a model is loaded."""
    if not is_split(accelerator):
        return
    kind = "DeepSpeed" if is_deepspeed(accelerator) else "FSDP"

    def refuse(name: str, value: object, expected: str) -> None:
        raise ValueError(f"{name}: got {value!r}, which does not work under {kind}; expected {expected}")

    if config.optim.optimizer != "adamw":
        refuse("optim.optimizer", config.optim.optimizer, "'adamw', whose state can be split")
    if config.model.quantization is not None:
        refuse("model.quantization", config.model.quantization, "null; or launch without it, each process with the whole model")
    if kind == "DeepSpeed":
        if config.optim.ema_decay:
            refuse("optim.ema_decay", config.optim.ema_decay, "0, or FSDP2: DeepSpeed keeps fp32 weights to itself")
        if config.model.compile:
            refuse("model.compile", True, "false, or FSDP2: DeepSpeed gathers weights in hooks, which graphs do not see")
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"accelerate's fsdp_version: got {plugin.fsdp_version}; expected 2 (configs/accelerate-8x80gb-fsdp2.yaml)"
        )
    if plugin.activation_checkpointing:
        raise ValueError(
            "accelerate's fsdp_activation_checkpointing: got true; expected false, model.gradient_checkpointing does the same"
        )


def load_parts_whole(accelerator: Accelerator) -> None:
    """Has pretrained parts loaded as they are.

    transformers splits every text encoder where it knows of ZeRO-3, and leaves it without weights in all processes but the
    first where accelerate says `fsdp_cpu_ram_efficient_loading`. Of the transformer `prepare` takes care.
    """
    if is_deepspeed(accelerator):
        from transformers.integrations import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
    elif is_split(accelerator):
        disable_fsdp_ram_efficient_loading()


def place_of_transformer(accelerator: Accelerator, config: TrainConfig) -> torch.device | None:
    """Where a process reads the transformer to; None is host memory.

    Under FSDP2 one process of the whole launch reads it, and `prepare` gives the others their parts. What is quantised, or
    split by DeepSpeed, is read by every process into host memory and goes to the device piece by piece.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        return None if accelerator.is_main_process else META
    if is_deepspeed(accelerator) or config.model.quantization is not None:
        return None
    return accelerator.device


def prepare(accelerator: Accelerator, backbone: Backbone, optimizer: torch.optim.Optimizer, config: TrainConfig) -> Any:
    """Brings all parts to the device, wraps or splits the transformer, and returns accelerate's optimiser.

    The transformer's parameters may be others than before.
    """
    device, module = accelerator.device, backbone.transformer
    accelerator.gradient_accumulation_steps = config.gradient_accumulation  # a launch file's own number would win otherwise
    # A model that is going to be split need not fit a device as a whole: it goes there block by block.
    backbone.to(device, transformer=not is_split(accelerator))
    if is_deepspeed(accelerator):
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = config.data.batch_size
        settings["gradient_accumulation_steps"] = config.gradient_accumulation
        settings["gradient_clipping"] = config.optim.max_grad_norm
        if settings.get("bf16", {}).get("enabled") in (True, "auto"):
            settings["bf16"]["check_grad_overflow"] = True  # skips steps without a finite gradient, as the trainer does
    elif is_split(accelerator):
        plugin = accelerator.state.fsdp_plugin
        # Parameters keep their dtypes and autocast works as on one device. accelerate's own policy would run the adapter and
        # the rotary embeddings in bf16, and add gradients up in it.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        plugin.transformer_cls_names_to_wrap = sorted({type(module.get_submodule(p)).__name__ for p in backbone.tap_paths()})
        plugin.cpu_ram_efficient_loading = True  # whatever the launch file says: the others have no weights
        _check_alike(module)
        with _buffers_apart(module):
            backbone.transformer, prepared = accelerator.prepare(module, optimizer)
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, src=0)
        return prepared
    backbone.transformer, prepared = accelerator.prepare(module, optimizer)
    return prepared


def _check_alike(module: nn.Module) -> None:
    """ValueError, in all processes, where one has another model than the first, whose weights it would wait for in vain."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    mine = {name: (list(tensor.shape), str(tensor.dtype)) for name, tensor in tensors}
    first = broadcast_object_list([mine])[0]
    differing = min((name for name in mine.keys() | first.keys() if mine.get(name) != first.get(name)), default=None)
    described = differing and f"{differing} is {mine.get(differing)} there and {first.get(differing)} in process 0"
    for number, text in enumerate(gather_object([described])):
        if text is not None:
            raise ValueError(
                f"model.path: process {number} has another model than process 0: {text}; expected the same files everywhere"
            )


@contextmanager
def _buffers_apart(module: nn.Module) -> Iterator[None]:
    """Inside, no buffer counts as part of the module's state: accelerate takes all of that to be split."""
    kept = [
        (part, name)
        for part in module.modules()
        for name, _ in part.named_buffers(recurse=False)
        if name not in part._non_persistent_buffers_set
    ]
    for part, name in kept:
        part.register_buffer(name, part.get_buffer(name), persistent=False)
    yield
    for part, name in kept:
        part.register_buffer(name, part.get_buffer(name))


def whole(tree: Any) -> Any:
    """A nested state with its split tensors gathered, on the CPU; all processes call it."""
    return tree_map(lambda x: _gather(x).detach().cpu() if isinstance(x, Tensor) else x, tree)


def _gather(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def split_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor split and placed as another one is."""
    if isinstance(like, DTensor):
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return tensor.to(like.device)


def split_optimizer_state(state: dict[str, Any], parameters: Sequence[nn.Parameter]) -> dict[str, Any]:
    """An optimiser's whole state with its moments split as their parameters are."""

    def of(value: Any, parameter: nn.Parameter) -> Any:
        return split_like(value, parameter) if isinstance(value, Tensor) and value.shape == parameter.shape else value

    moments = {i: {k: of(v, parameters[i]) for k, v in values.items()} for i, values in state["state"].items()}
    return {**state, "state": moments}


def gathered(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
    """Inside, parameters that ZeRO-3 has split are whole; others are left alone. All processes enter it."""
    split = [p for p in parameters if hasattr(p, "ds_id")]
    if not split:
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(split)
