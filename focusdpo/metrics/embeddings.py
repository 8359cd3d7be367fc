"""Embeddings on disk, so that a killed run goes on and another manifest costs only what is new.

A file holds a batch, under a name that follows from encoder and content; what is there once is never made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from focusdpo.foundation.files import hash_of
from focusdpo.foundation.tensor_files import TensorFiles
from focusdpo.foundation.text import printable
from focusdpo.metrics.encoders import Encoder

T = TypeVar("T")
S = TypeVar("S")


def embed(
    encoder: Encoder[S], items: Mapping[str, T], read: Callable[[T], S], folder: Path, batch_size: int
) -> dict[str, Tensor]:
    """The embeddings [D], float32, by key; those that the folder lacks are made and written.

    Batches are cut before what is there is left out: a run that goes on sees the batches that it would have seen, and gives the
    same bits.

    Args:
        encoder: what makes them.
        items: what to encode, by a hash of its content.
        read: gives the image or text of an item; runs in threads.
        folder: of all embeddings; an encoder has its own folder in it.
        batch_size: items encoded at once.
    """
    files = TensorFiles("output_dir", folder / encoder.key[:32])
    found = {key: value for key, value in files.read_all() if key in items}
    keys = list(items)
    batches = [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]
    left = [batch for batch in ([key for key in batch if key not in found] for batch in batches) if batch]
    name = f"encoding with {printable(encoder.name)}"
    progress = tqdm(total=len(keys), initial=len(found), desc=name, unit="item", leave=False)
    with progress, ThreadPoolExecutor(4) as pool:
        for batch, loaded in _ahead(pool, left, lambda key: read(items[key])):
            embeddings = encoder.encode(loaded)
            if not embeddings.isfinite().all():
                raise FloatingPointError(f"{encoder.name} gave embeddings that are not finite; look at its weights")
            made = {key: embedding.clone() for key, embedding in zip(batch, embeddings, strict=True)}
            files.write(hash_of(*batch), made)
            found |= made
            progress.update(len(batch))
    return {key: found[key] for key in keys}


def _ahead(
    pool: ThreadPoolExecutor, batches: Sequence[list[str]], read: Callable[[str], S]
) -> Iterator[tuple[list[str], list[S]]]:
    """Batches with their images, of which the next are read while one is encoded."""
    coming = pool.map(read, batches[0]) if batches else iter(())
    for index, batch in enumerate(batches):
        loaded = list(coming)
        if index + 1 < len(batches):
            coming = pool.map(read, batches[index + 1])
        yield batch, loaded


def stack(found: Mapping[str, Tensor], keys: Sequence[str]) -> Tensor:
    """[N, D] in the order of the keys."""
    return torch.stack([found[key] for key in keys])
