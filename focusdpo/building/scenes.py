"""The builder's input: `scenes.jsonl`, one scene a line; paths are relative to the file.

    {"prompt": "a dog and a cup", "scene": "scene.png",
     "subjects": [{"class_name": "dog", "name": "rex", "reference": "rex.png", "reference_mask": "rex_mask.png",
                   "mask": "scene_rex.png"},
                  {"class_name": "cup", "name": "blue", "reference": "blue.png", "box": [10, 20, 200, 180]}],
     "meta": {"any": "thing"}}

`name` says which instance of its class a subject is: only another name is another instance. `box` and `reference_box` (left,
top, right, bottom in pixels) tell a segmentation where to look; a mask makes it unnecessary. `background`, an image of the
scene's size without its subjects, is what shows where one of them is taken out; without it that is made up of what is around.
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
from focusdpo.data.lines import DatasetError, LineParser, Problem, read_lines, split_problems

FILE_NAME = "scenes.jsonl"
FIELDS = {"prompt": True, "scene": True, "subjects": True, "background": False, "meta": False}
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
    background: Path | None = None
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
    lines = read_lines(file, lambda line: _SceneParser(file, line))
    scenes, problems = split_problems(lines)
    if not scenes and not problems:
        problems.append(Problem(file, 1, "file", "has no scene", "write one JSON object a line"))
    with ThreadPoolExecutor() as pool:
        # A photo that is missing shows in each of its subjects.
        checked = pool.map(lambda scene: list(dict.fromkeys(_check_files(scene))), scenes)
        for found in tqdm(checked, total=len(scenes), desc="checking scenes", unit="scene", disable=not progress, leave=False):
            problems += found
    if problems:
        raise DatasetError(problems)
    return scenes


class _SceneParser(LineParser[Scene]):
    """Makes a scene of a line."""

    DOCS = "docs/build.md"

    def make(self, value: dict[str, Any]) -> Scene | None:
        self.check_fields("", value, FIELDS)
        folder = self.file.parent
        prompt = self.text("prompt", value["prompt"], "write what the scene shows") if "prompt" in value else None
        name = self.text("scene", value["scene"], 'write it like "scene.png"') if "scene" in value else None
        empty = value.get("background")
        background = None if empty is None else self.text("background", empty, 'write it like "empty.png", or leave it out')
        meta, image = self.meta(value), folder / (name or "")
        subjects = []
        remedy, example = "give each subject of the prompt one", '{"class_name": "dog", "reference": "rex.png"}'
        listed = self.objects("subjects", value["subjects"], SUBJECT_FIELDS, remedy, example) if "subjects" in value else ()
        for place, item in listed:
            given = {name: item[name] for name in item if item[name] is not None}
            named = [name for name in ("class_name", "name", *PATHS) if name in given]
            texts = {name: self.text(place + name, given[name], "write it as text") or "" for name in named}
            boxes = {name: self.box(place + name, given[name], (int,)) for name in BOXES if name in given}
            paths = {name: folder / texts[name] for name in PATHS if name in texts}
            if "reference" in paths and "class_name" in texts:
                subjects.append(
                    SceneSubject(
                        texts["class_name"],
                        texts.get("name", str(paths["reference"])),
                        View(image, paths.get("mask"), boxes.get("box")),
                        View(paths["reference"], paths.get("reference_mask"), boxes.get("reference_box")),
                    )
                )
        behind = None if background is None else folder / background
        return None if prompt is None else Scene(self.file, self.line, prompt, image, tuple(subjects), behind, meta)


def _check_files(scene: Scene) -> Iterator[Problem]:
    """Reads headers: every file is an image, and masks and boxes fit theirs."""

    def views() -> Iterator[tuple[str, str, View]]:
        yield "background", "scene", View(scene.image, scene.background)
        for index, subject in enumerate(scene.subjects):
            yield f"subjects[{index}].mask", f"subjects[{index}].box", subject.scene
            yield f"subjects[{index}].reference_mask", f"subjects[{index}].reference_box", subject.reference

    for mask_field, box_field, view in views():
        sizes = []
        image_field = mask_field.removesuffix("_mask") if view.image != scene.image else "scene"
        for name, path in ((image_field, view.image), (mask_field, view.mask)):
            try:
                if path is not None:
                    sizes.append(attempt(partial(read_size, mask=path is view.mask and name != "background"), path))
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
