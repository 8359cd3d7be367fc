"""Preference pairs as tensors, and batches whose images have the same sizes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import Dataset

from focusdpo.data.headers import INDEX
from focusdpo.data.images import PATCH_SIZE, Ratio, Size, fit_mask, read_alpha, read_mask, read_photo
from focusdpo.data.lines import DatasetError, Problem
from focusdpo.data.records import PairRecord, Reference
from focusdpo.data.references import LongestSide, Placement, ReferenceRule
from focusdpo.foundation.files import ReadableFile
from focusdpo.foundation.garbage_collection import collector_paused


@dataclass(frozen=True)
class PromptEncodings:
    """What VAE and text encoders made of a prompt with its references, where that was kept.

    references: R tensors of clean tokens [Q_r, C]. prompt: the embeddings by name, without a batch axis.
    """

    references: tuple[Tensor, ...]
    prompt: dict[str, Tensor]


@dataclass(frozen=True)
class Encodings(PromptEncodings):
    """The same of one pair, with the clean tokens [P, C] of winner and loser."""

    winner: Tensor
    loser: Tensor


@dataclass(frozen=True)
class PairSample:
    """One pair, at size.

    winner, loser: [3, H, W] in [0, 1]. references: R tensors [3, h, w] in [0, 1]. reference_masks: R tensors bool [h, w].
    prior: bool [H, W], or [R, H, W] where it is per subject. prompt_images: R tensors [3, h', w'] in [0, 1], the references as
    the text encoder is to see them; none where it sees none, or has seen them. encodings: None where the step has to encode the
    pair itself.
    """

    index: int
    prompt: str
    winner: Tensor
    loser: Tensor
    references: tuple[Tensor, ...]
    reference_masks: tuple[Tensor, ...]
    prior: Tensor
    prompt_images: tuple[Tensor, ...] = ()
    encodings: Encodings | None = None


@dataclass(frozen=True)
class PairBatch:
    """B pairs whose images have the same sizes: the tensors of PairSample with a leading B, and B encodings or none.

    prompt_images: those of each pair, whose sizes may differ from pair to pair, on the CPU.
    """

    indices: list[int]
    prompts: list[str]
    winner: Tensor
    loser: Tensor
    references: tuple[Tensor, ...]
    reference_masks: tuple[Tensor, ...]
    prior: Tensor
    prompt_images: tuple[tuple[Tensor, ...], ...] = ()
    encodings: tuple[Encodings, ...] = ()

    @property
    def target(self) -> Size:
        height, width = self.winner.shape[-2:]
        return width, height

    def to(self, device: torch.device) -> PairBatch:
        """All but the prompt's images and the encodings, which the step stacks first."""
        pictures = {name: getattr(self, name) for name in ("winner", "loser", "references", "reference_masks", "prior")}
        return replace(self, **tree_map(lambda picture: picture.to(device, non_blocking=True), pictures))


@dataclass(frozen=True)
class PairSizes:
    """A pair's layout: pixel sizes that it is brought to. Pairs of equal layouts may share a batch."""

    target: Size
    references: tuple[Size, ...]
    per_subject: bool

    @property
    def tokens(self) -> int:
        return sum(width * height for width, height in (self.target, *self.references)) // PATCH_SIZE**2

    def __str__(self) -> str:
        target, *references = (f"{width}x{height}" for width, height in (self.target, *self.references))
        return f"{target} px with references of {', '.join(references)} px{', a prior for each' * self.per_subject}"


@dataclass(frozen=True)
class PlacedImage:
    """An image's file, and its way to whole tokens."""

    file: ReadableFile
    placement: Placement


@dataclass(frozen=True)
class PlacedPrompt:
    """A prompt with its references, to be sampled at a size; `seen` are the references as the text encoder sees them."""

    text: str
    target: Size
    references: tuple[PlacedImage, ...]
    seen: tuple[PlacedImage, ...] = ()


def reference_mask(reference: Reference) -> Image.Image | None:
    """Where a reference counts as its subject: its mask, or where it is opaque; None is everywhere."""
    return read_alpha(reference.image) if reference.mask is None else read_mask(reference.mask)


@dataclass(frozen=True)
class PairPlacements:
    """How each image of a pair is brought to size: winner and loser, the references, and these for the text encoder."""

    target: Placement
    references: tuple[Placement, ...]
    prompt: tuple[Placement, ...]
    sizes: PairSizes


@dataclass(frozen=True, kw_only=True)
class SizeRules:
    """How pairs are brought to size; what it says of some sizes is remembered, as most pairs share theirs with others.

    Args:
        resolution: longest side of winner and loser in pixels.
        reference_rule: how references are brought to size.
        reference_rule_multiple: how those of pairs with several are; None is `reference_rule`.
        prompt_rule: how a text encoder sees the references, made of the photos themselves; None where it does not.
        buckets: aspect ratios that winner and loser are cut to, each to the nearest; None keeps an image's own.
        reference_buckets: the same for references.
    """

    resolution: int
    reference_rule: ReferenceRule
    reference_rule_multiple: ReferenceRule | None = None
    prompt_rule: ReferenceRule | None = None
    buckets: Sequence[Ratio] | None = None
    reference_buckets: Sequence[Ratio] | None = None
    _known: dict[tuple[Size, tuple[Size, ...], bool], PairPlacements] = field(default_factory=dict, init=False, repr=False)

    def place(self, record: PairRecord, target: Size, references: tuple[Size, ...]) -> PairPlacements:
        """The way of each image of a pair.

        Args:
            record: the pair.
            target, references: sizes of the winner and of the references, in pixels.

        Raises:
            DatasetError: with every reference that its rule has no way for.
        """
        key = target, references, record.per_subject
        if key not in self._known:
            placed, prompt = self.place_references(record.file, record.line, record.references, references)
            winner = LongestSide(self.resolution).place(target, 1, self.buckets)
            sizes = PairSizes(winner.size, tuple(one.size for one in placed), record.per_subject)
            self._known[key] = PairPlacements(winner, placed, prompt, sizes)
        return self._known[key]

    def place_references(
        self, file: Path, line: int, references: Sequence[Reference], sizes: Sequence[Size]
    ) -> tuple[tuple[Placement, ...], tuple[Placement, ...]]:
        """The way of each reference of a line of a file, and that for the text encoder; none where it sees none.

        Raises:
            DatasetError: with every reference that its rule has no way for.
        """
        several = self.reference_rule_multiple if len(references) > 1 else None
        rule = several or self.reference_rule
        placed, prompt, problems = [], [], []
        for number, (reference, size) in enumerate(zip(references, sizes, strict=True)):
            try:
                placed.append(rule.place(size, len(references), self.reference_buckets))
                if self.prompt_rule is not None:
                    prompt.append(self.prompt_rule.place(placed[-1].cut, len(references)))
            except ValueError as error:
                message = f"{reference.image} cannot be brought to size: {error}"
                problems.append(Problem(file, line, f"references[{number}].image", message, "cut or enlarge it by hand"))
        if problems:
            raise DatasetError(problems)
        return tuple(placed), tuple(prompt)


class PairDataset(Dataset[PairSample]):
    """Reads pairs from disk.

    Args:
        records: checked records (`focusdpo.data.load_pairs`).
        rules: of `SizeRules`, by name.

    Raises:
        DatasetError: with every reference that its rule has no way for.

    `encodings`, once set, reads what was kept of the pair of an index.
    """

    encodings: Callable[[int], Encodings] | None = None

    def __init__(self, records: Sequence[PairRecord], **rules: Any) -> None:
        self.records = list(records)
        size_rules = SizeRules(**rules)
        self.buckets, self.reference_buckets = size_rules.buckets, size_rules.reference_buckets
        self.placements: list[PairPlacements] = []
        problems: list[Problem] = []
        for record in self.records:
            references = tuple(INDEX.header(reference.image).size for reference in record.references)
            try:
                self.placements.append(size_rules.place(record, INDEX.header(record.winner).size, references))
            except DatasetError as error:
                problems += error.problems
        if problems:
            raise DatasetError(problems)
        self.sizes = [placed.sizes for placed in self.placements]
        self._remembered: dict[int, PairSample] | None = None

    def keep(self, indices: Sequence[int]) -> None:
        """Takes all other pairs out."""
        self.records = [self.records[index] for index in indices]
        self.placements = [self.placements[index] for index in indices]
        self.sizes = [placed.sizes for placed in self.placements]
        self._remembered = None

    def placed(self, index: int) -> PlacedPrompt:
        """The pair's prompt, to be sampled at the winner's size."""
        record, placed = self.records[index], self.placements[index]
        files = [reference.image for reference in record.references]
        return PlacedPrompt(
            record.prompt,
            placed.target.size,
            tuple(map(PlacedImage, files, placed.references)),
            tuple(PlacedImage(file, way) for file, way in zip(files, placed.prompt, strict=False)),  # all or none
        )

    def targets(self, index: int) -> tuple[PlacedImage, ...]:
        """Winner and loser."""
        record, placed = self.records[index], self.placements[index]
        return PlacedImage(record.winner, placed.target), PlacedImage(record.loser, placed.target)

    def __len__(self) -> int:
        return len(self.records)

    def remember(self, limit: int) -> None:
        """Keeps each sample once it is read, where pixels of all take at most `limit` bytes: for what is read anew."""
        pixels = sum(sizes.tokens for sizes in self.sizes) * PATCH_SIZE**2
        if 2 * 3 * 4 * pixels <= limit:  # fp32 RGB, and references no more than once
            self._remembered = {}

    def __getitem__(self, index: int) -> PairSample:
        if self._remembered is None:
            return self._read(index)
        if index not in self._remembered:
            self._remembered[index] = self._read(index)
        return self._remembered[index]

    def _read(self, index: int) -> PairSample:
        record, placed = self.records[index], self.placements[index]
        photos = [read_photo(reference.image) for reference in record.references]
        reference_masks = []
        for reference, placement in zip(record.references, placed.references, strict=True):
            mask = reference_mask(reference)
            whole = torch.ones(placement.size[1], placement.size[0], dtype=torch.bool)
            reference_masks.append(whole if mask is None else placement.mask(mask))
        priors = [fit_mask(read_mask(path), placed.target.size) for path in record.prior]
        seen = placed.prompt if self.encodings is None else ()
        return PairSample(
            index=index,
            prompt=record.prompt,
            winner=placed.target.pixels(read_photo(record.winner)),
            loser=placed.target.pixels(read_photo(record.loser)),
            references=tuple(one.pixels(photo) for one, photo in zip(placed.references, photos, strict=True)),
            reference_masks=tuple(reference_masks),
            prior=torch.stack(priors) if record.per_subject else priors[0],
            prompt_images=tuple(one.pixels(photo) for one, photo in zip(seen, photos, strict=False)),
            encodings=None if self.encodings is None else self.encodings(index),
        )


def collate(samples: Sequence[PairSample]) -> PairBatch:
    """Stacks samples of the same sizes."""
    return PairBatch(
        indices=[s.index for s in samples],
        prompts=[s.prompt for s in samples],
        winner=torch.stack([s.winner for s in samples]),
        loser=torch.stack([s.loser for s in samples]),
        references=tuple(torch.stack(images) for images in zip(*(s.references for s in samples), strict=True)),
        reference_masks=tuple(torch.stack(masks) for masks in zip(*(s.reference_masks for s in samples), strict=True)),
        prior=torch.stack([s.prior for s in samples]),
        prompt_images=tuple(s.prompt_images for s in samples if s.prompt_images),
        encodings=tuple(s.encodings for s in samples if s.encodings is not None),
    )


class SizeBatches:
    """Batches of equal sizes, in an order that depends on seed and epoch alone, so that any position can be found again.

    Args:
        dataset: whose `sizes` decide what may share a batch.
        batch_size: pairs per batch; the last batch of a size may be smaller.
        shuffle: a new order each epoch.
        seed: of that order.
    """

    def __init__(self, dataset: PairDataset, batch_size: int, *, shuffle: bool, seed: int) -> None:
        self._groups: dict[PairSizes, list[int]] = defaultdict(list)
        for index, sizes in enumerate(dataset.sizes):
            self._groups[sizes].append(index)
        self._batch_size = batch_size
        self._shuffle = shuffle
        self._seed = seed

    @property
    def layouts(self) -> dict[PairSizes, int]:
        """Pairs of each layout, the most frequent first."""
        counts = {sizes: len(group) for sizes, group in self._groups.items()}
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    @property
    def batches(self) -> int:
        """Number of batches of every epoch."""
        return sum(-(-len(group) // self._batch_size) for group in self._groups.values())

    def epoch(self, epoch: int) -> list[list[int]]:
        """Batches of indices, in the epoch's order; every epoch has as many."""
        # PyTorch's CPU generator looks at 32 bits of its seed.
        seed = int(np.random.SeedSequence([self._seed, epoch]).generate_state(1)[0])
        generator = torch.Generator().manual_seed(seed)

        def order(count: int) -> list[int]:
            return torch.randperm(count, generator=generator).tolist() if self._shuffle else list(range(count))

        batches = []
        with collector_paused():
            for group in self._groups.values():
                shuffled = [group[i] for i in order(len(group))]
                batches += [shuffled[i : i + self._batch_size] for i in range(0, len(shuffled), self._batch_size)]
        return [batches[i] for i in order(len(batches))]
