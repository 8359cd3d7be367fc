"""The microcosm's identities: subjects cut from real photographs, several of each class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from PIL import Image
from tqdm.auto import tqdm

from focusdpo.building.dreambench import read_classes
from focusdpo.building.photo_folder import read_photo_folder
from focusdpo.building.photos import Subject, subjects
from focusdpo.foundation.packages import require_build
from focusdpo.foundation.settings import require

HUES = (0.33, 0.66)  # of the two other instances that each subject gives
MAX_OF_A_CLASS = 3  # subjects: scikit-image has seven coins, which look alike, and DreamBench seven dogs


class _OfAClass(Protocol):
    @property
    def class_name(self) -> str: ...


Named = TypeVar("Named", bound=_OfAClass)


@dataclass(frozen=True, eq=False)
class Identity:
    """One instance of a class.

    views: RGBA cut-outs to compose and learn from. held_out: those that only the judgement sees; where a subject has one
    photograph, the same.
    """

    name: str
    class_name: str
    views: tuple[Image.Image, ...]
    held_out: tuple[Image.Image, ...]

    def photos(self, held_out: bool) -> tuple[Image.Image, ...]:
        """Those that the judgement sees, or the others."""
        return self.held_out if held_out else self.views


def check_source(dreambench: str | None) -> None:
    """Refuses a DreamBench folder that is none.

    Raises:
        FileNotFoundError, ValueError: its list of classes is missing, or has none.
        ModuleNotFoundError: OpenCV, which cuts the subjects out, is not installed.
    """
    if dreambench is not None:
        require_build("DreamBench in the microcosm")
        known = read_photo_folder(Path(dreambench), read_classes(Path(dreambench), "dreambench"), "dreambench")
        _check_classes(dreambench, [subject.class_name for subject in known if len(subject.files) >= 2])


def identities_of(dreambench: str | None, longest: int) -> list[Identity]:
    """The identities: each subject as it is and in two other colours.

    Args:
        dreambench: folder of DreamBench; None takes scikit-image's photographs, one of each subject.
        longest: pixels of a cut-out's longest side.
    """
    if dreambench is None:
        return [one for subject in _few_of_each(subjects()) for one in _instances([subject], [subject], longest)]
    return _dreambench(Path(dreambench), longest)


def _few_of_each(known: Sequence[Named]) -> list[Named]:
    """The first subjects of each class."""
    places = [sum(one.class_name == subject.class_name for one in known[:place]) for place, subject in enumerate(known)]
    return [subject for subject, place in zip(known, places, strict=True) if place < MAX_OF_A_CLASS]


def _instances(views: Sequence[Subject], held_out: Sequence[Subject], longest: int) -> list[Identity]:
    """A subject's photographs as they are and in two other colours."""
    found = []
    for hue in (None, *HUES):
        turned = [[view if hue is None else view.recoloured(hue) for view in part] for part in (views, held_out)]
        pictures = [tuple(_fitted(view.image, longest) for view in part) for part in turned]
        found.append(Identity(turned[0][0].name, views[0].class_name, pictures[0], pictures[1]))
    return found


def _fitted(image: Image.Image, longest: int) -> Image.Image:
    fitted = image.copy()
    fitted.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return fitted


def _dreambench(root: Path, longest: int) -> list[Identity]:
    """Subjects with at least two photographs that can be cut out; of four or more, two are held out, of fewer one."""
    from focusdpo.building.cutting import default_cutter

    cutter, found = default_cutter(), []
    known = read_photo_folder(root, read_classes(root), "dreambench")
    for subject in tqdm(
        _few_of_each([one for one in known if len(one.files) >= 2]), desc="cutting subjects out", unit="subject", leave=False
    ):
        cut_outs = cutter.cut(subject.name, subject.class_name, subject.files)
        views = [Subject(one.name, one.class_name, one.rgba()) for one in cut_outs if one.refused is None]
        if len(views) >= 2:
            kept = len(views) - (2 if len(views) >= 4 else 1)
            found += _instances(views[:kept], views[kept:], longest)
    _check_classes(str(root), [one.class_name for one in found])
    return found


def _check_classes(dreambench: str, classes: Sequence[str]) -> None:
    wanted = "subjects of two classes at least, with two photographs each that can be cut out"
    require(len(set(classes)) >= 2, "dreambench", dreambench, wanted)
