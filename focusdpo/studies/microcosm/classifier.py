"""Tells the microcosm's identities apart: the judge of what was generated, learnt from photographs alone."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from focusdpo.studies.microcosm.learning import learn
from focusdpo.studies.microcosm.world import World

WIDTHS = (32, 64, 128, 128)
BATCH = 32  # scenes, of two regions each


class IdentityClassifier(nn.Module):
    """A convolutional network over one half of a scene, [N, 3, H, W / 2] in [0, 1]."""

    def __init__(self, identities: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in WIDTHS:
            layers += [nn.Conv2d(channels, width, 3, 2, 1), nn.GroupNorm(8, width), nn.SiLU()]
            layers += [nn.Conv2d(width, width, 3, 1, 1), nn.GroupNorm(8, width), nn.SiLU()]
            channels = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(channels, identities)

    def features(self, regions: Tensor) -> Tensor:
        """[N, 128]."""
        return self.body(regions * 2 - 1).mean((2, 3))

    def forward(self, regions: Tensor) -> Tensor:
        """Logits [N, identities]."""
        return self.head(self.features(regions))


def halves(images: Tensor) -> Tensor:
    """The regions of scenes [N, 3, H, W]: left and right half of each in turn, [2 N, 3, H, W / 2]."""
    half = images.shape[-1] // 2
    return torch.stack([images[..., :half], images[..., half:]], dim=1).flatten(0, 1)


def train_classifier(
    classifier: IdentityClassifier, world: World, restored: Tensor, steps: int, seed: int, state_file: Path
) -> list[float]:
    """Learns from composed photographs, in other light, shifted and blurred, and from what the autoencoder makes of them.

    Args:
        classifier: on its device.
        world: scenes.
        restored: the first scenes once more, as the autoencoder gives them back, uint8 [M, 3, H, W]: no generated image can be
            sharper.
        steps: of the training.
        seed: of the draws.
        state_file: as in `learn`.
    """
    device = classifier.head.weight.device
    nn.utils.convert_conv2d_weight_memory_format(classifier, torch.channels_last)

    def loss(generator: torch.Generator) -> Tensor:
        photos = torch.randint(len(world.scenes), (BATCH // 2,), generator=generator)
        soft = torch.randint(len(restored), (BATCH // 2,), generator=generator)
        regions = halves(torch.cat([world.scenes[photos], restored[soft]]).to(device) / 255)
        identities = world.identities[torch.cat([photos, soft])].flatten().to(device)
        shift = torch.randint(-4, 5, (2,), generator=generator).tolist()
        regions = regions.roll(shift, dims=(2, 3))
        coarse = 1 + 2 * float(torch.rand(1, generator=generator))
        small = F.interpolate(regions, scale_factor=1 / coarse, mode="bilinear", antialias=True)
        regions = F.interpolate(small, size=regions.shape[-2:], mode="bilinear")
        light = 0.85 + 0.3 * torch.rand(len(regions), 1, 1, 1, generator=generator)
        noise = 0.05 * torch.rand(1, generator=generator) * torch.randn(regions.shape, generator=generator)
        regions = (regions * light.to(device) + noise.to(device)).clamp(0, 1)
        logits = classifier(regions.contiguous(memory_format=torch.channels_last))
        return F.cross_entropy(logits, identities, label_smoothing=0.05)

    return learn("classifier", classifier, loss, steps=steps, lr=2e-3, seed=seed, state_file=state_file)


@torch.no_grad()
def classify(classifier: IdentityClassifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [N, 2, identities] and features [N, 2, D] of both regions of images [N, 3, H, W] in [0, 1]."""
    device = classifier.head.weight.device
    features = torch.cat([classifier.features(halves(part.to(device))) for part in torch.split(images, 64)])
    logits = classifier.head(features)
    return logits.reshape(-1, 2, logits.shape[-1]).cpu(), features.reshape(-1, 2, features.shape[-1]).cpu()
