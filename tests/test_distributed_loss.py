"""Under DistributedDataParallel the loss gives the single-process gradients of the same global batch (gloo, two processes)."""

from __future__ import annotations

import torch
from torch import distributed as dist
from torch import multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from focusdpo import focus_dpo_loss


class Policy(nn.Module):
    """Predictions for winner and loser from one set of weights."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, win, lose):
        return self.linear(win), self.linear(lose)


def gradient(model, data, weight):
    win, lose = model(data[0], data[1])
    focus_dpo_loss(win, lose, *data[2:], focus=weight, beta=1.0, loser_scale="sdpo", winner_anchor=0.1).loss.backward()
    return next(model.parameters()).grad


def make():
    torch.manual_seed(0)
    return Policy(), torch.randn(6, 4, 9, 4), torch.rand(4, 9)


def worker(rank, store, results):
    dist.init_process_group("gloo", init_method=store.as_uri(), rank=rank, world_size=2)
    model, data, weight = make()
    mine = slice(2 * rank, 2 * rank + 2)
    results[rank] = gradient(DistributedDataParallel(model), data[:, mine], weight[mine])
    dist.destroy_process_group()


def test_ddp_gradients_are_the_single_process_ones(tmp_path):
    results = mp.Manager().dict()
    mp.spawn(worker, args=(tmp_path / "store", results), nprocs=2)  # a file: a free port may be another's a moment later
    expected = gradient(*make())
    assert expected.abs().max() > 1e-3
    for rank in (0, 1):
        torch.testing.assert_close(results[rank], expected, rtol=1e-6, atol=1e-8)
