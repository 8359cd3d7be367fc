"""Two-subject scenes of real photographs, with disrupted-instance losers, in the dataset format of focusdpo.data.

The winner shows both references' subjects; in the loser one of them is another instance: another subject of its class,
recoloured, or retextured. The prior is the region where the two can differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from tqdm.auto import tqdm

from focusdpo.building.photos import Subject, backgrounds, subjects
from focusdpo.building.scenes import FILE_NAME as SCENES_FILE
from focusdpo.data.images import token_size
from focusdpo.data.records import FILE_NAME

DISRUPTIONS = ("instance", "recolour", "retexture")
Placement = tuple[int, int, int, int]  # left, top, width, height


def write_dataset(folder: Path, pairs: int, resolution: int, seed: int) -> Path:
    """Composes pairs and writes them with their pairs.jsonl; returns that file."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    progress = tqdm(range(pairs), desc=f"composing {folder.name}", unit="pair", leave=False)
    for index in progress:
        rng = np.random.default_rng([seed, index])
        lines.append(json.dumps(_write_pair(folder, index, resolution, rng)))
    file = folder / FILE_NAME
    file.write_text("\n".join(lines) + "\n")
    return file


def _write_pair(folder: Path, index: int, resolution: int, rng: np.random.Generator) -> dict[str, object]:
    pair = _two_subjects(rng)
    changed = int(rng.integers(2))
    kind, disrupted = _disrupt(pair[changed], rng)
    background = _background(resolution, rng)
    places = list(_places(resolution, [(s, disrupted if i == changed else s) for i, s in enumerate(pair)], rng))

    winner, loser = background.copy(), background.copy()
    for i, (subject, place) in enumerate(zip(pair, places, strict=True)):
        _paste(winner, subject, place)
        _paste(loser, disrupted if i == changed else subject, place)
    prior = np.asarray(ImageOps.grayscale(_outline(pair[changed], places[changed], resolution))) > 0
    prior |= np.asarray(_outline(disrupted, places[changed], resolution)) > 0

    names = {part: f"{index:04d}_{part}.png" for part in ("winner", "loser", "prior")}
    winner.save(folder / names["winner"])
    loser.save(folder / names["loser"])
    Image.fromarray(prior.astype(np.uint8) * 255).save(folder / names["prior"])
    references = []
    for i, subject in enumerate(pair):
        image, mask = _reference(subject, resolution // 2)
        image.save(folder / f"{index:04d}_reference{i}.png")
        mask.save(folder / f"{index:04d}_reference{i}_mask.png")
        references.append(
            {
                "image": f"{index:04d}_reference{i}.png",
                "mask": f"{index:04d}_reference{i}_mask.png",
                "class_name": subject.class_name,
            }
        )
    prompt = f"a {pair[0].class_name} and a {pair[1].class_name}"
    meta = {"disruption": kind, "changed": changed, "subjects": [s.name for s in pair], "loser_subject": disrupted.name}
    return {"prompt": prompt, "references": references, **names, "meta": meta}


def write_scenes(folder: Path, scenes: int, resolution: int, seed: int) -> Path:
    """Composes winners alone, with what `focusdpo data build` needs to make pairs of them; returns their scenes.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in tqdm(range(scenes), desc=f"composing {folder.name}", unit="scene", leave=False):
        rng = np.random.default_rng([seed, index])
        pair, scene = _two_subjects(rng), _background(resolution, rng)
        places = list(_places(resolution, [(s, s) for s in pair], rng))
        described = []
        for i, (subject, place) in enumerate(zip(pair, places, strict=True)):
            _paste(scene, subject, place)
            image, reference_mask = _reference(subject, resolution // 2)
            files = {"reference": image, "reference_mask": reference_mask, "mask": _outline(subject, place, resolution)}
            for name, picture in files.items():
                picture.save(folder / f"{index:04d}_{name}{i}.png")
            named = {name: f"{index:04d}_{name}{i}.png" for name in files}
            described.append({"class_name": subject.class_name, "name": subject.name, **named})
        scene.save(folder / f"{index:04d}_scene.png")
        prompt = f"a {pair[0].class_name} and a {pair[1].class_name}"
        lines.append(json.dumps({"prompt": prompt, "scene": f"{index:04d}_scene.png", "subjects": described}))
    file = folder / SCENES_FILE
    file.write_text("\n".join(lines) + "\n")
    return file


def _two_subjects(rng: np.random.Generator) -> list[Subject]:
    """Two subjects of different classes, each in its own or another colour: what makes an identity here."""
    classes = sorted({s.class_name for s in subjects()})
    chosen = []
    for name in rng.choice(classes, size=2, replace=False):
        members = [s for s in subjects() if s.class_name == name]
        subject = members[int(rng.integers(len(members)))]
        chosen.append(subject.recoloured(float(rng.uniform(0.1, 0.9))) if rng.random() < 0.5 else subject)
    return chosen


def _disrupt(subject: Subject, rng: np.random.Generator) -> tuple[str, Subject]:
    """Another instance of the subject's class."""
    # A recoloured subject is named after its original: that one is no other instance.
    others = [s for s in subjects() if s.class_name == subject.class_name and not subject.name.startswith(s.name)]
    kinds = DISRUPTIONS if others else DISRUPTIONS[1:]
    kind = str(rng.choice(kinds))
    if kind == "instance":
        return kind, others[int(rng.integers(len(others)))]
    if kind == "recolour":
        return kind, subject.recoloured(float(rng.uniform(0.25, 0.75)))
    return kind, subject.retextured(str(rng.choice(["brick", "grass", "gravel"])), float(rng.random()))


def _background(resolution: int, rng: np.random.Generator) -> Image.Image:
    photos = backgrounds()
    photo = photos[int(rng.integers(len(photos)))]
    side = min(photo.size) * float(rng.uniform(0.6, 1.0))
    left, top = (float(rng.uniform(0, length - side)) for length in photo.size)
    box = (left, top, left + side, top + side)
    image = photo.resize((resolution, resolution), Image.Resampling.BICUBIC, box=box)
    return ImageEnhance.Brightness(image).enhance(float(rng.uniform(0.7, 1.1)))


def _places(resolution: int, candidates: list[tuple[Subject, Subject]], rng: np.random.Generator) -> Iterator[Placement]:
    """One box in the left and one in the right half; within it a subject keeps its proportions, standing at the bottom."""
    for half, _ in enumerate(candidates):
        width = int(resolution * rng.uniform(0.40, 0.46))
        height = int(resolution * rng.uniform(0.50, 0.80))
        left = half * resolution // 2 + int(rng.uniform(0, resolution // 2 - width))
        top = int(rng.uniform(0.05 * resolution, 0.95 * resolution - height))
        yield left, top, width, height


def _fitted(subject: Subject, place: Placement) -> tuple[Image.Image, tuple[int, int]]:
    left, top, width, height = place
    scale = min(width / subject.image.width, height / subject.image.height)
    size = (max(round(subject.image.width * scale), 1), max(round(subject.image.height * scale), 1))
    image = subject.image.resize(size, Image.Resampling.LANCZOS)
    return image, (left + (width - size[0]) // 2, top + height - size[1])


def _paste(scene: Image.Image, subject: Subject, place: Placement) -> None:
    image, corner = _fitted(subject, place)
    scene.paste(image, corner, image)


def _outline(subject: Subject, place: Placement, resolution: int) -> Image.Image:
    image, corner = _fitted(subject, place)
    outline = Image.new("L", (resolution, resolution))
    outline.paste(image.getchannel("A"), corner)
    return outline


def _reference(subject: Subject, longest: int) -> tuple[Image.Image, Image.Image]:
    """The subject alone on white, and its mask."""
    scale = 0.94 * longest / max(subject.image.size)
    size = (max(round(subject.image.width * scale), 1), max(round(subject.image.height * scale), 1))
    image = subject.image.resize(size, Image.Resampling.LANCZOS)
    canvas_size = token_size(subject.image.size, longest)
    canvas, mask = Image.new("RGB", canvas_size, "white"), Image.new("L", canvas_size)
    corner = ((canvas_size[0] - size[0]) // 2, (canvas_size[1] - size[1]) // 2)
    canvas.paste(image, corner, image)
    mask.paste(image.getchannel("A").point(lambda a: 255 if a >= 128 else 0), corner)
    return canvas, mask
