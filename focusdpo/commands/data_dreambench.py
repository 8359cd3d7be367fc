"""`focusdpo data dreambench`: the evaluation's prompts as manifests, and training pairs from its photos."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from focusdpo.building.config import BuildConfig, DreamBenchConfig
from focusdpo.building.dreambench import LISTS, WRITTEN, manifest, read_classes, subjects_together
from focusdpo.building.dreambench_scenes import composed_scenes, photo_scenes
from focusdpo.building.ray_cluster import check_cluster
from focusdpo.commands import data_build
from focusdpo.data.writing import text_of, write_lines
from focusdpo.foundation.output_folder import OutputFolder
from focusdpo.foundation.packages import require_package
from focusdpo.foundation.settings import require

logger = logging.getLogger(__name__)


def prepare(config: DreamBenchConfig) -> Callable[[], None]:
    """Reads the lists, and returns what writes the manifests and builds.

    Raises:
        FileNotFoundError: a list or photos are missing.
        ValueError: a list is not in UNO's format.
        FileExistsError, NotADirectoryError: the folder holds something that may not be replaced.
        ConnectionError: the Ray cluster that is named does not answer.
    """
    require_package("cv2", "data dreambench", "build")
    if config.engine == "ray" and config.pairs_per_scene:
        check_cluster(config.ray_address)
    root, out = Path(config.root), Path(config.output_dir)
    classes = read_classes(root)
    written: dict[str, list[dict[str, Any]]] = {}
    missing: set[str] = set()
    for name in LISTS:
        written[f"{name}.jsonl"], absent = manifest(root, out, name, classes)
        missing |= absent
    if missing and not config.allow_missing:
        raise FileNotFoundError(
            f"root: {root} lacks photos of {len(missing)} subjects ({', '.join(sorted(missing))}); complete it, or leave their "
            "prompts out with --allow_missing true"
        )
    singles = photo_scenes(root, out, classes)
    require(bool(singles), "root", str(root), "a folder with at least two photos of a subject")
    together = subjects_together(root, classes)
    resumable = not config.overwrite and all(
        (out / name).is_file() and (out / name).read_text() == text_of(lines) for name, lines in written.items()
    )
    folder = OutputFolder("output_dir", out, "data dreambench", WRITTEN)
    # One that was killed before it built any pair begins anew.
    composing = folder.is_unfinished and not (out / "pairs").exists()
    folder.check(config.overwrite or composing, goes_on=resumable)
    pairs = BuildConfig(
        scenes=str(out / "scenes.jsonl"),
        output_dir=str(out / "pairs"),
        disruption=config.disruption,
        resolution=config.resolution,
        reference_resolution=config.resolution,
        pairs_per_scene=max(config.pairs_per_scene, 1),
        seed=config.seed,
        engine=config.engine,
        workers=config.workers,
        ray_address=config.ray_address,
    )

    if resumable and (out / "scenes.jsonl").exists():
        data_build.prepare(pairs)  # refuses other settings before anything is written

    def work() -> None:
        with folder.begin():
            made = composed_scenes(root, out, classes, together, config.resolution, config.seed)
            composed = list(tqdm(made, total=len(together), desc="composing scenes", unit="scene", leave=False))
            whole = [line for line in composed if line is not None]
            if len(whole) < len(composed):
                logger.info("%d pairs of subjects have no photos that show both whole", len(composed) - len(whole))
            for name, lines in {**written, "scenes.jsonl": singles + whole}.items():
                write_lines(out / name, lines)
                logger.info("%d lines in %s", len(lines), out / name)
            if missing:
                absent = ", ".join(sorted(missing))
                logger.warning("left out: the prompts of %d subjects without photos: %s", len(missing), absent)
            if config.pairs_per_scene:
                data_build.prepare(pairs)()

    return work
