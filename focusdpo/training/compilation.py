"""torch.compile of a transformer, block by block.

The similarity taps hang hooks on the blocks at every step. So a block's `forward` is compiled and not the call of the block:
hooks run outside the compiled graph, and none of them makes it stale. Blocks of one class share their graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from focusdpo.models import Backbone

# A run needs six graphs of FLUX.1's single blocks, for policy and reference, training and evaluation, the first block and those
# that get slices of its output. PyTorch's limit of 8 counts all runs of a process.
GRAPHS_PER_CLASS = 64


@dataclass(frozen=True)
class _Inductor:
    """Inductor with options that hold for the graphs compiled here and no others; equal backends share their graphs."""

    activation_budget: float | None

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        from torch._functorch import config
        from torch._inductor.compile_fx import compile_fx

        budget = self.activation_budget
        # PyTorch 2.13 has a setting per region instead of the process-wide one, as a prototype.
        with nullcontext() if budget is None else config.patch(activation_memory_budget=budget):
            # A fused kernel skips the roundings to bf16 between its steps. Policy and reference fuse differently, which alone
            # would give them different errors, also where the adapter is zero; the loss is their difference times beta.
            return compile_fx(graph, inputs, config_patches={"emulate_precision_casts": True})


def compile_blocks(backbone: Backbone, *, sizes_vary: bool = False, activation_budget: float | None = None) -> None:
    """Compiles the blocks of `backbone.tap_paths()`, each when it first runs.

    Graphs depend on the sizes alone and not on the order in which they come, so that a resumed run computes the same.

    Args:
        backbone: whose transformer already has its adapter.
        sizes_vary: make graphs for all batch sizes and token counts at once. Otherwise each combination gets graphs of its own,
            which compile several times sooner: for data with one combination.
        activation_budget: share of the activations inside a block, by memory, that is kept for the backward pass, from 0 (all
            are computed again) to 1 (those that PyTorch keeps by default); None leaves PyTorch's own setting. With dropout in
            the blocks gradients are wrong below 1 (pytorch/pytorch#190758).
    """
    backend = _Inductor(activation_budget)
    for path in backbone.tap_paths():
        block = backbone.transformer.get_submodule(path)
        # fullgraph: a graph break would be slow in silence, and the budget would hold for parts of a block.
        forward = torch.compile(block.forward, backend=backend, dynamic=False, fullgraph=True)
        block.forward = _with_settings(forward, sizes_vary)


def _with_settings(forward: Callable[..., Any], sizes_vary: bool) -> Callable[..., Any]:
    """The compiled function under settings that PyTorch has for the whole process only."""
    # Without optimize_ddp=False a block is cut where DDP's gradient buckets end; blocks are small enough to overlap with.
    settings = torch._dynamo.config.patch(recompile_limit=GRAPHS_PER_CLASS, optimize_ddp=False)

    def run(*args: Any, **kwargs: Any) -> Any:
        if sizes_vary:
            for value in tree_leaves((args, kwargs)):
                # What may be batch or tokens: every dimension but the last, which is of features.
                for dim in range(value.ndim - 1) if isinstance(value, Tensor) else ():
                    torch._dynamo.maybe_mark_dynamic(value, dim)
        with settings:
            return forward(*args, **kwargs)

    return run
