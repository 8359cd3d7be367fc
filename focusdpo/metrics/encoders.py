"""Encoders of images and texts from local folders, each with the preparation of images that belongs to it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, BitImageProcessorPil

from focusdpo.foundation.choices import DinoTransform
from focusdpo.foundation.files import checksum, fingerprint, hash_of, read_object

# model_type in a folder's config.json, by the setting that names the folder; and the class that loads it.
KINDS: dict[str, dict[str, str]] = {
    "clip": {"clip": "CLIPModel"},
    "dino": {"vit": "ViTModel"},
    "dinov2": {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"},
}
EXAMPLES = {"clip": "openai/clip-vit-large-patch14", "dino": "facebook/dino-vits16", "dinov2": "facebook/dinov2-base"}
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

T_contra = TypeVar("T_contra", contravariant=True)


@dataclass(frozen=True)
class Encoder(Generic[T_contra]):
    """Makes embeddings of images or texts.

    Attributes:
        name: for progress and messages.
        key: hash of all that an embedding follows from beside its image or text: weights, preparation, library, device.
        encode: a batch to embeddings [B, D], float32 on the CPU.
    """

    name: str
    key: str
    encode: Callable[[Sequence[T_contra]], Tensor]


@dataclass(frozen=True)
class Encoders:
    """What a folder gives: an encoder of images, and CLIP's of texts as well."""

    image: Encoder[Image.Image]
    text: Encoder[str] | None = None
    truncated: Callable[[Sequence[str]], list[str]] | None = None  # the texts that are too long for CLIP


def load_encoder(setting: str, folder: Path, device: str, transform: DinoTransform = "folder") -> Encoders:
    """Loads a model and says how to use it.

    CLIP's embedding is its projection, DINO's the [CLS] token after the last layer norm, DINOv2's the same.

    Args:
        setting: "clip", "dino" or "dinov2"; any of the three kinds where it is "fid".
        folder: as `save_pretrained` writes it, with its image processor, and with CLIP its tokenizer.
        device: where it runs.
        transform: "original" prepares images as DINO's authors do, whatever the folder says.

    Raises:
        FileNotFoundError: there is no such folder, or it lacks files.
        ValueError: another kind of model, or weights that lack some of the model's.
    """
    kind, model_type = _kind(setting, folder)
    parts = [folder / "preprocessor_config.json", folder / "processor_config.json"]
    if transform == "folder" and not any(part.is_file() for part in parts):
        raise FileNotFoundError(f"{setting}: {folder} has no preprocessor_config.json, which says how images are prepared")
    model = _model(setting, folder, KINDS[kind][model_type], device)
    processor = _original(model.config.image_size) if transform == "original" else _processor(setting, folder)
    # Embeddings that were kept before the original transform cropped as torchvision does are of other pixels.
    prepared = "original, torchvision's crop" if transform == "original" else transform
    key = hash_of(kind, fingerprint(folder, ["."]), prepared, transformers.__version__, torch.device(device).type, "float32")

    @torch.inference_mode()
    def encode_images(images: Sequence[Image.Image]) -> Tensor:
        pixels = processor(images=list(images), return_tensors="pt")["pixel_values"].to(device)
        if kind == "clip":
            return _pooled(model.get_image_features(pixel_values=pixels))
        return model(pixel_values=pixels).last_hidden_state[:, 0].float().cpu()

    name = {"clip": "CLIP", "dino": "DINO", "dinov2": "DINOv2"}[kind]
    image = Encoder(name, key, encode_images)
    return Encoders(image) if setting == "fid" or kind != "clip" else _with_text(image, model, setting, folder, device)


def _kind(setting: str, folder: Path) -> tuple[str, str]:
    """Which of the three kinds a folder has, and the type of its model."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{setting}: no such folder: {folder}; models are read from local folders")
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{setting}: {folder} has no config.json; expected a folder that save_pretrained wrote")
    try:
        found = read_object(file).get("model_type")
    except ValueError as error:
        raise ValueError(f"{setting}: {file} is not a model's configuration ({error})") from error
    kinds = KINDS if setting == "fid" else {setting: KINDS[setting]}
    for kind, types in kinds.items():
        if found in types:
            return kind, found
    expected = " or ".join(f"{' or '.join(types)}, like {EXAMPLES[kind]}" for kind, types in kinds.items())
    raise ValueError(f"{setting}: {folder} holds a model of type {found!r}; expected {expected}")


def _processor(setting: str, folder: Path) -> Any:
    try:  # Pillow's, so that the numbers are the same whether torchvision is installed or not
        return AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    except (OSError, ValueError) as error:
        raise ValueError(f"{setting}: {folder} has no image processor that loads ({error})") from error


class _MiddleOfTorchvision(BitImageProcessorPil):  # type: ignore[misc]  # a lazily imported class is Any to mypy
    """Where the middle lies between two pixels, torchvision takes the even offset; transformers the smaller one."""

    def center_crop(self, image: np.ndarray, size: Any, **kwargs: Any) -> np.ndarray:
        top, left = (round((whole - part) / 2) for whole, part in zip(image.shape[1:], (size.height, size.width), strict=True))
        return image[:, top : top + size.height, left : left + size.width]


def _original(side: int) -> Any:
    """The transform of DINO's authors: the shorter side to 256 by bicubic interpolation, the middle 224, ImageNet's colours."""
    return _MiddleOfTorchvision(
        size={"shortest_edge": round(side * 256 / 224)},
        crop_size={"height": side, "width": side},
        resample=Image.Resampling.BICUBIC,
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
    )


def _model(setting: str, folder: Path, class_name: str, device: str) -> Any:
    """The model in float32, all of whose weights are in the folder: transformers would draw missing ones at random."""
    options = {"add_pooling_layer": False} if class_name == "ViTModel" else {}  # no weights in DINO's folder, and unused
    verbosity, progress = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()  # it reports weights of heads that are not used
    transformers.logging.disable_progress_bar()
    try:
        model, found = getattr(transformers, class_name).from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True, **options
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{setting}: {folder} cannot be loaded ({error})") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
        if progress:
            transformers.logging.enable_progress_bar()
    lost = sorted(found["missing_keys"])
    if lost:
        raise ValueError(f"{setting}: {folder} lacks {len(lost)} of the model's weights, as {lost[0]}; download it again")
    return model.to(device).eval()


def _pooled(output: Any) -> Tensor:
    """CLIP's projection, which transformers 5 wraps."""
    return (output if isinstance(output, Tensor) else output.pooler_output).float().cpu()


def _with_text(image: Encoder[Image.Image], model: Any, setting: str, folder: Path, device: str) -> Encoders:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{setting}: {folder} has no tokenizer that loads ({error})") from error
    longest = model.config.text_config.max_position_embeddings

    @torch.inference_mode()
    def encode_texts(texts: Sequence[str]) -> Tensor:
        tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt").to(device)
        output = model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return _pooled(output)

    def truncated(texts: Sequence[str]) -> list[str]:
        lengths = [len(tokens) for tokens in tokenizer(list(texts))["input_ids"]]
        return [text for text, length in zip(texts, lengths, strict=True) if length > longest]

    return Encoders(image, Encoder("CLIP's text", hash_of(image.key, "text"), encode_texts), truncated)


def load_inception(file: Path, device: str) -> Encoder[Image.Image]:
    """The InceptionV3 of FID's literature, as torchmetrics runs it: its last pooling layer, [B, 2048].

    Args:
        file: torch-fidelity's weights, pt_inception-2015-12-05-6726825d.pth. It is unpickled: take it from whom you trust.
        device: where it runs.

    Raises:
        ModuleNotFoundError: torch-fidelity, which defines the network, is not installed.
        ValueError: a file that is not its weights.
    """
    if importlib.util.find_spec("torch_fidelity") is None:
        raise ModuleNotFoundError(
            f"fid: {file} is a file, so an InceptionV3, which needs torch-fidelity; pip install torch-fidelity, or name the "
            "folder of a CLIP, DINO or DINOv2 model"
        )
    from torchmetrics.image.fid import FrechetInceptionDistance

    try:
        metric = FrechetInceptionDistance(2048, feature_extractor_weights_path=str(file))
    except Exception as error:  # whatever unpickling and load_state_dict raise
        raise ValueError(f"fid: {file} holds no weights of torch-fidelity's InceptionV3 ({error})") from error
    network = metric.inception.to(device).eval()

    @torch.inference_mode()
    def encode(images: Sequence[Image.Image]) -> Tensor:
        found = []
        for _, alike in groupby(images, key=lambda image: image.size):  # the network itself brings them to its size
            pixels = torch.from_numpy(np.stack([np.asarray(image) for image in alike])).permute(0, 3, 1, 2)
            found.append(network(pixels.to(device)).float().cpu())
        return torch.cat(found)

    key = hash_of("inception", checksum(file), torch.device(device).type)
    return Encoder("InceptionV3", key, encode)


def check_device(device: str) -> None:
    """ValueError where there is no such device."""
    try:
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: got {device!r}, which cannot be used ({str(error).splitlines()[0]}); cpu can") from error


def unit(embeddings: Tensor) -> np.ndarray:
    """Embeddings at length 1, float64: their dot products are cosines."""
    vectors = embeddings.double().numpy()
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    if not (np.isfinite(lengths) & (lengths > 0)).all():
        raise ValueError("an encoder gave an embedding that is zero or not a number")
    return np.asarray(vectors / lengths)
