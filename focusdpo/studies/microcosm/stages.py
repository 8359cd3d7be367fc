"""The microcosm, stage by stage: each leaves its result in the folder, and is passed over where that is already there."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils.memory import clear_device_cache
from diffusers import AutoencoderKL
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor

from focusdpo.data.records import FILE_NAME
from focusdpo.foundation.files import write_json, write_whole, writing, writing_folder
from focusdpo.foundation.output_folder import PIPELINE_WRITTEN, under
from focusdpo.foundation.packages import libraries_silenced
from focusdpo.studies.config import Base, MicrocosmConfig
from focusdpo.studies.microcosm.autoencoder import psnr, restore, train_autoencoder
from focusdpo.studies.microcosm.identities import Identity, check_source, identities_of
from focusdpo.studies.microcosm.judge import IdentityJudge, classify, train_judge
from focusdpo.studies.microcosm.judging import GeneratedRegions, verdicts
from focusdpo.studies.microcosm.model import (
    MISMATCHED,
    TEXT_TOKENS,
    Latents,
    build_model,
    encode_world,
    train_flow,
)
from focusdpo.studies.microcosm.pairs import write_pairs
from focusdpo.studies.microcosm.world import World, compose_world, empty_scenes
from focusdpo.training.config import (
    DataConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    SamplesConfig,
    TrainConfig,
)
from focusdpo_kernels.backend import resolve_backend

logger = logging.getLogger(__name__)

FACTS_FILE, RUN_FILE, JUDGE_FILE = "facts.json", "train.yaml", "judge.safetensors"
MODELS = tuple(MISMATCHED)  # each learns from where the one before ended
LEARNT = ("autoencoder", "judge", *MODELS)  # what is trained before the preferences
PARTS = ("train", "tuning", "held_out")  # of the pairs
RESULTS = (
    "autoencoder",
    JUDGE_FILE,
    *(f"{name}/model" for name in MODELS),
    *(f"pairs/{part}/{FILE_NAME}" for part in PARTS),
)
# What the stages write, see `focusdpo.foundation.output_folder`.
STAGES_WRITTEN = (
    r"(judge|real)\.safetensors",
    r"facts\.json",
    rf"({'|'.join(LEARNT)})\.state",
    r"autoencoder/(config\.json|diffusion_pytorch_model\.safetensors)",
    *(pattern for name in MODELS for pattern in under(name, (r"train\.yaml", *PIPELINE_WRITTEN))),
    r"(cache|references)/[0-9a-f]{2}/[0-9a-f]{64}\.safetensors",
    rf"pairs/({'|'.join(PARTS)})/pairs\.jsonl",
    rf"pairs/({'|'.join(PARTS)})/\d+_(winner|loser|prior\d)\.png",
    rf"pairs/({'|'.join(PARTS)})/references/\d+_\d(_mask)?\.png",
)
RESTORED = 800  # scenes that the judge learns from, also as the autoencoder gives them back
EMPTY = 100  # scenes without subjects that it learns from
JUDGED_SCENES = 256  # real scenes, which FID compares with
MEASURED = 64  # of them, by which the autoencoder is measured
Made = tuple[dict[str, Any], Callable[[], object]]  # what a stage says of itself, and what writes its result
HELD_OUT_SEED = 1_000_003  # added to the seed of what is only judged
# All linear layers of the image's stream: with the attention's alone identity rose less in as many steps.
ADAPTED = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_mlp", "proj_out")
SHIFT = 3.0  # of the times towards noise, where it is decided who will be seen


@dataclass
class Stages:
    """All that comes before the ablation."""

    config: MicrocosmConfig

    def __post_init__(self) -> None:
        self.size = self.config.sizes
        self.folder = Path(self.config.out)
        self.device = torch.device("cpu" if self.config.cpu or not torch.cuda.is_available() else "cuda")

    def check(self) -> None:
        """Refuses what cannot be composed or trained, before anything is."""
        check_source(self.config.dreambench)
        resolve_backend(self.config.backend, torch.empty(0, device=self.device))

    @cached_property
    def identities(self) -> list[Identity]:
        return identities_of(self.config.dreambench, 2 * self.size.resolution)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        return tuple(identity.class_name for identity in self.identities)

    @cached_property
    def world(self) -> World:
        """Scenes to learn from."""
        return self._compose(self.size.scenes, self.size.mismatched, 0, held_out=False)

    @cached_property
    def held_out(self) -> World:
        """Scenes, and photographs where there are several, that nothing learns from."""
        return self._compose(min(JUDGED_SCENES, self.size.scenes), 0, HELD_OUT_SEED, held_out=True)

    @cached_property
    def latents(self) -> Latents:
        """Of the scenes to learn from."""
        backbone = build_model(self.size, self.identities, self.config.seed)
        backbone.pipeline.register_modules(vae=self._vae())
        backbone.to(self.device)
        return encode_world(backbone, self.world)

    def _compose(self, count: int, mismatched: int, seed: int, held_out: bool) -> World:
        return compose_world(self.identities, count, mismatched, self.size, self.config.seed + seed, held_out)

    def run(self) -> None:
        """All stages, in order."""
        self._stage("autoencoder", self._autoencoder)
        self._stage(JUDGE_FILE, self._judge)
        logger.info("judge: %s", self.facts()[JUDGE_FILE]["says"])
        for name in MODELS:
            self._stage(f"{name}/model", partial(self._flow, name))
        counts = (self.size.pairs, self.size.tuning, self.size.held_out)
        for number, (part, count) in enumerate(zip(PARTS, counts, strict=True)):
            seed = number + (HELD_OUT_SEED if part == "held_out" else 1)
            self._stage(f"pairs/{part}/{FILE_NAME}", partial(self._pairs, count, seed))
        for name in ("latents", "world"):  # the ablation's workers want the memory
            self.__dict__.pop(name, None)

    @property
    def are_done(self) -> bool:
        """Whether the ablations can begin."""
        return all((self.folder / name).exists() for name in RESULTS)

    def write_run(self, file: Path, base: Base, beta: float) -> None:
        """What an ablation takes for its run; anew at each start, as the folder may have been moved."""
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, yaml.safe_dump(asdict(self.train_config(base, beta)), sort_keys=False))

    def _stage(self, name: str, work: Callable[[Path], Made]) -> None:
        """Does a stage unless its result is there, and notes how long it took and what it says of itself.

        The result comes last: a kill before it has the stage done again, from the state that `learn` kept.
        """
        target = self.folder / name
        if target.exists():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        facts, save = work(target)
        known = self.facts() | {name: {**facts, "seconds since its last start": round(time.perf_counter() - started, 1)}}
        write_json(self.folder / FACTS_FILE, known)
        save()
        for part in LEARNT:
            (self.folder / f"{part}.state").unlink(missing_ok=True)
        clear_device_cache(garbage_collection=True)  # the ablation's workers want the memory

    def facts(self) -> dict[str, Any]:
        """What the stages noted."""
        file = self.folder / FACTS_FILE
        return json.loads(file.read_text()) if file.is_file() else {}

    def _autoencoder(self, target: Path) -> Made:
        size, state = self.size, self.folder / "autoencoder.state"
        vae = build_model(size, self.identities, self.config.seed).vae.to(self.device)
        losses = train_autoencoder(vae, self.world, size.vae_steps, size.vae_batch, self.config.seed, state)
        facts = {"losses": _thinned(losses), "psnr of held-out scenes in dB": psnr(vae, self.held_out.scenes[:MEASURED])}
        return facts, partial(_save_folder, vae.save_pretrained, target)

    def _vae(self) -> AutoencoderKL:
        vae = AutoencoderKL.from_pretrained(self.folder / "autoencoder")
        return vae.to(device=self.device, memory_format=torch.channels_last)

    def _judge(self, target: Path) -> Made:
        size, state = self.size, self.folder / "judge.state"
        torch.manual_seed(self.config.seed)
        judge = IdentityJudge(len(self.identities), self.device)
        vae = self._vae()
        restored = (restore(vae, self.world.scenes[:RESTORED]) * 255).round().byte().cpu()
        empty = empty_scenes(min(EMPTY, size.scenes), size.resolution, self.config.seed)
        empty = torch.cat([empty, (restore(vae, empty) * 255).round().byte().cpu()])
        losses = train_judge(judge, self.world, restored, empty, size.judge_steps, self.config.seed, state)
        facts: dict[str, Any] = {"losses": _thinned(losses)}
        scenes = self.held_out.scenes
        pictures = {"photographs": scenes / 255, "restored by the autoencoder": restore(vae, scenes)}
        for name, images in pictures.items():
            logits, features = classify(judge, images.cpu())
            found = verdicts(logits, self.held_out.identities, self.classes)
            facts[f"held-out {name}"] = {kind: sum(values) / len(values) for kind, values in found.items()}
            if name == "photographs":
                _save_tensors({"features": features.flatten(0, 1).contiguous()}, self.folder / "real.safetensors")
        backgrounds = empty_scenes(len(scenes), size.resolution, self.config.seed + HELD_OUT_SEED)
        found = verdicts(classify(judge, backgrounds / 255)[0], self.held_out.identities[: len(backgrounds)], self.classes)
        facts["held-out scenes without subjects"] = {"nobody": sum(found["nobody"]) / len(found["nobody"])}
        facts["says"] = (
            f"of {2 * len(scenes)} held-out real regions {facts['held-out photographs']['identity']:.1%} named rightly, "
            f"{facts['held-out restored by the autoencoder']['identity']:.1%} as the autoencoder gives them back; nobody in "
            f"{facts['held-out scenes without subjects']['nobody']:.1%} of those without a subject"
        )
        weights = {key: value.cpu().contiguous() for key, value in judge.state_dict().items()}
        return facts, partial(_save_tensors, weights, target)

    def _flow(self, name: str, target: Path) -> Made:
        size, state, number = self.size, self.folder / f"{name}.state", MODELS.index(name)
        backbone = build_model(size, self.identities, self.config.seed)
        backbone.pipeline.register_modules(vae=self._vae())
        if number:  # it goes on from the model before
            before = load_file(self.folder / MODELS[number - 1] / "model" / "transformer" / SAFETENSORS_WEIGHTS_NAME)
            backbone.transformer.load_state_dict(before)
        backbone.to(self.device)
        steps, seed = size.flow_steps[number], self.config.seed + number
        losses = train_flow(backbone, self.world, self.latents, size, steps, MISMATCHED[name], seed, state)
        backbone.to(torch.device("cpu"))
        parameters = sum(parameter.numel() for parameter in backbone.transformer.parameters())
        facts = {"losses": _thinned(losses), "parameters": parameters}
        return facts, partial(_save_folder, backbone.pipeline.save_pretrained, target)

    def _pairs(self, count: int, seed: int, file: Path) -> Made:
        sides = self.size.resolution, self.size.reference_resolution
        held_out = file.parent.name == "held_out"
        return {}, partial(write_pairs, file.parent, self.identities, count, *sides, self.config.seed + seed, held_out)

    def train_config(self, base: Base, beta: float, validation: str = "held_out") -> TrainConfig:
        """The run that an ablation varies: of a base, with a beta, judged on some of the pairs."""
        config, size = self.config, self.size
        shown = config.steps * size.tuning_batch
        return TrainConfig(
            model=ModelConfig(
                path=str(self.folder / base / "model"),
                dtype="fp32",
                gradient_checkpointing=False,
                max_sequence_length=TEXT_TOKENS,
            ),
            data=DataConfig(
                train=str(self.folder / "pairs" / "train"),
                validation=str(self.folder / "pairs" / validation),
                resolution=size.resolution,
                reference_resolution=size.reference_resolution,
                batch_size=size.tuning_batch,
                num_workers=0 if self.device.type == "cpu" else 4,  # which would take the cores that train
                check="headers",
                cache=str(self.folder / "cache"),
                # Filled pair by pair, where a GPU wants batches.
                reference_cache=str(self.folder / "references") if self.device.type == "cpu" else None,
            ),
            output_dir=str(self.folder / base / "run"),
            lora=LoraConfig(rank=size.rank, alpha=2 * size.rank, target_modules=list(ADAPTED)),
            # A pair has new times and noise whenever it comes, and the same in all variants: the reference model is asked once.
            loss=LossConfig(beta=beta, reduction=config.reduction, shift=SHIFT, draws=-(-shown // size.pairs)),
            optim=OptimConfig(
                lr=size.lr if config.lr is None else config.lr,
                scheduler="constant_with_warmup",
                warmup_steps=max(config.steps // 10, 1),
            ),
            samples=SamplesConfig(steps=size.sampler_steps, guidance=1.0),
            max_steps=config.steps,
            mixed_precision="no" if self.device.type == "cpu" else "bf16",
            seed=config.seed,
            checkpoint_every=max(config.steps // 2, 1),
            backend=config.backend,
            cpu=config.cpu,
        )

    def judge(self) -> GeneratedRegions:
        return GeneratedRegions(
            self.folder / JUDGE_FILE,
            self.classes,
            self.folder / "real.safetensors",
            self.size.samples,
            self.size.sampler_steps,
        )


def _save_tensors(tensors: dict[str, Tensor], target: Path) -> None:
    """Writes a file whole or not at all."""
    with writing(target) as partial:
        save_file(tensors, partial)


def _save_folder(save: Callable[[Path], object], target: Path) -> None:
    """Writes a folder whole or not at all."""
    with writing_folder(target) as partial, libraries_silenced():  # saving imports DeepSpeed where it is installed
        save(partial)


def _thinned(losses: list[float], points: int = 100) -> list[tuple[int, float]]:
    """Means of the losses over equal parts, with the step each part ends at."""
    width = max(len(losses) // points, 1)
    parts = [(start, losses[start : start + width]) for start in range(0, len(losses), width)]
    return [(start + len(part), sum(part) / len(part)) for start, part in parts]
