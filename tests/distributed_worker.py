"""Started by test_trainer under `accelerate launch`: trains, then leaves this process's adapter in the output folder."""

import sys
from pathlib import Path

import torch

from focusdpo.cli import parse_config
from focusdpo.training.adapter import adapter_state
from focusdpo.training.trainer import Trainer

_, config = parse_config(["train", *sys.argv[1:]])
trainer = Trainer(config)
trainer.train()
torch.save(adapter_state(trainer.module), Path(config.output_dir) / f"rank{trainer.accelerator.process_index}.pt")
