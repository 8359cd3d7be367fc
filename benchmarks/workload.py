"""Training steps to measure: a full-size transformer with its adapter, and the ways to take a step with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks import pieces
from benchmarks.models import MODELS, Setting, random_batch
from benchmarks.results import FOCUS_STEP, PLAIN_STEP
from focusdpo.features import pool_mask, reference_token_mask
from focusdpo.mask import match_counts
from focusdpo.training.adapter import add_adapter, reference_model
from focusdpo.training.compilation import compile_blocks
from focusdpo.training.config import FocusConfig, LoraConfig, LossConfig
from focusdpo.training.step import PreferenceStep

BETA = 2000.0
PLAIN_LOOP = "plain loop (AdamW, full checkpointing)"


class Workload:
    """A backbone with its adapter, and one noised pair at a setting."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        self.text = MODELS[name].text
        self.device = device
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        torch.manual_seed(0)
        self.backbone = MODELS[name].architecture().build(self.dtype, self.text, device)
        self.module: Any = self.backbone.transformer
        self.parameters = add_adapter(self.backbone, LoraConfig(rank=32), seed=0)
        self.module.train()

    def at(self, setting: Setting) -> None:
        self.noised, self.batch = random_batch(self.backbone, setting)

    def predict(self) -> Tensor:
        n = self.noised
        return self.backbone.predict(n.tokens, n.t, n.prompts, n.references, n.layout)

    def autocast(self) -> Any:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast("cpu" if self.device.type == "meta" else self.device.type, torch.bfloat16)


def plain_loss(work: Workload) -> Tensor:
    """Diffusion-DPO as in a training script: policy, then the same model without adapter, then squared errors."""
    policy = work.predict()
    with torch.no_grad(), reference_model(work.module):
        reference = work.predict()
    return pieces.dpo_loss(*policy.chunk(2), *reference.chunk(2), *work.noised.target.chunk(2), None, beta=BETA)


def eager_focus_loss(work: Workload) -> Tensor:
    """FocusDPO as one would write it first: the hidden states of all blocks are kept, then compared."""
    states: dict[str, Tensor] = {}
    backbone, targets = work.backbone, work.noised.layout.num_target

    def keep(path: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            states.setdefault(path, backbone.image_tokens(output)[:1].detach())

        return hook

    with torch.no_grad(), reference_model(work.module):
        reference = work.predict()
    handles = [work.module.get_submodule(path).register_forward_hook(keep(path)) for path in backbone.tap_paths()]
    policy = work.predict()
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        batch, hidden = work.batch, list(states.values())
        mask, prior = reference_token_mask(batch.reference_masks), pool_mask(batch.prior)
        scores = pieces.similarity([h[:, :targets] for h in hidden], [h[:, targets:] for h in hidden], mask)
        counts = match_counts("reference", scores, prior, mask)
        k = int(counts.max())
        structure, coverage = pieces.structure(scores, k, prior)
        focus = pieces.fuse(structure, coverage, pieces.entropy(batch.winner), prior, tau=0.1, gamma=0.3)
    return pieces.dpo_loss(*policy.chunk(2), *reference.chunk(2), *work.noised.target.chunk(2), focus, beta=BETA)


def our_loss(mask: Literal["focus", "none"]) -> Callable[[Workload], Tensor]:
    """The trainer's own step."""

    def loss(work: Workload) -> Tensor:
        step = PreferenceStep(work.backbone, FocusConfig(mask=mask), LossConfig(beta=BETA))
        return step.compare(work.noised, work.batch).output.loss

    return loss


@dataclass(frozen=True)
class Variant:
    """One way to take a step."""

    name: str
    loss: Callable[[Workload], Tensor]
    fused: bool = True
    checkpointing: bool = True
    compiled: bool = False
    budget: float | None = None

    @contextmanager
    def applied(self, work: Workload) -> Iterator[torch.optim.Optimizer]:
        """The model as the variant wants it, and its optimiser."""
        work.module.enable_gradient_checkpointing()
        if not self.checkpointing:
            work.module.disable_gradient_checkpointing()
        if self.compiled:
            compile_blocks(work.backbone, activation_budget=self.budget)
        try:
            yield torch.optim.AdamW(work.parameters, lr=1e-5, fused=self.fused)
        finally:
            for path in work.backbone.tap_paths():
                work.module.get_submodule(path).__dict__.pop("forward", None)


PLAIN = Variant(PLAIN_STEP, our_loss("none"))
FOCUS = Variant(FOCUS_STEP, our_loss("focus"))
KEEPING = Variant("FocusDPO, eager PyTorch that keeps hidden states", eager_focus_loss)


def throughput_variants(budgets: list[float]) -> Iterator[Variant]:
    """A plain loop, ours with one setting after the other, and the plain loop again, to show how far the device drifts."""
    focus = our_loss("focus")
    yield Variant(PLAIN_LOOP, plain_loss, fused=False)
    yield Variant("FocusDPO, this library, fused AdamW", focus)
    yield Variant("FocusDPO, this library, no checkpointing", focus, checkpointing=False)
    yield Variant(PLAIN_LOOP + ", again", plain_loss, fused=False)
    # Last: compiling takes minutes.
    yield Variant("FocusDPO, this library, compiled", focus, compiled=True)
    for budget in budgets:
        name = f"FocusDPO, this library, compiled, activation budget {budget:g}"
        yield Variant(name, focus, checkpointing=False, compiled=True, budget=budget)
