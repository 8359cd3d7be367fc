"""Settings of the commands that no room has: their docstrings are the --help."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from focusdpo.foundation.choices import Autocast, BackboneName, Check, LoraForm, Optimizer, Quantization, WeightDtype
from focusdpo.foundation.settings import require
from focusdpo.training.config import DataConfig, LoraConfig, ModelConfig


@dataclass
class ModelsConfig:
    """The training step whose memory is estimated, without allocating it.

    Args:
        resolution: Side of winner and loser in pixels.
        references: Reference images of a pair.
        photo: Width and height of the photo that each of them is, in pixels.
        reference_resolution: Longest side that it is brought to; null takes each backbone's own size.
        batch_size: Pairs per process and forward pass.
        rank: Rank of the adapter.
        dtype: Precision of the frozen weights.
        quantization: Fewer bits for the frozen weights of the blocks.
        optimizer: That of the adapter.
        mixed_precision: Autocast of the forward pass.
        max_sequence_length: Text tokens of a prompt.
        gradient_checkpointing: Recompute activations in the backward pass.
        processes: Processes on one machine, each with a GPU of its own; from two on the memory that they need together is
            listed too.
    """

    resolution: int = 512
    references: int = 2
    photo: str = "1024x1024"
    reference_resolution: int | None = None
    batch_size: int = 1
    rank: int = 32
    dtype: WeightDtype = "bf16"
    quantization: Quantization | None = None
    optimizer: Optimizer = "adamw"
    mixed_precision: Autocast = "bf16"
    max_sequence_length: int = 512
    gradient_checkpointing: bool = True
    processes: int = 1

    def __post_init__(self) -> None:
        require(self.references >= 1, "references", self.references, "at least 1")
        require(self.processes >= 1, "processes", self.processes, "at least 1")
        match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", self.photo)
        require(match is not None, "photo", self.photo, "width and height in pixels, such as 1024x1024")
        assert match is not None
        self.photo_size = int(match[1]), int(match[2])
        # The settings of a run have their own checks.
        DataConfig("", resolution=self.resolution, reference_resolution=self.reference_resolution, batch_size=self.batch_size)
        self.lora = LoraConfig(rank=self.rank)
        self.model = ModelConfig(
            "",
            dtype=self.dtype,
            quantization=self.quantization,
            max_sequence_length=self.max_sequence_length,
            gradient_checkpointing=self.gradient_checkpointing,
        )


@dataclass
class ConvertLoraConfig:
    """A LoRA of FLUX.1, FLUX.2 or Qwen-Image, and where the converted one goes.

    Its strength is multiplied into its weights: every tool applies it at scale 1.

    Args:
        source: The LoRA, a file or its folder, in any of the forms below; which one is seen from its names.
        out_dir: Folder for the converted one: pytorch_lora_weights.safetensors (diffusers), adapter_config.json and
            adapter_model.safetensors (peft), lora_comfyui.safetensors, lora_kohya.safetensors, or dit_lora.safetensors (uno).
        to: The form to convert to; kohya is that of sd-scripts and, for FLUX.2 and Qwen-Image, of musubi-tuner.
        backbone: What the LoRA is for, where its names fit several models that differ in the form.
        overwrite: Replace what an earlier conversion left in out_dir.
    """

    source: str
    out_dir: str
    to: LoraForm = "diffusers"
    backbone: BackboneName | None = None
    overwrite: bool = False


@dataclass
class ConvertUnoConfig:
    """UNO's LoRA and where the converted one goes.

    Args:
        source: UNO's LoRA, its dit_lora.safetensors; with reverse a LoRA in diffusers' format, a file or its folder.
        out_dir: Folder for pytorch_lora_weights.safetensors, which diffusers loads; with reverse for dit_lora.safetensors.
        reverse: Convert from diffusers' format to UNO's.
        overwrite: Replace what an earlier conversion left in out_dir.
    """

    source: str
    out_dir: str
    reverse: bool = False
    overwrite: bool = False


@dataclass
class ValidateConfig:
    """Preference pairs to be checked.

    Args:
        path: A dataset, as data.train of a training run names it.
        json: File for the report as JSON; "-" prints it instead of the text.
        check: "full" decodes every image, "headers" reads sizes only.
        resolution: Longest side of winner and loser in pixels, by which layouts are counted.
        backbone: Whose own sizes references have where no number is given.
        reference_resolution: Longest side of a reference image in pixels; null takes the backbone's own size.
        reference_resolution_multiple: Another one for pairs that have several; null is reference_resolution's value.
    """

    path: str
    json: str | None = None
    check: Check = "full"
    resolution: int = 512
    backbone: BackboneName = "flux"
    reference_resolution: int | None = None
    reference_resolution_multiple: int | None = None

    def __post_init__(self) -> None:
        # The settings of a run have their own checks.
        self.data = DataConfig(
            self.path,
            resolution=self.resolution,
            reference_resolution=self.reference_resolution,
            reference_resolution_multiple=self.reference_resolution_multiple,
        )


@dataclass
class SplitConfig:
    """Preference pairs, and the two parts of them that share no photo.

    Args:
        source: A pairs.jsonl, or the folder that holds it.
        out_dir: Folder for train/pairs.jsonl and held_out/pairs.jsonl, whose lines name the images where they are.
        held_out: Share of the pairs to hold out. Pairs that share a photo, also over other pairs, stay together.
        seed: Of the choice.
        check: What is looked at before: "full" decodes every image, "headers" reads sizes only.
        overwrite: Replace what an earlier command left in out_dir.
    """

    source: str
    out_dir: str
    held_out: float = 0.1
    seed: int = 0
    check: Check = "full"
    overwrite: bool = False

    def __post_init__(self) -> None:
        require(0 < self.held_out < 1, "held_out", self.held_out, "above 0, below 1")
        require(self.seed >= 0, "seed", self.seed, "at least 0")


@dataclass
class ShardConfig:
    """Preference pairs and the WebDataset shards made of them.

    Args:
        source: A dataset, as data.train of a training run names it.
        out_dir: Folder for the shards.
        pairs_per_shard: Pairs in a shard; the last has what is left.
        check: What is looked at before: "full" decodes every image, "headers" reads sizes only.
        overwrite: Delete the shards that an earlier command left in out_dir.
    """

    source: str
    out_dir: str
    pairs_per_shard: int = 1000
    check: Check = "full"
    overwrite: bool = False

    def __post_init__(self) -> None:
        require(self.pairs_per_shard >= 1, "pairs_per_shard", self.pairs_per_shard, "at least 1")


@dataclass
class ImportConfig:
    """Another project's list of pairs and the dataset made of it.

    Args:
        source: UNO's json; or parquet files with Pick-a-Pic's columns caption, jpg_0, jpg_1 and label_0: one, a folder or a
            pattern.
        out_dir: Folder for pairs.jsonl and its images.
        losers: With UNO's json: folder that has a loser for each image_tgt_path, at the same path.
        priors: With UNO's json: folder that has the priors, likewise; without it, a prior marks where winner and loser differ.
        references: With Pick-a-Pic's columns: columns of reference images.
        prior: With Pick-a-Pic's columns: column of the prior; without it, a prior marks the whole image.
        overwrite: Delete what an earlier import left in out_dir.
    """

    source: str
    out_dir: str
    losers: str | None = None
    priors: str | None = None
    references: list[str] = field(default_factory=list)
    prior: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        is_uno = self.source.endswith(".json")
        for name in ("losers", "priors") if not is_uno else ("references", "prior"):
            if getattr(self, name):
                other = "parquet files" if not is_uno else "UNO's json"
                raise ValueError(f"{name}: got {getattr(self, name)!r}; expected none with {other}")
        if is_uno and self.losers is None:
            raise ValueError("losers: UNO's json has winners alone; name a folder with a loser for each")
        if not is_uno and not self.references:
            message = "a pair needs 1 to 6 reference images, and Pick-a-Pic itself has none; name the columns that have them"
            raise ValueError(f"references: {message}")
