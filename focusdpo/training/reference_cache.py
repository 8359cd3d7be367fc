"""The reference model's predictions on disk: with a fixed number of draws of times and noise a pair, each is computed once.

A step then runs the policy alone. A file holds one pair at one draw: predictions of winner and loser, and where the mask is
made of the reference's features, their similarity. They are computed pair by pair, whatever the batch size of the run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from focusdpo.data import PairBatch, PairDataset
from focusdpo.foundation.files import checksum, fingerprint, hash_of
from focusdpo.foundation.launch import Launch
from focusdpo.foundation.tensor_files import TensorFiles
from focusdpo.models.base import pipeline_folder
from focusdpo.models.base_lora import NAME, lora_checksum
from focusdpo.training.batches import in_rounds, load_batches
from focusdpo.training.cache import EncodingReader
from focusdpo.training.config import TrainConfig
from focusdpo.training.seeding import fixed_generator, fixed_round_robin_places
from focusdpo.training.step import ModelOutput, PreferenceStep

FORMAT = 2  # of the files


class ReferenceCache:
    """Reads and fills `data.reference_cache`.

    Args:
        config: the run.
        dataset: the training pairs, with their encodings.
        step: computes what is missing; its transformer is the one that is trained, whose adapter is switched off.
        accelerator, launch: of the run, whose processes share the work.
    """

    def __init__(
        self, config: TrainConfig, dataset: PairDataset, step: PreferenceStep, accelerator: Accelerator, launch: Launch
    ) -> None:
        data, model, loss, focus = config.data, config.model, config.loss, config.focus
        assert data.reference_cache is not None and isinstance(dataset.encodings, EncodingReader)
        self._files = TensorFiles("data.reference_cache", Path(data.reference_cache))
        self._config = config
        self._dataset = dataset
        self._pairs = dataset.encodings.pairs
        self._step = step
        self._accelerator = accelerator
        self._launch = launch
        self._content: Callable[[Any], str] = functools.cache(checksum)  # of references' masks
        self._has_scores = focus.taps_features and focus.feature_source == "reference"
        lora = None if model.base_lora is None else lora_checksum(NAME, model.base_lora)
        # What the prompts' encoders and the VAE contribute is in the pairs' keys.
        self._settings = hash_of(
            FORMAT,
            diffusers.__version__,
            *(model.backbone, model.dtype, str(model.quantization), config.mixed_precision, str(model.guidance)),
            *(str(lora), str(model.base_lora_scale)),
            *(str(getattr(loss, name)) for name in ("times", "time_order", "logit_mean", "logit_std", "shift")),
            *((str(focus.layers), focus.pooling, focus.mask_from) if self._has_scores else ()),
            # With loss.shift="auto" the scheduler decides the times.
            fingerprint(pipeline_folder(model.path, model.revision), ["scheduler", "transformer"]),
        )

    def fill(self, pairs: Mapping[int, set[int]]) -> None:
        """Computes what is not there yet, shared among the processes; all of them call it.

        Args:
            pairs: indices by number of the draw.

        Raises:
            FileNotFoundError: another process wrote elsewhere: the folder is not the same for all.
        """
        launch = self._launch
        wanted = [(index, draw) for draw in sorted(pairs) for index in sorted(pairs[draw])]
        share = {self._key(*item): item for item in wanted[launch.rank :: launch.size]}
        fits = {key: functools.partial(self._fits, index) for key, (index, _) in share.items()}
        missing = self._files.missing(fits, progress=launch.is_main)
        launch.wait("the reference's predictions are looked for")
        rounds = in_rounds(gather_object([share[key] for key in missing]), launch.size)
        self._compute_all([items[launch.rank] for items in rounds])
        launch.wait("the reference's predictions are computed")
        launch.once_a_machine(
            "the reference's predictions are looked for",
            lambda: self._files.check_written([self._key(*item) for item in wanted]),
        )

    def _compute_all(self, items: Sequence[tuple[int, int]]) -> None:
        """Computes and writes the predictions of pairs at their draws; a split model has all processes do so side by side."""
        self._step.backbone.transformer.eval()
        loader = load_batches(self._dataset, [[index] for index, _ in items], self._config.data.num_workers, self._accelerator)
        bar = tqdm(
            zip(items, loader, strict=True),
            total=len(items),
            desc="reference predictions",
            unit="pair",
            disable=not self._launch.is_main or not items,
        )
        for (index, draw), batch in bar:
            self._files.write(self._key(index, draw), self._compute(batch.to(self._accelerator.device), draw))

    def _compute(self, batch: PairBatch, draw: int) -> dict[str, Tensor]:
        with torch.no_grad(), self._accelerator.autocast():
            drawn = [fixed_generator(self._config.seed, batch.indices[0], draw)]
            noised = self._step.noise(batch, drawn, round_robin=fixed_round_robin_places(batch.indices, draw))
            reference = self._step.reference_output(noised, batch)
        return {name: value for name, value in vars(reference).items() if value is not None}

    def read(self, indices: Sequence[int], draw: int) -> ModelOutput:
        """The reference's predictions for the pairs of a batch."""
        pairs = [self._files.read(self._key(index, draw)) for index in indices]

        def stacked(name: str) -> Tensor:
            """Winners first, then losers."""
            return torch.stack([pair[name] for pair in pairs], dim=1).flatten(0, 1).to(self._accelerator.device)

        return ModelOutput(stacked("prediction"), stacked("scores") if self._has_scores else None)

    def _key(self, index: int, draw: int) -> str:
        masks = [reference.mask for reference in self._dataset.records[index].references if self._has_scores]
        contents = ["" if mask is None else self._content(mask) for mask in masks]
        return hash_of(self._settings, *self._pairs[index], *contents, self._config.seed, index, draw)

    def _fits(self, index: int, shapes: dict[str, list[int]]) -> bool:
        names = {"prediction", "scores"} if self._has_scores else {"prediction"}
        references = len(self._dataset.records[index].references)
        return shapes.keys() == names and (not self._has_scores or shapes["scores"][1] == references)
