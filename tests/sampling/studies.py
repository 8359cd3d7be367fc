"""What the tests of `focusdpo sample` need: tiny models, a manifest over photos, random LoRAs, and the command itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from focusdpo.commands.cli import main
from focusdpo.models import BACKBONES
from focusdpo.models.lora_fusion import Update
from focusdpo.models.lora_names import family_of
from focusdpo.models.lora_reading import Lora
from focusdpo.models.lora_writing import write_lora
from focusdpo.models.tiny_flux import write_tiny_flux
from tests.tiny_flux2 import write_tiny_flux2
from tests.tiny_qwen import write_tiny_qwen

TEXT = 300  # tokens; FLUX.2's and Qwen's tiny tokenizers need one for each letter of their templates
WRITE: dict[str, Callable[[Path], Path]] = {
    "flux": write_tiny_flux,
    "kontext": lambda folder: write_tiny_flux(folder, kontext=True),
    "klein": write_tiny_flux2,
    "dev": lambda folder: write_tiny_flux2(folder, klein=False),
    "qwen": write_tiny_qwen,
}
BACKBONE = {"klein": "flux2", "dev": "flux2", "qwen": "qwen-edit-plus"}
PROMPTS = ["a cat and a cup", "a dog", "a cup and a dog"]
SUBJECTS = [(0, 1), (2,), (1, 2)]


def write_photos(folder: Path) -> list[Path]:
    """Three photos of different shapes."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, size in enumerate(((64, 96), (80, 80), (96, 64))):
        coarse = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        files.append(folder / f"photo{number}.png")
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(files[-1])
    return files


def write_manifest(folder: Path, prompts: int = len(PROMPTS)) -> Path:
    """Prompts with their photos beside it, paths relative to it."""
    write_photos(folder / "photos")
    lines = [
        {"prompt": text, "references": [{"image": f"photos/photo{subject}.png"} for subject in subjects]}
        for text, subjects in zip(PROMPTS[:prompts], SUBJECTS, strict=False)
    ]
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def random_lora(transformer: nn.Module, backbone: str, ends: tuple[str, ...] = ("to_q", "to_v")) -> Lora:
    """A LoRA strong enough to be seen, of the linear layers whose names end so, with scales other than 1."""
    generator = torch.Generator().manual_seed(7)

    def draw(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    layers = {
        name: Update(draw(3, layer.in_features), draw(layer.out_features, 3), 1.5)
        for name, layer in transformer.named_modules()
        if isinstance(layer, nn.Linear) and name.endswith(ends) and "blocks" in name
    }
    return Lora(layers, (family_of(backbone),))


def load(kind: str, folder: Path, **arguments: Any) -> Any:
    settings = {"dtype": torch.float32, "max_sequence_length": TEXT} | arguments
    return BACKBONES[BACKBONE.get(kind, kind)].from_pretrained(str(folder), **settings)


def write_random_lora(backbone: Any, folder: Path) -> Path:
    write_lora(folder, random_lora(backbone.transformer, backbone.name), "diffusers")
    return folder


def model_words(kind: str, folder: Path) -> list[str]:
    return [
        *("--model.path", str(folder), "--model.backbone", BACKBONE.get(kind, kind)),
        *("--model.dtype", "fp32", "--model.max_sequence_length", str(TEXT), "--cpu", "true"),
    ]


def sample(*words: object) -> None:
    """The command, in this process."""
    main(["sample", *map(str, words), "--quiet"])


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file)).astype(int)


def contents(folder: Path, *names: str) -> dict[str, bytes]:
    """Files by their paths in a folder."""
    return {file.relative_to(folder).as_posix(): file.read_bytes() for name in names for file in folder.glob(name)}
