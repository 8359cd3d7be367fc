"""From a model's hidden states and pixel masks to the kernels' inputs.

`SimilarityTap` streams the outputs of chosen blocks into a `SimilarityAccumulator` while the model runs: no layer's hidden
state is kept. `pool_mask` and `reference_token_mask` bring pixel masks to the token grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from focusdpo_kernels import SimilarityAccumulator


def pool_mask(mask: Tensor, patch_size: int = 16) -> Tensor:
    """Token mask of a pixel mask: tokens of which at least half is covered.

    A mask that covers no token by half keeps its best covered tokens, so that a small subject does not vanish.

    Args:
        mask: [..., H, W], not zero inside; H and W are multiples of `patch_size`.
        patch_size: pixels along a token's side.

    Returns:
        bool [..., H/p * W/p], row-major.
    """
    covered = covered_share(mask, patch_size)
    best = covered.amax(-1, keepdim=True)
    return (covered >= best.clamp(max=0.5)) & (covered > 0)


def covered_share(mask: Tensor, patch_size: int = 16) -> Tensor:
    """The share of each token that a pixel mask [..., H, W] covers, fp32 [..., H/p * W/p], row-major; see `pool_mask`."""
    height, width = mask.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(f"mask: {height}x{width} pixels are not whole patches of {patch_size}; resize or crop the mask")
    covered = F.avg_pool2d((mask != 0).float().reshape(-1, 1, height, width), patch_size)
    return covered.reshape(*mask.shape[:-2], (height // patch_size) * (width // patch_size))


def reference_token_mask(masks: Sequence[Tensor], patch_size: int = 16) -> Tensor:
    """The kernels' reference mask from one pixel mask per reference.

    Args:
        masks: R tensors [B, h_r, w_r], not zero where the image shows its subject.
        patch_size: pixels along a token's side.

    Returns:
        bool [B, R, Q] over the tokens of all references, one reference after the other; row r is false outside reference r.
    """
    pooled = [pool_mask(mask, patch_size) for mask in masks]  # R x [B, Q_r]
    rows = [
        torch.cat([tokens if s == r else torch.zeros_like(other) for s, other in enumerate(pooled)], dim=1)
        for r, tokens in enumerate(pooled)
    ]
    return torch.stack(rows, dim=1)


class SimilarityTap:
    """Context manager: cross-layer similarity S (E3, E4) of the forward pass that runs inside it.

    One tap serves one forward pass. Each tapped block counts once in it, so that a recomputation under gradient checkpointing
    changes nothing. Blocks are found by their path in the model. With torch.compile, compile the `forward` of each block: a
    model compiled as a whole that has run before never looks at hooks that are added later, and a block compiled by
    `block.compile()` is compiled anew for every tap.

    Args:
        model: the module that holds the blocks (not wrapped by DDP: pass the unwrapped module).
        paths: names of the tapped blocks, as in `model.get_submodule`.
        image_tokens: takes a block's output to its image stream [B', P + Q, D], target tokens first.
        num_target: P.
        reference_mask: [B, R, Q], not zero where token q shows subject r.
        rows: the part of the batch to look at, when winner and loser run as one batch; B rows.
        pooling, backend: as in `focusdpo_kernels.cross_layer_similarity`.

    Example:
        >>> with SimilarityTap(transformer, paths, image_tokens=..., num_target=1024, reference_mask=mask) as tap:
        ...     prediction = transformer(...)
        >>> scores = tap.scores()  # [B, R, P]
    """

    def __init__(
        self,
        model: nn.Module,
        paths: Sequence[str],
        *,
        image_tokens: Callable[[Any], Tensor],
        num_target: int,
        reference_mask: Tensor,
        rows: slice = slice(None),
        pooling: str = "reference",
        backend: str | None = None,
    ) -> None:
        if not paths:
            raise ValueError("paths: no block to tap; name at least one")
        if len(set(paths)) != len(paths):
            raise ValueError(f"paths: a block is named twice in {list(paths)}")
        self._blocks = {path: _find(model, path) for path in paths}
        self._image_tokens = image_tokens
        self._num_target = num_target
        self._rows = rows
        self._seen: set[str] = set()
        self._similarity = SimilarityAccumulator(reference_mask, pooling=pooling, backend=backend)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> SimilarityTap:
        if self._seen:
            raise RuntimeError("SimilarityTap: it has served a forward pass already; make a new one for each")
        for path, block in self._blocks.items():
            self._handles.append(block.register_forward_hook(self._hook(path)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        @torch.no_grad()
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if path in self._seen:
                return
            self._seen.add(path)
            tokens = self._image_tokens(output)[self._rows].detach()
            target, reference = tokens[:, : self._num_target], tokens[:, self._num_target :]
            self._similarity.update(target, reference)

        return hook

    def scores(self) -> Tensor:
        """S [B, R, P] of the forward pass; RuntimeError when a tapped block did not run."""
        missing = [path for path in self._blocks if path not in self._seen]
        if missing:
            raise RuntimeError(
                f"SimilarityTap: these blocks did not run inside the context: {', '.join(missing)}; "
                "run the model once inside it, and if it is compiled, compile block by block"
            )
        return self._similarity.result()


def _find(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        known = ", ".join(name for name, _ in model.named_children())
        raise ValueError(f"paths: the model has no block {path!r}; its children are {known}") from None
