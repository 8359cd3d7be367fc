"""Makes the images that are missing, each from its own noise and written whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from focusdpo.data.images import to_pil
from focusdpo.data.prompt_dataset import PromptDataset
from focusdpo.foundation.files import writing
from focusdpo.foundation.launch import ElsewhereError, Launch
from focusdpo.models import Backbone
from focusdpo.models.conditioning import Conditioner
from focusdpo.models.lora_adapter import add_lora
from focusdpo.models.lora_reading import read_lora
from focusdpo.models.sampling import Sampler
from focusdpo.sampling.config import SampleConfig
from focusdpo.sampling.inputs import Inputs
from focusdpo.training.adapter import reference_model
from focusdpo.training.determinism import repeatable
from focusdpo.training.loading import load_whole, make_base
from focusdpo.training.seeding import seeded
from focusdpo.training.sharding import device_of

IMAGES, BASE = "images", "base"  # folders: of what `evaluate` takes, and of the same without the LoRA


class Wanted(NamedTuple):
    """An image to be made: the place of its prompt, its number among that prompt's, and the folder that it belongs to."""

    prompt: int
    number: int
    folder: str


def file_name(line: int, number: int) -> str:
    """The name of an image, as `focusdpo evaluate` takes it, whatever else there is."""
    return f"{line:04d}_{number}.png"


def wanted_images(config: SampleConfig, inputs: Inputs) -> list[Wanted]:
    """All images, a prompt's together, and each beside what the model without the LoRA makes of its noise."""
    folders = (IMAGES, BASE) if config.compare else (IMAGES,)
    numbers = range(config.images_per_prompt)
    return [Wanted(i, number, folder) for i in range(len(inputs.prompts)) for number in numbers for folder in folders]


def share_of(missing: Sequence[Wanted], rank: int, size: int) -> Sequence[Wanted]:
    """The part of one process: neighbours, as a prompt is encoded once by each process that has an image of it."""
    return missing[rank * len(missing) // size : (rank + 1) * len(missing) // size]


def load(config: SampleConfig, inputs: Inputs, launch: Launch) -> Backbone:
    """The model, with its LoRA as an adapter; ValueError where that does not fit it."""
    device = device_of(launch, inputs.run.cpu)

    def adapt(backbone: Backbone) -> None:
        make_base(backbone, inputs.run.model, device)
        if inputs.lora is not None:
            lora = read_lora("lora", inputs.lora, backbone.name)
            add_lora(backbone.transformer, lora, config.lora_scale, f"lora: {inputs.lora}")
            backbone.merged_layers = backbone.merged_layers or list(lora.layers)

    return load_whole(inputs.run, device, adapt)


@torch.no_grad()
def make_images(config: SampleConfig, inputs: Inputs, share: Sequence[Wanted], backbone: Backbone, launch: Launch) -> None:
    """Makes the images of one process.

    Args:
        config, inputs: of the command.
        share: what is missing, a prompt's images together.
        backbone: with its adapter, if it has a LoRA.
        launch: another process of which may fail meanwhile.
    """
    dataset = PromptDataset(inputs.placed)
    negatives = dataset.with_text(backbone.negative_prompt)
    sampler, conditioner = Sampler(backbone, config.steps, config.guidance, config.cfg_scale), Conditioner(backbone)
    autocast = torch.autocast(backbone.device.type, torch.bfloat16, enabled=inputs.run.mixed_precision == "bf16")
    bar = tqdm(total=len(share), desc="sampling", unit="image", disable=not launch.is_main)
    with bar, repeatable(inputs.run.deterministic), autocast:
        for index, of_prompt in groupby(share, lambda wanted: wanted.prompt):
            given = conditioner.condition(dataset[index].to(backbone.device))
            negative = None
            if sampler.needs_negative:
                negative = conditioner.condition(negatives[index].to(backbone.device)).prompts
            line = inputs.prompts[index].line
            for wanted in of_prompt:
                if (reason := launch.failure()) is not None:
                    raise ElsewhereError(reason)
                without = reference_model(backbone.transformer) if wanted.folder == BASE else nullcontext()
                with without:
                    tokens = sampler(given, negative, seeded(config.seed, line, wanted.number))
                image = to_pil(backbone.decode_images(tokens, given.layout.target)[0])
                file = Path(config.output_dir) / wanted.folder / file_name(line, wanted.number)
                with writing(file, shared=True) as partial:
                    image.save(partial, "PNG")
                bar.update()


def prompts_of(wanted: Sequence[Wanted]) -> Iterator[int]:
    """The prompts of images, each once."""
    return (index for index, _ in groupby(one.prompt for one in wanted))
