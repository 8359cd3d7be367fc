"""`focusdpo data dreambench`: the evaluation's prompts as manifests, and training pairs from its photos."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from focusdpo.building.config import DreamBenchConfig
from focusdpo.building.dreambench import LISTS, PAIRS, WRITTEN, manifest, read_classes
from focusdpo.commands import data_build, data_compose
from focusdpo.data.writing import text_of, write_lines
from focusdpo.foundation.output_folder import OutputFolder
from focusdpo.foundation.text import counted

logger = logging.getLogger(__name__)


def prepare(config: DreamBenchConfig) -> Callable[[], None]:
    """Reads the lists, and returns what writes the manifests and makes the pairs.

    Raises:
        FileNotFoundError: a list or photos are missing.
        ValueError: a list is not in UNO's format.
        FileExistsError, NotADirectoryError: the folder holds something that may not be replaced.
        ConnectionError: the Ray cluster that is named does not answer.
    """
    if config.pairs:
        data_build.check_models(config.compose_config(), "data dreambench")
    root, out = Path(config.root), Path(config.output_dir)
    classes = read_classes(root)
    written: dict[str, list[dict[str, Any]]] = {}
    missing: set[str] = set()
    for name in LISTS:
        written[f"{name}.jsonl"], absent = manifest(root, out, name, classes)
        missing |= absent
    if missing and not config.allow_missing:
        raise FileNotFoundError(
            f"root: {root} lacks photos of {counted(len(missing), 'subject')} ({', '.join(sorted(missing))}); complete "
            "it, or leave their prompts out with --allow_missing true"
        )
    resumable = not config.overwrite and all(
        (out / name).is_file() and (out / name).read_text() == text_of(lines) for name, lines in written.items()
    )
    folder = OutputFolder("output_dir", out, "data dreambench", WRITTEN)
    folder.check(config.overwrite, goes_on=resumable)
    compose = partial(data_compose.prepare, config.compose_config(), classes, "root")
    if config.pairs and resumable and (out / PAIRS).exists():
        compose()  # refuses other settings before anything is written

    def work() -> None:
        with folder.begin():
            for name, lines in written.items():
                write_lines(out / name, lines)
                logger.info("%s in %s", counted(len(lines), "line"), out / name)
            if missing:
                absent = ", ".join(sorted(missing))
                subjects = counted(len(missing), "subject")
                logger.warning("left out: the prompts of %s without photos: %s", subjects, absent)
            if config.pairs:
                compose()()

    return work
