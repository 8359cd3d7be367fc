"""Cut-outs on the disk, so that a run that was killed goes on; and accepted.yaml, where a person decides about them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from tqdm.auto import tqdm

from focusdpo.building.candidate import Mask, Pixels
from focusdpo.building.cutting import CutOut, Cutter
from focusdpo.building.photo_folder import SubjectPhotos
from focusdpo.data.writing import image_of
from focusdpo.foundation.files import checksum, write_whole
from focusdpo.foundation.journals import Journal, read_rows

logger = logging.getLogger(__name__)

Flags = Mapping[str, Mapping[str, bool]]  # whether each cut-out is used, by subject and photo

CUT_OUTS = "cutouts"  # a folder per subject in it
JOURNAL = "cutouts.jsonl"  # a line per subject that is cut out
ACCEPTED = "accepted.yaml"
TINT = np.array([255, 0, 255])  # over what is not the subject, in the pictures that a person looks at
HEAD = """\
# Which cut-outs the pairs are made of. masks.html shows them with their verdicts; change true to false, or back, and start the
# same command again: it goes by what was changed, and does not write over it.
"""


def cut_all(subjects: Sequence[SubjectPhotos], cutter: Cutter, folder: Path) -> dict[str, list[CutOut]]:
    """Cuts out what the folder does not have yet; all cut-outs by subject."""
    done = {row["subject"]: row["photos"] for row in read_rows(folder / JOURNAL) if _is_whole(row, folder)}
    found = {}
    with closing(Journal(folder / JOURNAL)) as journal:
        for subject in tqdm(subjects, desc="cutting subjects out", unit="subject", leave=False):
            rows = done.get(subject.name)
            if rows is not None and [row["photo"] for row in rows] == [file.name for file in subject.files]:
                found[subject.name] = [_read(subject, file, row, folder) for file, row in zip(subject.files, rows, strict=True)]
                continue
            cut_outs = cutter.cut(subject.name, subject.class_name, subject.files)
            rows = [_write(one, folder) for one in cut_outs]
            journal.write({"subject": subject.name, "photos": rows}, to_disk=True)
            found[subject.name] = cut_outs
    return found


def names_of(subject: str, photo: str) -> tuple[str, str, str]:
    """Files of a cut-out's photo, mask and picture, relative to the folder, of the names of its subject and its photo."""
    stem = f"{CUT_OUTS}/{subject}/{photo}"
    return f"{stem}.png", f"{stem}_mask.png", f"{stem}_shown.webp"


def _write(one: CutOut, folder: Path) -> dict[str, Any]:
    image, mask, shown = (folder / name for name in names_of(one.name, one.file.name))
    image.parent.mkdir(parents=True, exist_ok=True)
    image_of(one.pixels).save(image)
    image_of(one.mask).save(mask)
    picture = image_of(shade(one.pixels, one.mask))
    picture.thumbnail((320, 320), Image.Resampling.LANCZOS)
    picture.save(shown, quality=80)
    scores = {name: round(value, 4) for name, value in one.scores.items()}
    return {"photo": one.file.name, "scores": scores, "refused": one.refused}


def shade(pixels: Pixels, mask: Mask) -> Pixels:
    """A photo whose subject stands out: all else is dark and tinted."""
    return np.where(mask[..., None], pixels, 0.3 * pixels + 0.5 * TINT).astype(np.uint8)


def _is_whole(row: dict[str, Any], folder: Path) -> bool:
    """Whether a line of the journal is one, and its files are there, to their ends."""
    try:
        for photo in row["photos"]:
            for name in names_of(row["subject"], photo["photo"]):
                with Image.open(folder / name) as image:
                    image.load()
        return True
    except (KeyError, TypeError, OSError, SyntaxError):
        return False


def _read(subject: SubjectPhotos, file: Path, row: Mapping[str, Any], folder: Path) -> CutOut:
    one = CutOut(subject.name, subject.class_name, file, np.zeros((1, 1, 3), np.uint8), np.zeros((1, 1), bool))
    image, mask, _ = (folder / name for name in names_of(one.name, one.file.name))
    one.pixels, one.mask = np.asarray(Image.open(image).convert("RGB")), np.asarray(Image.open(mask)) >= 128
    one.scores, one.refused = dict(row["scores"]), row["refused"]
    return one


def write_accepted(file: Path, found: Iterable[CutOut]) -> None:
    """Writes the verdicts as a list for a person to change."""
    lines, before = [HEAD], None
    for one in found:
        if one.name != before:
            lines.append(f"{json.dumps(one.name, ensure_ascii=False)}:\n")
            before = one.name
        reason = "" if one.refused is None else f"  # {one.refused}"
        lines.append(f"  {json.dumps(one.file.name, ensure_ascii=False)}: {'false' if one.refused else 'true'}{reason}\n")
    write_whole(file, "".join(lines))


def read_accepted(file: Path, subjects: Sequence[SubjectPhotos]) -> dict[str, dict[str, bool]]:
    """What a person has decided, by subject and photo; nothing where there is no file.

    Raises:
        ValueError: it is not such a list, or names what is not there; all at once.
    """
    if not file.is_file():
        return {}
    example = "lines like '\"rex\":' and below it '  \"00.jpg\": true'"
    try:
        value = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"accepted: {file} is not YAML ({' '.join(str(error).split())}); expected {example}") from error
    if not isinstance(value, dict):
        raise ValueError(f"accepted: {file}: expected {example}, got {type(value).__name__}")
    known = {subject.name: {photo.name for photo in subject.files} for subject in subjects}
    faults = []
    for name, photos in value.items():
        if name not in known:
            faults.append(f"{name}: is no subject; take it out, or write it in quotes; known are {', '.join(known)}")
        elif not isinstance(photos, dict):
            faults.append(f"{name}: expected its photos, got {photos!r}")
        else:
            for photo, flag in photos.items():
                if photo not in known[name]:
                    faults.append(f"{name}: {photo}: is no photo of it; take the line out")
                elif not isinstance(flag, bool):
                    faults.append(f"{name}: {photo}: expected true or false, got {flag!r}")
    if faults:
        raise ValueError(f"accepted: {file}:\n  " + "\n  ".join(faults))
    return value


def verdicts_of(found: Mapping[str, Sequence[CutOut]]) -> dict[str, dict[str, bool]]:
    """Whether each cut-out is to be used, by subject and photo, where nobody decides otherwise."""
    return {name: {one.file.name: one.refused is None for one in cut_outs} for name, cut_outs in found.items()}


def decisions(accepted: Flags, written: Flags) -> dict[str, dict[str, bool]]:
    """Of a list what a person has changed since it was written: the rest are verdicts of that time."""
    return {
        name: {photo: flag for photo, flag in photos.items() if written.get(name, {}).get(photo) != flag}
        for name, photos in accepted.items()
    }


def refuse_shared(found: Mapping[str, Sequence[CutOut]]) -> None:
    """Of a photo that several subjects have the first one's stays: it could be trained on for one, and held out for another."""
    first: dict[str, CutOut] = {}
    for cut_outs in found.values():
        for one in cut_outs:
            other = first.setdefault(checksum(one.file), one)
            if other.name != one.name:
                one.refused = one.refused or f"is a photo of {other.name} as well, {other.file.name} there"


def chosen(found: Mapping[str, Sequence[CutOut]], decided: Flags) -> dict[str, list[CutOut]]:
    """The cut-outs to use: as a person has decided, and by the verdicts where nobody has."""
    kept = {}
    for name, cut_outs in found.items():
        own = decided.get(name, {})
        kept[name] = [one for one in cut_outs if one.mask.any() and own.get(one.file.name, one.refused is None)]
    return kept
