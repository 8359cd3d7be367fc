"""Text that came from outside, shown so that it cannot be taken for anything else: in terminals, logs, Markdown and tables."""

from __future__ import annotations

import logging
import os
import re
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from functools import partial

# Control characters; formats, such as those that turn the writing direction or have no width; halves of surrogate pairs; line
# and paragraph separators.
UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
MARKUP = re.compile(r"[\\`*_{}\[\]()#!|~$@:<>&^]|^[-+=]|(?<=www)\.", re.IGNORECASE)  # a name as www.a.b is a link to GitHub
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def printable(text: object) -> str:
    """The text on one line, with what is not seen, or moves what is, as escapes such as \\n, \\x1b and \\u202e."""
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in UNSEEN else c for c in str(text))


def first_line(error: BaseException) -> str:
    """What an error says, or its class: torch.distributed and Arrow put a stack of their own below."""
    return (str(error) or type(error).__name__).splitlines()[0]


def message_lines(text: object) -> str:
    """A message of several lines, each printable, all but the first indented by two spaces or more.

    Messages quote data, whose newlines look like ours. With this rule a line that begins at the margin is never a quotation: no
    prompt or file name can put "training may start" there.
    """
    first, *rest = str(text).rstrip().split("\n")
    return "\n".join([printable(first), *(line if line[:2] == "  " else f"  {line}" for line in map(printable, rest))])


def first_of(items: Sequence[object], limit: int = 5, separator: str = ", ") -> str:
    """The first few, and how many more there are: on the last one's line, or on one of their own where each item is."""
    left = len(items) - limit
    more = f"{separator if separator.isspace() else ' '}and {left} more" if left > 0 else ""
    return separator.join(map(str, items[:limit])) + more


def working_folder() -> str:
    """What relative paths are relative to."""
    try:
        return os.getcwd()
    except OSError:
        return "a folder that was deleted"


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """How many there are: 1 pair, 2 pairs, 12,000 pairs; nouns that take no s have their plural given."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def duration(seconds: float) -> str:
    """A time in its two largest units: 40 s, 3 min 20 s, 2 h 5 min, 1 d 4 h."""
    parts: list[str] = []
    left = round(seconds)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, length)
        if count or parts:
            parts.append(f"{count} {unit}" if count else "")
    return " ".join(filter(None, parts[:2])) or "0 s"


def size(count: int) -> str:
    """Bytes as people read them."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 // 100 else f"{count / 2**20:.2f} MiB"


def block(title: str, rows: Mapping[str, str], width: int | None) -> str:
    """A title, and rows with a name each below it, as `message_lines` shows them.

    Args:
        title: the first line.
        rows: texts, of several lines where they have newlines, by name.
        width: columns in which texts are wrapped, words in no case; None or 0 leaves lines as long as they are.
    """
    left = max(map(len, rows)) + 4
    lines = [title]
    for name, text in rows.items():
        parts = text.split("\n")
        if width:
            wrap = partial(textwrap.wrap, width=max(width - left, 20), break_long_words=False, break_on_hyphens=False)
            parts = [part for line in parts for part in wrap(line) or [""]]
        lines += [f"  {label:<{left - 2}}{part}" for label, part in zip([name, *[""] * len(parts)], parts, strict=False)]
    return "\n".join(lines)


class MessageFormatter(logging.Formatter):
    """Shows every record under the rule of `message_lines`."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802, the name is logging's
        return message_lines(super().formatMessage(record))


def markdown(text: object) -> str:
    """The text as Markdown shows it within a line: no markup, HTML, link, image, cell's end or formula."""
    return MARKUP.sub(r"\\\g<0>", printable(text))


def code(text: object) -> str:
    """The text on one line as code in Markdown, whatever backquotes it has itself."""
    shown = printable(text)
    quotes = "`" * (_longest(shown) + 1)
    return f"{quotes} {shown} {quotes}" if "`" in shown else f"`{shown}`"


def code_block(language: str, text: str) -> str:
    """Lines of code in Markdown, which no line of theirs ends."""
    quotes = "`" * max(3, _longest(text) + 1)
    return f"{quotes}{language}\n{text.rstrip()}\n{quotes}"


def _longest(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def cell(value: object) -> object:
    """A cell of a table for spreadsheets: a text that would be a formula there begins with an apostrophe; numbers stay."""
    if not isinstance(value, str):
        return value
    return "'" * value.startswith(FORMULA) + printable(value)


def aligned(rows: Sequence[Sequence[str]], words: int) -> str:
    """Rows as lines, columns as wide as their widest cell: the first few, of words, to the left, others to the right."""
    columns = []
    for i, column in enumerate(zip(*rows, strict=True)):
        width = max(map(len, column))
        columns.append([cell.ljust(width) if i < words else cell.rjust(width) for cell in column])
    return "\n".join("  ".join(row).rstrip() for row in zip(*columns, strict=True))
