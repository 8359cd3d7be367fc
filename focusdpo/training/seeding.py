"""Where times, noise and dropout of a training batch come from: seeds that follow from the settings and a place alone.

By default a pair meets new times and noise whenever it comes. With `loss.draws` it has that many fixed ones, its draws, which
are numbered from 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator whose seed is a hash of numbers."""
    # PyTorch's CPU generator looks at 32 bits of its seed.
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def fixed_generator(seed: int, index: int, draw: int) -> torch.Generator:
    """Gives time and noise of one of a pair's fixed draws, in whatever batch and epoch it comes."""
    return seeded(seed, index, draw, 1)


def batch_generators(
    seed: int, position: int, indices: Sequence[int], draw: int | None
) -> torch.Generator | list[torch.Generator]:
    """What gives times and noise of a batch: one generator, or with fixed draws one for each pair.

    The global generator, which dropout uses, is seeded as well.

    Args:
        seed: of the run.
        position: of the batch among those of all processes.
        indices: of its pairs.
        draw: number of the fixed draw; None where times and noise are new at every position.
    """
    here = seeded(seed, position)
    torch.manual_seed(here.initial_seed())
    return here if draw is None else [fixed_generator(seed, index, draw) for index in indices]


def round_robin_places(start: int, epoch: int, pairs: int) -> list[int]:
    """Places of a batch's pairs in the round robin of listed times.

    Each epoch begins one place further: a pair that never moves would otherwise always meet the same time.

    Args:
        start: how many pairs of the epoch come before the batch's first.
        epoch: its number.
        pairs: of the batch.
    """
    return [start + epoch + i for i in range(pairs)]


def fixed_round_robin_places(indices: Sequence[int], draw: int) -> list[int]:
    """The same in a fixed draw: through its draws each pair meets one time after the other."""
    return [index + draw for index in indices]
