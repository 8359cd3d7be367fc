"""The builder's input: `scenes.jsonl`, one scene a line; paths are relative to the file.

    {"prompt": "a dog and a cup", "scene": "scene.png",
     "subjects": [{"class_name": "dog", "name": "rex", "reference": "rex.png", "reference_mask": "rex_mask.png",
                   "mask": "scene_rex.png"},
                  {"class_name": "cup", "name": "blue", "reference": "blue.png", "box": [10, 20, 200, 180]}],
     "meta": {"any": "thing"}}

`name` says which instance of its class a subject is: only another name is another instance. `box` and `reference_box` (left,
top, right, bottom in pixels) tell a segmentation where to look; a mask makes it unnecessary.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from focusdpo.data.images import ImageError, attempt, read_size
from focusdpo.data.records import MAX_REFERENCES, DatasetError, LineError, Problem, parse_line, text_fault

FILE_NAME = "scenes.jsonl"
FIELDS = {"prompt": True, "scene": True, "subjects": True, "meta": False}
PATHS = ("reference", "reference_mask", "mask")
BOXES = ("box", "reference_box")
SUBJECT_FIELDS = {
    "class_name": True,
    "name": False,
    "reference": True,
    "reference_mask": False,
    "reference_box": False,
    "mask": False,
    "box": False,
}

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels of the file


@dataclass(frozen=True)
class View:
    """A photo that shows a subject: its file, and what is known of where the subject is."""

    image: Path
    mask: Path | None = None
    box: Box | None = None


@dataclass(frozen=True)
class SceneSubject:
    """A subject of a scene: which instance of which class, where in the scene, and its reference."""

    class_name: str
    name: str
    scene: View
    reference: View


@dataclass(frozen=True)
class Scene:
    """One line of scenes.jsonl."""

    file: Path
    line: int
    prompt: str
    image: Path
    subjects: tuple[SceneSubject, ...]
    meta: dict[str, Any] = field(default_factory=dict)


def load_scenes(path: str | Path, progress: bool = True) -> list[Scene]:
    """All scenes of a file, in its order, each fit to be built from.

    Raises:
        FileNotFoundError: there is no such file.
        DatasetError: every problem found, each with file, line, field and remedy.
    """
    file = Path(path)
    if file.is_dir():
        file = file / FILE_NAME
    if not file.is_file():
        raise FileNotFoundError(f"scenes: no such file: {file}; expected a {FILE_NAME}, or a folder that holds one")
    scenes: list[Scene] = []
    problems: list[Problem] = []
    for number, raw in enumerate(file.read_bytes().splitlines(), start=1):
        if raw.strip():
            scene, found = _parse(file, number, raw)
            problems += found
            if scene is not None:
                scenes.append(scene)
    if not scenes and not problems:
        problems.append(Problem(file, 1, "file", "has no scene; write one JSON object a line"))
    with ThreadPoolExecutor() as pool:
        # A photo that is missing shows in each of its subjects.
        checked = pool.map(lambda scene: list(dict.fromkeys(_check_files(scene))), scenes)
        for found in tqdm(checked, total=len(scenes), desc="checking scenes", unit="scene", disable=not progress, leave=False):
            problems += found
    if problems:
        raise DatasetError(problems)
    return scenes


def _parse(file: Path, line: int, raw: bytes) -> tuple[Scene | None, list[Problem]]:
    problems: list[Problem] = []

    def problem(name: str, message: str) -> None:
        problems.append(Problem(file, line, name, message))

    def fields(prefix: str, value: dict[str, Any], known: dict[str, bool]) -> None:
        for name in (name for name, required in known.items() if required and name not in value):
            problem(prefix + name, "is missing")
        for name in (name for name in value if name not in known):
            problem(prefix + name, f"is not a field; known are {', '.join(known)} (free values go into meta of the scene)")

    def text(name: str, value: object) -> str:
        fault = text_fault(value)
        if fault is not None:
            problem(name, fault)
        return "" if fault is not None else str(value)

    def box(name: str, value: object) -> Box | None:
        match value:
            case [int(left), int(top), int(right), int(bottom)] if 0 <= left < right and 0 <= top < bottom:
                return left, top, right, bottom
        problem(name, f"expected [left, top, right, bottom] in whole pixels, got {value!r}")
        return None

    try:
        value = parse_line(raw)
    except LineError as error:
        problem(error.field, f"{error.message}; {error.remedy}")
        return None, problems
    if not isinstance(value, dict):
        problem("line", f"expected a JSON object, got {type(value).__name__}")
        return None, problems
    fields("", value, FIELDS)
    prompt = text("prompt", value["prompt"]) if "prompt" in value else ""
    image = file.parent / text("scene", value["scene"]) if "scene" in value else file
    if not isinstance(value.get("meta", {}), dict):
        problem("meta", f"expected an object, got {type(value['meta']).__name__}")
    listed = value.get("subjects", [])
    if "subjects" in value and not (isinstance(listed, list) and 1 <= len(listed) <= MAX_REFERENCES):
        got = f"{len(listed)} items" if isinstance(listed, list) else type(listed).__name__
        problem("subjects", f"expected a list of 1 to {MAX_REFERENCES} subjects, got {got}")
        listed = []
    subjects = []
    for index, item in enumerate(listed):
        prefix = f"subjects[{index}]"
        if not isinstance(item, dict):
            problem(prefix, f'expected an object like {{"class_name": "dog", "reference": "rex.png"}}, got {item!r}')
            continue
        fields(f"{prefix}.", item, SUBJECT_FIELDS)
        given = {name: item[name] for name in item if item[name] is not None}
        texts = {name: text(f"{prefix}.{name}", given[name]) for name in ("class_name", "name", *PATHS) if name in given}
        boxes = {name: box(f"{prefix}.{name}", given[name]) for name in BOXES if name in given}
        paths = {name: file.parent / texts[name] for name in PATHS if name in texts}
        if "reference" in paths and "class_name" in texts:
            subjects.append(
                SceneSubject(
                    texts["class_name"],
                    texts.get("name", str(paths["reference"])),
                    View(image, paths.get("mask"), boxes.get("box")),
                    View(paths["reference"], paths.get("reference_mask"), boxes.get("reference_box")),
                )
            )
    if problems:
        return None, problems
    return Scene(file, line, prompt, image, tuple(subjects), value.get("meta", {})), problems


def _check_files(scene: Scene) -> Iterator[Problem]:
    """Reads headers: every file is an image, and masks and boxes fit theirs."""

    def views() -> Iterator[tuple[str, str, View]]:
        yield "scene", "scene", View(scene.image)
        for index, subject in enumerate(scene.subjects):
            yield f"subjects[{index}].mask", f"subjects[{index}].box", subject.scene
            yield f"subjects[{index}].reference_mask", f"subjects[{index}].reference_box", subject.reference

    for mask_field, box_field, view in views():
        sizes = []
        image_field = mask_field.removesuffix("_mask") if view.image != scene.image else "scene"
        for name, path in ((image_field, view.image), (mask_field, view.mask)):
            try:
                if path is not None:
                    sizes.append(attempt(partial(read_size, mask=path is view.mask), path))
            except ImageError as error:
                yield Problem(scene.file, scene.line, name, error.message, error.remedy)
        if len(sizes) == 2 and sizes[0] != sizes[1]:
            (w, h), (ow, oh) = sizes
            yield Problem(
                scene.file, scene.line, mask_field, f"is {ow}x{oh} pixels, but its image is {w}x{h}; both must be alike"
            )
        if sizes and view.box is not None and (view.box[2] > sizes[0][0] or view.box[3] > sizes[0][1]):
            message = f"{list(view.box)} reaches out of its image of {sizes[0][0]}x{sizes[0][1]} pixels"
            yield Problem(scene.file, scene.line, box_field, message)
