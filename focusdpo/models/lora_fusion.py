"""Low-rank updates of several layers as one of the layer that has them side by side, exactly, and back to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor


class Update(NamedTuple):
    """A low-rank update `scale * b @ a` of a linear layer's weight: a is [rank, inputs], b [outputs, rank]."""

    a: Tensor
    b: Tensor
    scale: float = 1.0

    def folded(self) -> Update:
        """The same with scale 1: b is multiplied in float64 and rounded once, to its dtype.

        In fp16 to fp32, where values would become subnormal: a scale of 1/128 takes many there, and their last bits.
        """
        if self.scale == 1:
            return self
        exact = self.b.double() * self.scale
        small = (exact != 0) & (exact.abs() < torch.finfo(torch.float16).tiny)
        loses = self.b.dtype == torch.float16 and bool((small & (exact.half().double() != exact)).any())
        return Update(self.a, exact.to(torch.float32 if loses else self.b.dtype))


def fuse(parts: Sequence[Update | None], rows: Sequence[int]) -> Update:
    """The update of layers of the same input that stand under each other in one layer.

    Where they have one a in common it is kept; else theirs are stacked and the b stand on a block diagonal, so that the ranks
    add up. What is missing gets rows of zeros.

    Args:
        parts: updates of scale 1 from top to bottom; None where a layer has none. One is there at least.
        rows: outputs of each layer, relative to one another.

    Raises:
        ValueError: their shapes do not fit together.
    """
    present = [part for part in parts if part is not None]
    units = {(part.b.shape[0], size) for part, size in zip(parts, rows, strict=True) if part is not None}
    heights = {height // size for height, size in units}
    if len(heights) > 1 or any(height % size for height, size in units) or len({part.a.shape[1] for part in present}) > 1:
        sizes = ", ".join(f"{list(part.b.shape)} x {list(part.a.shape)}" for part in present)
        raise ValueError(f"cannot stand in one layer: {sizes}; expected the same inputs, and outputs as {list(rows)}")
    unit = heights.pop()
    first = present[0].a
    shared = all(part.a.dtype == first.dtype and torch.equal(part.a, first) for part in present)
    width = 0 if not shared else first.shape[0]
    dtype = reduce(torch.promote_types, (part.b.dtype for part in present))
    blocks = [
        torch.zeros(size * unit, width, dtype=dtype) if part is None else part.b.to(dtype)
        for part, size in zip(parts, rows, strict=True)
    ]
    if shared:
        return Update(first.clone(), torch.cat(blocks))
    return Update(torch.cat([part.a for part in present]), torch.block_diag(*blocks))  # type: ignore[no-untyped-call]


def split(update: Update, rows: Sequence[int]) -> list[Update | None]:
    """The inverse of `fuse`; no two results share memory, and all keep the scale.

    Which rows of a belong to which layer is read off the columns where its b is not zero: blocks of one size, as of one rank
    for all; or else blocks of several sizes; or else a is shared. None where a layer has zeros alone and no block.

    Args:
        update: of the one layer.
        rows: outputs of each of the layers in it, relative to one another.

    Raises:
        ValueError: its outputs cannot be divided so.
    """
    a, b, scale = update
    rank, outputs = a.shape[0], b.shape[0]
    if outputs % sum(rows):
        raise ValueError(f"{outputs} outputs cannot be divided as {list(rows)}")
    strips = torch.split(b, [size * outputs // sum(rows) for size in rows])
    used = [strip.ne(0).any(dim=0).nonzero().flatten().tolist() for strip in strips]
    columns = _blocks(used, rank)
    if columns is None:
        # Query, key and value of one a belong together even where one of them is zero.
        columns = [(0, rank) if use or size == 1 else None for use, size in zip(used, rows, strict=True)]
    return [
        None if one is None else Update(a[slice(*one)].clone(), strip[:, slice(*one)].clone(), scale)
        for strip, one in zip(strips, columns, strict=True)
    ]


def _blocks(used: Sequence[Sequence[int]], rank: int) -> list[tuple[int, int] | None] | None:
    """Columns (start, end) of each layer's block, None for a layer without one; None altogether where there are no blocks."""
    present = [i for i, columns in enumerate(used) if columns]
    if not present:
        return None
    others = [i for i in range(len(used)) if i not in present]
    # A layer whose b is zero may have a block all the same, so the most layers that fit are taken.
    for more in range(len(others), -1, -1):
        for chosen in combinations(others, more):
            members = sorted((*present, *chosen))
            size, rest = divmod(rank, len(members))
            found = {layer: (k * size, (k + 1) * size) for k, layer in enumerate(members)}
            if not rest and all(found[i][0] <= used[i][0] and used[i][-1] < found[i][1] for i in present):
                return [found.get(i) for i in range(len(used))]
    starts = [0, *(used[i][0] for i in present[1:]), rank]
    if any(used[i][-1] >= end for i, end in zip(present, starts[1:], strict=True)):
        return None
    found = {layer: (starts[k], starts[k + 1]) for k, layer in enumerate(present)}
    return [found.get(i) for i in range(len(used))]
