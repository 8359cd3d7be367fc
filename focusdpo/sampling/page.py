"""What is looked at: a sheet of each prompt with and without the LoRA, and a page of all images, whose links are relative."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from tqdm.auto import tqdm

from focusdpo.data.dataset import PlacedImage
from focusdpo.data.images import on_white, read_photo
from focusdpo.drawing.contact_sheets import sample_sheet, stack
from focusdpo.foundation.files import checksum, stamp, write_stamped, writing
from focusdpo.foundation.output_folder import OutputFolder
from focusdpo.foundation.text import counted
from focusdpo.pages.html import TEMPLATES
from focusdpo.sampling.config import SampleConfig
from focusdpo.sampling.inputs import Inputs
from focusdpo.sampling.work import BASE, IMAGES, Wanted, file_name, prompts_of

PAGE_FILE, SHEETS, THUMBNAILS = "index.html", "compare", "references"
WRITTEN = (r"index\.html", rf"{SHEETS}/\d{{4,}}\.png", rf"{THUMBNAILS}/[0-9a-f]{{16}}\.webp")
LONGEST = 640  # pixels of a reference's longest side, in sheets and on the page
LABELS = {BASE: "base", IMAGES: "base + LoRA"}


class Shown(NamedTuple):
    """A picture on the page: its file, relative to the page, what it is called, and its size in pixels."""

    source: str
    caption: str
    width: int
    height: int


def remove_sheets(out: OutputFolder, inputs: Inputs, missing: Sequence[Wanted]) -> None:
    """Deletes the sheets that will lack an image, before it is made: a start that is killed leaves none that is out of date."""
    for index in prompts_of(missing):
        out.remove(_sheet(out.path, inputs, index))


def write_sheets(config: SampleConfig, inputs: Inputs, folder: Path) -> None:
    """Draws the sheets that are not there: references, the model's image and the LoRA's, a row for each image of a prompt."""
    (folder / SHEETS).mkdir(exist_ok=True)
    missing = [i for i in range(len(inputs.prompts)) if not _sheet(folder, inputs, i).is_file()]
    for index in tqdm(missing, desc="drawing sheets", unit="prompt", leave=False):
        prompt, rows = inputs.prompts[index], []
        references = [_small(reference) for reference in inputs.placed[index].references]
        for number in range(config.images_per_prompt):
            name = file_name(prompt.line, number)
            images = {LABELS[kind]: Image.open(folder / kind / name) for kind in (BASE, IMAGES)}
            rows.append(sample_sheet(prompt.text, references, images))
        with writing(_sheet(folder, inputs, index)) as partial:
            stack(rows).save(partial, "PNG")


def write_page(config: SampleConfig, inputs: Inputs, folder: Path) -> None:
    """Writes index.html, and small copies of the references beside it: the folder may be moved, or given away, as a whole."""
    (folder / THUMBNAILS).mkdir(exist_ok=True)
    thumbnails: dict[str, Shown] = {}
    for reference in tqdm(_references(inputs), desc="drawing references", unit="image", leave=False):
        thumbnails[str(reference.file)] = _thumbnail(reference, folder)
    kinds = (BASE, IMAGES) if config.compare else (IMAGES,)
    prompts = [
        {
            "line": prompt.line,
            "text": prompt.text,
            "references": [
                thumbnails[str(one.file)]._replace(caption=reference.class_name or f"reference {number}")
                for number, (one, reference) in enumerate(zip(placed.references, prompt.references, strict=True), 1)
            ],
            "images": [
                [_shown(prompt.line, number, kind, placed.target, config.compare) for kind in kinds]
                for number in range(config.images_per_prompt)
            ],
        }
        for prompt, placed in zip(inputs.prompts, inputs.placed, strict=True)
    ]
    count = len(prompts) * config.images_per_prompt
    title = f"{counted(count, 'image')} of {counted(len(prompts), 'prompt')}"
    page = TEMPLATES.get_template("samples.html").render(
        title=title, prompts=prompts, facts=_facts(config, inputs), stamp=stamp("sample")
    )
    write_stamped(folder / PAGE_FILE, page, "sample", errors="backslashreplace")


def _facts(config: SampleConfig, inputs: Inputs) -> dict[str, Any]:
    """What the images were made with; of folders the last part alone, as the rest is nobody's business."""
    model = inputs.run.model
    given = {name: getattr(config, name) for name in ("steps", "guidance", "cfg_scale")}
    lora = None if inputs.lora is None else "/".join(Path(inputs.lora).absolute().parts[-2:])
    facts = {
        "model": Path(model.path).name if Path(model.path).exists() else model.path,
        "base LoRA": model.base_lora and Path(model.base_lora).name,
        "LoRA": lora and f"{lora}, scale {config.lora_scale:g}",
        **{name.replace("_", " "): "the pipeline's own" if value is None else value for name, value in given.items()},
        "size": "{}x{} px".format(*inputs.placed[0].target),
        "seed": config.seed,
    }
    return {name: value for name, value in facts.items() if value is not None}


def _shown(line: int, number: int, kind: str, size: tuple[int, int], compare: bool) -> Shown:
    caption = f"{LABELS[kind]}, {number}" if compare else str(number)
    return Shown(f"{kind}/{file_name(line, number)}", caption, *size)


def _sheet(folder: Path, inputs: Inputs, index: int) -> Path:
    return folder / SHEETS / f"{inputs.prompts[index].line:04d}.png"


def _references(inputs: Inputs) -> list[PlacedImage]:
    """Each file once."""
    return list({str(one.file): one for placed in inputs.placed for one in placed.references}.values())


def _small(reference: PlacedImage) -> Image.Image:
    image = on_white(read_photo(reference.file))
    image.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    return image


def _thumbnail(reference: PlacedImage, folder: Path) -> Shown:
    """A small copy of a reference, called by its content."""
    name = f"{THUMBNAILS}/{checksum(reference.file)[:16]}.webp"
    if not (folder / name).is_file():
        with writing(folder / name) as partial:
            _small(reference).save(partial, "WEBP", quality=85)
    with Image.open(folder / name) as image:
        return Shown(name, "", *image.size)
