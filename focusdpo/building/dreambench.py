"""DreamBench as it is downloaded: subjects and their classes, and UNO's lists of prompts as manifests.

DreamBench is the folder of google/dreambooth's dataset: a folder of photos per subject, `prompts_and_classes.txt`, and beside
them UNO's two lists, `dreambench_singleip.json` and `dreambench_multiip.json`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from focusdpo.building import photo_pairs
from focusdpo.building.photo_folder import SUFFIXES
from focusdpo.foundation.output_folder import under
from focusdpo.foundation.settings import require

CLASSES_FILE = "prompts_and_classes.txt"
PAIRS = "pairs"  # a folder as `data compose` makes it
# What it writes, see `focusdpo.foundation.output_folder`.
WRITTEN = (r"(single|multi)\.jsonl", *under(PAIRS, photo_pairs.WRITTEN))
LISTS = {"single": "dreambench_singleip.json", "multi": "dreambench_multiip.json"}


def read_classes(root: Path, setting: str = "root") -> dict[str, str]:
    """Class by subject, from prompts_and_classes.txt; messages name the setting that names the folder."""
    file = root / CLASSES_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{setting}: no {CLASSES_FILE} in {root}; expected a DreamBench folder")
    rows = [line.strip().split(",") for line in file.read_text().splitlines()]
    classes = {row[0]: row[1] for row in rows if len(row) == 2 and row[0].isidentifier() and row[0] != "subject_name"}
    require(bool(classes), f"{setting}: {file}", "no line", "lines like dog2,dog")
    return classes


def manifest(root: Path, out: Path, name: str, classes: dict[str, str]) -> tuple[list[dict[str, Any]], set[str]]:
    """The prompts of one of UNO's lists, as records with references; and the subjects whose photos are missing."""
    file = root / LISTS[name]
    if not file.is_file():
        raise FileNotFoundError(f"root: no {file.name} in {root}; it is among UNO's datasets")
    lines, missing = [], set()
    try:
        listed = json.loads(file.read_text())
        if not isinstance(listed, list):
            raise ValueError(f"expected a list, got {type(listed).__name__}")
    except ValueError as error:
        raise ValueError(f"{file}: is not UNO's list ({error}); download it again") from error
    for number, item in enumerate(listed, start=1):
        try:
            prompt, paths = item["prompt"], [Path(path) for path in item["image_paths"]]
            known = [classes[path.parent.name] for path in paths]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file}: item {number}: expected prompt and image_paths of known subjects ({error})") from error
        photos = [as_stored(root / path.parent.name / path.name) for path in paths]
        absent = {photo.parent.name for photo in photos if not photo.is_file()}
        missing |= absent
        if not absent:
            images = [relative(photo, out) for photo in photos]
            references = [{"image": image, "class_name": kind} for image, kind in zip(images, known, strict=True)]
            lines.append({"prompt": prompt, "references": references, "meta": {"list": name, "item": number}})
    return lines, missing


def as_stored(photo: Path) -> Path:
    """A photo that UNO's lists name, as it is called in the folder: suffixes may be written otherwise."""
    if photo.is_file():
        return photo
    others = (path for path in sorted(photo.parent.glob("*")) if path.suffix.lower() in SUFFIXES and path.stem == photo.stem)
    return next(others, photo)


def relative(path: Path, folder: Path) -> str:
    """A path as a line of a file in `folder` names it."""
    return Path(os.path.relpath(path, folder)).as_posix()
