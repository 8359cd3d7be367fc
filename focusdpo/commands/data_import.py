"""`focusdpo data import`: another project's list of pairs as preference pairs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from focusdpo.commands.config import ImportConfig
from focusdpo.data.formats import find_sources
from focusdpo.data.importers import import_pickapic, import_uno
from focusdpo.foundation.output_folder import OutputFolder

logger = logging.getLogger(__name__)

# What it writes, see `focusdpo.foundation.output_folder`.
IMPORTED = (r"pairs\.jsonl", r"images/\d{7,}_(prior|winner|loser|reference\d+)\.\w+", r"images/whole_\d+x\d+\.png")


def prepare(config: ImportConfig) -> Callable[[], None]:
    """Finds the source, and returns what imports it.

    Raises:
        FileNotFoundError: there is no such list or folder.
        FileExistsError, NotADirectoryError: the folder holds something that may not be replaced.
    """
    folder, source = Path(config.out_dir), Path(config.source)
    out = OutputFolder("out_dir", folder, "data import", IMPORTED)
    out.check(config.overwrite or out.is_unfinished, "replace it with --overwrite true, or name another folder")
    for name in ("losers", "priors"):
        value = getattr(config, name)
        if value is not None and not Path(value).is_dir():
            raise FileNotFoundError(f"{name}: no such folder: {value}")
    if config.losers is not None and not source.is_file():
        raise FileNotFoundError(f"source: no such file: {source}")
    files = [] if config.losers is not None else [table.file for table in find_sources(config.source)]

    def work() -> None:
        with out.begin():
            try:
                if config.losers is not None:
                    priors = None if config.priors is None else Path(config.priors)
                    writer = import_uno(source, Path(config.losers), priors, folder)
                else:
                    writer = import_pickapic(files, config.references, config.prior, folder)
            except ValueError as error:
                raise ValueError(f"source: {error}") from error
        logger.info("%s: %s", folder, writer.summary())

    return work
