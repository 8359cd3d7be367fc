"""One resumable loop for everything in the microcosm that is learnt from nothing: autoencoder, judge, flow."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from focusdpo.foundation.files import writing
from focusdpo.training.seeding import seeded

SAVE_SECONDS = 60.0  # between the states that a kill may cost


def learn(
    name: str,
    model: nn.Module,
    loss: Callable[[torch.Generator], Tensor],
    *,
    steps: int,
    lr: float,
    seed: int,
    state_file: Path,
    ema_decay: float = 0.0,
) -> list[float]:
    """Trains a model, and leaves it in evaluation mode; goes on from `state_file` where an earlier call was killed.

    What a step draws depends on seed and step alone, so that a continued training gives the same weights; on a GPU, which
    computes in bfloat16 here, as far as its convolutions do.

    Args:
        name: what the progress bar shows.
        model: on its device.
        loss: of one batch, which it draws by the generator it is given.
        steps: optimiser steps.
        lr: peak learning rate, warmed up over a twentieth of the steps and then led to 0 as a cosine.
        seed: of the draws.
        state_file: where the state is kept while it learns; deleted by the caller once it has saved the result.
        ema_decay: of a moving average that the model is left with; 0 keeps none.

    Returns:
        The loss of each step.

    Raises:
        FloatingPointError: a loss is not finite; nothing is kept of that step.
    """
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    scheduler = get_cosine_schedule_with_warmup(optimizer, max(steps // 20, 1), steps)
    on_gpu = parameters[0].is_cuda
    ema = EMAModel(parameters, decay=ema_decay, foreach=on_gpu) if ema_decay else None
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, **({"ema": ema} if ema else {})}
    losses: list[float] = []
    if state_file.exists():
        state = torch.load(state_file, map_location="cpu", weights_only=True)
        losses = state.pop("losses")
        for key, part in parts.items():
            part.load_state_dict(state[key])
        if ema:
            ema.to(device=parameters[0].device)
    bar = tqdm(total=steps, initial=len(losses), desc=name, unit="step", leave=False)
    saved = time.monotonic()
    while len(losses) < steps:
        generator = seeded(seed, len(losses))
        torch.manual_seed(generator.initial_seed())
        with torch.autocast(parameters[0].device.type, torch.bfloat16, enabled=on_gpu):
            value = loss(generator)
        losses.append(float(value.detach()))
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"{name}: the loss is {losses[-1]} in step {len(losses)}; another --seed may do better")
        optimizer.zero_grad()
        torch.autograd.backward(value)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        if ema:
            ema.step(parameters)
        bar.update()
        if len(losses) % 10 == 0:
            bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.4f}")
        if time.monotonic() - saved > SAVE_SECONDS:
            with writing(state_file) as partial:
                torch.save({"losses": losses, **{key: part.state_dict() for key, part in parts.items()}}, partial)
            saved = time.monotonic()
    bar.close()
    if ema:
        ema.copy_to(parameters)
    model.eval()
    return losses
