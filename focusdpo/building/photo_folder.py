"""A folder of photos, one folder a subject: what is in it, of which class each subject is, and what it is called."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tqdm.auto import tqdm

from focusdpo.building.config import SMALLEST
from focusdpo.data.images import ROOM, ImageError, attempt, read_image, read_size
from focusdpo.data.lines import text_fault

logger = logging.getLogger(__name__)

CLASSES_FILE = "classes.yaml"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
OTHER_SUFFIXES = (".heic", ".heif", ".avif", ".tif", ".tiff", ".bmp", ".gif")
WIDEST = 8  # times the shorter side


@dataclass(frozen=True)
class SubjectPhotos:
    """A subject: its folder's name, its class, what prompts call it where that is more than the class, and its photos."""

    name: str
    class_name: str
    caption: str | None
    files: tuple[Path, ...]


def photos_in(folder: Path) -> tuple[Path, ...]:
    """The photos of a folder, by name."""
    found = (path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    return tuple(sorted(path for path in found if not path.name.startswith(".")))


def read_photo_folder(
    root: Path, classes: Path | Mapping[str, str] | None = None, setting: str = "photos"
) -> list[SubjectPhotos]:
    """The subjects of a folder, by name; every photo is decoded.

    Args:
        root: a folder of photos per subject.
        classes: the subjects' classes by their folders' names, or YAML with these, or with {class_name, caption}; by default
            classes.yaml in `root` where there is one. A subject that the file does not name has its folder's name as its
            class, without a number at its end; one that is not among the classes is left out.
        setting: names the folder in messages.

    Raises:
        FileNotFoundError: there is no such folder or file, or no subject in it.
        ValueError: photos that cannot be read, or lines of `classes` that say nothing: all at once.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{setting}: no such folder: {root}; expected one with a folder of photos per subject")
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    photographed = {folder.name: found for folder in folders if (found := photos_in(folder))}
    if not photographed:
        loose = "its photos stand beside each other; " if photos_in(root) else ""
        raise FileNotFoundError(
            f"{setting}: {root} has no folder with photos ({', '.join(SUFFIXES)}); {loose}give each subject a folder of its own"
        )
    others = {path.suffix.lower() for folder in folders for path in folder.iterdir() if path.suffix.lower() in OTHER_SUFFIXES}
    if others:
        logger.warning("%s: files of %s are passed over; photos are %s", root, ", ".join(sorted(others)), ", ".join(SUFFIXES))
    empty = [folder.name for folder in folders if folder.name not in photographed]
    if empty:
        logger.info("no photos in %s of %s: left out", ", ".join(empty), root)
    if isinstance(classes, Mapping):
        photographed = {name: files for name, files in photographed.items() if name in classes}
        named: dict[str, tuple[str, str | None]] = {name: (class_name, None) for name, class_name in classes.items()}
    else:
        named = _read_classes(root, classes, set(photographed))
    check_photos([file for files in photographed.values() for file in files], setting)
    return [SubjectPhotos(name, *named.get(name, (_class_of(name), None)), files) for name, files in photographed.items()]


def _class_of(name: str) -> str:
    """dog2 is a dog, robot_toy a robot toy."""
    words = re.sub(r"[_\-\s]+", " ", name).strip() or name
    return re.sub(r"\s*\d+$", "", words) or words


def _read_classes(root: Path, file: Path | None, subjects: set[str]) -> dict[str, tuple[str, str | None]]:
    """Class and caption by subject, as far as a file names them."""
    if file is None:
        file = root / CLASSES_FILE
        if not file.is_file():
            return {}
    elif not file.is_file():
        raise FileNotFoundError(f"classes: no such file: {file}; expected YAML like 'rex: dog'")
    try:
        value = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"classes: {file} is not YAML ({reason}); expected lines like 'rex: dog'") from error
    if not isinstance(value, dict):
        raise ValueError(f"classes: {file}: expected lines like 'rex: dog', got {type(value).__name__}")
    found: dict[str, tuple[str, str | None]] = {}
    faults = []
    for key, item in value.items():
        name = str(key)
        if name not in subjects:
            quoted = "" if isinstance(key, str) else " (write it in quotes where that is its name)"
            faults.append(f"{name}: is no folder with photos in {root}{quoted}; known are {', '.join(sorted(subjects))}")
            continue
        given = item if isinstance(item, dict) else {"class_name": item}
        fault = _fault(given)
        if fault is None:
            found[name] = given["class_name"].strip(), given.get("caption")
        else:
            faults.append(f"{name}: {fault}; write 'rex: dog' or 'rex: {{class_name: dog, caption: a brown dog}}'")
    if faults:
        raise ValueError(f"classes: {file}:\n  " + "\n  ".join(faults))
    return found


def _fault(given: dict[Any, Any]) -> str | None:
    unknown = [str(name) for name in given if name not in ("class_name", "caption")]
    if unknown:
        return f"{unknown[0]} is not a field"
    if "class_name" not in given:
        return "class_name is missing"
    faults = [f"{name}: {fault}" for name, text in given.items() if (fault := text_fault(text)) is not None]
    return faults[0] if faults else None


def check_photos(files: Sequence[Path], setting: str) -> None:
    """Decodes every photo: a damaged one, or one that shows too little, would turn up after hours.

    Raises:
        ValueError: those that cannot be used, all at once.
    """

    def fault(file: Path) -> str | None:
        try:
            width, height = attempt(read_size, file)
            if min(width, height) < SMALLEST or max(width, height) > WIDEST * min(width, height):
                return (
                    f"{file} is {width}x{height} pixels; expected at least {SMALLEST} a side, and no side more than {WIDEST} "
                    "times the other"
                )
            with ROOM.hold(width * height):
                attempt(read_image, file)
        except ImageError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        checked = tqdm(pool.map(fault, files), total=len(files), desc="checking photos", unit="photo", leave=False)
        faults = [text for text in checked if text is not None]
    if faults:
        raise ValueError(f"{setting}: photos cannot be used; mend or remove them:\n  " + "\n  ".join(faults))
