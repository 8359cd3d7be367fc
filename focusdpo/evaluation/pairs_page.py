"""A page to look at preference pairs: one HTML file, and a folder of thumbnails beside it."""

from __future__ import annotations

import re
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from PIL import Image, ImageChops, ImageFilter, ImageOps
from tqdm.auto import tqdm

from focusdpo.data.checks import CheckedPair
from focusdpo.data.images import Size, read_image, read_mask
from focusdpo.data.records import Problem
from focusdpo.data.validation import check_pairs
from focusdpo.evaluation import pages
from focusdpo.files import stamp, write_stamped
from focusdpo.folders import OutputFolder

COMMAND = "data show"
THUMBNAILS = "thumbnails"
GAIN = 2  # of the difference, so that a faint one is seen
COMMON = "#ff2d95"  # a prior for all subjects; on hardly any photo
SUBJECTS = (  # one for each of six subjects, where each has its own prior
    "#ffd400",
    "#00c8ff",
    "#ff5ac8",
    "#5be37d",
    "#ff8a1f",
    "#b388ff",
)


@dataclass(frozen=True)
class Picture:
    """What a card shows in one place: a thumbnail and the outlines over it, or that there is none. Paths for the page."""

    caption: str
    colour: str | None = None
    size: Size = (1, 1)
    image: str | None = None
    outlines: str | None = None


@dataclass
class Card:
    """One pair, or a line of which none could be made."""

    file: Path
    line: int
    prompt: str = ""
    classes: tuple[str, ...] = ()
    references: tuple[Picture, ...] = ()
    targets: tuple[Picture, ...] = ()
    problems: list[Problem] = field(default_factory=list)

    @property
    def kinds(self) -> list[str]:
        """What the filter by problem looks for: severities, and with the field they are about."""
        return sorted({kind for p in self.problems for kind in (p.severity, f"{p.severity} {_name(p)}")}) or ["none"]


def check_page(page: Path, overwrite: bool) -> OutputFolder:
    """Refuses to write over what is there, and returns the folder that goes with the page.

    Raises:
        ValueError, OSError: with the setting's name.
    """
    pages.check_page(page, COMMAND, overwrite)
    out = OutputFolder("out", page.with_name(f"{page.stem}_files"), COMMAND, [rf"{THUMBNAILS}-[0-9a-f]{{8}}/\d+_\w+\.webp"])
    out.check(overwrite or out.is_unfinished, "replace it with --overwrite true, or name another file")
    return out


def write_page(path: str | Path, page: Path, out: OutputFolder, size: int, progress: bool = True) -> list[Card]:
    """Checks all pairs and writes the page, with what is wrong beside each.

    An earlier page and its thumbnails stay until the new ones are whole: these have a folder of their own.

    Args:
        path: what `find_sources` takes.
        page: the HTML file.
        out: what `check_page` gave.
        size: pixels of a thumbnail's longest side.
        progress: show progress bars.
    """
    pairs, problems = check_pairs(path, "full", progress)
    out.begin(clear=False)
    with out:
        earlier = set(out.path.glob(f"{THUMBNAILS}-*"))
        thumbnails = out.path / f"{THUMBNAILS}-{uuid.uuid4().hex[:8]}"
        thumbnails.mkdir()
        ordered = _draw(pairs, problems, thumbnails, size, progress)
        write_stamped(page, _render(str(path), ordered), COMMAND, errors="backslashreplace")
        for folder in earlier:
            out.remove(folder)
    return ordered


def _draw(pairs: list[CheckedPair], problems: list[Problem], folder: Path, size: int, progress: bool) -> list[Card]:
    """Writes the thumbnails; the cards by file and line."""
    with ThreadPoolExecutor() as pool:  # Pillow releases the interpreter while it decodes, scales and encodes
        drawn = pool.map(lambda i, pair: _Drawer(i, pair, folder, size).card(), range(len(pairs)), pairs)
        found = list(tqdm(drawn, total=len(pairs), desc="drawing pairs", unit="pair", disable=not progress, leave=False))
    cards = {(card.file, card.line): card for card in found}
    for problem in problems:
        place = (problem.file, problem.line)
        cards.setdefault(place, Card(*place)).problems.append(problem)
    return sorted(cards.values(), key=lambda card: (str(card.file), card.line))


def _render(path: str, cards: list[Card]) -> str:
    classes = Counter(name for card in cards for name in dict.fromkeys(card.classes))
    kinds = Counter(kind for card in cards for kind in card.kinds)
    fields: dict[str, list[str]] = defaultdict(list)
    for kind in sorted(kinds):
        severity, _, name = kind.partition(" ")
        if name:
            fields[severity].append(name)
    values: dict[str, Any] = {"path": path, "cards": cards, "classes": classes.most_common(), "kinds": kinds, "fields": fields}
    loader = PackageLoader("focusdpo.evaluation", "page")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("page.html").render(values, gain=GAIN, stamp=stamp(COMMAND))


def _name(problem: Problem) -> str:
    """The field, whichever reference or subject it is of."""
    return re.sub(r"\[\d+\]", "", problem.field)


class _Drawer:
    """Draws the pictures of one pair, of the files that could be read."""

    def __init__(self, index: int, pair: CheckedPair, folder: Path, size: int) -> None:
        self.record = pair.record
        self.sizes = pair.sizes
        self.prefix = f"{index:06}"
        self.folder = folder
        self.longest = size

    def card(self) -> Card:
        record = self.record
        references = []
        for i, reference in enumerate(record.references):
            caption = reference.class_name or f"reference {i + 1}"
            swatch = self.colour(i) if record.per_subject else None
            references.append(
                self.picture(f"references[{i}].image", caption, {f"references[{i}].mask": self.colour(i)}, swatch)
            )
        priors = {name: self.colour(i) for i, name in enumerate(record.prior_fields)}
        targets = (self.picture("winner", "winner", priors), self.picture("loser", "loser", {}), self.difference())
        classes = tuple(reference.class_name or "" for reference in record.references)
        return Card(record.file, record.line, record.prompt, classes, tuple(references), targets)

    def colour(self, subject: int) -> str:
        return SUBJECTS[subject] if self.record.per_subject else COMMON

    def picture(self, name: str, caption: str, masks: dict[str, str], colour: str | None = None) -> Picture:
        """An image and the outlines of the masks over it, each in its colour."""
        if name not in self.sizes:
            return Picture(caption, colour)
        thumbnail = self.thumbnail(read_image(self.record.image_fields[name]))
        stem = re.sub(r"\W+", "", name)
        fitting = {mask: paint for mask, paint in masks.items() if self.sizes.get(mask) == self.sizes[name]}
        outlines = None
        if fitting:
            lines = [(read_mask(self.record.mask_fields[mask]), paint) for mask, paint in fitting.items()]
            outlines = self.save(outlines_of(lines, thumbnail.size), f"{stem}_outlines", lossless=True)
        return Picture(caption, colour, thumbnail.size, self.save(thumbnail, stem, quality=80), outlines)

    def difference(self) -> Picture:
        caption = f"difference × {GAIN}"
        if "winner" not in self.sizes or self.sizes["winner"] != self.sizes.get("loser"):
            return Picture(caption)
        difference = ImageChops.difference(read_image(self.record.winner), read_image(self.record.loser))
        thumbnail = self.thumbnail(difference.point(lambda value: min(GAIN * value, 255)))
        return Picture(caption, None, thumbnail.size, self.save(thumbnail, "difference", quality=80))

    def thumbnail(self, image: Image.Image) -> Image.Image:
        image.thumbnail((self.longest, self.longest), Image.Resampling.LANCZOS)
        return image

    def save(self, image: Image.Image, name: str, **options: Any) -> str:
        file = self.folder / f"{self.prefix}_{name}.webp"
        image.save(file, **options)
        return f"{self.folder.parent.name}/{self.folder.name}/{file.name}"


def outlines_of(masks: Iterable[tuple[Image.Image, str]], size: Size) -> Image.Image:
    """The borders of masks, each in its colour with a dark line within, on a clear image; they lie inside the masks."""
    canvas = Image.new("RGBA", size)
    for mask, colour in masks:
        scaled = mask.resize(size, Image.Resampling.BOX)
        threshold = min(128, max(scaled.getextrema()[1], 1))  # a mask thinner than a pixel stays
        # The image's own edge is a border as well.
        within = ImageOps.expand(scaled.point(lambda value, least=threshold: 255 if value >= least else 0), border=1)
        bright = within.filter(ImageFilter.MinFilter(5))
        dark = bright.filter(ImageFilter.MinFilter(3))
        for ring, paint in ((ImageChops.subtract(within, bright), colour), (ImageChops.subtract(bright, dark), "#000000b0")):
            canvas.paste(paint, (0, 0), ImageOps.crop(ring, 1))
    return canvas
