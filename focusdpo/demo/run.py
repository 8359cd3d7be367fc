"""Runs the demo end to end and says where everything is."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging

from focusdpo.data import collate
from focusdpo.demo.config import DemoConfig
from focusdpo.demo.scenes import write_dataset
from focusdpo.drawing.overlays import draw_overlays
from focusdpo.drawing.training_curves import draw_curves
from focusdpo.foundation.journals import read_metrics
from focusdpo.foundation.output_folder import PIPELINE_WRITTEN, under
from focusdpo.foundation.text import counted
from focusdpo.models.tiny_flux import write_tiny_flux
from focusdpo.pages.run.page import write_run_page
from focusdpo.training.announcements import Announcements
from focusdpo.training.config import DataConfig, LoraConfig, ModelConfig, OptimConfig, SamplesConfig, TrainConfig
from focusdpo.training.run_files import WRITTEN
from focusdpo.training.samples import MASK_TIMES, masks_at
from focusdpo.training.trainer import Trainer

# What the demo writes, see `focusdpo.foundation.output_folder`.
DEMO_WRITTEN = (
    r"data/(train|held_out)/pairs\.jsonl",
    r"data/(train|held_out)/\d+_(winner|loser|prior|reference\d(_mask)?)\.png",
    *PIPELINE_WRITTEN,
    *under("run", WRITTEN),
    r"overlays/pair\d+\.png",
    r"(curves|sample)\.png",
    r"train\.yaml",
    r"report\.html",
)
MAX_SAMPLED = 2  # held-out pairs that are sampled while training


def train_config(config: DemoConfig, folder: Path) -> TrainConfig:
    """The demo's training run: that of a user, on a small scale."""
    sampled = max(min(config.overlays, MAX_SAMPLED), 1)
    return TrainConfig(
        model=ModelConfig(path=str(folder / "model"), dtype="fp32", gradient_checkpointing=False, max_sequence_length=64),
        data=DataConfig(
            train=str(folder / "data" / "train"),
            validation=str(folder / "data" / "held_out"),
            resolution=config.resolution,
            reference_resolution=config.resolution // 2,
            batch_size=config.batch_size,
            num_workers=0,
        ),
        output_dir=str(folder / "run"),
        lora=LoraConfig(rank=8, alpha=16),
        optim=OptimConfig(lr=1e-4, scheduler="cosine", warmup_steps=min(10, config.steps)),
        samples=SamplesConfig(every=math.ceil(config.steps / 2) if config.overlays else 0, count=sampled, steps=4),
        max_steps=config.steps,
        mixed_precision="no",
        seed=config.seed,
        checkpoint_every=max(config.steps // 2, 1),
        validate_every=max(config.steps // 4, 1),
        backend=config.backend,
    )


def run_demo(config: DemoConfig) -> None:
    """Dataset, checkpoint, training, pictures and a sample, in `config.out`, which is ready."""
    started = time.perf_counter()
    folder = Path(config.out)
    write_dataset(folder / "data" / "train", config.pairs, config.resolution, config.seed, per_subject=True)
    write_dataset(folder / "data" / "held_out", config.held_out, config.resolution, config.seed + 1_000_003, per_subject=True)
    write_tiny_flux(folder / "model", seed=config.seed)

    settings = train_config(config, folder)
    (folder / "train.yaml").write_text(yaml.safe_dump(asdict(settings), sort_keys=False))
    trainer = Trainer(settings, callbacks=[Announcements()])
    trainer.train()

    rows = read_metrics(folder / "run" / "metrics.jsonl")
    validation = read_metrics(folder / "run" / "validation.jsonl")
    draw_curves(rows, validation, folder / "curves.png")
    _draw_overlays(trainer, config, folder / "overlays")
    _sample(folder)
    write_run_page(folder / "run", folder / "report.html")

    before, after = validation[0], validation[-1]
    print(
        f"""
held-out pairs ({config.held_out}; {counted(config.steps, "step")} on {config.pairs} others):
  implicit accuracy  {before["accuracy"]:.2f} before   {after["accuracy"]:.2f} after
  loss               {before["loss"]:.4f} before   {after["loss"]:.4f} after   (ln 2 = 0.6931)

  data        {folder / "data" / "train" / "pairs.jsonl"}
  model       {folder / "model"}  (tiny and random: its images mean nothing, its code path is the real one)
  settings    {folder / "train.yaml"}  (focusdpo train --config {folder / "train.yaml"} --output_dir NEW_FOLDER)
  metrics     {folder / "run" / "metrics.jsonl"}
  TensorBoard {folder / "run" / "tensorboard"}
  curves      {folder / "curves.png"}
  overlays    {folder / "overlays"}
  LoRA        {folder / "run" / "lora" / "pytorch_lora_weights.safetensors"}
  sample      {folder / "sample.png"}
  report      {folder / "report.html"}  (the run as one page: open it in a browser)
done in {time.perf_counter() - started:.0f} s"""
    )


@torch.no_grad()
def _draw_overlays(trainer: Trainer, config: DemoConfig, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    trainer.module.eval()
    for index in range(config.overlays):
        sample = trainer.validation_set[index]
        batch = collate([sample]).to(trainer.accelerator.device)
        masks = masks_at(trainer.step, batch, MASK_TIMES, config.seed)
        draw_overlays(batch, masks, folder / f"pair{index}.png", f"held-out pair {index}: {sample.prompt}")


def _sample(folder: Path) -> None:
    """One image through diffusers' own pipeline with the trained LoRA."""
    diffusers_logging.set_verbosity_error()  # it would warn that the text encoder has no adapter, as it should not
    pipeline = DiffusionPipeline.from_pretrained(folder / "model")
    pipeline.load_lora_weights(folder / "run" / "lora")
    pipeline.set_progress_bar_config(desc="sampling", leave=False)
    image = pipeline(
        "a cat and a cup",
        height=128,
        width=128,
        num_inference_steps=8,
        guidance_scale=1.0,
        max_sequence_length=64,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    image.save(folder / "sample.png")
