"""`focusdpo data split`: a pairs.jsonl as two, which share no photo."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from focusdpo.commands.config import SplitConfig
from focusdpo.data.records import FILE_NAME
from focusdpo.data.splitting import SPLITS, line_in, split
from focusdpo.data.validation import load_pairs
from focusdpo.data.writing import write_lines
from focusdpo.foundation.output_folder import OutputFolder
from focusdpo.foundation.text import counted

logger = logging.getLogger(__name__)

WRITTEN = (rf"({'|'.join(SPLITS)})/pairs\.jsonl",)  # what it writes, see `focusdpo.foundation.output_folder`


def prepare(config: SplitConfig) -> Callable[[], None]:
    """Checks the pairs, and returns what writes the two.

    Raises:
        FileNotFoundError, DatasetError: there is no such dataset, or it is unfit.
        ValueError: no pair can be held out, or the images are in shards or tables.
        FileExistsError, NotADirectoryError: the folder holds something that may not be replaced.
    """
    folder = Path(config.out_dir)
    out = OutputFolder("out_dir", folder, "data split", WRITTEN)
    out.check(config.overwrite or out.is_unfinished, "replace them with --overwrite true, or name another folder")
    records = load_pairs(config.source, config.check)
    parts = split(records, config.held_out, config.seed)
    lines = [[line_in(folder / name, records[i]) for i in part] for name, part in zip(SPLITS, parts, strict=True)]

    def work() -> None:
        with out.begin():
            for name, part in zip(SPLITS, lines, strict=True):
                (folder / name).mkdir(parents=True, exist_ok=True)
                write_lines(folder / name / FILE_NAME, part)
                logger.info("%s in %s", counted(len(part), "pair"), folder / name / FILE_NAME)

    return work
