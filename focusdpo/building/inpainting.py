"""The fourth stage with weights: a diffusers pipeline inpaints another instance from the subject's caption."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import cv2
import numpy as np
import torch
from diffusers import AutoPipelineForInpainting, DiffusionPipeline
from PIL import Image

from focusdpo.building.blending import box_of, grow, poisson
from focusdpo.building.candidate import Candidate, Pixels
from focusdpo.building.config import DisruptionConfig
from focusdpo.building.disruption import Change, Disruption
from focusdpo.building.encoder import Encoder
from focusdpo.data.images import PATCH_SIZE
from focusdpo.data.writing import image_of


class Inpainting(Disruption):
    """Inpaints the subject's region and pastes it back; every other pixel is the winner's."""

    def __init__(self, config: DisruptionConfig, encoder: Encoder | None, max_resemblance: float) -> None:
        super().__init__(encoder, max_resemblance)
        self.device = config.device
        self._config = config
        name = DiffusionPipeline.load_config(config.path, local_files_only=True)["_class_name"]
        # FLUX Fill is made for inpainting alone: diffusers' automatic choice does not know it.
        loader = DiffusionPipeline if "Fill" in name else AutoPipelineForInpainting
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[config.dtype]
        self._pipeline = loader.from_pretrained(config.path, torch_dtype=dtype, local_files_only=True).to(config.device)
        self._pipeline.set_progress_bar_config(disable=True)
        self._has_strength = "strength" in inspect.signature(self._pipeline.__call__).parameters

    def changes(self, candidate: Candidate, number: int, loser: Pixels) -> Iterator[Change]:
        region = grow(candidate.subjects[number].region, 4)
        for index, other in enumerate(candidate.subjects):
            if index != number:
                region &= ~other.region
        rows, columns = box_of(region, round(self._config.margin * max(side.stop - side.start for side in box_of(region))))
        crop, inside = loser[rows, columns], region[rows, columns]
        scale = self._config.resolution / max(inside.shape)
        height, width = (max(round(side * scale / PATCH_SIZE), 1) * PATCH_SIZE for side in inside.shape)
        caption, class_name = candidate.captions[number], candidate.subjects[number].subject.class_name
        options = {"strength": self._config.strength} if self._has_strength else {}
        image = self._pipeline(
            prompt=self._config.prompt.format(caption=caption, class_name=class_name),
            image=Image.fromarray(crop).resize((width, height), Image.Resampling.LANCZOS),
            mask_image=image_of(inside).resize((width, height), Image.Resampling.NEAREST),
            height=height,
            width=width,
            num_inference_steps=self._config.steps,
            guidance_scale=self._config.guidance,
            generator=torch.Generator().manual_seed(int(candidate.rng(f"inpainting {number}").integers(2**31))),
            **options,
        ).images[0]
        painted = loser.copy()
        interpolation = cv2.INTER_AREA if scale > 1 else cv2.INTER_CUBIC
        painted[rows, columns] = cv2.resize(np.asarray(image), inside.shape[::-1], interpolation=interpolation)
        yield poisson(loser, painted, region, reach=8.0), region, {"kind": "inpaint", "prompt": caption}
