"""From cut-outs to scenes in two splits, which share no photo."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from focusdpo.building import builder
from focusdpo.building.composed_scenes import LEAST_PHOTOS, SCENES, Stock, compose_scenes, free_part, split_photos
from focusdpo.building.config import ComposeConfig
from focusdpo.building.cut_out_files import CUT_OUTS, names_of
from focusdpo.building.cutting import CutOut, read_photo
from focusdpo.building.photo_folder import SubjectPhotos, photos_in
from focusdpo.building.scenes import FILE_NAME
from focusdpo.data.writing import write_lines
from focusdpo.foundation.output_folder import OutputFolder, under

logger = logging.getLogger(__name__)

SPLITS = ("train", "held_out")
SETTINGS = "compose.json"  # what the work was begun with
PAGE = "masks.html"
# What it writes, see `focusdpo.foundation.output_folder`; accepted.yaml is a person's.
WRITTEN = (
    r"compose\.json",
    r"cutouts\.jsonl",
    r"masks\.html",
    rf"{CUT_OUTS}/.+/.+\.(png|webp)",
    *under(
        f"({'|'.join(SPLITS)})",
        (r"scenes\.jsonl", rf"{SCENES}/\d+_(scene|background|mask\d)\.png", *builder.WRITTEN),
    ),
)


def stocks(config: ComposeConfig, subjects: Sequence[SubjectPhotos], kept: Mapping[str, Sequence[CutOut]]) -> dict[str, Stock]:
    """What each split's scenes are made of.

    Raises:
        ValueError: there are too few cut-outs, or no background.
    """
    parts: dict[str, dict[str, list[CutOut]]] = {split: {} for split in SPLITS}
    for name, cut_outs in kept.items():
        rng = np.random.default_rng([config.seed, *name.encode()])
        for split, numbers in zip(SPLITS, split_photos(len(cut_outs), config.held_out, rng), strict=True):
            parts[split][name] = [cut_outs[i] for i in numbers]
    named = {subject.name: subject for subject in subjects}
    own = None
    if config.backgrounds is not None:
        own = [Image.fromarray(read_photo(file, 2 * config.resolution)) for file in photos_in(Path(config.backgrounds))]
    made = {}
    for split, members in parts.items():
        described = {name: [_described(one) for one in ones] for name, ones in members.items()}
        free = own or [part for ones in members.values() for one in ones if (part := free_part(one)) is not None]
        made[split] = Stock(named, described, free)
    few = sorted(set(kept) - set(made["train"].placeable))
    if few:
        logger.info(
            "in no scene: %s; each needs %d accepted cut-outs, of which one is whole or cut off at the bottom alone",
            ", ".join(few), LEAST_PHOTOS,
        )  # fmt: skip
    if not made["train"].placeable:
        raise ValueError(
            f"photos: no subject of {config.photos} has {LEAST_PHOTOS} cut-outs that can be used; {PAGE} shows why, and "
            "accepted.yaml can be changed; or segment with rembg"
        )
    for split in SPLITS:
        if made[split].placeable and not made[split].backgrounds:
            raise ValueError(
                f"backgrounds: no photo of the {split} split shows enough beside its subject; name a folder of photos without "
                "subjects with --backgrounds"
            )
    return made


def _described(one: CutOut) -> tuple[CutOut, str, str]:
    image, mask, _ = names_of(one)
    return one, f"../{image}", f"../{mask}"


def write_scenes(config: ComposeConfig, made: Mapping[str, Stock], out: OutputFolder) -> None:
    """Writes the scenes of both splits, where they are not written yet."""
    wanted = {"train": config.pairs, "held_out": config.held_out_pairs}
    for number, split in enumerate(SPLITS):
        folder = out.path / split
        if not made[split].placeable or not wanted[split]:
            if wanted[split]:
                logger.warning("no held-out pairs: no subject has %d cut-outs beyond those that are trained on", LEAST_PHOTOS)
            continue
        if (folder / FILE_NAME).is_file():
            continue
        lines = compose_scenes(made[split], wanted[split], config.subjects, config.resolution, (config.seed, number), folder)
        write_lines(
            folder / FILE_NAME,
            list(tqdm(lines, total=wanted[split], desc=f"composing {split}", unit="scene", leave=False)),
        )
