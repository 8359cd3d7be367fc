"""Images of held-out pairs and of prompts while a run goes on, always from the same noise, and the masks of the pairs."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from focusdpo.data import PairBatch, PairRecord, collate
from focusdpo.data.dataset import PlacedPrompt
from focusdpo.data.images import to_pil
from focusdpo.data.prompt_dataset import PromptDataset
from focusdpo.drawing.contact_sheets import read_picture, sample_sheet
from focusdpo.drawing.overlays import MaskAtTime, draw_overlays
from focusdpo.foundation.output_folder import OutputFolder, step_folders
from focusdpo.models import BACKBONES, Backbone
from focusdpo.models.sampling import Sampler
from focusdpo.training.batches import dataset_of, in_rounds
from focusdpo.training.callbacks import Callback
from focusdpo.training.config import TrainConfig
from focusdpo.training.loading import load_backbone
from focusdpo.training.run_files import SAMPLES_FOLDER
from focusdpo.training.seeding import seeded
from focusdpo.training.step import PreferenceStep
from focusdpo.training.tracking import log_images

if TYPE_CHECKING:
    from focusdpo.training.trainer import Trainer

MASK_TIMES = (0.1, 0.5, 0.9)


def masks_at(step: PreferenceStep, batch: PairBatch, times: Sequence[float], seed: int) -> list[MaskAtTime]:
    """The focus masks of one pair at several times, with one noise; none where `focus.mask` is not "focus"."""
    return [MaskAtTime(t, step.masks(batch, t, seed)["all"]) for t in times if step.focus.mask == "focus"]


Made = tuple[int, Image.Image, bytes]  # index of a pair or prompt, its sample, the page of its masks as PNG, empty without any


class Samples(Callback):
    """Samples of the first held-out pairs, with their masks, and of prompts.

    Each step that has some gets a folder with three files per pair: the sample beside references, winner and what the model
    made of the same noise before it was trained; the sample alone; and the masks. A prompt has no winner and no masks.

    Args:
        config: of the run.
        records: held-out pairs.
        prompts: by what their files are called, line-N.
        out: the run's folder.
    """

    in_all_processes = True

    def __init__(
        self, config: TrainConfig, records: Sequence[PairRecord], prompts: Mapping[str, PlacedPrompt], out: OutputFolder
    ) -> None:
        self._config = config
        self._settings = config.samples
        self._out = out
        self._folder = out.path / SAMPLES_FOLDER
        shown = records[: config.samples.count] if config.samples.every else []
        self._pairs = dataset_of(shown, config.data, config.model.backbone)
        pairs = {str(index): self._pairs.placed(index) for index in range(len(self._pairs))}
        self._names = [*pairs, *prompts]
        self._prompts = PromptDataset([*pairs.values(), *prompts.values()])
        self._negatives = self._prompts.with_text(BACKBONES[config.model.backbone].negative_prompt)
        # What has to be encoded for them.
        self.datasets = (self._pairs, self._prompts, *((self._negatives,) if config.samples.cfg_scale != 1 else ()))
        self._vae: Backbone | None = None  # a backbone with the VAE alone, where the run's has none

    def on_train_begin(self, trainer: Trainer) -> None:
        """Deletes what lies beyond the step, which is about to be made again."""
        for step, path in step_folders(self._folder) if trainer.launch.is_main else ():
            if step > trainer.progress.step:
                self._out.remove(path)

    def between_steps(self, trainer: Trainer) -> None:
        if trainer.is_due(self._settings.every):
            self.make(trainer.progress.step, trainer, trainer.check_stop)

    @torch.no_grad()
    def make(self, number: int, trainer: Trainer, on_step: Callable[[], object] = lambda: None) -> None:
        """Makes the samples of a step of the run, if it has any; all processes call it, and share the work.

        Args:
            number: of the optimiser step.
            trainer: whose model makes them.
            on_step: called after each step of the sampler, equally often in all processes; what it raises ends the sampling.
        """
        step, accelerator, launch = trainer.step, trainer.accelerator, trainer.launch
        # A model in shards runs in all processes or in none: all have pairs, which have masks, and then all have prompts.
        pairs, every = range(len(self._pairs)), range(len(self._prompts))
        rounds = [*in_rounds(pairs, launch.size), *in_rounds(every[len(pairs) :], launch.size)]
        if not rounds:
            return
        module = step.backbone.pipeline.transformer
        was_training = module.training
        module.eval()
        bar = tqdm(
            total=len(rounds) * self._settings.steps,
            desc="sampling",
            unit="step",
            leave=False,
            disable=not launch.is_main,
        )

        def on_sampler() -> None:
            bar.update()
            on_step()

        made: list[Made] = []
        with bar:
            for index in (of_processes[launch.rank] for of_processes in rounds):
                with accelerator.autocast():
                    tokens, grid = self._sample(index, step, on_sampler)
                    page = self._draw_masks(index, number, step) if index in pairs else b""
                made.append((index, self._decode(tokens, grid, step.backbone), page))
        module.train(was_training)
        launch.wait("samples are made")
        made = list({one[0]: one for one in gather_object(made)}.values())  # the last round may repeat the first
        if launch.is_main:
            pages = self._write(number, made)
            log_images(accelerator, {f"samples/{name}": np.asarray(page) for name, page in pages.items()}, number)
        launch.wait("samples are written")

    def _draw_masks(self, index: int, number: int, step: PreferenceStep) -> bytes:
        """The page of a pair's masks as PNG; empty where there are none."""
        page, batch = io.BytesIO(), collate([self._pairs[index]]).to(step.backbone.device)
        masks = masks_at(step, batch, MASK_TIMES, self._settings.seed)
        if masks:
            draw_overlays(batch, masks, page, f"step {number}: {batch.prompts[0]}")
        return page.getvalue()

    def _sample(self, index: int, step: PreferenceStep, on_step: Callable[[], object]) -> tuple[Tensor, tuple[int, int]]:
        """Clean tokens [1, P, C] of the prompt of an index, and their grid."""
        backbone, settings = step.backbone, self._settings
        sampler = Sampler(backbone, settings.steps, settings.guidance, settings.cfg_scale)
        given = step.condition(self._prompts[index].to(backbone.device))
        negative = None
        if sampler.needs_negative:
            negative = step.condition(self._negatives[index].to(backbone.device)).prompts
        name = self._names[index]
        # A prompt's is that of the first image which `focusdpo sample` makes of its line.
        own = torch.Generator().manual_seed(settings.seed + index)
        generator = own if name.isdecimal() else seeded(settings.seed, int(name.removeprefix("line-")), 0)
        return sampler(given, negative, generator, on_step), given.layout.target

    def _decode(self, tokens: Tensor, grid: tuple[int, int], backbone: Backbone) -> Image.Image:
        if backbone.pipeline.vae is not None:
            return to_pil(backbone.decode_images(tokens, grid)[0])
        if self._vae is None:
            self._vae = load_backbone(self._config, "vae")
        self._vae.vae.to(tokens.device)
        try:
            return to_pil(self._vae.decode_images(tokens, grid)[0])
        finally:
            self._vae.vae.to("cpu")  # the run was told to keep it off the device

    def _write(self, number: int, made: Sequence[Made]) -> dict[str, Image.Image]:
        """Writes the files of a step; returns its sheets and pages of masks by name."""
        final = self._folder / f"step-{number:06d}"
        pages = {}
        with self._out.writing_folder(final) as partial:
            for index, sample, masks in made:
                prompt, name = self._prompts[index], self._names[index]
                sample.save(partial / f"{name}_sample.png")
                untrained = read_picture(self._folder / "step-000000" / f"{name}_sample.png") if number else None
                before = {} if untrained is None else {"step 0": untrained}
                winner = {"winner": to_pil(self._pairs[index].winner)} if index < len(self._pairs) else {}
                images = {**before, f"step {number}": sample, **winner}
                pages[name] = sample_sheet(prompt.prompts[0], [to_pil(image[0]) for image in prompt.references], images)
                pages[name].save(partial / f"{name}.png")
                if masks:
                    (partial / f"{name}_masks.png").write_bytes(masks)
                    pages[f"{name}_masks"] = Image.open(io.BytesIO(masks)).convert("RGB")
        return pages
