"""`focusdpo masks`: what the mask of a run sees in one pair, over times and groups of blocks, as pictures and numbers."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from focusdpo.data import PairBatch
from focusdpo.data.images import PATCH_SIZE
from focusdpo.drawing.overlays import MaskAtTime, draw_coverage, draw_overlays
from focusdpo.features import pool_mask, reference_token_mask
from focusdpo.foundation.files import write_json
from focusdpo.foundation.settings import require
from focusdpo.foundation.text import counted, printable
from focusdpo.mask import FocusMask
from focusdpo.studies.config import MasksConfig
from focusdpo.training.config import TrainConfig
from focusdpo.training.step import PreferenceStep
from focusdpo_kernels import topk_mask

logger = logging.getLogger(__name__)

NUMBERS_FILE, FIELDS_FILE, OVERVIEW_FILE, GROUPS = "masks.json", "fields.npz", "coverage.png", "groups"
# See focusdpo.foundation.output_folder.
WRITTEN = (r"masks\.json", r"fields\.npz", r"coverage\.png", rf"{GROUPS}/(all|blocks?-[\d-]+)\.png")
ALL = "all"


def parts_of(count: int, parts: int) -> list[range]:
    """`count` blocks in contiguous parts whose sizes differ by at most one."""
    return [range(i * count // parts, (i + 1) * count // parts) for i in range(parts)]


def groups_of(paths: Sequence[str], count: int, numbers: Sequence[int]) -> dict[str, list[str]]:
    """Blocks by the name of their group: all, then `count` contiguous groups.

    Args:
        paths: of the tapped blocks.
        count: of groups.
        numbers: of the tapped blocks, by which groups are called, as `focus.layers` has them.

    Raises:
        ValueError: there are fewer blocks than groups.
    """
    require(count <= len(paths), "layer_groups", count, f"0 to {len(paths)}, the number of tapped blocks")
    groups = {ALL: list(paths)}
    width = len(str(max(numbers)))
    for part in parts_of(len(paths), count):
        first, last = numbers[part[0]], numbers[part[-1]]
        name = f"block {first:0{width}d}" if len(part) == 1 else f"blocks {first:0{width}d}-{last:0{width}d}"
        groups[name] = [paths[i] for i in part]
    return groups


def write_masks(
    config: MasksConfig,
    run: TrainConfig,
    step: PreferenceStep,
    batch: PairBatch,
    groups: dict[str, list[str]],
    about: dict[str, Any],
) -> None:
    """Computes all masks, and writes pictures, fields and, last, the numbers."""
    out = Path(config.out)
    (out / GROUPS).mkdir(exist_ok=True)
    masks: dict[str, list[MaskAtTime]] = {name: [] for name in groups}
    for t in tqdm(config.timesteps, desc="forward passes", unit="time", leave=False):
        with torch.autocast(step.backbone.device.type, torch.bfloat16, enabled=run.mixed_precision == "bf16"):
            found = step.masks(batch, t, config.seed, groups)
        for name, focus in found.items():
            masks[name].append(MaskAtTime(t, focus))
    model = "before training" if about["checkpoint"] is None else Path(about["checkpoint"]).name
    for name, each in tqdm(masks.items(), desc="drawing", unit="group", leave=False):
        seen = (
            f"{name} ({counted(len(groups[name]), 'block')})"
            if run.focus.taps_features
            else f"focus.source: {run.focus.source}"
        )
        title = f"pair {config.pair} ({config.split}): {printable(batch.prompts[0])}\n{seen}, {model}"
        draw_overlays(batch, each, out / GROUPS / f"{name.replace(' ', '-')}.png", title)
    draw_coverage(masks, out / OVERVIEW_FILE, f"coverage A of pair {config.pair}, {model}")
    grid = [side // PATCH_SIZE for side in batch.winner.shape[-2:]]
    arrays: dict[str, np.ndarray] = {}
    numbers: dict[str, Any] = {}
    for name, each in masks.items():
        numbers[name] = {"blocks": groups[name], "timesteps": [numbers_of(one.focus, batch) | {"t": one.t} for one in each]}
        for one in each:
            arrays |= {f"{name}/t={one.t!r}/{field}": value for field, value in _fields(one.focus, batch, grid).items()}
    np.savez_compressed(out / FIELDS_FILE, **arrays)  # type: ignore[arg-type]  # names are no keywords of its own
    write_json(out / NUMBERS_FILE, {**about, "grid": grid, "groups": numbers})
    for name, value in numbers.items():
        line = ", ".join(f"A({one['t']:g}) = {one['coverage']:.3f} {one['branch']}" for one in value["timesteps"])
        print(f"{name}: {line}")
    logger.info("%s: %s, %s, %s and %s/", out, NUMBERS_FILE, FIELDS_FILE, OVERVIEW_FILE, GROUPS)


def numbers_of(focus: FocusMask, batch: PairBatch) -> dict[str, Any]:
    """What is measured of the mask of one pair."""
    prior = pool_mask(batch.prior)[0]
    chance = float(focus.coverage_chance[0])
    numbers = {
        "source": focus.source,
        "coverage": float(focus.coverage[0]),
        "branch": "detail" if bool(focus.uses_detail[0]) else "structure",
        "tau": focus.tau,
        "coverage_floor": float(focus.coverage_floor[0]),
        "coverage_chance": None if math.isnan(chance) else chance,
        "all_matched": bool(focus.all_matched[0]),
        "prior_tokens": int(focus.prior[0].sum()),
        "prior": "per subject" if prior.ndim == 2 else "common",
    }
    if focus.source == "estimate":
        s, inside = focus.scores[0, 0], focus.prior[0]
        return numbers | {
            "aligned": int(focus.matched.sum()),
            "s_inside": _spread(s[inside].tolist()),
            "s_outside": _spread(s[~inside].tolist()),
        }
    return numbers | {"subjects": _subjects(focus, prior, batch)}


def _subjects(focus: FocusMask, prior: Tensor, batch: PairBatch) -> list[dict[str, Any]]:
    """Of each subject's S and matches, inside and outside of its own prior, or of the common one where there is one for all."""
    scores, matched = focus.scores[0], topk_mask(focus.scores, focus.counts)[0]  # [R, P]
    priors = prior.expand_as(matched) if prior.ndim == 1 else prior
    kept = reference_token_mask(batch.reference_masks)[0].sum(-1)
    counts = torch.as_tensor(focus.counts).reshape(-1).expand(len(scores)).tolist()
    subjects = []
    for r, (score, matches, inside) in enumerate(zip(scores, matched, priors, strict=True)):
        count = int(matches.sum())
        subjects.append(
            {
                "reference_tokens": int(kept[r]),
                "prior_tokens": int(inside.sum()),
                "K": int(counts[r]),
                "matches": count,
                "matches_within_prior": int((matches & inside).sum()) / count if count else None,
                "S_inside": _spread(score[inside].tolist()),
                "S_outside": _spread(score[~inside].tolist()),
            }
        )
    return subjects


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    finite = [value for value in values if value > float("-inf")]
    return {"min": min(finite), "mean": sum(finite) / len(finite), "max": max(finite)} if finite else None


def _fields(focus: FocusMask, batch: PairBatch, grid: Sequence[int]) -> dict[str, np.ndarray]:
    """S (an estimate's s) and M' [R, rows, columns], M_s, M_d within the prior, M and the prior(s) [rows, columns]."""
    named = {
        "S": focus.scores[0].float(),
        "matched": focus.matched[0],
        "structure": focus.structure[0],
        "detail": focus.detail[0],
        "mask": focus.mask[0],
        "prior": pool_mask(batch.prior)[0],
    }
    return {name: value.reshape(*value.shape[:-1], *grid).cpu().numpy() for name, value in named.items()}
