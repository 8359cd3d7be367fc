"""Self-contained HTML pages: one file with its plots, pictures and tables, which opens without a server or a network.

A template under `templates/` is rendered into `sections.html`. Within it, `{% call section("Heading") %}` makes a section that
the table of contents lists.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from PIL import Image, ImageOps
from plotly.io import to_json
from plotly.offline import get_plotlyjs

from focusdpo.foundation.files import check_stamped, stamp, write_stamped

HEIGHT = 280  # pixels of a plot that names none
COLOURS = ("#3987e5", "#e07b39", "#2fa36b", "#a06bd6", "#c94f7c", "#1ba3b8")  # told apart, and legible on white and on black

TEMPLATES = Environment(
    loader=PackageLoader("focusdpo.pages", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)


def check_page(page: Path, command: str, overwrite: bool) -> None:
    """Refuses to write over what is there.

    Args:
        page: the HTML file of the setting `out`.
        command: that writes it.
        overwrite: whether a page that it wrote before may be replaced; another's never is.

    Raises:
        ValueError, FileExistsError, NotADirectoryError, PermissionError: with the setting's name.
    """
    if page.suffix not in (".html", ".htm"):
        raise ValueError(f"out: got {str(page)!r}; expected a file that ends with .html")
    check_stamped("out", page, command, overwrite, "replace it with --overwrite true, or name another file")


def plot(figure: go.Figure, name: str) -> Markup:
    """A figure that the page draws when it comes into sight, in the colours of the page, light or dark.

    Args:
        figure: its title stands above it as text. `layout.meta` may have "x", the name of a group of plots that zoom along x
            together, "note", a sentence under the title, and "wide", whether it takes the page's whole width.
        name: of the element; once in a page. An image that is saved from the plot is called so.
    """
    content = figure.to_plotly_json()
    layout = content["layout"]
    layout.pop("template", None)  # the page has its own
    title = (layout.pop("title", None) or {}).get("text") or ""
    meta = layout.get("meta") or {}
    height = layout.pop("height", None) or HEIGHT
    note = Markup('<p class="note">{}</p>').format(meta["note"]) if "note" in meta else ""
    data = Markup(to_json(content, validate=False))  # arrays in base64; markup in it is escaped, as it stands in a script
    return Markup(
        '<figure class="plot{wide}" id="{name}"><figcaption><h3>{title}</h3>{note}</figcaption>'
        '<div class="canvas" style="height: {height}px"></div><script type="application/json">{data}</script></figure>'
    ).format(wide=" wide" if meta.get("wide") else "", name=name, title=title, note=note, height=int(height), data=data)


def image_uri(image: str | Path | Image.Image, longest: int | None = None) -> str:
    """An image as a data: URI, in WebP.

    Args:
        image: a file, or an image.
        longest: pixels that its longest side has at most; None leaves it as it is.

    Raises:
        OSError: the file is no image, or damaged.
    """
    if not isinstance(image, Image.Image):
        with Image.open(image) as opened:
            image = ImageOps.exif_transpose(opened)
    clear = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    shown = image.convert("RGBA" if clear else "RGB")
    if longest is not None:
        shown.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    # Method 2 is a third faster than the usual 4, and as small within a percent or two.
    shown.save(stream, "WEBP", quality=80, method=2)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()


def write_page(path: Path, command: str, title: str, template: str, **values: Any) -> None:
    """Writes a page at once or not at all; an earlier one stays until then.

    Args:
        path: the HTML file; its folder is made.
        command: that writes it.
        title: of the page.
        template: name of a file under `templates/`, whose sections the page shows.
        values: what it needs. Text is escaped; what `plot` returns is not.
    """
    contents: list[tuple[str, str]] = []

    def section(heading: str, caller: Callable[[], str]) -> Markup:
        anchor = re.sub(r"\W+", "-", heading.lower()).strip("-")
        contents.append((anchor, heading))
        return Markup('<section id="{}"><h2>{}</h2>{}</section>').format(anchor, heading, Markup(caller()))

    sections = Markup(TEMPLATES.get_template(template).render(values, title=title, section=section))
    text = TEMPLATES.get_template("sections.html").render(
        title=title, sections=sections, contents=contents, plotly=Markup(get_plotlyjs()), stamp=stamp(command)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_stamped(path, text, command, errors="backslashreplace")
