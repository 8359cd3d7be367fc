"""Settings of `focusdpo sample`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from focusdpo.foundation.settings import require
from focusdpo.training.config import ModelConfig


@dataclass
class SampleConfig:
    """Prompts with references, and the model that makes images of them. docs/sampling.md shows it within the whole chain.

    Args:
        config: A training run, its folder or its settings as YAML: its model, sizes of references and LoRA are taken.
        checkpoint: Whose LoRA of the run: "latest", the folder of a checkpoint, or "none" for the model before training; null
            takes the finished one, or that of the latest checkpoint where there is none yet.
        model: A pretrained model instead of a run.
        lora: A LoRA, a file or its folder in any form that `focusdpo convert-lora` reads, instead of the run's; without one
            --model.path samples the model itself.
        lora_scale: Factor of its update.
        prompt: A single prompt; it counts as line 1.
        references: Images of its subjects, in the prompt's order.
        manifest: File with a prompt and its references a line, as `focusdpo evaluate` takes it; pairs.jsonl, or the folder
            that holds one, serves too.
        images_per_prompt: Images of each prompt; more can be asked for later.
        size: Width and height of the images in pixels, such as 768x512, multiples of 16; null takes a square of the run's
            data.resolution, or of 512 pixels.
        steps: Steps of the sampler; null takes the pipeline's own number.
        guidance: Guidance value fed to guidance-distilled models; null takes the pipeline's default.
        cfg_scale: Scale of classifier-free guidance, which 1 switches off; null takes the pipeline's default.
        seed: Of the noise, which follows from it, an image's line and its number, and from nothing else.
        compare: Make each image without the LoRA as well, from the same noise, and sheets that have both side by side.
        output_dir: Folder for images, base, compare and index.html.
        overwrite: Delete what an earlier call left in output_dir, instead of making what is missing.
        cpu: Use the CPU even where there is a GPU.
    """

    config: str | None = None
    checkpoint: str | None = None
    model: ModelConfig | None = None
    lora: str | None = None
    lora_scale: float = 1.0
    prompt: str | None = None
    references: list[str] = field(default_factory=list)
    manifest: str | None = None
    images_per_prompt: int = 1
    size: str | None = None
    steps: int | None = None
    guidance: float | None = None
    cfg_scale: float | None = None
    seed: int = 0
    compare: bool = False
    output_dir: str = "samples"
    overwrite: bool = False
    cpu: bool = False

    def __post_init__(self) -> None:
        if (self.config is None) == (self.model is None):
            came = "neither" if self.config is None else "both"
            raise ValueError(f"config, model: got {came}; expected a run, or --model.path")
        if (self.prompt is None) == (self.manifest is None):
            came = "neither" if self.prompt is None else "both"
            raise ValueError(f"prompt, manifest: got {came}; expected one prompt, or a file with one a line")
        self._check_lora()
        require(self.prompt is None or bool(self.prompt.strip()), "prompt", self.prompt, "a text that is not empty")
        listed = not self.references or self.manifest is None
        require(listed, "references", self.references, "none with --manifest, whose lines name their own")
        require(self.images_per_prompt >= 1, "images_per_prompt", self.images_per_prompt, "at least 1")
        self.pixels = None if self.size is None else _parse_size(self.size)
        require(self.steps is None or self.steps >= 1, "steps", self.steps, "at least 1, or null")
        for name in ("guidance", "cfg_scale"):
            scale = getattr(self, name)
            require(scale is None or (math.isfinite(scale) and scale >= 0), name, scale, "0 or more, or null")
        require(0 <= self.seed < 2**32, "seed", self.seed, "0 <= seed < 2^32")
        require(bool(self.output_dir), "output_dir", self.output_dir, "a folder")

    def _check_lora(self) -> None:
        alone = self.checkpoint is None or self.config is not None
        require(alone, "checkpoint", self.checkpoint, "none without --config; --lora names a LoRA's file or folder")
        require(self.checkpoint is None or self.lora is None, "checkpoint", self.checkpoint, "none together with --lora")
        has_lora = self.lora is not None or (self.config is not None and self.checkpoint != "none")
        scale = self.lora_scale
        require(math.isfinite(scale) and scale != 0, "lora_scale", scale, "a finite number other than 0")
        require(scale == 1 or has_lora, "lora_scale", scale, "1 without a LoRA; name one with --lora")
        require(not self.compare or has_lora, "compare", self.compare, "false without a LoRA; name one with --lora")


def _parse_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text)
    require(match is not None, "size", text, "width and height in pixels, such as 768x512")
    assert match is not None
    return int(match[1]), int(match[2])
