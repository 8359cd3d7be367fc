"""Prompts of a manifest under the sizes of a run."""

from __future__ import annotations

from collections.abc import Sequence

from focusdpo.data.dataset import PlacedPrompt, SizeRules
from focusdpo.data.images import Size, token_size
from focusdpo.data.prompt_dataset import place_prompts
from focusdpo.data.prompts import Prompt, check_references, find_manifest, read_prompts
from focusdpo.foundation.launch import Launch
from focusdpo.models import BACKBONES
from focusdpo.training.config import DataConfig, TrainConfig
from focusdpo.training.image_sizes import size_rules


def square(data: DataConfig) -> Size:
    """The size of an image that follows from no photo: data.resolution in both directions, in whole tokens."""
    return token_size((1, 1), data.resolution)


def place_as_run(prompts: Sequence[Prompt], config: TrainConfig, target: Size) -> list[PlacedPrompt]:
    """The way of each reference, as that of a run's pairs; `target` is the images' size. Errors as `place_prompts`."""
    return place_prompts(prompts, SizeRules(**size_rules(config.data, config.model.backbone)), target)


def load_sample_prompts(config: TrainConfig, launch: Launch) -> dict[str, PlacedPrompt]:
    """The prompts of `samples.manifest`, where the run makes samples of them, by what their files are called: line-N.

    The first process of each machine decodes the references.

    Raises:
        FileNotFoundError, DatasetError: the manifest, or what it names, cannot be used; ElsewhereError in other processes.
    """
    manifest = config.samples.manifest
    if manifest is None or not config.samples.every:
        return {}
    prompts = read_prompts(find_manifest(manifest), "samples.manifest")
    fewest = BACKBONES[config.model.backbone].fewest_references
    launch.once_a_machine("prompts are checked", lambda: check_references(prompts, fewest, launch.is_main))
    placed = place_as_run(prompts, config, square(config.data))
    return {f"line-{prompt.line}": one for prompt, one in zip(prompts, placed, strict=True)}
