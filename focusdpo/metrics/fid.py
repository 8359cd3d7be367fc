"""The Fréchet distance of torchmetrics between features that are already there, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import stats
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm.auto import tqdm

from focusdpo.metrics import LEVEL
from focusdpo.metrics.bootstrap import Interval, find_clusters


class _Features(nn.Module):
    """What FrechetInceptionDistance takes for its network where the features are there: it passes them on."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance_of_features(real: ArrayLike | Tensor, fake: ArrayLike | Tensor) -> float:
    """|mean_r - mean_f|^2 + tr(C_r + C_f - 2 (C_r C_f)^(1/2)), by torchmetrics in float64.

    Args:
        real: [N, D] features of real images, N at least 2.
        fake: [M, D] features of generated images, M at least 2.

    Raises:
        ValueError: shapes that do not fit, fewer than two images, or values that are not finite.
    """
    sets = {"real": torch.as_tensor(real).double().cpu(), "fake": torch.as_tensor(fake).double().cpu()}
    for name, features in sets.items():
        if features.ndim != 2 or len(features) < 2 or features.shape[1] != sets["real"].shape[-1]:
            shapes = " and ".join(str(tuple(each.shape)) for each in sets.values())
            raise ValueError(f"{name}: got real and fake of {shapes}; expected [N, D] and [M, D], at least two images each")
        if not features.isfinite().all():
            raise ValueError(f"{name}: features are not finite")
    metric = FrechetInceptionDistance(_Features(sets["real"].shape[1]))
    metric.update(sets["real"], real=True)
    metric.update(sets["fake"], real=False)
    return float(metric.compute())


def frechet_interval(
    real: Tensor, fake: Tensor, groups: Iterable[Hashable], level: float = LEVEL, resamples: int = 100, seed: int = 0
) -> Interval:
    """The distance, and an interval over groups of generated images: the distance +- t times its bootstrap deviation.

    Percentiles would mislead: a resample repeats images, which moves its distance up. Its spread is right all the same, once it
    is made larger for few groups, and for those with common members as if members were all that differs, by
    `Clusters.independent`.

    Args:
        real: [N, D] features of real images, taken as they are.
        fake: [M, D] features of generated images.
        groups: [M], as `mean_interval` takes them; a resample draws groups.
        level: of the interval, between 0 and 1.
        resamples: each takes as long as the distance itself; fewer than 2 give no interval.
        seed: the same seed gives the same interval.

    Returns:
        (distance, low, high); low and high are NaN without an interval, and low is 0 at least.
    """
    distance = frechet_distance_of_features(real, fake)
    clusters = find_clusters(groups)
    number, independent = len(clusters.sizes), clusters.independent
    if resamples < 2 or number < 2:
        return distance, math.nan, math.nan
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(clusters.index == group) for group in range(number)]
    found = []
    for _ in tqdm(range(resamples), desc="resampling FID", unit="resample", leave=False):
        drawn = np.concatenate([members[group] for group in rng.integers(0, number, number)])
        found.append(frechet_distance_of_features(real, fake[torch.from_numpy(drawn)]))
    apart = clusters.sizes.sum() ** 2 / (clusters.sizes @ clusters.sizes)  # `independent`, had they no common members
    deviation = float(np.std(found, ddof=1)) * math.sqrt(apart / (independent - 1))
    half = float(stats.t.ppf((1 + level) / 2, independent - 1)) * deviation
    return distance, max(distance - half, 0.0), distance + half
