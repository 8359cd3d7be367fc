"""S of every tapped block, for winner and loser, in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from focusdpo.data import PairBatch
from focusdpo.features import SimilarityTap, reference_token_mask
from focusdpo.training.adapter import reference_model
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
    backbone = step.backbone
    mask = reference_token_mask(batch.reference_masks).repeat(2, 1, 1)
    with ExitStack() as stack:
        if step.focus.feature_source == "reference":
            stack.enter_context(reference_model(backbone.pipeline.transformer))
        taps = [
            [
                stack.enter_context(
                    SimilarityTap(
                        backbone.pipeline.transformer,
                        [path],
                        image_tokens=backbone.image_tokens,
                        num_target=noised.layout.num_target,
                        reference_mask=mask,
                        pooling=pooling,
                        backend=step.backend,
                    )
                )
                for path in step.paths
            ]
            for pooling in poolings
        ]
        backbone.predict(noised.tokens, noised.t, noised.prompts, noised.references, noised.layout)
    scores = torch.stack([torch.stack([tap.scores().float() for tap in each]) for each in taps])
    return torch.cat([scores.mean(1, keepdim=True), scores], dim=1)
