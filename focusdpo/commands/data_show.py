"""`focusdpo data show`: a page to look at preference pairs and their problems."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from focusdpo.data.formats import find_sources
from focusdpo.foundation.text import counted
from focusdpo.pages.config import ShowConfig
from focusdpo.pages.pairs import check_page, write_page

logger = logging.getLogger(__name__)


def prepare(config: ShowConfig) -> Callable[[], None]:
    """Finds the dataset, and returns what writes the page.

    Raises:
        FileNotFoundError: there is no such dataset.
        ValueError, FileExistsError, NotADirectoryError: the page may not be written there.
    """
    find_sources(config.path)
    page = Path(config.out)
    out = check_page(page, config.overwrite)

    def work() -> None:
        cards = write_page(config.path, page, out, config.size)
        spoilt = sum(bool(card.problems) for card in cards)
        logger.info("%s: %s, %d with problems", page, counted(len(cards), "pair"), spoilt)

    return work
