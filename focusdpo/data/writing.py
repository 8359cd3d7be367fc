"""Writing pairs: images under the names of their parts, and the lines of pairs.jsonl that name them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from focusdpo.foundation.files import write_whole

T = TypeVar("T")


def pair_line(
    save: Callable[[str, T], str],
    prompt: str,
    references: Sequence[tuple[T, T | None, str | None]],
    winner: T,
    loser: T,
    prior: T | list[T],
    meta: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A pair as a line of pairs.jsonl has it, once its images are stored; see `focusdpo.data.records`.

    Args:
        save: stores an image under the name of its part, like "winner" or "reference0_mask"; returns its path for the line.
        prompt: what the winner shows.
        references: image, mask and class name of each subject; None where it has none.
        winner, loser: images.
        prior: a mask, or a list with one per reference.
        meta: anything else.
    """
    described = []
    for number, (image, mask, class_name) in enumerate(references):
        reference = {"image": save(f"reference{number}", image)}
        if mask is not None:
            reference["mask"] = save(f"reference{number}_mask", mask)
        if class_name is not None:
            reference["class_name"] = class_name
        described.append(reference)
    return {
        "prompt": prompt,
        "references": described,
        "winner": save("winner", winner),
        "loser": save("loser", loser),
        "prior": [save(f"prior{i}", one) for i, one in enumerate(prior)] if isinstance(prior, list) else save("prior", prior),
        **({} if meta is None else {"meta": meta}),
    }


def png_saver(folder: Path, prefix: str = "", listed: str = "", **options: Any) -> Callable[[str, Image.Image], str]:
    """What stores the images of a pair for `pair_line`.

    Args:
        folder: where to.
        prefix: of the files' names.
        listed: what comes before these in the line, where the folder is not that of pairs.jsonl.
        options: of PNG.
    """

    def save(part: str, image: Image.Image) -> str:
        name = f"{prefix}{part}.png"
        image.save(folder / name, **options)
        return f"{listed}{name}"

    return save


def image_of(pixels: NDArray[np.uint8] | NDArray[np.bool_]) -> Image.Image:
    """Pixels [H, W, 3], or a mask [H, W] as 0 and 255."""
    return Image.fromarray(pixels.astype(np.uint8) * 255 if pixels.dtype == np.bool_ else pixels)


def text_of(lines: Iterable[dict[str, Any]]) -> str:
    """JSON, one object a line."""
    return "".join(json.dumps(line) + "\n" for line in lines)


def write_lines(file: Path, lines: Iterable[dict[str, Any]]) -> Path:
    """Writes them at once or not at all, and returns the file."""
    write_whole(file, text_of(lines))
    return file
