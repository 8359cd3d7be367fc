"""DreamBench as it is downloaded: subjects and their classes, and UNO's lists of prompts as manifests.

DreamBench is the folder of google/dreambooth's dataset: a folder of photos per subject, `prompts_and_classes.txt`, and beside
them UNO's two lists, `dreambench_singleip.json` and `dreambench_multiip.json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from focusdpo.building import builder
from focusdpo.building.dreambench_scenes import COMPOSED, as_stored, photos, relative
from focusdpo.foundation.output_folder import under
from focusdpo.foundation.settings import require

CLASSES_FILE = "prompts_and_classes.txt"
# What it writes, see `focusdpo.foundation.output_folder`.
WRITTEN = (
    r"(single|multi|scenes)\.jsonl",
    rf"{COMPOSED}/\d+(_[ab])?\.png",
    *under("pairs", builder.WRITTEN),
)
LISTS = {"single": "dreambench_singleip.json", "multi": "dreambench_multiip.json"}


def subjects_together(root: Path, classes: dict[str, str]) -> list[tuple[str, str]]:
    """The pairs of subjects of UNO's list of several, where there are photos of both, once each."""
    listed = json.loads((root / LISTS["multi"]).read_text())
    pairs = dict.fromkeys(tuple(Path(path).parent.name for path in item["image_paths"]) for item in listed)
    return [(pair[0], pair[1]) for pair in pairs if len(pair) == 2 and all(photos(root, name) for name in pair)]


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
