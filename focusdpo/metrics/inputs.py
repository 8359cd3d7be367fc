"""Everything an evaluation reads, checked before the first image is encoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from focusdpo.data.lines import DatasetError, Problem
from focusdpo.data.prompts import IMAGE_SUFFIXES, Prompt, find_manifest, read_prompts
from focusdpo.metrics.config import EvaluateConfig
from focusdpo.metrics.encoders import Encoder, Encoders, check_device, load_encoder, load_inception
from focusdpo.metrics.images import Content, GeneratedImage, Picture, find_images, read_contents
from focusdpo.metrics.regions import FoundRegions, check_sizes, read_regions
from focusdpo.metrics.subjects import Subjects, find_subjects

SIMILAR = ("clip", "dino", "dinov2")  # settings of the encoders that compare images with references


@dataclass(frozen=True)
class Inputs:
    """What is compared with what, and by which encoders.

    Attributes:
        prompts: those that have images, by line of the manifest.
        subjects: who their references show.
        references: pictures of each reference of a line, several with --references all.
        images: that were generated. missing: lines of prompts that have too few.
        regions: where their subjects are.
        contents: of every file.
        encoders: by the setting that names their folder.
        fid: the encoder of FID's features. real: what it compares with.
        lines: how many prompts the manifest has.
    """

    prompts: dict[int, Prompt]
    subjects: Subjects
    references: dict[int, tuple[tuple[Picture, ...], ...]]
    images: tuple[GeneratedImage, ...]
    missing: tuple[int, ...]
    regions: FoundRegions | None
    contents: dict[Path, Content]
    encoders: dict[str, Encoders]
    fid: Encoder[Image.Image] | None
    real: tuple[Picture, ...]
    lines: int


def read_inputs(config: EvaluateConfig) -> Inputs:
    """Reads manifest and names, loads the encoders, then decodes every image.

    Raises:
        FileNotFoundError, ValueError, ModuleNotFoundError: what is not fit, named.
    """
    manifest = find_manifest(config.manifest)
    prompts = read_prompts(manifest)
    images, missing = find_images(Path(config.images), prompts, config.images_per_prompt, config.allow_missing)
    if config.fid is not None and len(images) < 2:
        message = f"images: FID needs at least 2 generated images, {config.images} holds {len(images)}"
        raise ValueError(f"{message}; generate more, or leave fid out")
    with_images = {image.line for image in images}
    used = {prompt.line: prompt for prompt in prompts if prompt.line in with_images}
    subjects = find_subjects(manifest, list(used.values()), config.references)
    references = {line: _pictures(prompt, subjects, config, manifest) for line, prompt in used.items()}
    regions = None
    if config.regions is not None:
        counts = {line: len(prompt.references) for line, prompt in used.items()}
        regions = read_regions(Path(config.regions), images, counts, config.allow_missing)
    real = _real(config, subjects)
    check_device(config.device)
    encoders = {
        setting: load_encoder(setting, Path(folder), config.device, config.dino_transform if setting == "dino" else "folder")
        for setting in SIMILAR
        if (folder := getattr(config, setting)) is not None
    }
    fid = None
    if config.fid is not None:
        path = Path(config.fid)
        fid = load_inception(path, config.device) if path.is_file() else load_encoder("fid", path, config.device).image
    contents = _contents(config, manifest, used, subjects, images, regions, real)
    _same_sizes(manifest, list(used.values()), contents, config)
    if regions is not None:
        regions = check_sizes(regions, contents)
    pictures = tuple(Picture(path) for path in real)
    return Inputs(used, subjects, references, images, missing, regions, contents, encoders, fid, pictures, len(prompts))


def _pictures(prompt: Prompt, subjects: Subjects, config: EvaluateConfig, manifest: Path) -> tuple[tuple[Picture, ...], ...]:
    """What each reference of a prompt is compared by."""
    if config.reference_crop == "none":
        photos = (subjects.photos[Path(str(reference.image))] for reference in prompt.references)
        return tuple(tuple(Picture(photo) for photo in each) for each in photos)
    lacking = [index for index, reference in enumerate(prompt.references) if reference.mask is None]
    if lacking:
        field = f"references[{lacking[0]}].mask"
        problem = Problem(manifest, prompt.line, field, "is missing", "add it, or use --reference_crop none")
        raise DatasetError([problem], "--reference_crop mask needs a mask for every reference")
    return tuple((Picture(Path(str(r.image)), mask=Path(str(r.mask))),) for r in prompt.references)


def _real(config: EvaluateConfig, subjects: Subjects) -> tuple[Path, ...]:
    """The images that FID compares with."""
    if config.fid is None:
        return ()
    if config.real is None:
        real = sorted({photo for photos in subjects.photos.values() for photo in photos})
        what = f"the manifest's references are {len(real)} photo; name a folder with --real"
    else:
        folder = Path(config.real)
        if not folder.is_dir():
            raise FileNotFoundError(f"real: no such folder: {folder}")
        real = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
        what = f"{folder} holds {len(real)}"
    if len(real) < 2:
        raise ValueError(f"real: FID needs at least 2 images of {', '.join(IMAGE_SUFFIXES)}; {what}")
    return tuple(real)


def _contents(
    config: EvaluateConfig,
    manifest: Path,
    prompts: dict[int, Prompt],
    subjects: Subjects,
    images: Sequence[GeneratedImage],
    regions: FoundRegions | None,
    real: Sequence[Path],
) -> dict[Path, Content]:
    """Decodes all that is used, each file once."""
    files = dict.fromkeys(real, "real")
    masks = {} if regions is None else dict(regions.masks)
    for prompt in prompts.values():
        for index, reference in enumerate(prompt.references):
            place = f"{manifest}:{prompt.line}: references[{index}]"
            for photo in subjects.photos[Path(str(reference.image))]:
                files[photo] = f"{place}.image"
            if config.reference_crop == "mask":
                masks.setdefault(Path(str(reference.mask)), f"{place}.mask")
    files |= {image.path: "images" for image in images}
    return read_contents(files, masks)


def _same_sizes(manifest: Path, prompts: Sequence[Prompt], contents: dict[Path, Content], config: EvaluateConfig) -> None:
    """Refuses references' masks of another size than their image, or that mark nothing, where masks are used."""
    if config.reference_crop == "none":
        return
    problems = []
    for prompt in prompts:
        for index, reference in enumerate(prompt.references):
            image, mask = contents[Path(str(reference.image))], contents[Path(str(reference.mask))]
            field = f"references[{index}].mask"
            if image.size != mask.size:
                sizes = f"is {mask.size[0]}x{mask.size[1]} pixels, but its image is {image.size[0]}x{image.size[1]}"
                problems.append(Problem(manifest, prompt.line, field, sizes, "bring both to one size"))
            elif not mask.marks:
                message = f"{reference.mask} is empty"
                problems.append(Problem(manifest, prompt.line, field, message, "expected bright pixels inside the subject"))
    if problems:
        raise DatasetError(problems, "--reference_crop mask cannot use these masks")
