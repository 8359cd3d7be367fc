"""Started by test_distributed in several processes on CPUs: trains, and leaves what each process had in the output folder.

accelerate splits models on accelerators only. WORLD=fsdp, zero2 or zero3 lets it take this machine's processes for such ones;
everything after that is its own path, over gloo. WORLD=unsynced is DDP that forgets to average gradients: what the test has to
notice.
"""

import gc
import os
import sys
from importlib import import_module
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from focusdpo.commands.cli import parse_config
from focusdpo.training import trainer as training
from focusdpo.training.adapter import adapter_state
from focusdpo.training.sharding import whole

gc.freeze()  # as the commands do with what they import
world = os.environ.get("WORLD", "ddp")
_, config = parse_config(["train", *sys.argv[1:]])
if world.startswith("zero"):
    import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # which is compiled for half a minute
if world != "ddp":
    PartialState(cpu=True)
if world == "fsdp":
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU

trainer = training.Trainer(config)
if world == "unsynced":
    trainer.backbone.transformer = trainer.module

gradients = []
step = trainer.optimizer.step


def recorded() -> None:
    if trainer.accelerator.sync_gradients and not world.startswith("zero"):
        gradients.append([whole(p.grad) for p in trainer.parameters])
    step()


trainer.optimizer.step = recorded
end = trainer.accelerator.end_training


def leave() -> None:
    """Before the processes part: gathering needs all of them."""
    split = sorted({type(p.data).__name__ for p in trainer.module.parameters()})
    left = {"adapter": adapter_state(trainer.module), "gradients": gradients, "split": split}
    torch.save(left, Path(config.output_dir) / f"rank{trainer.accelerator.process_index}.pt")
    end()


trainer.accelerator.end_training = leave
trainer.train()
