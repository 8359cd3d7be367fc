"""What the tests of every backbone need."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from focusdpo.data import LongestSide, PairBatch, PairDataset, collate, load_pairs
from focusdpo.features import SimilarityTap
from focusdpo.foundation.journals import read_metrics
from focusdpo.models import Backbone, Flux1
from focusdpo.models.lora_reading import LORA_FILE
from focusdpo.training.adapter import add_adapter, reference_model
from focusdpo.training.config import DataConfig, FocusConfig, LoraConfig, LossConfig, ModelConfig, TrainConfig
from focusdpo.training.step import PreferenceStep
from focusdpo.training.trainer import Trainer


def recorded_call(transformer: nn.Module, run: Callable[[], object]) -> dict[str, Any]:
    """Arguments and output of the one call of the transformer in `run`, and what `run` returns."""
    calls: list[dict[str, Any]] = []
    handle = transformer.register_forward_hook(
        lambda module, args, kwargs, output: calls.append({**kwargs, "output": output[0]}), with_kwargs=True
    )
    result = run()
    handle.remove()
    assert len(calls) == 1
    return {**calls[0], "result": result}


def photos(*sizes: tuple[int, int]) -> tuple[list[Image.Image], list[Tensor]]:
    """Noise of (height, width) pixels, as images and as pixels in [0, 1]."""
    arrays = [np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8) for i, size in enumerate(sizes)]
    return [Image.fromarray(a) for a in arrays], [torch.from_numpy(a[None]).permute(0, 3, 1, 2) / 255 for a in arrays]


def image_streams(transformer: nn.Module, blocks: list[nn.Module], run: Callable[[], object]) -> list[Tensor]:
    """Image streams after each of `blocks` in `run`, as the next part of the transformer is given them.

    With the text in front where that is given both as one.
    """
    streams: list[Tensor] = []

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        streams.append((kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).detach())

    parts = (*blocks[1:], transformer.get_submodule("norm_out"))
    handles = [part.register_forward_pre_hook(keep, with_kwargs=True) for part in parts]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return streams


def tapped_scores(backbone: Backbone, arguments: tuple[Any, ...], reference_mask: Tensor, run: str) -> Tensor:
    """Similarity [B, R, P] by the tap while `predict` of `arguments` is trained: "eager", "checkpointed" or "compiled"."""
    transformer = backbone.transformer
    add_adapter(backbone, LoraConfig(rank=4, alpha=4), seed=0)
    if run == "checkpointed":
        transformer.enable_gradient_checkpointing()
    if run == "compiled":
        transformer.compile_repeated_blocks(backend="eager")
    tap = SimilarityTap(
        transformer,
        backbone.tap_paths(),
        image_tokens=backbone.image_tokens,
        num_target=arguments[0].shape[1],
        reference_mask=reference_mask,
    )
    with tap:
        backbone.predict(*arguments).sum().backward()
    return tap.scores()


def check_saved_lora(
    backbone: Backbone, load: Callable[[], Backbone], arguments: tuple[Any, ...], lora: LoraConfig, folder: Path
) -> None:
    """A saved adapter does in a pipeline that `load` gives what it did here; switched off it does nothing."""
    base = backbone.predict(*arguments)
    for parameter in add_adapter(backbone, lora, seed=0):
        nn.init.normal_(parameter, std=0.1)
    expected = backbone.predict(*arguments)
    assert not torch.allclose(expected, base, atol=1e-2)
    with reference_model(backbone.transformer):
        assert torch.equal(backbone.predict(*arguments), base)
    backbone.save_lora(folder)
    for source in (folder, load_file(folder / LORA_FILE)):
        loaded = load()
        loaded.pipeline.load_lora_weights(source)
        torch.testing.assert_close(loaded.predict(*arguments), expected, rtol=0, atol=1e-5)
    loaded = load()
    PeftModel.from_pretrained(loaded.transformer, str(folder), subfolder="peft")
    torch.testing.assert_close(loaded.predict(*arguments), expected, rtol=0, atol=1e-5)


def prompt_images(backbone: Backbone, photos: list[Image.Image]) -> list[Tensor]:
    """Photos as the text encoder is to see them, [1, 3, h, w] each; none where it sees none."""
    rule = backbone.prompt_rule
    return [] if rule is None else [rule.place(photo.size, len(photos)).pixels(photo)[None] for photo in photos]


def pair_batch(pairs: Path, *indices: int, backbone: type[Backbone] = Flux1) -> PairBatch:
    rules: dict[str, Any] = {"reference_rule": LongestSide(48), "prompt_rule": backbone.prompt_rule}
    data = PairDataset(load_pairs(str(pairs)), resolution=96, **rules)
    return collate([data[i] for i in indices])


def check_first_step(backbone: Backbone, pairs: Path) -> int:
    """The trainer's step with a fresh adapter: ln 2, and a gradient in every lora_B. Returns the number of its matrices."""
    parameters = add_adapter(backbone, LoraConfig(rank=4, alpha=8), seed=0)
    backbone.transformer.enable_gradient_checkpointing()
    step = PreferenceStep(backbone, FocusConfig(tau=0.6), LossConfig())
    backbone.transformer.train()
    result = step(pair_batch(pairs, 0, backbone=type(backbone)), torch.Generator().manual_seed(0))
    assert result.output.loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert result.focus is not None and 0 < result.focus.mask.mean() < 1
    result.output.loss.backward()
    # At initialisation lora_B is zero, so that the gradient is in it alone.
    moved = {n for n, p in backbone.transformer.named_parameters() if p.grad is not None and p.grad.any()}
    adapted = {n for n, p in backbone.transformer.named_parameters() if "lora_B" in n}
    assert moved == adapted and 2 * len(adapted) == len(parameters)
    return len(parameters)


def check_training_run(model: ModelConfig, pairs: Path, folder: Path, **lora: Any) -> Backbone:
    """Two steps of the trainer in fp32; returns its backbone."""
    config = TrainConfig(
        model=model,
        data=DataConfig(
            train=str(pairs), resolution=96, reference_resolution_multiple=48, batch_size=2, num_workers=0, check="headers"
        ),
        output_dir=str(folder),
        lora=LoraConfig(rank=4, alpha=8, **lora),
        focus=FocusConfig(tau=0.6),
        max_steps=2,
        mixed_precision="no",
        cpu=True,
    )
    trainer = Trainer(config)
    trainer.train()
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and rows[1]["loss"] != rows[0]["loss"]
    return trainer.backbone
