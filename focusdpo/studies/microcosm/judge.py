"""Tells the microcosm's identities apart, or sees nobody: a small network on a pretrained encoder's features of photographs."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from focusdpo.building.encoder import EfficientNetLite0
from focusdpo.studies.microcosm.learning import learn
from focusdpo.studies.microcosm.world import World

AT_ONCE = 16  # regions that the encoder sees: more do not fit a processor's cache
SIDE = 64  # pixels of a region's width before the encoder; drawings are no sharper
WIDTH, BATCH = 128, 128
FEATURES = 1432  # of EfficientNetLite0.pooled
CELL = 16  # pixels of the squares that a region is cut into and shuffled, to show nobody
NOBODY = 0.2  # share of the regions that show nobody
COARSEST = 16  # times as coarse: nobody can be told any more


class IdentityJudge(nn.Module):
    """Who is seen in one half of a scene, [N, 3, H, W / 2] in [0, 1]; of EfficientNet-Lite0 it learns nothing.

    Args:
        identities: how many there are; the answer behind them is nobody.
        device: of the encoder.
        encoder: one that is there already; None loads it.
    """

    def __init__(self, identities: int, device: str | torch.device = "cpu", encoder: EfficientNetLite0 | None = None) -> None:
        super().__init__()
        self._encoder = EfficientNetLite0(str(device)) if encoder is None else encoder
        self.body = nn.Sequential(nn.LayerNorm(FEATURES), nn.Linear(FEATURES, WIDTH), nn.GELU())
        self.head = nn.Linear(WIDTH, identities + 1)
        self.to(device)

    @torch.no_grad()
    def look(self, regions: Tensor) -> Tensor:
        """What the encoder sees, [N, FEATURES], on the judge's device."""
        height = round(SIDE * regions.shape[2] / regions.shape[3])
        scaled = F.interpolate(regions.to(self.head.weight.device), size=(height, SIDE), mode="bilinear", antialias=True)
        return torch.cat([self._encoder.pooled(part) for part in torch.split(scaled, AT_ONCE)])

    def forward(self, seen: Tensor) -> Tensor:
        """Logits [N, identities + 1] of what `look` gave."""
        return self.head(self.body(seen))


def halves(images: Tensor) -> Tensor:
    """The regions of scenes [N, 3, H, W]: left and right half of each in turn, [2 N, 3, H, W / 2]."""
    half = images.shape[-1] // 2
    return torch.stack([images[..., :half], images[..., half:]], dim=1).flatten(0, 1)


def train_judge(
    judge: IdentityJudge, world: World, restored: Tensor, empty: Tensor, steps: int, seed: int, state_file: Path
) -> list[float]:
    """Learns from composed photographs, shifted, in other light and blurred, and from what the autoencoder makes of them.

    Nobody is in regions without a subject, in regions whose squares are shuffled, and in those too coarse to tell.

    Args:
        judge: on its device.
        world: scenes.
        restored: the first scenes once more, as the autoencoder gives them back, uint8 [M, 3, H, W]: no generated image can be
            sharper.
        empty: scenes without subjects, uint8 [K, 3, H, W].
        steps: of the training.
        seed: of the draws.
        state_file: as in `learn`.
    """
    identities = world.identities[: len(restored)].flatten()
    nobody = judge.head.out_features - 1
    generator = torch.Generator().manual_seed(seed)
    seen, labels = [], []
    for scenes in (world.scenes[: len(restored)], restored):
        for start in tqdm(range(0, len(scenes), 32), desc="judge: looking", unit="batch", leave=False):
            regions = halves(scenes[start : start + 32] / 255)
            who = identities[2 * start : 2 * start + len(regions)].clone()
            hidden = torch.rand(len(regions), generator=generator) < NOBODY
            if hidden.any():
                regions[hidden] = _unrecognisable(regions[hidden], generator)
            who[hidden] = nobody
            seen.append(judge.look(_in_other_light(regions, generator)))
            labels.append(who)
    for scenes in torch.split(empty, 32):
        regions = halves(scenes / 255)
        seen.append(judge.look(_in_other_light(regions, generator)))
        labels.append(torch.full((len(regions),), nobody))
    features, answers = torch.cat(seen), torch.cat(labels).to(judge.head.weight.device)

    def loss(generator: torch.Generator) -> Tensor:
        picked = torch.randint(len(features), (BATCH,), generator=generator)
        return F.cross_entropy(judge(features[picked]), answers[picked], label_smoothing=0.05)

    return learn("judge", judge, loss, steps=steps, lr=2e-3, seed=seed, state_file=state_file)


def _unrecognisable(regions: Tensor, generator: torch.Generator) -> Tensor:
    """Regions whose squares are shuffled, or that are too coarse, every other one."""
    found = regions.clone()
    rows, columns = regions.shape[2] // CELL, regions.shape[3] // CELL
    cells = F.unfold(regions, CELL, stride=CELL)
    order = torch.randperm(cells.shape[-1], generator=generator)
    shuffled = F.fold(cells[..., order], (rows * CELL, columns * CELL), CELL, stride=CELL)
    found[::2, :, : rows * CELL, : columns * CELL] = shuffled[::2]
    return torch.cat([_coarse(one, COARSEST) if place % 2 else one for place, one in enumerate(torch.split(found, 1))])


def _in_other_light(regions: Tensor, generator: torch.Generator) -> Tensor:
    shift = torch.randint(-4, 5, (2,), generator=generator).tolist()
    regions = regions.roll(shift, dims=(2, 3))
    regions = _coarse(regions, 1 + 2 * float(torch.rand(1, generator=generator)))
    light = 0.85 + 0.3 * torch.rand(len(regions), 1, 1, 1, generator=generator)
    noise = 0.05 * torch.rand(1, generator=generator) * torch.randn(regions.shape, generator=generator)
    return (regions * light + noise).clamp(0, 1)


def _coarse(regions: Tensor, times: float) -> Tensor:
    small = F.interpolate(regions, scale_factor=1 / times, mode="bilinear", antialias=True)
    return F.interpolate(small, size=regions.shape[-2:], mode="bilinear")


@cache
def _shared_encoder(device: str) -> EfficientNetLite0:
    return EfficientNetLite0(device)


def load_judge(weights: Path, identities: int, device: str | torch.device = "cpu") -> IdentityJudge:
    """A judge that has learnt; all look through one encoder, as an ablation loads a judge at each point."""
    judge = IdentityJudge(identities, device, _shared_encoder(str(device)))
    judge.load_state_dict(load_file(weights))
    return judge.eval()


@torch.no_grad()
def classify(judge: IdentityJudge, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [N, 2, identities + 1] and features [N, 2, WIDTH] of both regions of images [N, 3, H, W] in [0, 1]."""
    features = torch.cat([judge.body(judge.look(halves(part))) for part in torch.split(images, 32)])
    logits = judge.head(features)
    return logits.reshape(-1, 2, logits.shape[-1]).cpu(), features.reshape(-1, 2, features.shape[-1]).cpu()
