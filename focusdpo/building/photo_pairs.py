"""From cut-outs to scenes in two splits, which share no photo."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm

from focusdpo.building import builder
from focusdpo.building.composed_scenes import LEAST_PHOTOS, SCENES, Stock, compose_scenes, free_part, split_photos
from focusdpo.building.config import ComposeConfig
from focusdpo.building.cut_out_files import CUT_OUTS, names_of
from focusdpo.building.cutting import CutOut, read_photo
from focusdpo.building.photo_folder import SubjectPhotos, photos_in
from focusdpo.building.scenes import FILE_NAME
from focusdpo.data.splitting import SPLITS
from focusdpo.data.writing import write_lines
from focusdpo.foundation.output_folder import OutputFolder, under

logger = logging.getLogger(__name__)

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
        halves = split_photos([f"{name}/{one.file.name}" for one in cut_outs], config.held_out, config.seed)
        for split, numbers in zip(SPLITS, halves, strict=True):
            parts[split][name] = [cut_outs[i] for i in numbers]
    named = {subject.name: subject for subject in subjects}
    own = _own_backgrounds(config)
    made = {}
    for split, members in parts.items():
        described = {name: [_described(one) for one in ones] for name, ones in members.items()}
        free = own[split] or [
            (part, f"{one.name}/{one.file.name}")
            for ones in members.values()
            for one in ones
            if (part := free_part(one)) is not None
        ]
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
    if not made["train"].backgrounds:
        raise ValueError(
            "backgrounds: no photo shows enough beside its subject; name a folder of photos without subjects with --backgrounds"
        )
    return made


def _described(one: CutOut) -> tuple[CutOut, str, str]:
    image, mask, _ = names_of(one.name, one.file.name)
    return one, f"../{image}", f"../{mask}"


def _own_backgrounds(config: ComposeConfig) -> dict[str, list[tuple[Image.Image, str]]]:
    """Those of a folder that the settings name, of which each split has its own where there are enough; else none."""
    if config.backgrounds is None:
        return {split: [] for split in SPLITS}
    files = photos_in(Path(config.backgrounds))
    shown = [(Image.fromarray(read_photo(file, 2 * config.resolution)), f"backgrounds/{file.name}") for file in files]
    train, held_out = split_photos([file.name for file in files], config.held_out, config.seed)
    return {"train": [shown[i] for i in train], "held_out": [shown[i] for i in held_out or train]}


def write_scenes(config: ComposeConfig, made: Mapping[str, Stock], out: OutputFolder) -> None:
    """Writes the scenes of both splits, where they are not written yet."""
    wanted = {"train": config.pairs, "held_out": config.held_out_pairs}
    for number, split in enumerate(SPLITS):
        folder = out.path / split
        if not wanted[split] or not (made[split].placeable and made[split].backgrounds):
            if wanted[split] and config.held_out:
                logger.warning(
                    "no held-out pairs: no subject has %d photos that are not trained on, one of them whole, or none of these "
                    "shows enough beside its subject",
                    LEAST_PHOTOS,
                )
            continue
        if (folder / FILE_NAME).is_file():
            continue
        lines = compose_scenes(made[split], wanted[split], config.subjects, config.resolution, (config.seed, number), folder)
        write_lines(
            folder / FILE_NAME,
            list(tqdm(lines, total=wanted[split], desc=f"composing {split}", unit="scene", leave=False)),
        )
