"""A build of preference pairs: a resumable run over all candidates, then the dataset and a report."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from focusdpo.building.candidate import IMAGES, Candidate
from focusdpo.building.config import BuildConfig
from focusdpo.building.scenes import Scene
from focusdpo.data.records import FILE_NAME
from focusdpo.data.writing import write_lines
from focusdpo.foundation.files import write_whole
from focusdpo.foundation.journals import Journal, read_rows
from focusdpo.foundation.output_folder import OutputFolder
from focusdpo.foundation.text import counted

logger = logging.getLogger(__name__)

MANIFEST = "manifest.jsonl"  # one line for each candidate that is done
SETTINGS = "build.json"  # what the build was begun with
REJECTED = "rejected.jsonl"
REPORT = "report.json"
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
# What a build writes, see `focusdpo.foundation.output_folder`.
WRITTEN = (
    r"(pairs|manifest|rejected)\.jsonl",
    r"(build|report)\.json",
    rf"{IMAGES}/\d{{7}}-\d+/(winner|loser|reference\d+(_mask)?|prior\d+)\.png",
)


def build(config: BuildConfig, scenes: Sequence[Scene], out: OutputFolder) -> None:
    """Builds what the manifest lacks, and writes the dataset into a folder that is ready.

    Raises:
        ChildProcessError: workers were killed.
        ValueError: there are too few GPUs for the workers, or no candidate became a pair.
    """
    from focusdpo.building.engines import run_plain, steps  # imports OpenCV
    from focusdpo.building.ray_engine import run_ray

    folder = out.path
    done = read_manifest(folder)
    candidates = [Candidate(i, v, config.seed, scene) for i, scene in enumerate(scenes) for v in range(config.pairs_per_scene)]
    same = duplicates_of([done[candidate.name] for candidate in candidates if candidate.name in done], config)
    lost = [name for name, row in done.items() if "pair" in row and name not in same and not _has_images(folder, row["pair"])]
    if lost:
        logger.warning(
            "%s: images of %s are lost (of %s first), and are built again", folder, counted(len(lost), "pair"), min(lost)
        )
        done = {name: row for name, row in done.items() if name not in lost}
    left = [candidate for candidate in candidates if "failed" in done.get(candidate.name, {"failed": "not built"})]
    if len(left) < len(candidates):
        logger.info("done before: %d of %s", len(candidates) - len(left), counted(len(candidates), "candidate"))
    started = time.perf_counter()
    manifest = Journal(folder / MANIFEST)
    pipeline = steps(config, scenes)
    if config.engine == "ray":
        running = run_ray(pipeline, left, config.workers, config.ray_address)
    else:
        running = run_plain(pipeline, left, config.workers)
    with closing(manifest), closing(running) as outcomes:  # whatever is raised, workers end here
        for outcome in tqdm(outcomes, total=len(left), desc="building pairs", unit="pair", leave=False):
            manifest.write(outcome, to_disk=True)
            done[outcome["name"]] = outcome
    if config.engine == "ray":
        out.tidy()  # what actors have left that were killed and begun again
    seconds = time.perf_counter() - started
    finish(out, [done[candidate.name] for candidate in candidates], config, len(left), seconds)


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """The outcomes of a build by name; where a candidate was built again, the last.

    Those of damaged lines are not among them: their candidates are built again.
    """
    return {row["name"]: row for row in read_rows(folder / MANIFEST) if _is_outcome(row)}


def _is_outcome(row: dict[str, Any]) -> bool:
    """Whether a row of the manifest is what `Candidate.outcome` gives."""
    kinds = {"pair": dict, "rejected": str, "failed": str}
    known = [kind for kind in kinds if isinstance(row.get(kind), kinds[kind])]
    places = {"name": str, "line": int, "variant": int} | ({"hash": str} if known == ["pair"] else {})
    return len(known) == 1 and all(isinstance(row.get(name), kind) for name, kind in places.items())


def _has_images(folder: Path, pair: dict[str, Any]) -> bool:
    """Whether all images of a pair are there, to their ends."""
    try:
        names = [pair["winner"], pair["loser"], *pair["prior"]]
        names += [reference[kind] for reference in pair["references"] for kind in ("image", "mask")]
        return all(_ends(folder / name) for name in names)
    except (KeyError, TypeError, OSError):
        return False


def _ends(png: Path) -> bool:
    with png.open("rb") as stream:
        stream.seek(-len(PNG_END), 2)
        return stream.read() == PNG_END


def duplicates_of(outcomes: Sequence[dict[str, Any]], config: BuildConfig) -> dict[str, str]:
    """Names of pairs that are too much like an earlier one, and that one's."""
    from focusdpo.building.gates import duplicates  # imports torch

    hashes = ((outcome["name"], outcome["hash"]) for outcome in outcomes if "pair" in outcome)
    return dict(duplicates(hashes, config.gates.min_hash_distance))


def finish(out: OutputFolder, outcomes: list[dict[str, Any]], config: BuildConfig, built: int, seconds: float) -> None:
    """Writes pairs.jsonl, rejected.jsonl and the report, in the order of the scenes whatever the order of building."""
    folder = out.path
    same = duplicates_of(outcomes, config)
    pairs, rejected = [], []
    reasons: Counter[str] = Counter()
    for outcome in outcomes:
        place = {"line": outcome["line"], "variant": outcome["variant"]}
        if outcome["name"] in same:
            reasons["a duplicate"] += 1
            rejected.append({**place, "rejected": f"a duplicate of {same[outcome['name']]}"})
            out.remove(folder / IMAGES / outcome["name"])
        elif "pair" in outcome:
            pairs.append(outcome["pair"])
        else:
            verdict = "failed" if "failed" in outcome else "rejected"
            reasons["failed" if verdict == "failed" else outcome[verdict]] += 1
            rejected.append({**place, verdict: outcome[verdict]})
    for name, lines in ((FILE_NAME, pairs), (REJECTED, rejected)):
        write_lines(folder / name, lines)
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
    write_whole(folder / REPORT, json.dumps(report, indent=2) + "\n")
    logger.info("%s of %s in %s", counted(len(pairs), "pair"), counted(len(outcomes), "candidate"), folder / FILE_NAME)
    for reason, count in reasons.most_common():
        logger.info("%d: %s", count, reason)
    if built:
        tried = counted(built, "candidate")
        logger.info("%s tried in %.1f s: %.2f per second with %d x %s", tried, seconds, rate, config.workers, config.engine)
    if reasons["failed"]:
        logger.warning("%d failed: %s has the errors; the same command tries them again", reasons["failed"], folder / REJECTED)
    if not pairs:
        raise ValueError(f"no candidate became a pair; {folder / REJECTED} says why")
