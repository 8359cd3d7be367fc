"""Sheets that show a sample beside what it was asked for."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

logger = logging.getLogger(__name__)

SIDE = 320  # pixels that the longest side of an image has at least
MARGIN, LINE, FONT_SIZE = 12, 24, 18


def read_picture(file: Path) -> Image.Image | None:
    """A picture that a run drew, in RGB; None where it is not there, or damaged, which is said: a run does not end for it."""
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        return None
    except Exception as error:  # Pillow's decoders raise anything on damaged files
        logger.warning("%s: left out, it cannot be read: %s", file, error)
        return None


def sample_sheet(prompt: str, references: Sequence[Image.Image], images: Mapping[str, Image.Image]) -> Image.Image:
    """References, then images side by side under their names, the prompt above all.

    Args:
        prompt: the text; broken into lines.
        references: of any sizes, fitted into one panel.
        images: of one size, by name; each pixel becomes a square of whole pixels.
    """
    width, height = next(iter(images.values())).size
    factor = math.ceil(SIDE / max(width, height))
    size = width * factor, height * factor
    panels = {"references": _grid(references, size)} if references else {}
    panels |= {name: image.resize(size, Image.Resampling.NEAREST) for name, image in images.items()}

    font = ImageFont.load_default(FONT_SIZE)
    whole = MARGIN + len(panels) * (size[0] + MARGIN)
    lines = _wrap(prompt, font, whole - 2 * MARGIN)
    top = MARGIN + len(lines) * LINE
    sheet = Image.new("RGB", (whole, top + LINE + size[1] + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(lines):
        draw.text((MARGIN, MARGIN + i * LINE), line, "black", font)
    for i, (name, panel) in enumerate(panels.items()):
        left = MARGIN + i * (size[0] + MARGIN)
        draw.text((left, top), name, "gray", font)
        sheet.paste(panel, (left, top + LINE))
    return sheet


def stack(sheets: Sequence[Image.Image]) -> Image.Image:
    """Sheets one below the other."""
    page = Image.new("RGB", (max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)), "white")
    top = 0
    for sheet in sheets:
        page.paste(sheet, (0, top))
        top += sheet.height
    return page


def _grid(images: Sequence[Image.Image], size: tuple[int, int]) -> Image.Image:
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = size[0] // columns, size[1] // rows
    panel = Image.new("RGB", size, "white")
    for i, image in enumerate(images):
        panel.paste(ImageOps.contain(image, (width, height)), (i % columns * width, i // columns * height))
    return panel


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
