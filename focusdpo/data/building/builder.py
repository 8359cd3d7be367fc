"""`focusdpo data build`: checks first, then a resumable run, then the dataset and a report."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from focusdpo.data.building.config import BuildConfig
from focusdpo.data.building.draft import Draft
from focusdpo.data.building.scenes import FILE_NAME as SCENES_FILE
from focusdpo.data.building.scenes import Scene, load_scenes
from focusdpo.data.records import FILE_NAME
from focusdpo.extras import require_package
from focusdpo.files import checksum
from focusdpo.folders import check_folder, clear_folder
from focusdpo.settings import differences, flat

logger = logging.getLogger(__name__)

MANIFEST = "manifest.jsonl"  # one line for each draft that is done
SETTINGS = "build.json"
REJECTED = "rejected.jsonl"
REPORT = "report.json"
FILES = (FILE_NAME, MANIFEST, SETTINGS, REJECTED, REPORT, "images")

# What a build that goes on may change: where things lie and what they run on.
FREE = ("scenes", "output_dir", "overwrite", "engine", "workers", "device")


def prepare_build(config: BuildConfig) -> Callable[[], None]:
    """Checks settings, scenes and output folder, and returns the build.

    Raises:
        ModuleNotFoundError: an optional dependency is missing; names the extra.
        FileNotFoundError, ValueError: scenes, models or settings are not fit.
        FileExistsError, NotADirectoryError: the folder holds something that may not be replaced.
    """
    require_package("cv2", "data build", "build")
    require_package("imagehash", "data build", "build")
    if config.engine == "ray":
        require_package("ray.data", "engine=ray", "ray")
    for group in ("segmentation", "captioning", "disruption", "gates"):
        for name in ("path", "detector"):
            folder = getattr(getattr(config, group), name, None)
            if folder is not None and not Path(folder).is_dir():
                raise FileNotFoundError(f"{group}.{name}: no such folder: {folder}; models are read from local folders")
    scenes = load_scenes(config.scenes)
    folder = Path(config.output_dir)
    settings = _settings(config)
    if config.overwrite or not (folder / SETTINGS).exists():
        hint = "delete it with --overwrite true, or name another folder"
        check_folder("output_dir", folder, FILES, config.overwrite, hint)
    else:
        _check_same(json.loads((folder / SETTINGS).read_text()), settings, folder)
    return lambda: build(config, scenes, settings)


def _settings(config: BuildConfig) -> dict[str, Any]:
    """What decides the pairs, flat."""
    file = Path(config.scenes)
    content = checksum(file / SCENES_FILE if file.is_dir() else file)
    kept = {name: value for name, value in flat(config).items() if name.split(".")[-1] not in FREE}
    return {**kept, "scenes (its content)": content[:16]}


def _check_same(saved: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    differing = differences("build", saved, now)
    if differing:
        lines = "\n  ".join(differing)
        raise ValueError(
            f"output_dir: {folder} holds a build with other settings:\n  {lines}\n"
            "use its settings to go on, delete it with --overwrite true, or name another folder"
        )


def build(config: BuildConfig, scenes: Sequence[Scene], settings: dict[str, Any]) -> None:
    """Builds what the manifest lacks, and writes the dataset."""
    from focusdpo.data.building.engines import run_plain, run_ray, steps  # imports OpenCV

    folder = Path(config.output_dir)
    clear_folder(folder, FILES if config.overwrite else ())
    _write(folder / SETTINGS, json.dumps(settings, indent=2) + "\n")
    for partial in folder.glob("images/.*.partial"):
        shutil.rmtree(partial)
    done = read_manifest(folder / MANIFEST)
    drafts = [Draft(i, v, config.seed, scene) for i, scene in enumerate(scenes) for v in range(config.pairs_per_scene)]
    left = [draft for draft in drafts if "failed" in done.get(draft.name, {"failed": "not built"})]
    if len(left) < len(drafts):
        logger.info("%d of %d drafts were done before", len(drafts) - len(left), len(drafts))
    started = time.perf_counter()
    with (folder / MANIFEST).open("a") as manifest:
        run = {"plain": run_plain, "ray": run_ray}[config.engine]
        outcomes = run(steps(config, scenes), left, config.workers) if left else iter(())
        for outcome in tqdm(outcomes, total=len(left), desc="building pairs", unit="pair", leave=False):
            manifest.write(json.dumps(outcome) + "\n")
            manifest.flush()
            os.fsync(manifest.fileno())
            done[outcome["name"]] = outcome
    seconds = time.perf_counter() - started
    finish(folder, [done[draft.name] for draft in drafts], config, len(left), seconds)


def read_manifest(file: Path) -> dict[str, dict[str, Any]]:
    """The outcomes by name; where a draft was built again, the last. A line that a kill cut short is cut off the file."""
    if not file.exists():
        return {}
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with file.open("r+b") as stream:
            stream.truncate(len(whole))
    outcomes = [json.loads(line) for line in whole.splitlines()]
    return {outcome["name"]: outcome for outcome in outcomes}


def finish(folder: Path, outcomes: list[dict[str, Any]], config: BuildConfig, built: int, seconds: float) -> None:
    """Writes pairs.jsonl, rejected.jsonl and the report, in the order of the scenes whatever the order of building."""
    from focusdpo.data.building.gates import duplicates  # imports torch

    hashes = ((outcome["name"], outcome["hash"]) for outcome in outcomes if "pair" in outcome)
    same = dict(duplicates(hashes, config.gates.min_hash_distance))
    pairs, rejected = [], []
    reasons: Counter[str] = Counter()
    for outcome in outcomes:
        place = {"line": outcome["line"], "variant": outcome["variant"]}
        if outcome["name"] in same:
            reasons["a duplicate"] += 1
            rejected.append({**place, "rejected": f"a duplicate of {same[outcome['name']]}"})
            shutil.rmtree(folder / "images" / outcome["name"], ignore_errors=True)
        elif "pair" in outcome:
            pairs.append(outcome["pair"])
        else:
            verdict = "failed" if "failed" in outcome else "rejected"
            reasons["failed" if verdict == "failed" else outcome[verdict]] += 1
            rejected.append({**place, verdict: outcome[verdict]})
    for name, lines in ((FILE_NAME, pairs), (REJECTED, rejected)):
        _write(folder / name, "".join(json.dumps(line) + "\n" for line in lines))
    rate = built / seconds if built else 0.0
    report = {
        "drafts": len(outcomes),
        "pairs": len(pairs),
        "rejected": dict(reasons.most_common()),
        "built_in_this_run": built,
        "seconds": round(seconds, 2),
        "per_second": round(rate, 3),
        "engine": config.engine,
        "workers": config.workers,
    }
    _write(folder / REPORT, json.dumps(report, indent=2) + "\n")
    logger.info("%d pairs of %d drafts in %s", len(pairs), len(outcomes), folder / FILE_NAME)
    for reason, count in reasons.most_common():
        logger.info("%d: %s", count, reason)
    if built:
        logger.info("%d built in %.1f s: %.2f per second with %d x %s", built, seconds, rate, config.workers, config.engine)
    if reasons["failed"]:
        logger.warning("%d failed: %s has the errors; the same command tries them again", reasons["failed"], folder / REJECTED)
    if not pairs:
        sys.exit(f"focusdpo data build: error: no draft became a pair; {folder / REJECTED} says why")


def _write(file: Path, content: str) -> None:
    """Under its own name the file is always whole."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(content)
    os.replace(partial, file)
