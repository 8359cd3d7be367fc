"""`focusdpo data shard`: preference pairs as WebDataset shards."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

from focusdpo.commands.config import ShardConfig
from focusdpo.data.shards import write_shards
from focusdpo.data.validation import load_pairs
from focusdpo.foundation.output_folder import OutputFolder
from focusdpo.foundation.packages import require_package
from focusdpo.foundation.text import counted

logger = logging.getLogger(__name__)

# What it writes, see `focusdpo.foundation.output_folder`.
SHARD = r"pairs-\d{5,}-of-\d{5,}\.tar"


def prepare(config: ShardConfig) -> Callable[[], None]:
    """Checks the pairs, and returns what writes the shards.

    Raises:
        FileNotFoundError, DatasetError: there is no such dataset, or it is unfit.
        FileExistsError, NotADirectoryError: the folder holds something that may not be replaced.
    """
    require_package("webdataset", "writing shards")
    folder = Path(config.out_dir)
    out = OutputFolder("out_dir", folder, "data shard", [SHARD])
    others = sorted(file.name for file in folder.glob("*.tar") if not re.fullmatch(SHARD, file.name))
    if others:  # they would be read as part of the dataset
        raise FileExistsError(f"out_dir: {folder} holds other shards ({', '.join(others[:5])}); name another folder")
    out.check(config.overwrite or out.is_unfinished, "replace them with --overwrite true, or name another folder")
    records = load_pairs(config.source, config.check)
    sources = {record.file.resolve() for record in records}
    if any(source.parent == folder.resolve() and source.suffix == ".tar" for source in sources):
        raise FileExistsError(f"out_dir: {folder} holds the source itself; name another folder")

    def work() -> None:
        with out.begin():
            shards = write_shards(records, folder, config.pairs_per_shard)
        written = f"{counted(len(records), 'pair')} to {counted(len(shards), 'shard')}"
        logger.info("wrote %s in %s", written, folder)

    return work
