"""`focusdpo data build`: checks first, then a resumable run, then the dataset and a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from focusdpo.building.builder import REJECTED, SETTINGS, WRITTEN, build
from focusdpo.building.config import BuildConfig, ComposeConfig
from focusdpo.building.ray_cluster import check_cluster
from focusdpo.building.scenes import FILE_NAME as SCENES_FILE
from focusdpo.building.scenes import load_scenes
from focusdpo.building.segmentation import check_rembg
from focusdpo.data.records import FILE_NAME
from focusdpo.foundation.files import checksum
from focusdpo.foundation.output_folder import OutputFolder
from focusdpo.foundation.packages import require_build
from focusdpo.foundation.settings import differences, flat

# What a build that goes on may change: where things lie and what they run on.
FREE = ("scenes", "output_dir", "overwrite", "engine", "workers", "ray_address", "device")

CONTENT = "scenes (its content)"  # among the settings that decide the pairs


def prepare(config: BuildConfig) -> Callable[[], None]:
    """Checks settings, scenes and output folder, and returns the build.

    Raises:
        ModuleNotFoundError: an optional dependency is missing; names the extra.
        FileNotFoundError, ValueError: scenes, models or settings are not fit.
        FileExistsError, NotADirectoryError: the folder holds something that may not be replaced.
        ConnectionError: the Ray cluster that is named does not answer.
    """
    check_models(config, "data build")
    scenes = load_scenes(config.scenes)
    folder = Path(config.output_dir)
    out = OutputFolder("output_dir", folder, "data build", WRITTEN)
    out.check_begun(config.overwrite, SETTINGS, _settings(config), partial(_check_same, folder), aside=(FILE_NAME, REJECTED))

    def work() -> None:
        with out.begin():
            out.tidy()
            build(config, scenes, out)

    return work


def check_models(config: BuildConfig | ComposeConfig, command: str) -> None:
    """Looks at the packages, models and the cluster that the settings need.

    Raises:
        ModuleNotFoundError: a package is missing; names the extra.
        FileNotFoundError, ValueError: a setting names no model.
        ConnectionError: the Ray cluster that is named does not answer.
    """
    if config.engine == "ray":
        check_cluster(config.ray_address)
    require_build(command, encoder=config.encoder.name == "efficientnet-lite0")
    if config.segmentation.name == "rembg":
        check_rembg(config.segmentation)
    for group in ("segmentation", "encoder", "captioning", "disruption"):
        for name in ("path", "detector"):
            path = getattr(getattr(config, group), name, None)
            if path is not None and getattr(config, group).name != "rembg":
                _check_model(f"{group}.{name}", path, group in ("segmentation", "encoder"))


def _check_model(setting: str, path: str, may_be_hub_id: bool) -> None:
    if Path(path).is_dir():
        return
    if not may_be_hub_id:
        raise FileNotFoundError(f"{setting}: no such folder: {path}; this model is read from a local folder")
    if Path(path).exists() or Path(path).is_absolute() or path.startswith((".", "~")) or path.count("/") != 1:
        raise FileNotFoundError(f"{setting}: no such folder: {path} (nor a hub id, which looks like owner/name)")


def _settings(config: BuildConfig) -> dict[str, Any]:
    """What decides the pairs, flat."""
    file = Path(config.scenes)
    kept = {name: value for name, value in flat(config).items() if name.split(".")[-1] not in FREE}
    return {**kept, CONTENT: content_of(file / SCENES_FILE if file.is_dir() else file)}


def content_of(scenes: Path) -> str:
    """What tells a scenes.jsonl from another."""
    return checksum(scenes)[:16]


def _check_same(folder: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    refuse_others(folder, "a build with", differences("build", saved, now))


def refuse_others(folder: Path, what: str, differing: Sequence[str], stays: str = "") -> None:
    """ValueError where settings differ from those that `what` in the folder was begun with; `stays` is not overwritten."""
    if differing:
        lines = "\n  ".join(differing)
        raise ValueError(
            f"output_dir: {folder} holds {what} other settings:\n  {lines}\n"
            f"use its settings to go on, delete it with --overwrite true{stays}, or name another folder"
        )
