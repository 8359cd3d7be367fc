"""Latents and prompt embeddings on disk: VAE and text encoders run once, and never stand beside the transformer.

Every image and every prompt has a file of its own (`foundation/tensor_files.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from torch import Tensor
from tqdm.auto import tqdm

from focusdpo.data import Encodings, PairDataset
from focusdpo.data.dataset import PlacedImage, PromptEncodings
from focusdpo.data.images import PATCH_SIZE, read_photo
from focusdpo.data.prompt_dataset import PromptDataset
from focusdpo.foundation.files import ReadableFile, checksum, fingerprint, hash_of
from focusdpo.foundation.launch import Launch
from focusdpo.foundation.tensor_files import SHOWN, TensorFiles
from focusdpo.models import Backbone
from focusdpo.models.base import pipeline_folder, pipeline_parts
from focusdpo.training.config import TrainConfig

FORMAT = 3  # of the files; another one where an image is brought to size, or encoded, in another way


class _Image(PlacedImage):
    def pixels(self, device: torch.device) -> Tensor:
        return self.placement.pixels(read_photo(self.file))[None].to(device)

    def encode(self, backbone: Backbone) -> dict[str, Tensor]:
        return {"tokens": backbone.encode_images(self.pixels(backbone.device))[0]}

    def fits(self, shapes: dict[str, list[int]]) -> bool:
        tokens = math.prod(self.placement.size) // PATCH_SIZE**2
        return shapes.keys() == {"tokens"} and len(shapes["tokens"]) == 2 and shapes["tokens"][0] == tokens


@dataclass(frozen=True)
class _Prompt:
    text: str
    references: tuple[_Image, ...]  # as its encoder sees them

    def encode(self, backbone: Backbone) -> dict[str, Tensor]:
        pixels = [reference.pixels(backbone.device) for reference in self.references]
        embeddings = backbone.encode_prompts([self.text], pixels).to(torch.device("cpu"), backbone.dtype)
        return {name: value[0] for name, value in embeddings.tensors.items()}

    def fits(self, shapes: dict[str, list[int]]) -> bool:
        return len(shapes) > 0


@dataclass(frozen=True)
class EncodingReader:
    """Reads the encodings of a dataset's pairs; goes to the loader's processes with it."""

    files: TensorFiles
    pairs: list[tuple[str, ...]]  # keys of winner, loser, references and prompt; whatever these are made of is in them

    def __call__(self, index: int) -> Encodings:
        *images, prompt = self.pairs[index]
        winner, loser, *references = (self.files.read(key)["tokens"] for key in images)
        return Encodings(tuple(references), self.files.read(prompt), winner, loser)


@dataclass(frozen=True)
class PromptReader:
    """The same of prompts with their references."""

    files: TensorFiles
    prompts: list[tuple[str, ...]]  # keys of references and prompt

    def __call__(self, index: int) -> PromptEncodings:
        *images, prompt = self.prompts[index]
        return PromptEncodings(tuple(self.files.read(key)["tokens"] for key in images), self.files.read(prompt))


class EncodingCache:
    """Encodings of images and prompts for the model and precision of a run.

    Args:
        config: the run; `data.cache` names the folder.
        accelerator, launch: of the run, whose processes share the work.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator, launch: Launch) -> None:
        self._accelerator = accelerator
        self._launch = launch
        data, model = config.data, config.model
        assert data.cache is not None
        self._files = TensorFiles("data.cache", Path(data.cache))
        pipeline = pipeline_folder(model.path, model.revision)
        prompt_parts = [part for part in pipeline_parts(pipeline) if part not in ("transformer", "vae")]
        # The libraries' own part in an embedding, such as a prompt's template, may change from version to version.
        versions = (diffusers.__version__, transformers.__version__)
        common = (FORMAT, *versions, model.backbone, model.dtype, config.mixed_precision)
        self._image_settings = hash_of(*common, fingerprint(pipeline, ["vae"]))
        self._prompt_settings = hash_of(*common, model.max_sequence_length, fingerprint(pipeline, prompt_parts))
        self._items: dict[str, _Image | _Prompt] = {}
        self._contents: dict[ReadableFile, str] = {}

    def attach(self, datasets: Sequence[PairDataset | PromptDataset]) -> None:
        """Has each dataset read its encodings from here, once `fill` has run."""
        self._hash_images(datasets)
        for dataset in datasets:
            keys = [self._keys(dataset, index) for index in range(len(dataset))]
            reader = EncodingReader if isinstance(dataset, PairDataset) else PromptReader
            dataset.encodings = reader(self._files, keys)

    def _hash_images(self, datasets: Sequence[PairDataset | PromptDataset]) -> None:
        """Of each image's content, shared among the processes."""
        rank, processes = self._launch.rank, self._launch.size
        images = (
            image
            for dataset in datasets
            for index in range(len(dataset))
            for image in (*dataset.targets(index), *dataset.placed(index).references)
        )
        files = list(dict.fromkeys(image.file for image in images))
        mine = files[rank::processes]
        shown = self._launch.is_main and len(files) >= SHOWN
        with ThreadPoolExecutor() as pool:
            bar = tqdm(pool.map(checksum, mine), total=len(mine), desc="hashing images", unit="file", disable=not shown)
            contents = list(bar)
        self._launch.wait("images are hashed")
        order = [file for other in range(processes) for file in files[other::processes]]
        self._contents = dict(zip(order, gather_object(contents), strict=True))

    def _keys(self, dataset: PairDataset | PromptDataset, index: int) -> tuple[str, ...]:
        """Of a pair's or prompt's images, and last of its text."""
        prompt = dataset.placed(index)
        images = (_Image(one.file, one.placement) for one in (*dataset.targets(index), *prompt.references))
        seen = tuple(_Image(one.file, one.placement) for one in prompt.seen)
        return (*map(self._add, images), self._add(_Prompt(prompt.text, seen)))

    def fill(self, load: Callable[[], Backbone]) -> None:
        """Encodes what is not there yet, shared among the processes; all of them call it.

        The run's autocast applies, as it does in a step that encodes for itself.

        Args:
            load: loads a backbone that can encode; called only where there is something to encode.

        Raises:
            FileNotFoundError: another process wrote elsewhere: the folder is not the same for all.
        """
        accelerator, launch = self._accelerator, self._launch
        # Looked for in shares, then shared anew: an interrupted process would else have all its work left, others none.
        share = {key: self._items[key].fits for key in list(self._items)[launch.rank :: launch.size]}
        lacking = self._files.missing(share, progress=launch.is_main)
        launch.wait("encodings are looked for")
        missing = gather_object(lacking)[launch.rank :: launch.size]
        if missing:
            backbone = load()
            backbone.to(accelerator.device)
            bar = tqdm(missing, desc="encoding", unit="item", disable=not launch.is_main)
            with torch.no_grad(), accelerator.autocast():
                for key in bar:
                    self._files.write(key, self._items[key].encode(backbone))
            del backbone
            clear_device_cache(garbage_collection=True)
        launch.wait("images and prompts are encoded")
        launch.once_a_machine("encodings are looked for", lambda: self._files.check_written(list(self._items)))

    def _add(self, item: _Image | _Prompt) -> str:
        """The key of an item, which is remembered."""
        if isinstance(item, _Prompt):
            key = hash_of(self._prompt_settings, item.text, *map(self._pixels_key, item.references))
        else:
            key = hash_of(self._image_settings, self._pixels_key(item))
        self._items[key] = item
        return key

    def _pixels_key(self, image: _Image) -> str:
        """Of what decides an image's pixels."""
        placement = image.placement
        way = (placement.rule.name, *placement.cut, *placement.scaled, *placement.size)
        return hash_of(self._contents[image.file], *way)
