"""Everything that sampling reads, checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from focusdpo.data.dataset import PlacedPrompt
from focusdpo.data.images import PATCH_SIZE, Size
from focusdpo.data.lines import MAX_REFERENCES
from focusdpo.data.prompts import Prompt, check_references, find_manifest, read_prompts
from focusdpo.data.records import Reference
from focusdpo.foundation.files import checksum, fingerprint, hash_of
from focusdpo.foundation.launch import Launch
from focusdpo.foundation.settings import require
from focusdpo.models import BACKBONES
from focusdpo.models.base import pipeline_folder
from focusdpo.models.base_lora import lora_checksum
from focusdpo.models.lora_reading import LORA_FILE, read_lora
from focusdpo.sampling.config import SampleConfig
from focusdpo.training.config import TrainConfig
from focusdpo.training.loading import check_model, checkpoint_of
from focusdpo.training.prompts import place_as_run, square
from focusdpo.training.run_files import model_as_run, read_run_config
from focusdpo.training.run_folder import model_contents

# Of the model's settings, those that make no image another one, and those that are compared by their content.
FREE = ("path", "revision", "base_lora", "guidance", "gradient_checkpointing", "compile", "activation_budget")
COMPARED = ("steps", "guidance", "cfg_scale", "seed", "lora_scale")


@dataclass(frozen=True)
class Inputs:
    """What is sampled, and with what.

    Attributes:
        run: whose model it is, or the model as a run that has not begun.
        lora: the file or folder of the LoRA; None is the model itself.
        prompts: by line. placed: the same with the way of each reference, and the images' size.
    """

    run: TrainConfig
    lora: str | None
    prompts: Sequence[Prompt]
    placed: Sequence[PlacedPrompt]

    @property
    def references(self) -> list[Reference]:
        return [reference for prompt in self.prompts for reference in prompt.references]


def read_inputs(config: SampleConfig, launch: Launch) -> Inputs:
    """Reads run, LoRA and prompts. The first process of each machine decodes the references and reads the LoRA's values.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: what is not fit, named; ElsewhereError in other processes.
    """
    run = model_as_run(config.model) if config.model is not None else read_run_config("config", config.config or "")
    run.cpu = run.cpu or config.cpu
    target = _target(config, run)
    lora = _find_lora(config, run)
    prompts = read_prompts(find_manifest(config.manifest)) if config.manifest is not None else [_single(config)]
    backbone = run.model.backbone

    def check() -> None:
        check_model(run.model)
        if lora is not None:
            read_lora("lora", lora, backbone)
        check_references(prompts, BACKBONES[backbone].fewest_references, launch.is_main)

    launch.once_a_machine("prompts and references are checked", check)
    return Inputs(run, lora, prompts, place_as_run(prompts, run, target))


def _target(config: SampleConfig, run: TrainConfig) -> Size:
    """The images' size; ValueError for one that is not of whole tokens."""
    size = config.pixels
    if size is None:
        return square(run.data)
    nearest = "{}x{}".format(*(max(round(side / PATCH_SIZE), 1) * PATCH_SIZE for side in size))
    expected = f"multiples of {PATCH_SIZE} pixels, such as {nearest}"
    require(all(side % PATCH_SIZE == 0 for side in size), "size", config.size, expected)
    return size


def _find_lora(config: SampleConfig, run: TrainConfig) -> str | None:
    """The LoRA's file or folder: what `lora` names, or the run's, finished or of a checkpoint."""
    if config.lora is not None or config.config is None or config.checkpoint == "none":
        return config.lora
    finished = Path(run.output_dir) / "lora"
    if config.checkpoint is None and (finished / LORA_FILE).is_file():
        return str(finished)
    checkpoint = checkpoint_of("checkpoint", run, config.checkpoint or "latest")
    return None if checkpoint is None else str(checkpoint / "lora")


def _single(config: SampleConfig) -> Prompt:
    """The prompt of the settings, as the line of a manifest that messages call as one types it."""
    assert config.prompt is not None
    few = len(config.references) <= MAX_REFERENCES
    require(few, "references", config.references, f"at most {MAX_REFERENCES} images")
    return Prompt(Path("--prompt"), 1, config.prompt, tuple(Reference(Path(name)) for name in config.references))


def settings_of(config: SampleConfig, inputs: Inputs) -> dict[str, Any]:
    """What decides the images, model, LoRA and references by their content: nothing else is gone on with in a folder."""
    run, model = inputs.run, inputs.run.model
    contents = {str(file): checksum(file) for file in {reference.image for reference in inputs.references}}
    size = "{}x{}".format(*inputs.placed[0].target)
    return {
        "settings": {name: getattr(config, name) for name in COMPARED}
        | {"size": size, "images_per_prompt": config.images_per_prompt},
        "model": {name: value for name, value in asdict(model).items() if name not in FREE}
        | model_contents(model)
        | {
            "scheduler (its content)": fingerprint(pipeline_folder(model.path, model.revision), ["scheduler"])[:16],
            "lora (its content)": None if inputs.lora is None else lora_checksum("lora", inputs.lora)[:16],
            "mixed_precision": run.mixed_precision,
            **{name: getattr(run.data, name) for name in ("reference_resolution", "reference_resolution_multiple")},
            "reference_buckets": run.data.reference_buckets,
        },
        "prompts": {
            f"line {prompt.line}": f"{prompt.text} [references {hash_of(*_contents(prompt, contents))[:8]}]"
            for prompt in inputs.prompts
        },
    }


def _contents(prompt: Prompt, contents: dict[str, str]) -> list[str]:
    return [contents[str(reference.image)] for reference in prompt.references]


def may_differ(name: str, begun: Any, now: Any) -> bool:
    """Whether what was begun can be gone on with all the same: more images of a prompt, and more lines, change none."""
    return (name == "images_per_prompt" and now >= begun) or (name.startswith("line ") and begun is None)
