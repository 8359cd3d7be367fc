"""The evaluation of images that are there: features of what is new, measures, results, a picture."""

from __future__ import annotations

import logging
import platform
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from focusdpo.foundation.files import hash_of, write_json
from focusdpo.foundation.packages import version_of
from focusdpo.foundation.text import counted, first_of
from focusdpo.metrics import report
from focusdpo.metrics.bootstrap import mean_interval
from focusdpo.metrics.config import EvaluateConfig
from focusdpo.metrics.embeddings import embed, stack
from focusdpo.metrics.encoders import unit
from focusdpo.metrics.fid import frechet_distance_of_features, frechet_interval
from focusdpo.metrics.images import Picture
from focusdpo.metrics.inputs import Inputs
from focusdpo.metrics.report import Line, Row, Subjects, by, line_of, subject_rows, summarise
from focusdpo.metrics.similarity import image_metrics, image_values, region_metrics, region_values

logger = logging.getLogger(__name__)

EMBEDDINGS = "embeddings"
PACKAGES = ("focusdpo", "torch", "transformers", "torchmetrics", "scipy", "numpy", "pillow")
MISSING = {"missing": "missing subjects, rate"}


def evaluate(config: EvaluateConfig, inputs: Inputs) -> None:
    """Encodes what is new, measures, and writes into a folder that is ready."""
    out = Path(config.output_dir)
    notes = _notes(config, inputs)
    images, regions, fid_features = _measure(config, inputs, out / EMBEDDINGS)
    interval = partial(mean_interval, level=config.level, resamples=config.resamples, seed=config.seed)
    metrics, leakage = image_metrics(list(inputs.encoders)), region_metrics(list(inputs.encoders)) | MISSING
    asked = {line: frozenset(names) for line, names in inputs.subjects.names.items()}
    summary = summarise(images, metrics, interval, asked) | summarise(regions, leakage, interval, asked)
    if inputs.fid is not None:
        summary["fid"] = _fid(config, inputs, fid_features, asked)
    regions_of = by(regions, "subject")  # regions count for the subject that they show
    subjects = {}
    for subject, rows in sorted(by(subject_rows(images, metrics), "subject").items()):
        alone = dict.fromkeys(asked, frozenset({subject}))
        subjects[subject] = summarise(rows, metrics, interval, alone, "prompts")
        subjects[subject] |= summarise(regions_of.get(subject, ()), leakage, interval, alone, "prompts")
    prompts = [
        ((line, inputs.prompts[line].text, len(rows)), summarise(rows, metrics, interval, asked, "images"))
        for line, rows in tqdm(by(images, "line").items(), desc="intervals per prompt", unit="prompt", leave=False)
    ]
    results = {
        "settings": asdict(config),
        "versions": {"python": platform.python_version(), **{name: version_of(name) for name in PACKAGES}},
        "encoders": {name: each.image.key for name, each in inputs.encoders.items()},
        **notes,
        "summary": {name: asdict(line) for name, line in summary.items()},
        "subjects": {name: {metric: asdict(line) for metric, line in lines.items()} for name, lines in subjects.items()},
        "images": images,
        "regions": regions,
    }
    report.write_table(out / report.PROMPTS, ("line", "prompt", "images"), prompts)
    report.write_table(out / report.SUBJECTS, ("subject",), [((name,), lines) for name, lines in subjects.items()])
    shown = {name: label for name, label in metrics.items() if not name.endswith("_min")}
    leaks = {name: label for name, label in leakage.items() if name.endswith("_leaks")}
    report.draw_subjects(out / report.PICTURE, subjects, summary, [shown, leaks], config.level)
    write_json(out / report.RESULTS, results)  # last: it says that the run is whole
    fid = {} if inputs.fid is None else {"fid": f"FID ({inputs.fid.name})"}
    print(report.table(summary, metrics | fid, config.level, "images"))
    if regions:
        print("\n" + report.table(summary, leakage, config.level, "regions"))
    logger.info("%s: %s", out, ", ".join(report.FILES))


def _notes(config: EvaluateConfig, inputs: Inputs) -> dict[str, Any]:
    """What there is and what is missing, for the results; and a warning where it would mislead."""
    counts = Counter(image.line for image in inputs.images)
    per_prompt = sorted(Counter(counts.values()).items())
    if inputs.missing:
        logger.warning("%d of %s: no or too few images", len(inputs.missing), counted(inputs.lines, "prompt"))
    if len(per_prompt) > 1:
        text = ", ".join(f"{prompts} have {count}" for count, prompts in per_prompt)
        logger.warning("prompts count by their images, and differ: %s", text)
    unmentioned = () if inputs.regions is None else inputs.regions.unmentioned
    if unmentioned:
        logger.warning("%d of %s: no regions", len(unmentioned), counted(len(inputs.images), "image"))
    contents = Counter((image.line, inputs.contents[image.path].checksum) for image in inputs.images)
    copies = sorted({line for (line, _), count in contents.items() if count > 1})
    if copies:
        logger.warning("lines with one image several times over, byte for byte: %s", ", ".join(map(str, copies)))
    long: list[int] = []
    clip = inputs.encoders.get("clip")
    if clip is not None and clip.truncated is not None:
        texts = {prompt.text for prompt in inputs.prompts.values()}
        cut = set(clip.truncated(sorted(texts)))
        long = [line for line, prompt in inputs.prompts.items() if prompt.text in cut]
    if long:
        logger.warning("longer than CLIP reads, and cut: %s (line %s)", counted(len(long), "prompt"), first_of(long, 10))
    return {
        "counts": {
            "prompts_in_manifest": inputs.lines,
            "prompts": len(inputs.prompts),
            "images": len(inputs.images),
            "images_per_prompt": {str(count): prompts for count, prompts in per_prompt},
        },
        "missing_lines": list(inputs.missing),
        "images_without_regions": list(unmentioned),
        "lines_with_copies": copies,
        "lines_cut_by_clip": long,
    }


def _measure(config: EvaluateConfig, inputs: Inputs, folder: Path) -> tuple[list[Row], list[Row], Any]:
    """Rows of images and of regions, and the features for FID: real [N, D] and generated [M, D]."""
    contents = inputs.contents

    def key(picture: Picture) -> str:
        return picture.key(contents)

    generated = {image.name: Picture(image.path) for image in inputs.images}
    found_regions = () if inputs.regions is None else inputs.regions.regions
    compared: list[Picture] = [*generated.values()]
    compared += [photo for references in inputs.references.values() for photos in references for photo in photos]
    compared += [region.picture for region in found_regions if region.picture is not None]

    def vectors_of(encoder: Any, items: Mapping[str, Any], read: Callable[[Any], Any]) -> dict[str, Any]:
        found = embed(encoder, items, read, folder, config.batch_size)
        return {name: unit(embedding) for name, embedding in found.items()}

    vectors = {
        setting: vectors_of(each.image, {key(picture): picture for picture in compared}, Picture.read)
        for setting, each in inputs.encoders.items()
    }
    text_keys = {line: hash_of("prompt", prompt.text) for line, prompt in inputs.prompts.items()}
    clip, texts = inputs.encoders.get("clip"), None
    if clip is not None and clip.text is not None:
        prompts = {text_keys[line]: prompt.text for line, prompt in inputs.prompts.items()}
        texts = vectors_of(clip.text, prompts, str)
    photos = {line: [[key(photo) for photo in each] for each in found] for line, found in inputs.references.items()}
    images: list[Row] = []
    for image in inputs.images:
        what = {"image": image.name, "line": image.line, "subjects": list(inputs.subjects.names[image.line])}
        name = key(generated[image.name])
        images.append(what | image_values(name, photos[image.line], text_keys[image.line], vectors, texts))
    regions: list[Row] = []
    for region in found_regions:
        line, picture = region.image.line, region.picture
        what = {"image": region.image.name, "line": line, "reference": region.subject}
        what |= {"subject": inputs.subjects.names[line][region.subject], "missing": float(picture is None)}
        if picture is not None and len(photos[line]) > 1:
            what |= region_values(key(picture), photos[line], region.subject, vectors)
        regions.append(what)
    if inputs.fid is None:
        return images, regions, None
    every = {key(picture): picture for picture in (*generated.values(), *inputs.real)}
    features = embed(inputs.fid, every, Picture.read, folder, config.batch_size)
    fake = stack(features, [key(picture) for picture in generated.values()])
    return images, regions, (stack(features, [key(picture) for picture in inputs.real]), fake)


def _fid(config: EvaluateConfig, inputs: Inputs, features: Any, subjects: Subjects) -> Line:
    real, fake = features
    fewest = min(len(real), len(fake))
    if fewest <= real.shape[1]:
        text = "FID of %d images with %d features: its covariance is not full, and it is too high"
        logger.warning(text, fewest, real.shape[1])
    rows = [{"line": image.line, "image": image.name} for image in inputs.images]
    estimate = partial(frechet_interval, real, fake, level=config.level, resamples=config.fid_resamples, seed=config.seed)
    return line_of(rows, subjects, "subjects", frechet_distance_of_features(real, fake), estimate)
