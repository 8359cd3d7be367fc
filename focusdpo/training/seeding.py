"""Where times, noise and dropout of a training batch come from: seeds that follow from the settings and a place alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator whose seed is a hash of numbers."""
    # PyTorch's CPU generator looks at 32 bits of its seed.
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def fixed_draw(seed: int, index: int, draw: int) -> torch.Generator:
    """Times and noise of a pair's n-th fixed draw, in whatever batch and epoch it comes."""
    return seeded(seed, index, draw, 1)


def generators(seed: int, position: int, indices: Sequence[int], draw: int | None) -> torch.Generator | list[torch.Generator]:
    """What draws times and noise of a batch, after the global generator, which dropout draws from, was seeded.

    Args:
        seed: of the run.
        position: of the batch among those of all processes.
        indices: of its pairs.
        draw: number of the fixed draw; None draws anew at every position.
    """
    here = seeded(seed, position)
    torch.manual_seed(here.initial_seed())
    return here if draw is None else [fixed_draw(seed, index, draw) for index in indices]


def turns_at(start: int, epoch: int, pairs: int) -> list[int]:
    """Turns of the pairs of a batch.

    Each epoch begins one turn further: a pair whose place never changes would otherwise always meet the same time.

    Args:
        start: how many pairs of the epoch come before the batch's first.
        epoch: its number.
        pairs: of the batch.
    """
    return [start + epoch + i for i in range(pairs)]


def fixed_turns(indices: Sequence[int], draw: int) -> list[int]:
    """Turns of a batch's pairs in their n-th fixed draw: through its draws each pair meets one time after the other."""
    return [index + draw for index in indices]
