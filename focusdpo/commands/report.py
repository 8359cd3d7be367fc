"""`focusdpo report`: refuses what cannot be reported on, and writes the page of a run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from focusdpo.pages.config import ReportConfig
from focusdpo.pages.html import check_page
from focusdpo.pages.run.page import write_run_page
from focusdpo.training.run_files import REPORT_FILE, read_run_config

logger = logging.getLogger(__name__)


def prepare(config: ReportConfig) -> Callable[[], None]:
    """Finds the run, and returns what writes its page.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: there is no such run.
        ValueError, FileExistsError, NotADirectoryError: the page may not be written there.
    """
    folder = Path(config.run_dir)
    if not folder.exists():
        raise FileNotFoundError(f"run_dir: no such folder: {folder}; name the output_dir of a training run")
    if not folder.is_dir():
        raise NotADirectoryError(f"run_dir: {folder} is a file; name the folder of a training run")
    read_run_config("run_dir", folder)
    own = folder / REPORT_FILE
    page = own if config.out is None else Path(config.out)
    check_page(page, "report", config.overwrite or page.resolve() == own.resolve())

    def work() -> None:
        write_run_page(folder, page, config.points, config.max_images, config.image_size)
        logger.info("%s: %.1f MB", page, page.stat().st_size / 1e6)

    return work
