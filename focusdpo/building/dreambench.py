"""`focusdpo data dreambench`: the evaluation's prompts as manifests, and training pairs from its photos.

DreamBench is the folder of google/dreambooth's dataset: a folder of photos per subject, `prompts_and_classes.txt`, and beside
them UNO's two lists, `dreambench_singleip.json` and `dreambench_multiip.json`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm

from focusdpo.building import builder
from focusdpo.building.builder import prepare_build
from focusdpo.building.config import BuildConfig, DisruptionConfig
from focusdpo.building.dreambench_scenes import COMPOSED, as_stored, composed_scenes, photo_scenes, photos, relative
from focusdpo.building.ray_cluster import check_cluster
from focusdpo.foundation.files import write_whole
from focusdpo.foundation.output_folder import OutputFolder, under
from focusdpo.foundation.packages import require_package
from focusdpo.foundation.settings import require

logger = logging.getLogger(__name__)

CLASSES_FILE = "prompts_and_classes.txt"
# What it writes, see `focusdpo.foundation.output_folder`.
WRITTEN = (
    r"(single|multi|scenes)\.jsonl",
    rf"{COMPOSED}/\d+(_[ab])?\.png",
    *under("pairs", builder.WRITTEN),
)
LISTS = {"single": "dreambench_singleip.json", "multi": "dreambench_multiip.json"}


@dataclass
class DreamBenchConfig:
    """From a DreamBench folder to manifests of its prompts, and pairs built from its photos.

    Args:
        root: DreamBench: a folder of photos per subject, prompts_and_classes.txt, and UNO's two lists.
        output_dir: Folder for single.jsonl, multi.jsonl, scenes.jsonl, composed/, and the built pairs in pairs/.
        allow_missing: Leave out the prompts whose photos are not there; their number is reported.
        pairs_per_scene: How many pairs are built of a photo; 0 writes manifests and scenes only.
        disruption: How a subject becomes another instance.
        resolution: Longest side of winner and loser in pixels.
        seed: Of every random choice.
        engine: "plain" or "ray", as for `focusdpo data build`.
        workers: Processes or actors.
        ray_address: The Ray cluster to join, as for `focusdpo data build`.
        overwrite: Delete what an earlier run left in output_dir.
    """

    root: str
    output_dir: str = "dreambench-pairs"
    allow_missing: bool = False
    pairs_per_scene: int = 1
    disruption: DisruptionConfig = field(default_factory=DisruptionConfig)
    resolution: int = 512
    seed: int = 0
    engine: Literal["plain", "ray"] = "plain"
    workers: int = 1
    ray_address: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        require(self.pairs_per_scene >= 0, "pairs_per_scene", self.pairs_per_scene, "at least 0")


def prepare_dreambench(config: DreamBenchConfig) -> Callable[[], None]:
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
    together = _subjects_together(root, classes)
    resumable = not config.overwrite and all(_holds(out / name, lines) for name, lines in written.items())
    folder = OutputFolder("output_dir", out, "data dreambench", WRITTEN)
    # One that was killed before it built any pair begins anew.
    composing = folder.is_unfinished and not (out / "pairs").exists()
    folder.check(config.overwrite or composing, "delete it with --overwrite true, or name another folder", resumable)
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
        prepare_build(pairs)  # refuses other settings before anything is written

    def work() -> None:
        folder.begin(clear=not resumable)
        with folder:
            write()

    def write() -> None:
        made = composed_scenes(root, out, classes, together, config.resolution, config.seed)
        composed = list(tqdm(made, total=len(together), desc="composing scenes", unit="scene", leave=False))
        whole = [line for line in composed if line is not None]
        if len(whole) < len(composed):
            logger.info("%d pairs of subjects have no photos that show both whole", len(composed) - len(whole))
        for name, lines in {**written, "scenes.jsonl": singles + whole}.items():
            write_whole(out / name, _text(lines))
            logger.info("%d lines in %s", len(lines), out / name)
        if missing:
            logger.warning("left out: the prompts of %d subjects without photos: %s", len(missing), ", ".join(sorted(missing)))
        if config.pairs_per_scene:
            prepare_build(pairs)()

    return work


def _text(lines: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def _holds(file: Path, lines: Sequence[dict[str, Any]]) -> bool:
    return file.is_file() and file.read_text() == _text(lines)


def _subjects_together(root: Path, classes: dict[str, str]) -> list[tuple[str, str]]:
    """The pairs of subjects of UNO's list of several, where there are photos of both, once each."""
    listed = json.loads((root / LISTS["multi"]).read_text())
    pairs = dict.fromkeys(tuple(Path(path).parent.name for path in item["image_paths"]) for item in listed)
    return [(pair[0], pair[1]) for pair in pairs if len(pair) == 2 and all(photos(root, name) for name in pair)]


def read_classes(root: Path, setting: str = "root") -> dict[str, str]:
    """Class by subject, from prompts_and_classes.txt; messages name the setting that names the folder."""
    file = root / CLASSES_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{setting}: no {CLASSES_FILE} in {root}; expected a DreamBench folder")
    rows = [line.strip().split(",") for line in file.read_text().splitlines()]
    classes = {row[0]: row[1] for row in rows if len(row) == 2 and row[0].isidentifier() and row[0] != "subject_name"}
    require(bool(classes), f"{setting}: {file}", "no line", "lines like dog2,dog")
    return classes


def manifest(root: Path, out: Path, name: str, classes: dict[str, str]) -> tuple[list[dict[str, Any]], set[str]]:
    """The prompts of one of UNO's lists, as records with references; and the subjects whose photos are missing."""
    file = root / LISTS[name]
    if not file.is_file():
        raise FileNotFoundError(f"root: no {file.name} in {root}; it is among UNO's datasets")
    lines, missing = [], set()
    try:
        listed = json.loads(file.read_text())
        if not isinstance(listed, list):
            raise ValueError(f"expected a list, got {type(listed).__name__}")
    except ValueError as error:
        raise ValueError(f"{file}: is not UNO's list ({error}); download it again") from error
    for number, item in enumerate(listed, start=1):
        try:
            prompt, paths = item["prompt"], [Path(path) for path in item["image_paths"]]
            known = [classes[path.parent.name] for path in paths]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file}: item {number}: expected prompt and image_paths of known subjects ({error})") from error
        photos = [as_stored(root / path.parent.name / path.name) for path in paths]
        absent = {photo.parent.name for photo in photos if not photo.is_file()}
        missing |= absent
        if not absent:
            images = [relative(photo, out) for photo in photos]
            references = [{"image": image, "class_name": kind} for image, kind in zip(images, known, strict=True)]
            lines.append({"prompt": prompt, "references": references, "meta": {"list": name, "item": number}})
    return lines, missing
