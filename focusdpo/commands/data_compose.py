"""`focusdpo data compose`: photos are checked first, then cut out, judged, put into scenes, and built into pairs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from focusdpo.building import builder
from focusdpo.building.config import ComposeConfig
from focusdpo.building.cut_out_files import (
    ACCEPTED,
    chosen,
    cut_all,
    decisions,
    read_accepted,
    refuse_shared,
    verdicts_of,
    write_accepted,
)
from focusdpo.building.cutting import CutOut, Cutter
from focusdpo.building.encoder import load_encoder
from focusdpo.building.engines import segmentation_of
from focusdpo.building.photo_folder import SubjectPhotos, check_photos, photos_in, read_photo_folder
from focusdpo.building.photo_pairs import PAGE, SETTINGS, WRITTEN, stocks, write_scenes
from focusdpo.building.scenes import FILE_NAME as SCENES_FILE
from focusdpo.commands import data_build
from focusdpo.data.splitting import SPLITS
from focusdpo.foundation.files import checksum, hash_of, read_object
from focusdpo.foundation.output_folder import OutputFolder
from focusdpo.foundation.settings import differences, flat
from focusdpo.pages.cut_outs import write_page

logger = logging.getLogger(__name__)

# What a run that goes on may change: where things lie, what they run on, how far it goes; and the list of a person's decisions,
# from which scenes and pairs are made anew.
FREE = (
    "photos", "output_dir", "classes", "accepted", "masks_only", "backgrounds", "overwrite", "engine", "workers", "ray_address",
    "device",
)  # fmt: skip
OF_MASKS = ("photos", "classes", "segmentation", "cut_outs", "encoder", "resolution", "reference_resolution")
WRITTEN_LIST = "accepted.yaml as written"  # a note: verdicts and checksum, from which a person's changes are told
DECIDED = "decided"  # the note of the decisions that scenes and pairs are made of


def prepare(config: ComposeConfig, classes: Mapping[str, str] | None = None, setting: str = "photos") -> Callable[[], None]:
    """Checks settings, photos and output folder, and returns the work.

    Args:
        config: settings.
        classes: of the subjects, in place of a file with them.
        setting: names the folder of photos in messages.

    Raises:
        ModuleNotFoundError: an optional dependency is missing; names the extra.
        FileNotFoundError, ValueError: photos, models or settings are not fit.
        FileExistsError, NotADirectoryError: the folder holds something that may not be replaced.
        ConnectionError: the Ray cluster that is named does not answer.
    """
    data_build.check_models(config, "data compose")
    listed = classes if config.classes is None else Path(config.classes)
    subjects = read_photo_folder(Path(config.photos), listed, setting)
    if config.backgrounds is not None:
        _check_backgrounds(Path(config.backgrounds), Path(config.photos))
    folder = Path(config.output_dir)
    file = folder / ACCEPTED if config.accepted is None else Path(config.accepted)
    if config.accepted is not None and not file.is_file():
        raise FileNotFoundError(f"accepted: no such file: {file}; a first run without it writes {ACCEPTED}")
    accepted = read_accepted(file, subjects)
    out = OutputFolder("output_dir", folder, "data compose", WRITTEN)
    out.check_begun(config.overwrite, SETTINGS, _settings(config, subjects), partial(_check_same, folder))
    note = out.recall(WRITTEN_LIST) if config.accepted is None else None
    written = {} if note is None else note["verdicts"]
    is_untouched = note is not None and file.is_file() and checksum(file) == note["checksum"]

    def work() -> None:
        with out.begin():
            found = _cut_out(config, subjects, folder)
            decided = decisions(accepted, written)
            new = not file.is_file() or is_untouched
            if new:
                write_accepted(file, [one for cut_outs in found.values() for one in cut_outs])
            if config.accepted is None and (new or note is not None):
                out.remember(WRITTEN_LIST, {"verdicts": verdicts_of(found), "checksum": checksum(file)} if new else note)
            every = [one for cut_outs in found.values() for one in cut_outs]
            write_page(folder / PAGE, every, decided)
            kept = chosen(found, decided)
            count = sum(map(len, kept.values()))
            logger.info("%d of %d cut-outs are used: look at %s; %s decides", count, len(every), folder / PAGE, file)
            if not config.masks_only:
                _make_pairs(config, subjects, kept, out)

    return work


def _check_backgrounds(folder: Path, photos: Path) -> None:
    if not folder.is_dir() or not photos_in(folder):
        raise FileNotFoundError(f"backgrounds: no photos in {folder}; name a folder of photos without subjects")
    if folder.resolve().parent == photos.resolve():
        raise ValueError(f"backgrounds: {folder} is one of the folders in {photos}, and would be a subject; move it elsewhere")
    check_photos(photos_in(folder), "backgrounds")


def _cut_out(config: ComposeConfig, subjects: Sequence[SubjectPhotos], folder: Path) -> dict[str, list[CutOut]]:
    """All cut-outs by subject; the models are let go of."""
    encoder = load_encoder(config.encoder)
    assert encoder is not None  # as the settings check
    longest = max(config.resolution, config.reference_resolution)
    found = cut_all(subjects, Cutter(segmentation_of(config.segmentation), encoder, config.cut_outs, longest), folder)
    refuse_shared(found)
    return found


def _make_pairs(
    config: ComposeConfig, subjects: Sequence[SubjectPhotos], kept: dict[str, list[CutOut]], out: OutputFolder
) -> None:
    """Composes the scenes of both splits, and builds their pairs; pairs of a split that has no scenes any more go."""
    folder = out.path
    made = stocks(config, subjects, kept)
    decided = hash_of(*(f"{one.name}/{one.file.name}" for cut_outs in kept.values() for one in cut_outs))
    if out.recall(DECIDED) != decided:
        for split in SPLITS:
            (folder / split / SCENES_FILE).unlink(missing_ok=True)
        out.remember(DECIDED, decided)
    write_scenes(config, made, out)
    for split in SPLITS:
        if (folder / split / SCENES_FILE).is_file():
            data_build.prepare(config.build_config(split, _is_of_other_scenes(folder / split)))()
        elif (folder / split).is_dir():
            left = OutputFolder("output_dir", folder / split, "data build", builder.WRITTEN)
            left.check(True)  # refuses what a person has changed
            left.release()
            out.remove(folder / split)


def _is_of_other_scenes(split: Path) -> bool:
    """Whether the pairs there were built of other scenes, or nothing tells of which: a person has decided otherwise since."""
    try:
        built = read_object(split / builder.SETTINGS)
    except (OSError, ValueError):
        return True
    if built.get(data_build.CONTENT) == data_build.content_of(split / SCENES_FILE):
        return False
    logger.info("%s: other cut-outs are used now, so its pairs are built anew", split)
    return True


def _settings(config: ComposeConfig, subjects: Sequence[SubjectPhotos]) -> dict[str, Any]:
    """What decides the pairs, flat, with what is in the files that are named."""
    kept = {name: value for name, value in flat(config).items() if name.split(".")[-1] not in FREE}
    files = {
        "photos": [file for subject in subjects for file in subject.files],
        "backgrounds": [] if config.backgrounds is None else list(photos_in(Path(config.backgrounds))),
    }
    for name, paths in files.items():
        content = [f"{path.parent.name}/{path.name} {checksum(path)}" for path in paths]
        kept[f"{name} (their content)"] = hash_of(*content)[:16]
    return {**kept, "classes": {one.name: [one.class_name, one.caption] for one in subjects}}


def _check_same(folder: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    if not any((folder / split).is_dir() for split in SPLITS):  # the masks alone are there, which the rest does not change
        saved, now = ({name: value for name, value in one.items() if name.startswith(OF_MASKS)} for one in (saved, now))
    data_build.refuse_others(
        folder, "pairs of", differences("run", saved, now), " (what a person changed in accepted.yaml stays)"
    )
