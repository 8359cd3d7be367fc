"""Started by test_distributed in two processes that FSDP2 splits a model over: loads it, and leaves what that took and gave.

Two buffers with another value in each process stand for those that a model brings along.
"""

import importlib
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers.integrations import is_fsdp_enabled

from focusdpo.commands.cli import parse_config
from focusdpo.training import prepared_run
from focusdpo.training.sharding import whole
from focusdpo.training.trainer import Trainer


def peak() -> int:
    """The most bytes that were resident in this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def loaded(*arguments, **places):
    before.append(peak())
    left_out.append(is_fsdp_enabled())
    return load(*arguments, **places)


def with_buffers(backbone, *arguments):
    make_policy(backbone, *arguments)
    backbone.transformer.register_buffer("kept", torch.full((3,), 1.0 + rank))
    backbone.transformer.register_buffer("derived", torch.full((2, 2), 3 + rank), persistent=False)


with suppress(ImportError):
    importlib.import_module(
        "onnxruntime"
    )  # diffusers does while it loads, where it is installed: no part of what a model takes
_, config = parse_config(["train", *sys.argv[1:]])
rank = PartialState(cpu=True).process_index
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU  # as in distributed_worker
before: list[int] = []
left_out: list[bool] = []  # whether transformers would leave something to another process
load, make_policy = prepared_run.load_backbone, prepared_run.make_policy
prepared_run.load_backbone, prepared_run.make_policy = loaded, with_buffers
trainer = Trainer(config)
taken = peak() - before[0]
state = {name: whole(value) for name, value in trainer.module.state_dict().items()}
encoders = [part for name, part in trainer.backbone.pipeline.components.items() if name.startswith("text_encoder")]
torch.save(
    {
        "taken": taken,
        "held": sum(p.to_local().nbytes for p in trainer.module.parameters()),
        "left_out": left_out,
        "persistent": "kept" in state and "derived" not in state,
        "buffers": dict(trainer.module.named_buffers()),
        "sums": {name: value.double().sum() for name, value in state.items()},
        "encoders": [value.double().sum() for part in encoders for value in (*part.parameters(), *part.buffers())],
    },
    Path(config.output_dir) / f"rank{rank}.pt",
)
trainer.accelerator.end_training()
