"""Times t of training pairs: how they are drawn, and where they bring a pair (E2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Tensor

from focusdpo.training.config import LossConfig


def draw_times(loss: LossConfig, generator: torch.Generator, round_robin: Sequence[int], shift: float) -> Tensor:
    """Times t in [0, 1] of as many pairs as there are places, fp32 [B] on the CPU.

    Args:
        loss: `times`, `time_order`, `logit_mean` and `logit_std`.
        generator: CPU generator.
        round_robin: each pair's place in the round robin, which picks its time where listed times go in turn.
        shift: s of t' = s t / (1 + (s - 1) t), as in SD3 and in diffusers' schedulers.
    """
    count = len(round_robin)
    if isinstance(loss.times, list):
        listed = torch.tensor(loss.times, dtype=torch.float32)
        if loss.time_order == "round_robin":
            return listed[torch.tensor(round_robin) % len(listed)]
        return listed[torch.randint(len(listed), (count,), generator=generator)]
    scheme = "logit_normal" if loss.times == "logit_normal" else "none"
    t = compute_density_for_timestep_sampling(
        scheme, count, logit_mean=loss.logit_mean, logit_std=loss.logit_std, generator=generator
    )
    return t if shift == 1 else shift * t / (1 + (shift - 1) * t)


def at_times(clean: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """E2: x_t = (1 - t) x_0 + t eps and its velocity eps - x_0, of tokens [B, P, C] at times t [B]."""
    t = t[:, None, None]
    return (1 - t) * clean + t * noise, noise - clean
