"""The optimisers a run can choose from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from focusdpo.foundation.packages import require_package
from focusdpo.training.config import OptimConfig

PACKAGES = {"adamw8bit": ("bitsandbytes", "quantization"), "prodigy": ("prodigyopt", "prodigy")}  # and the extra with it
# Bytes of state a parameter. Prodigy keeps the first weights and a sum of gradients besides the moments. Small tensors keep
# fp32 under 8 bits; not counted.
STATE_BYTES = {"adamw": 8, "adamw8bit": 2, "prodigy": 16}


def check_optimizer(name: str) -> None:
    """ModuleNotFoundError where the package is missing that has it."""
    if name in PACKAGES:
        package, extra = PACKAGES[name]
        require_package(package, f"optim.optimizer: {name}", extra, load=False)


def build_optimizer(parameters: Sequence[nn.Parameter], optim: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser of the adapter's parameters."""
    common: dict[str, Any] = {
        "lr": optim.lr,
        "betas": (optim.beta1, optim.beta2),
        "weight_decay": optim.weight_decay,
        "eps": optim.eps,
    }
    if optim.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **common)
    if optim.optimizer == "prodigy":
        from prodigyopt import Prodigy

        # Its paper's settings for diffusion models; warm-up would be taken for a small step size without the safeguard.
        return Prodigy(parameters, **common, use_bias_correction=True, safeguard_warmup=optim.warmup_steps > 0)
    return torch.optim.AdamW(parameters, **common, fused=True)


def step_size(optimizer: torch.optim.Optimizer, learning_rate: float) -> float:
    """What the update is multiplied by: the schedule's rate, times Prodigy's estimate where it makes one."""
    return learning_rate * float(optimizer.param_groups[0].get("d", 1.0))
