"""One scene measured: all times, poolings and blocks. What is measured of a scene lies in a file of its own."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from focusdpo.data import PairBatch
from focusdpo.data.images import PATCH_SIZE
from focusdpo.features import pool_mask, reference_token_mask
from focusdpo.foundation.files import writing
from focusdpo.mask import match_counts
from focusdpo.studies.stress import match_measures
from focusdpo.training.seeding import seeded
from focusdpo.training.step import Noised, PreferenceStep
from focusdpo_kernels import structure_field, topk_mask

Arrays = dict[str, NDArray[np.generic]]
FORMS = ("union", "per_subject")  # of the structure field


@torch.no_grad()
def measure_scene(
    step: PreferenceStep,
    batch: PairBatch,
    times: Sequence[float],
    poolings: Sequence[str],
    counts: Sequence[str | int | float],
    seed: tuple[int, ...],
    autocast: bool = False,
) -> Arrays:
    """Measures of one scene (a batch of one), float64.

    Axes: T times, O poolings, L = 1 + N layers (their mean first), C counts of matches, R subjects.

    Returns:
        confusion [T, O, L, C, R, R + 1], recall [T, O, L, C, R], union_precision and union_recall [T, O, L, C], auc_others and
        auc_rest [T, O, L, R], coverage A [T, O, L, C, 2, 2] as union and per subject, of winner and loser; and of the winner
        scores [T, O, R, rows, columns] of the mean over layers, regions [R, rows, columns], K [C, R].
    """
    regions = pool_mask(batch.prior)  # [1, R, P]
    match_measures.check_regions(regions[0])
    kept = reference_token_mask(batch.reference_masks)
    grid = [side // PATCH_SIZE for side in batch.winner.shape[-2:]]
    found: dict[str, list[Tensor]] = {}
    k: list[Tensor] = []
    for t in times:
        with torch.autocast(step.backbone.device.type, torch.bfloat16, enabled=autocast):
            noised = step.noise(batch, seeded(*seed), torch.tensor([t]))  # the same noise at each time
            scores = block_scores(step, noised, batch, poolings)  # [O, L, 2, R, P]
        wanted = [match_counts(count, scores[0, 0, :1], regions, kept) for count in counts]  # numbers, or tensors on the device
        k = [torch.as_tensor(each, device=scores.device).expand(1, len(regions[0]))[0] for each in wanted]
        shown = {"scores": scores[:, 0, 0].reshape(len(poolings), -1, *grid)}
        for name, value in (measures_of(scores, regions[0], k, step.backend) | shown).items():
            found.setdefault(name, []).append(value)
    arrays: Arrays = {name: torch.stack(each).cpu().numpy() for name, each in found.items()}
    arrays["regions"] = regions[0].reshape(-1, *grid).cpu().numpy()
    arrays["K"] = torch.stack(k).cpu().numpy()
    return arrays


@torch.no_grad()
def block_scores(step: PreferenceStep, noised: Noised, batch: PairBatch, poolings: Sequence[str]) -> Tensor:
    """S of every tapped block by pooling, for winner and loser, in one forward pass.

    Args:
        step: whose run says which blocks are tapped, and of which model.
        noised: tokens and conditioning of the batch.
        batch: one pair of R references.
        poolings: "reference" (E4), "max" (E4').

    Returns:
        fp32 [poolings, 1 + N, 2, R, P]: first the mean over the N tapped blocks (E4), then each; of the winner, of the loser.
    """
    taps = [[step.tap(noised, batch, [path], pooling, each=True) for path in step.paths] for pooling in poolings]
    step.predict(noised, chain.from_iterable(taps), step.focus.feature_source)
    scores = torch.stack([torch.stack([tap.scores().float() for tap in each]) for each in taps])
    return torch.cat([scores.mean(1, keepdim=True), scores], dim=1)


def measures_of(scores: Tensor, regions: Tensor, counts: Sequence[Tensor], backend: str | None = None) -> dict[str, Tensor]:
    """The measures of S [O, L, 2, R, P] of winner and loser at one time, named as above without T; counts are C times [R]."""
    winner = scores[:, :, 0]
    others, rest = match_measures.auc_by_subject(winner, regions)
    per_count: dict[str, list[Tensor]] = {}
    for k in counts:
        matched = topk_mask(winner, k.expand(winner.shape[:-1]), backend=backend)
        precision, recall = match_measures.union_precision_recall(matched, regions)
        coverage = torch.stack([_coverage(scores, regions, k, form == "per_subject", backend) for form in FORMS], dim=2)
        values = {
            "confusion": match_measures.confusion(matched, regions),
            "recall": match_measures.recall(matched, regions),
            "union_precision": precision,
            "union_recall": recall,
            "coverage": coverage,
        }
        for name, value in values.items():
            per_count.setdefault(name, []).append(value.double())
    return {"auc_others": others, "auc_rest": rest} | {name: torch.stack(each, 2) for name, each in per_count.items()}


def _coverage(scores: Tensor, regions: Tensor, k: Tensor, per_subject: bool, backend: str | None) -> Tensor:
    """A of winner and loser [O, L, 2], both against the places that the subjects should have: those in the winner."""
    flat = scores.flatten(0, 2)
    prior = regions.expand(flat.shape).contiguous()
    _, coverage = structure_field(flat, k.expand(flat.shape[:2]).contiguous(), prior, per_subject=per_subject, backend=backend)
    return coverage.reshape(scores.shape[:3])


def save_scene(file: Path, arrays: Arrays) -> None:
    """Under its own name the file is always whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with writing(file) as partial, partial.open("wb") as stream:  # by its name numpy would add an ending
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]  # names are no keywords of its own


def load_scene(file: Path) -> Arrays | None:
    """None where there is no file, or a damaged one."""
    try:
        with np.load(file) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error):
        return None
