"""A page to look at preference pairs: one HTML file, and a folder of thumbnails beside it."""

from __future__ import annotations

import json
import math
import re
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from markupsafe import Markup
from PIL import Image, ImageChops, ImageFilter, ImageOps
from tqdm.auto import tqdm

from focusdpo.data.checks import CheckedPair
from focusdpo.data.images import ROOM, Size, read_image, read_mask
from focusdpo.data.lines import Problem
from focusdpo.data.validation import check_pairs
from focusdpo.foundation.files import stamp, write_stamped
from focusdpo.foundation.output_folder import OutputFolder
from focusdpo.foundation.text import counted
from focusdpo.pages import html as pages

COMMAND = "data show"
THUMBNAILS = "thumbnails"
GAIN = 2  # of the difference, so that a faint one is seen
BRIGHTER = [min(GAIN * value, 255) for value in range(256)] * 3  # of red, green and blue
METHOD = 2  # of WebP's encoder, 0 to 6: half of the time of its default, 4, for files larger by a twentieth
COMMON = "#ff2d95"  # a prior for all subjects; on hardly any photo
SUBJECTS = (  # one for each of six subjects, where each has its own prior
    "#ffd400",
    "#00c8ff",
    "#ff5ac8",
    "#5be37d",
    "#ff8a1f",
    "#b388ff",
)


class Picture(NamedTuple):
    """What a card shows in one place: a thumbnail and the outlines over it, or that there is none. Names of files."""

    caption: str
    colour: str | None = None
    width: int = 1
    height: int = 1
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
    resemblance: float | None = None  # of loser and winner, where the build noted it

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
        write_stamped(page, _render(str(path), thumbnails, ordered), COMMAND, errors="backslashreplace")
        for folder in earlier:
            out.remove(folder)
    return ordered


def _draw(pairs: list[CheckedPair], problems: list[Problem], folder: Path, size: int, progress: bool) -> list[Card]:
    """Writes the thumbnails; the cards by file and line."""
    with ThreadPoolExecutor() as pool:  # Pillow releases the interpreter while it decodes, scales and encodes
        drawn = pool.map(lambda i, pair: _Drawer(i, pair, folder, size).draw(), range(len(pairs)), pairs)
        found = list(tqdm(drawn, total=len(pairs), desc="drawing pairs", unit="pair", disable=not progress, leave=False))
    cards = {(card.file, card.line): card for card in found}
    for problem in problems:
        place = (problem.file, problem.line)
        cards.setdefault(place, Card(*place)).problems.append(problem)
    return sorted(cards.values(), key=lambda card: (str(card.file), card.line))


def _render(path: str, folder: Path, cards: list[Card]) -> str:
    classes = Counter(name for card in cards for name in dict.fromkeys(card.classes))
    kinds = Counter(kind for card in cards for kind in card.kinds)
    fields: dict[str, list[str]] = defaultdict(list)
    for kind in sorted(kinds):
        severity, _, name = kind.partition(" ")
        if name:
            fields[severity].append(name)
    # The page makes elements of the few cards in sight: ten thousand at once would keep a browser busy for a minute.
    data = {"folder": quote(f"{folder.parent.name}/{folder.name}"), "cards": [_as_json(card) for card in cards]}
    return pages.TEMPLATES.get_template("pairs.html").render(
        title=f"{path}: {counted(len(cards), 'pair')}",
        path=path,
        count=len(cards),
        classes=classes.most_common(),
        kinds=kinds,
        fields=fields,
        compared=any(card.resemblance is not None for card in cards),
        data=_in_script(data),
        stamp=stamp(COMMAND),
    )


def _as_json(card: Card) -> dict[str, Any]:
    """What the page's script shows, and looks for, of a card."""
    return {
        "file": str(card.file),
        "place": f"{card.file.name}:{card.line}",
        "prompt": card.prompt,
        "classes": card.classes,
        "kinds": card.kinds,
        "references": card.references,
        "targets": card.targets,
        "resemblance": card.resemblance,
        "problems": [[p.severity, p.field, p.message, p.remedy] for p in card.problems],
    }


def _in_script(value: Any) -> Markup:
    """JSON within a script element: nothing in it can end that, or begin a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    # Halves of surrogate pairs, of names that are no UTF-8, show as the page's other texts have them: as \\udcff.
    text = re.sub("[\ud800-\udfff]", lambda half: rf"\\u{ord(half[0]):04x}", text)
    return Markup(text.replace("<", r"\u003c"))


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

    def draw(self) -> Card:
        areas = {name: width * height for name, (width, height) in self.sizes.items()}
        # Winner, loser and their difference, and a file more.
        with ROOM.hold(2 * areas.get("winner", 0) + areas.get("loser", 0) + max(areas.values(), default=0)):
            return self.card()

    def card(self) -> Card:
        record = self.record
        references = []
        for i, reference in enumerate(record.references):
            caption = reference.class_name or f"reference {i + 1}"
            swatch = self.colour(i) if record.per_subject else None
            name, masks = f"references[{i}].image", {f"references[{i}].mask": self.colour(i)}
            references.append(self.picture(name, caption, masks, self.read(name), swatch))
        priors = {name: self.colour(i) for i, name in enumerate(record.prior_fields)}
        winner, loser = self.read("winner"), self.read("loser")
        difference = self.difference(winner, loser)  # of the whole images, which become thumbnails
        targets = (self.picture("winner", "winner", priors, winner), self.picture("loser", "loser", {}, loser), difference)
        classes = tuple(reference.class_name or "" for reference in record.references)
        noted = record.meta.get("resemblance")
        resemblance = float(noted) if isinstance(noted, int | float) and math.isfinite(noted) else None
        return Card(record.file, record.line, record.prompt, classes, tuple(references), targets, resemblance=resemblance)

    def colour(self, subject: int) -> str:
        return SUBJECTS[subject] if self.record.per_subject else COMMON

    def read(self, name: str) -> Image.Image | None:
        """None where it could not be read when it was checked."""
        return read_image(self.record.image_fields[name]) if name in self.sizes else None

    def picture(
        self, name: str, caption: str, masks: dict[str, str], image: Image.Image | None, colour: str | None = None
    ) -> Picture:
        """An image and the outlines of the masks over it, each in its colour."""
        if image is None:
            return Picture(caption, colour)
        thumbnail = self.thumbnail(image)
        stem = re.sub(r"\W+", "", name)
        fitting = {mask: paint for mask, paint in masks.items() if self.sizes.get(mask) == self.sizes[name]}
        outlines = None
        if fitting:
            lines = [(read_mask(self.record.mask_fields[mask]), paint) for mask, paint in fitting.items()]
            outlines = self.save(outlines_of(lines, thumbnail.size), f"{stem}_outlines", lossless=True)
        return Picture(caption, colour, *thumbnail.size, self.save(thumbnail, stem, quality=80), outlines)

    def difference(self, winner: Image.Image | None, loser: Image.Image | None) -> Picture:
        caption = f"difference × {GAIN}"
        if winner is None or loser is None or winner.size != loser.size:
            return Picture(caption)
        thumbnail = self.thumbnail(ImageChops.difference(winner, loser).point(BRIGHTER))
        return Picture(caption, None, *thumbnail.size, self.save(thumbnail, "difference", quality=80))

    def thumbnail(self, image: Image.Image) -> Image.Image:
        image.thumbnail((self.longest, self.longest), Image.Resampling.LANCZOS)
        return image

    def save(self, image: Image.Image, name: str, **options: Any) -> str:
        file = self.folder / f"{self.prefix}_{name}.webp"
        image.save(file, method=METHOD, **options)
        return file.name


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
