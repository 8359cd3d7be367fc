"""What the trainer needs of a backbone. One file per backbone implements it; none imports another."""

from __future__ import annotations

import abc
import inspect
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

import diffusers
import numpy as np
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from focusdpo.data.images import PATCH_SIZE, Size
from focusdpo.data.references import ReferenceRule
from focusdpo.foundation.text import working_folder
from focusdpo.models.lora_fusion import Update
from focusdpo.models.lora_names import family_of
from focusdpo.models.lora_reading import Lora
from focusdpo.models.lora_settings import scale_of
from focusdpo.models.lora_writing import write_lora


class StretchedReferences(ReferenceRule):
    """References of pipelines that stretch them, and take RGB images alone.

    These are what diffusers' `load_image` makes: transparent parts have whatever colour the file has under them.
    """

    processor: ClassVar[VaeImageProcessor] = VaeImageProcessor(vae_scale_factor=PATCH_SIZE, do_normalize=False)

    def resize(self, photo: Image.Image, scaled: Size, size: Size) -> Tensor:
        return self.processor.preprocess(photo.convert("RGB"), size[1], size[0])[0]


def check_pipeline_path(path: str) -> None:
    """Refuses a path that cannot be a pipeline folder; a hub id is left to the loader.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no pipeline.
    """
    folder = Path(path)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"model.path: {path} is no diffusers pipeline, it has no model_index.json")
    if not folder.exists() and (folder.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1):
        raise FileNotFoundError(f"model.path: no such folder: {path} (nor a hub id, which looks like owner/name)")


def pipeline_folder(path: str, revision: str | None) -> Path:
    """The local folder of a pipeline; one on the hub is downloaded, as loading it would. ValueError where that fails."""
    try:
        return Path(path if Path(path).is_dir() else DiffusionPipeline.download(path, revision=revision))
    except OSError as error:
        here = f"no folder of that name is in {working_folder()}, and from the hub it cannot be loaded"
        raise ValueError(f"model.path: {path}: {here}: {error}") from error


def pipeline_parts(pipeline: Path) -> list[str]:
    """A pipeline's components that training depends on: all but the scheduler."""
    index = DiffusionPipeline.load_config(pipeline)
    return sorted(name for name, value in index.items() if isinstance(value, list) and value[0] and name != "scheduler")


def encoders(components: Iterable[str]) -> list[str]:
    """Those of a pipeline's components that training needs only to encode its data, and that take memory."""
    return [name for name in components if name == "vae" or name.startswith("text_encoder")]


Parts = Literal["all", "encoders", "transformer", "vae"]


@dataclass(frozen=True)
class TokenLayout:
    """Token grids of one sample: (rows, columns) of the target and of each reference. A batch shares one layout."""

    target: tuple[int, int]
    references: tuple[tuple[int, int], ...]

    @property
    def num_target(self) -> int:
        return self.target[0] * self.target[1]

    @property
    def num_reference(self) -> int:
        return sum(rows * columns for rows, columns in self.references)


@dataclass(frozen=True)
class PromptEmbeddings:
    """Text conditioning of a batch: tensors with a leading batch axis, by name; what they mean is the backbone's affair."""

    tensors: dict[str, Tensor]

    def to(self, device: torch.device, dtype: torch.dtype) -> PromptEmbeddings:
        return PromptEmbeddings({name: value.to(device, dtype) for name, value in self.tensors.items()})

    def repeat(self, times: int) -> PromptEmbeddings:
        return PromptEmbeddings({k: v.repeat(times, *[1] * (v.ndim - 1)) for k, v in self.tensors.items()})

    @staticmethod
    def stack(single: Sequence[PromptEmbeddings]) -> PromptEmbeddings:
        """Joins embeddings of one prompt each to a batch; shorter texts, and their masks, are padded with zeros at the end."""
        names = single[0].tensors
        return PromptEmbeddings({k: pad_sequence([one.tensors[k][0] for one in single], batch_first=True) for k in names})


def _device_map(device: torch.device | None) -> str | None:
    """What diffusers is told of a device; it takes a kind, and means the process's current device of that kind.

    transformers means the one of the process's number, which is not there where each process sees a GPU of its own alone.
    """
    if device is None or device.type == "cpu":
        return None
    return None if int(os.environ.get("LOCAL_RANK", 0)) > (device.index or 0) else device.type


def _transformer(kind: Any, path: str, revision: str | None, dtype: torch.dtype, device: torch.device | None) -> nn.Module:
    """A pipeline's transformer by itself: see `Backbone.from_pretrained`."""
    if device is None or device.type != "meta":
        place = _device_map(device)
        loaded = kind.from_pretrained(path, subfolder="transformer", revision=revision, torch_dtype=dtype, device_map=place)
        return cast(nn.Module, loaded)
    config = kind.load_config(path, subfolder="transformer", revision=revision)
    # Buffers, and what a model keeps in plain attributes, are made by its code: Qwen-Image's frequencies are in no file.
    with init_empty_weights(include_buffers=False):
        transformer = kind.from_config(config)
    return cast(nn.Module, transformer.to(dtype))


class Backbone(abc.ABC):
    """A pretrained image model that takes reference images as extra tokens.

    Tokens are [B, P, C] for a target and [B, Q, C] for all references one after the other. Times t are in [0, 1]; the model
    predicts the velocity eps - x_0 at x_t = (1 - t) x_0 + t eps (E2).
    """

    name: ClassVar[str]
    pipelines: ClassVar[tuple[type[DiffusionPipeline], ...]]  # whose folders it takes
    reference_rule: ClassVar[ReferenceRule]  # how its pipeline brings references to size
    prompt_rule: ClassVar[ReferenceRule | None] = None  # how the text encoder sees the references, where it does
    adapted_layers: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")  # ends of names, the default
    tapped: ClassVar[tuple[str, ...]] = ("transformer_blocks", "single_transformer_blocks")  # lists of blocks, as they run
    fewest_references: ClassVar[int] = 0  # that its pipeline can sample with
    negative_prompt: ClassVar[str] = ""  # what classifier-free guidance leads away from
    merged_layers: Sequence[str] = ()  # of a LoRA that is part of the frozen weights: sampling may go by it
    transformer: Any  # an nn.Module; what the trainer calls on it comes from diffusers' mixins

    def __init__(self, pipeline: Any, guidance: float = 1.0, max_sequence_length: int = 512) -> None:
        """Freezes all parts of a pipeline; those that are None are not needed for what is asked of it."""
        self.pipeline = pipeline
        self.transformer = pipeline.transformer
        self.guidance = guidance
        self.max_sequence_length = max_sequence_length
        self._device: torch.device | None = None
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
        # cuDNN's attention is PyTorch's first choice on Hopper. With it a step of FLUX.1 at 512 px ended in an illegal memory
        # access (torch 2.11, H200); without it works. pytorch/pytorch#196678 and #193893 are of its wrong results.
        torch.backends.cuda.enable_cudnn_sdp(False)

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        dtype: torch.dtype,
        revision: str | None = None,
        guidance: float = 1.0,
        max_sequence_length: int = 512,
        parts: Parts = "all",
        device: torch.device | None = None,
        transformer_device: torch.device | None = None,
    ) -> Self:
        """Loads a folder of one of `pipelines`, local or from the hub.

        Args:
            path: folder or hub id.
            dtype: dtype of the frozen weights.
            revision: hub revision.
            guidance: guidance fed to guidance-distilled models; UNO trains with 1. Others have no use for it.
            max_sequence_length: text tokens that a prompt is padded or cut to, where the pipeline does that.
            parts: "encoders" loads VAE and text encoders without the transformer, "transformer" the transformer without them,
                "vae" the VAE alone.
            device: where VAE and text encoders go as their files are read. On the CPU, or with None, they stay parts of the
                files, whose pages the processes of a machine share, as far as the files have `dtype`.
            transformer_device: the same for the transformer. On the meta device it has shapes and no weights, and nothing of
                its files is read but the config.

        Raises:
            ValueError: the folder holds another kind of pipeline.
        """
        index = DiffusionPipeline.load_config(path, revision=revision)
        kind = index["_class_name"]
        known = [pipeline.__name__ for pipeline in cls.pipelines]
        if kind not in known:
            raise ValueError(f"model.path: {path} holds a {kind}; backbone {cls.name!r} takes {' or '.join(known)}")
        left_out = {
            "all": [],
            "encoders": ["transformer"],
            "transformer": encoders(index),
            "vae": ["transformer", *(name for name in encoders(index) if name != "vae")],
        }[parts]
        given = cls._parts(path, revision) | dict.fromkeys(left_out)
        place = _device_map(device)
        if "transformer" not in left_out and _device_map(transformer_device) != place:
            kind = getattr(diffusers, index["transformer"][1])
            given["transformer"] = _transformer(kind, path, revision, dtype, transformer_device)
        pipeline = DiffusionPipeline.from_pretrained(path, revision=revision, dtype=dtype, device_map=place, **given)
        return cls(pipeline, guidance, max_sequence_length)

    @classmethod
    def _parts(cls, path: str, revision: str | None) -> dict[str, Any]:
        """Parts of the pipeline that have to be loaded in another way than its own."""
        return {}

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [0, 1] to clean tokens [B, H/16 * W/16, C], deterministically."""
        return self._tokens((images * 2 - 1).to(self.vae.device, self.vae.dtype))

    @abc.abstractmethod
    def _tokens(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] to clean tokens: of the posterior's mode, normalised."""

    @torch.no_grad()
    def decode_images(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Clean tokens [B, P, C] of a (rows, columns) grid to pixels [B, 3, H, W] in [0, 1]."""
        images = self.vae.decode(self._latents(tokens, grid).to(self.vae.dtype), return_dict=False)[0]
        images = images.reshape(*images.shape[:2], *images.shape[-2:])  # a video VAE has frames between, one here
        return ((images.float() + 1) / 2).clamp(0, 1)

    def _latents(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Clean tokens as the VAE's latents; here they are unpacked only, as FLUX.1 and Qwen-Image do."""
        height, width = (side * PATCH_SIZE for side in grid)
        latents: Tensor = self.pipeline._unpack_latents(tokens, height, width, self.pipeline.vae_scale_factor)
        return latents

    @abc.abstractmethod
    def encode_prompts(self, prompts: Sequence[str], references: Sequence[Tensor] = ()) -> PromptEmbeddings:
        """Text conditioning of a batch of prompts.

        Args:
            prompts: B texts.
            references: pixels [B, 3, h, w] in [0, 1] of each reference, in the size of `prompt_rule`; without one they make no
                difference.
        """

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that `predict` needs of a prompt of `max_sequence_length` tokens, without the batch axis."""
        return {"prompt_embeds": (self.max_sequence_length, self.pipeline.transformer.config.joint_attention_dim)}

    def predict(self, noisy: Tensor, t: Tensor, prompts: PromptEmbeddings, references: Tensor, layout: TokenLayout) -> Tensor:
        """Velocity [B, P, C] of noisy target tokens [B, P, C] at times t [B], given reference tokens [B, Q, C]."""
        guidance = None
        if self.pipeline.transformer.config.guidance_embeds:
            guidance = torch.full((noisy.shape[0],), self.guidance, device=noisy.device, dtype=self.dtype)
        velocity = self.transformer(
            # The embedders' weights keep the base dtype; under autocast the matrix products take care of themselves.
            hidden_states=torch.cat([noisy, references], dim=1).to(self.dtype),
            timestep=t.to(self.dtype),
            guidance=guidance,
            return_dict=False,
            **self._inputs(prompts.to(noisy.device, self.dtype).tensors, layout),
        )[0]
        return velocity[:, : layout.num_target]

    @abc.abstractmethod
    def _inputs(self, prompts: dict[str, Tensor], layout: TokenLayout) -> dict[str, Any]:
        """What the transformer is given besides tokens, times and guidance: text, in its dtype, and positions."""

    def tap_paths(self) -> list[str]:
        """Paths in `transformer` of the blocks whose output can be tapped, in the order they run."""
        return [f"{name}.{i}" for name in self.tapped for i in range(len(getattr(self.pipeline.transformer, name)))]

    @classmethod
    def count_tapped(cls, pipeline: Path) -> int:
        """How many blocks of a pipeline's local folder can be tapped, from its configs alone."""
        kind = getattr(diffusers, DiffusionPipeline.load_config(pipeline)["transformer"][1])
        transformer = _transformer(kind, str(pipeline), None, torch.float32, torch.device("meta"))
        return sum(len(getattr(transformer, name)) for name in cls.tapped)

    def image_tokens(self, output: Any) -> Tensor:
        """The image stream [B, P + Q, D], target first, of a tapped block's output: as a rule (text stream, image stream)."""
        return output[1]

    @abc.abstractmethod
    def default_scales(self) -> tuple[float, float]:
        """Guidance fed to the model, and scale of classifier-free guidance (1 is none), that its pipeline samples with."""

    @property
    def default_steps(self) -> int:
        """Steps that its pipeline samples with."""
        return int(inspect.signature(type(self.pipeline).__call__).parameters["num_inference_steps"].default)

    def time_shift(self, tokens: int, steps: int) -> float:
        """What is sampled with as the scheduler's mu, for an image of so many tokens."""
        return self._mu(tokens, steps)

    def _mu(self, tokens: int, steps: int) -> float:
        """The pipeline's own mu for an image of so many tokens."""
        config = self.pipeline.scheduler.config
        names = {"base_seq_len": "base_image_seq_len", "max_seq_len": "max_image_seq_len"}
        names |= {name: name for name in ("base_shift", "max_shift")}
        return float(calculate_shift(tokens, **{to: config[name] for to, name in names.items() if name in config}))

    def training_shift(self, tokens: int) -> float:
        """The s of t' = s t / (1 + (s - 1) t) of the pipeline's scheduler, for an image of so many tokens."""
        config = self.pipeline.scheduler.config
        if not config.get("use_dynamic_shifting", False):
            return float(config.get("flow_shift", config.get("shift", 1.0)))
        mu = self._mu(tokens, self.default_steps)
        return mu if config.get("time_shift_type") == "linear" else math.exp(mu)

    def guide(self, velocity: Tensor, negative: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance: the velocity [B, P, C], led away from the negative prompt's."""
        return negative + scale * (velocity - negative)

    @torch.no_grad()
    def sample(
        self,
        noise: Tensor,
        prompts: PromptEmbeddings,
        references: Tensor,
        layout: TokenLayout,
        *,
        steps: int,
        guidance: float | None = None,
        negative: PromptEmbeddings | None = None,
        cfg_scale: float = 1.0,
        on_step: Callable[[], object] = lambda: None,
    ) -> Tensor:
        """Clean tokens, fp32 [B, P, C], by the pipeline's own scheduler and times.

        Args:
            noise: what to start from, fp32 [B, P, C] on the model's device.
            prompts: text conditioning.
            references: reference tokens [B, Q, C].
            layout: grids of target and references.
            steps: of the sampler.
            guidance: fed to guidance-distilled models instead of that of the training.
            negative: conditioning of the negative prompt; a `cfg_scale` other than 1 needs it, and predicts twice a step.
            cfg_scale: of classifier-free guidance.
            on_step: called after each step.

        Raises:
            ValueError: a `cfg_scale` other than 1 without a negative prompt.
        """
        if cfg_scale != 1 and negative is None:
            raise ValueError(f"cfg_scale: got {cfg_scale:g} without a negative prompt; expected 1, or embeddings as negative")
        scheduler = self.pipeline.scheduler.from_config(self.pipeline.scheduler.config)  # keeps where it is in a run
        sigmas = None if scheduler.config.get("use_flow_sigmas") else np.linspace(1, 1 / steps, steps)
        mu = self.time_shift(layout.num_target, steps)
        times, _ = retrieve_timesteps(scheduler, steps, noise.device, sigmas=sigmas, mu=mu)
        trained_with, tokens = self.guidance, noise
        self.guidance = trained_with if guidance is None else guidance
        try:
            for time in times:
                t = (time / scheduler.config.num_train_timesteps).expand(noise.shape[0])
                velocity = self.predict(tokens, t, prompts, references, layout).float()
                if cfg_scale != 1 and negative is not None:
                    away_from = self.predict(tokens, t, negative, references, layout).float()
                    velocity = self.guide(velocity, away_from, cfg_scale)
                tokens = scheduler.step(velocity, time, tokens, return_dict=False)[0]
                on_step()
        finally:
            self.guidance = trained_with
        return tokens

    def save_lora(self, folder: Path, state: dict[str, Tensor] | None = None, peft: bool = True) -> None:
        """Writes the transformer's adapter in diffusers' format, and in PEFT's to `peft` under the folder.

        What scales the update is multiplied into lora_B, so that every tool applies the trained strength.

        Args:
            folder: where to.
            state: the adapter's weights, whole; None takes them from a transformer that is not split.
            peft: whether to write PEFT's as well.
        """
        transformer = self.pipeline.transformer
        state = get_peft_model_state_dict(transformer) if state is None else state
        settings = transformer.peft_config["default"].to_dict()
        layers = {}
        for key in (key for key in state if key.endswith(".lora_A.weight")):
            name = key.removesuffix(".lora_A.weight")
            a, b = (state[f"{name}.lora_{side}.weight"].detach().cpu() for side in "AB")
            layers[name] = Update(a, b, scale_of(settings, name, a.shape[0]))
        lora = Lora(layers, (family_of(self.name),))
        write_lora(folder, lora, "diffusers")
        if peft:
            write_lora(folder / "peft", lora, "peft")

    def to(self, device: torch.device, transformer: bool = True) -> None:
        """Moves all parts to a device, the transformer only if asked to; `device` is that one from now on."""
        for part in self.pipeline.components.values():
            if isinstance(part, nn.Module) and (transformer or part is not self.pipeline.transformer):
                part.to(device)
        self._device = device

    @property
    def vae(self) -> Any:
        """The VAE; RuntimeError where it was not loaded."""
        if self.pipeline.vae is None:
            raise RuntimeError("this pipeline was loaded without its VAE (training with data.cache does that)")
        return self.pipeline.vae

    @property
    def device(self) -> torch.device:
        return self._weight.device if self._device is None else self._device

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the frozen weights."""
        return self._weight.dtype

    @property
    def _weight(self) -> nn.Parameter:
        part = self.transformer
        if part is None:
            part = self.pipeline.text_encoder or self.pipeline.vae
        return next(part.parameters())
