"""`focusdpo data build`: checks first, then a resumable run, then the dataset and a report."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from focusdpo.building.builder import REJECTED, SETTINGS, WRITTEN, build
from focusdpo.building.config import BuildConfig
from focusdpo.building.ray_cluster import check_cluster
from focusdpo.building.scenes import FILE_NAME as SCENES_FILE
from focusdpo.building.scenes import load_scenes
from focusdpo.data.records import FILE_NAME
from focusdpo.foundation.files import checksum
from focusdpo.foundation.output_folder import OutputFolder
from focusdpo.foundation.packages import require_package
from focusdpo.foundation.settings import differences, flat

# What a build that goes on may change: where things lie and what they run on.
FREE = ("scenes", "output_dir", "overwrite", "engine", "workers", "ray_address", "device")


def prepare(config: BuildConfig) -> Callable[[], None]:
    """Checks settings, scenes and output folder, and returns the build.

    Raises:
        ModuleNotFoundError: an optional dependency is missing; names the extra.
        FileNotFoundError, ValueError: scenes, models or settings are not fit.
        FileExistsError, NotADirectoryError: the folder holds something that may not be replaced.
        ConnectionError: the Ray cluster that is named does not answer.
    """
    require_package("cv2", "data build", "build")
    require_package("imagehash", "data build", "build")
    if config.engine == "ray":
        check_cluster(config.ray_address)
    for group in ("segmentation", "captioning", "disruption", "gates"):
        for name in ("path", "detector"):
            folder = getattr(getattr(config, group), name, None)
            if folder is not None and not Path(folder).is_dir():
                raise FileNotFoundError(f"{group}.{name}: no such folder: {folder}; models are read from local folders")
    scenes = load_scenes(config.scenes)
    folder = Path(config.output_dir)
    out = OutputFolder("output_dir", folder, "data build", WRITTEN)
    out.check_begun(config.overwrite, SETTINGS, _settings(config), partial(_check_same, folder), aside=(FILE_NAME, REJECTED))

    def work() -> None:
        with out.begin():
            out.tidy()
            build(config, scenes, out)

    return work


def _settings(config: BuildConfig) -> dict[str, Any]:
    """What decides the pairs, flat."""
    file = Path(config.scenes)
    content = checksum(file / SCENES_FILE if file.is_dir() else file)
    kept = {name: value for name, value in flat(config).items() if name.split(".")[-1] not in FREE}
    return {**kept, "scenes (its content)": content[:16]}


def _check_same(folder: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    differing = differences("build", saved, now)
    if differing:
        lines = "\n  ".join(differing)
        raise ValueError(
            f"output_dir: {folder} holds a build with other settings:\n  {lines}\n"
            "use its settings to go on, delete it with --overwrite true, or name another folder"
        )
