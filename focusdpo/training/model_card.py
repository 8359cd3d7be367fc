"""The model card beside a finished LoRA: how to load it, what it was trained on, and what the run's numbers and images were."""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from focusdpo.data import PairDataset
from focusdpo.drawing.contact_sheets import read_picture, stack
from focusdpo.drawing.training_curves import draw_curves
from focusdpo.foundation.files import write_whole, writing
from focusdpo.foundation.journals import read_metrics, read_steps
from focusdpo.foundation.output_folder import step_folders
from focusdpo.foundation.packages import version_of
from focusdpo.foundation.text import code, code_block, counted, first_of, markdown
from focusdpo.models.lora_reading import LORA_FILE
from focusdpo.training.config import DataConfig, FocusConfig, ModelConfig, TrainConfig
from focusdpo.training.run_files import METRICS_FILE, SAMPLES_FOLDER, VALIDATION_FILE, samples_in

PACKAGES = ("focusdpo", "torch", "diffusers", "peft", "transformers", "accelerate")
METHODS = {
    "focus": "FocusDPO ([arXiv 2509.01181](https://arxiv.org/abs/2509.01181)), Diffusion-DPO with a spatial mask,",
    "prior": "Diffusion-DPO within the regions where winner and loser differ",
    "none": "Diffusion-DPO",
}
SOURCES = {
    "estimate": " whose structure field is made of the model's own estimate (focusdpo's E10),",
    "random": " whose structure field is random, a control,",
    "truth": " whose structure field is made of the priors, a control,",
}
# Which of kohya's tools know the model.
KOHYAS = {"flux": "sd-scripts", "kontext": "musubi-tuner", "flux2": "musubi-tuner", "qwen-edit-plus": "musubi-tuner"}
# What the pipelines' calls take of references, and what of them they do not.
CALLS = {
    "flux": "",
    "kontext": ', image=load_image("cat.png")',
    "flux2": ', image=[load_image("cat.png"), load_image("cup.png")]',
    "qwen-edit-plus": ', negative_prompt=" ", image=[load_image("cat.png"), load_image("cup.png")]',
}
REFERENCES = {
    "flux": "FLUX.1's pipeline takes no references, which lie as in UNO here; focusdpo places them:",
    "kontext": "The pipeline takes one reference, and several are put side by side here; focusdpo takes up to six:",
    "flux2": "focusdpo does the same, for any number of prompts and images:",
    "qwen-edit-plus": "The pipeline needs torchvision. focusdpo does the same without it:",
}
HELD_OUT = {
    "accuracy": "implicit accuracy",
    "loss": "loss (ln 2 = 0.693 at the start)",
    "margin": "margin",
    "error/policy_win": "winner's error",
    "error/reference_win": "winner's error without the LoRA",
    "error/policy_lose": "loser's error",
    "error/reference_lose": "loser's error without the LoRA",
}

MASK_MOVES = (
    "Errors are weighted by the mask M, which is drawn from {} of the model with the LoRA: as that learns, M "
    "changes, and so do the errors without the LoRA, though the model under it, the pairs, times and noise stay the same."
)


def _why_errors_move(focus: FocusConfig) -> str:
    if focus.mask != "focus" or focus.feature_source != "policy" or focus.source == "truth":
        return ""
    return MASK_MOVES.format("the predictions" if focus.source == "estimate" else "the hidden states")


def write_model_card(config: TrainConfig, folder: Path, train: PairDataset, validation: PairDataset) -> None:
    """Writes README.md, curves.png and, where the run made some, samples.png beside the LoRA of a run.

    Args:
        config: of the run.
        folder: of the run; the LoRA is in `lora` under it.
        train, validation: the pairs, of which the card says how many and of what kind; no path of them is in it.
    """
    lora = folder / "lora"
    held_out = read_metrics(folder / VALIDATION_FILE)
    with writing(lora / "curves.png") as partial:
        draw_curves(read_steps(folder / METRICS_FILE), held_out, partial)
    sheets = [sheet for path in _sheets(folder / SAMPLES_FOLDER) if (sheet := read_picture(path)) is not None]
    if sheets:
        with writing(lora / "samples.png") as partial:
            stack(sheets).save(partial, "PNG")

    method = "supervised fine-tuning on the winners" if config.loss.loss_type == "sft" else METHODS[config.focus.mask]
    if config.loss.loss_type != "sft" and config.focus.mask == "focus":
        method += SOURCES.get(config.focus.source, "")
    hub_id = None if Path(config.model.path).exists() else config.model.path
    data = ModelCardData(
        base_model=hub_id,
        library_name="diffusers",
        pipeline_tag="image-to-image",
        tags=["lora", "diffusers-training", "dpo", "focusdpo", config.model.backbone],
    )
    parts = [
        f"# LoRA for {markdown(hub_id or f'a {config.model.backbone} pipeline')}, trained with focusdpo",
        f"{counted(config.max_steps, 'step')} of {method} on {counted(len(train), 'preference pair')} with reference images.",
        "![References, samples before and after training, and winners](samples.png)" if sheets else "",
        "## Use",
        _use(config.model, hub_id),
        "### In other tools",
        _other_tools(config.model),
        "## Held-out pairs" if held_out else "",
        _table(held_out, len(validation)) if held_out else "",
        _why_errors_move(config.focus) if held_out else "",
        "## Training",
        "![Curves of the run](curves.png)",
        _data_summary(train),
        "What differs from the defaults:",
        code_block("yaml", yaml.safe_dump(_changed(config), sort_keys=False)),
        "<details><summary>All settings</summary>",
        code_block("yaml", yaml.safe_dump(_shown(config), sort_keys=False)),
        "</details>",
        "Made with " + ", ".join(f"{name} {version_of(name) or '(not installed as a package)'}" for name in PACKAGES) + ".",
    ]
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n")
    write_whole(lora / "README.md", str(card))


def _sheets(folder: Path) -> list[Path]:
    """The sheets of the last step that has some."""
    return [path / f"{name}.png" for _, path in step_folders(folder)[-1:] for name in samples_in(path)]


def _use(model: ModelConfig, hub_id: str | None) -> str:
    """A script for diffusers that ends with a picture, and what its pipeline cannot do by `focusdpo sample`."""
    base, here = hub_id or "the base model", "this folder or repository"
    call = CALLS[model.backbone]
    # Without a file's name diffusers looks for one on the hub, which it cannot do offline.
    file = f'weight_name="{LORA_FILE}"'
    note, loads = "", [f'pipeline.load_lora_weights("{here}", {file})']
    if model.base_lora is not None:
        name, scale = Path(model.base_lora).name, model.base_lora_scale
        loads = [
            f'pipeline.load_lora_weights("base-lora", {file}, adapter_name="base")',
            f'pipeline.load_lora_weights("{here}", {file}, adapter_name="focusdpo")',
            f'pipeline.set_adapters(["base", "focusdpo"], [{scale:g}, 1.0])',
        ]
        command = f"focusdpo convert-lora {shlex.quote(name)} base-lora"
        note = (
            f"It was trained on top of {code(name)}, which has to be loaded under it, in other tools as well, at scale "
            f"{scale:g}; {code(command)} brings it into diffusers' format.\n\n"
        )
    lines = ["import torch", "from diffusers import DiffusionPipeline"]
    lines += ["from diffusers.utils import load_image"] * ("load_image" in call)
    lines += ["", f"pipeline = DiffusionPipeline.from_pretrained({json.dumps(base)}, dtype=torch.bfloat16)", *loads]
    lines += ['pipeline.to("cuda" if torch.cuda.is_available() else "cpu")']
    # By name: the first argument of some is the image.
    lines += [f'image = pipeline(prompt="a cat and a cup"{call}).images[0]', 'image.save("picture.png")']
    return f"{note}{code_block('python', chr(10).join(lines))}\n\n{REFERENCES[model.backbone]}\n\n{_sample(model, base)}"


def _sample(model: ModelConfig, base: str) -> str:
    words = ["focusdpo", "sample", "--model.path", base, "--model.backbone", model.backbone]
    if model.base_lora is not None:
        words += ["--model.base_lora", "base-lora"]
        words += ["--model.base_lora_scale", f"{model.base_lora_scale:g}"] * (model.base_lora_scale != 1)
    words += ["--lora", "this folder", "--prompt", "a cat and a cup", "--references", "cat.png", "cup.png"]
    return code_block("bash", shlex.join(words))


def _other_tools(model: ModelConfig) -> str:
    kohyas = KOHYAS[model.backbone]
    rows = {
        "PEFT": '`PeftModel.from_pretrained(pipeline.transformer, "this folder or repository", subfolder="peft")`',
        "ComfyUI": "`focusdpo convert-lora FOLDER out --to comfyui`, and `out/lora_comfyui.safetensors` in `models/loras`",
        kohyas: "`focusdpo convert-lora FOLDER out --to kohya`, and `--network_weights out/lora_kohya.safetensors`",
    }
    table = "\n".join(["| tool | how |", "|---|---|", *(f"| {tool} | {how} |" for tool, how in rows.items())])
    return f"All apply its trained strength at scale 1: alpha is multiplied into the weights.\n\n{table}"


def _table(rows: Sequence[dict[str, float]], pairs: int) -> str:
    first, last = rows[0], rows[-1]

    def numbers(name: str) -> bool:  # a row may be damaged
        return all(isinstance(row.get(name), int | float) for row in (first, last))

    lines = [f"| {counted(pairs, 'pair')} | step {first['step']:.0f} | step {last['step']:.0f} |", "|---|---|---|"]
    lines += [f"| {label} | {first[name]:.4g} | {last[name]:.4g} |" for name, label in HELD_OUT.items() if numbers(name)]
    return "\n".join(lines)


def _data_summary(pairs: PairDataset) -> str:
    references = Counter(str(len(record.references)) for record in pairs.records)
    classes = Counter(r.class_name for record in pairs.records for r in record.references if r.class_name)
    sizes = Counter("{}x{}".format(*size.target) for size in pairs.sizes)
    lines = [
        f"- {counted(len(pairs), 'pair')}, by their number of references: " + _most(references),
        "- images in pixels: " + _most(sizes),
    ]
    if classes:
        lines.append("- classes of the references: " + _most(classes))
    return "\n".join(lines)


def _most(counts: Counter[str]) -> str:
    return first_of([f"{markdown(name)} ({count})" for name, count in counts.most_common()], 20)


def _shown(config: TrainConfig) -> dict[str, Any]:
    """All settings; of a path outside of the working folder the last part alone, as the rest is nobody's business."""

    def without_folders(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: without_folders(item) for name, item in value.items()}
        if isinstance(value, str) and (Path(value).is_absolute() or value.startswith(("~", ".."))):
            return Path(value).name
        return None if isinstance(value, float) and not math.isfinite(value) else value

    shown: dict[str, Any] = without_folders(asdict(config))
    return shown


def _changed(config: TrainConfig) -> dict[str, Any]:
    """Those of the settings shown that are not their default."""
    defaults = asdict(TrainConfig(model=ModelConfig(path=""), data=DataConfig(train=""), output_dir="_"))
    return {
        name: {key: item for key, item in value.items() if item != defaults[name][key]} if isinstance(value, dict) else value
        for name, value in _shown(config).items()
        if value != defaults[name]
    }
