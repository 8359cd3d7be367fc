"""S of every tapped block, for winner and loser, in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from focusdpo.data import PairBatch
from focusdpo.training.step import Noised, PreferenceStep


@torch.no_grad()
def block_scores(step: PreferenceStep, noised: Noised, batch: PairBatch, poolings: Sequence[str]) -> Tensor:
    """S by pooling and block.

    Args:
        step: whose run says which blocks are tapped, and of which model.
        noised: tokens and conditioning of the batch.
        batch: one pair of R references.
        poolings: "reference" (E4), "max" (E4').

    Returns:
        fp32 [poolings, 1 + N, 2, R, P]: first the mean over the N tapped blocks (E4), then each; of the winner, of the loser.
    """
    taps = [[step.tap(noised, batch, [path], pooling, each=True) for path in step.paths] for pooling in poolings]
    step.predict(noised, chain.from_iterable(taps), step.focus.feature_source)
    scores = torch.stack([torch.stack([tap.scores().float() for tap in each]) for each in taps])
    return torch.cat([scores.mean(1, keepdim=True), scores], dim=1)
