"""Prompts with their references, brought to size to be sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset

from focusdpo.data.dataset import PlacedImage, PlacedPrompt, PromptEncodings, SizeRules
from focusdpo.data.headers import INDEX
from focusdpo.data.images import Size, read_photo
from focusdpo.data.lines import DatasetError, Problem
from focusdpo.data.prompts import Prompt


@dataclass(frozen=True)
class PromptBatch:
    """A prompt as a batch of one.

    prompts: its text. target: size of the image to be made. references: R tensors [1, 3, h, w] in [0, 1]. prompt_images: R
    tensors [3, h', w'], as the text encoder is to see them; none where it sees none, or has seen them. encodings: one, or none
    where the prompt has to be encoded.
    """

    prompts: list[str]
    target: Size
    references: tuple[Tensor, ...]
    prompt_images: tuple[tuple[Tensor, ...], ...] = ()
    encodings: tuple[PromptEncodings, ...] = ()

    def to(self, device: torch.device) -> PromptBatch:
        """All but the prompt's images and the encodings, as `PairBatch.to`."""
        return replace(self, references=tuple(image.to(device) for image in self.references))


class PromptDataset(Dataset[PromptBatch]):
    """Reads the references of prompts from disk.

    Args:
        prompts: with the way of each reference.

    `encodings`, once set, reads what was kept of the prompt of an index.
    """

    encodings: Callable[[int], PromptEncodings] | None = None

    def __init__(self, prompts: Sequence[PlacedPrompt]) -> None:
        self._prompts = list(prompts)

    def with_text(self, text: str) -> PromptDataset:
        """The same with another text for all, as the negative prompt: it takes the same way through cache and encoders."""
        return PromptDataset([replace(prompt, text=text) for prompt in self._prompts])

    def placed(self, index: int) -> PlacedPrompt:
        return self._prompts[index]

    def targets(self, index: int) -> tuple[PlacedImage, ...]:
        """What is encoded beside the references: nothing."""
        return ()

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> PromptBatch:
        prompt = self._prompts[index]
        photos = [read_photo(reference.file) for reference in prompt.references]
        seen = prompt.seen if self.encodings is None else ()
        images = tuple(one.placement.pixels(photo) for one, photo in zip(seen, photos, strict=False))
        return PromptBatch(
            prompts=[prompt.text],
            target=prompt.target,
            references=tuple(one.placement.pixels(p)[None] for one, p in zip(prompt.references, photos, strict=True)),
            prompt_images=(images,) if images else (),
            encodings=() if self.encodings is None else (self.encodings(index),),
        )


def place_prompts(prompts: Sequence[Prompt], rules: SizeRules, target: Size) -> list[PlacedPrompt]:
    """The way of each reference of prompts whose files can be read.

    Args:
        prompts: by line.
        rules: bring references to size.
        target: size of the images to be made, in whole tokens.

    Raises:
        DatasetError: with every reference that its rule has no way for.
    """
    placed: list[PlacedPrompt] = []
    problems: list[Problem] = []
    for prompt in prompts:
        sizes = tuple(INDEX.header(reference.image).size for reference in prompt.references)
        try:
            ways, seen = rules.place_references(prompt.file, prompt.line, prompt.references, sizes)
        except DatasetError as error:
            problems += error.problems
            continue
        files = [reference.image for reference in prompt.references]
        placed.append(
            PlacedPrompt(
                prompt.text,
                target,
                tuple(map(PlacedImage, files, ways)),
                tuple(PlacedImage(file, way) for file, way in zip(files, seen, strict=False)),  # all or none
            )
        )
    if problems:
        raise DatasetError(problems, "references cannot be used")
    return placed
