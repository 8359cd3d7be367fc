"""`focusdpo convert-lora`: a LoRA from any form that tools know to any other."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

from focusdpo.commands.config import ConvertLoraConfig
from focusdpo.foundation.files import write_bytes
from focusdpo.foundation.output_folder import OutputFolder
from focusdpo.models.lora_reading import find_lora_file, read_lora
from focusdpo.models.lora_writing import FILES, lora_files

logger = logging.getLogger(__name__)


def prepare(config: ConvertLoraConfig) -> Callable[[], None]:
    """Converts in memory, and returns what writes the files.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it cannot be converted.
        FileExistsError, NotADirectoryError: the folder holds something that may not be replaced.
    """
    source, folder = find_lora_file("source", config.source), Path(config.out_dir)
    out = OutputFolder("out_dir", folder, f"convert-lora {config.to}", [re.escape(name) for name in FILES[config.to]])
    out.check(config.overwrite or out.is_unfinished, "replace it with --overwrite true, or name another folder")
    lora = read_lora("source", config.source, config.backbone)
    try:
        files = lora_files(lora, config.to)
    except ValueError as error:
        raise ValueError(f"source: {source}: {error}") from error

    def write() -> None:
        with out.begin(clear=False):
            for name, content in files.items():
                write_bytes(folder / name, content)
                logger.info("wrote %s", folder / name)

    return write
