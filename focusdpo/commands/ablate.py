"""`focusdpo ablate`: from a run's settings to trained variants, numbers and a page."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from focusdpo.data import DatasetError
from focusdpo.data.formats import content_checksum
from focusdpo.foundation.files import write_json, write_whole
from focusdpo.foundation.output_folder import OutputFolder
from focusdpo.foundation.settings import check_begun, require
from focusdpo.studies.ablation import yardsticks
from focusdpo.studies.ablation.gradients import draw_gradients, gradients_at_start, text_of_gradients
from focusdpo.studies.ablation.jobs import JOB_WRITTEN, Job, Judge, Result, fresh_trainer, run_jobs, run_of
from focusdpo.studies.ablation.page import write_ablation_page
from focusdpo.studies.ablation.statistics import Table, tabulate, text_of
from focusdpo.studies.ablation.variants import VARIANTS, Change, changes_of
from focusdpo.studies.ablation.yardsticks import Measure
from focusdpo.studies.config import AblationConfig
from focusdpo.training.batches import check_match_count, dataset_of, load_records, prior_problems
from focusdpo.training.config import TrainConfig
from focusdpo.training.loading import check_files_and_packages
from focusdpo.training.run_files import read_run_config
from focusdpo.training.run_folder import compared_settings, model_contents

logger = logging.getLogger(__name__)

RUNS, SETTINGS_FILE, RESULTS_FILE, TABLE_FILE, PAGE_FILE = "runs", "ablation.json", "results.json", "table.txt", "ablation.html"
# What an ablation writes, see `focusdpo.foundation.output_folder`.
WRITTEN = (
    r"(ablation|results|gradients)\.json",
    r"table\.txt",
    r"ablation\.html",
    r"gradients\.png",
    *(f"{RUNS}/{pattern}" for pattern in JOB_WRITTEN),
)
GRADIENTS_FILE, GRADIENTS_PICTURE = "gradients.json", "gradients.png"
FREE = (
    "config",
    "output_dir",
    "workers",
    "overwrite",
    "baseline",
    "gradients",
    "gradient_pairs",
)  # settings that change no run


def prepare(
    config: AblationConfig,
    judge: Judge | None = None,
    measures: Mapping[str, Measure] | None = None,
    draw: Callable[[Table, Sequence[Result]], None] | None = None,
) -> Callable[[], None]:
    """Looks at the run, and returns what trains, judges and draws.

    Args:
        config: settings.
        judge: asked about each trained model, beside the yardsticks.
        measures: what the judge's numbers are, by name.
        draw: called at the end, for pictures beside the page.

    Raises:
        FileNotFoundError, ValueError: the run, or a variant of it, cannot be, also for its pairs.
        FileExistsError, NotADirectoryError: the folder holds something else.
    """
    run = read_run_config("config", config.config)
    require(run.data.validation is not None, "config", config.config, "a run with data.validation, whose pairs are judged")
    require(run.loss.loss_type != "sft", "config", config.config, "a preference loss, of which SFT is a variant")
    check_alone("ablate")
    check_files_and_packages(run)
    changes = changes_of(config, run)
    _check_pairs(run, changes)
    folder = Path(config.output_dir)
    settings = _settings(config, run)
    out = OutputFolder("output_dir", folder, "ablate", WRITTEN)
    compare = partial(check_begun, "ablation", folder, may_differ=_is_longer)
    out.check_begun(config.overwrite, SETTINGS_FILE, settings, compare, aside=(TABLE_FILE, PAGE_FILE, RESULTS_FILE))
    taken = {**(measures or {}), **yardsticks.MEASURES}

    def compare_gradients() -> None:
        with out.begin():
            print(write_gradients(folder, run, changes, config.gradient_pairs))
        logger.info("%s, %s", folder / GRADIENTS_FILE, folder / GRADIENTS_PICTURE)

    def work() -> None:
        with out.begin():
            jobs = jobs_of(config, run, changes, judge)
            results = run_jobs(jobs, config.workers)
            table = tabulate(results, changes, config.baseline, taken)
            content = {
                **settings,
                "variants": [asdict(change) for change in changes],
                "table": asdict(table),
                "results": [asdict(result) for result in results],
            }
            write_json(folder / RESULTS_FILE, content)
            text = text_of(table, {change.name: change.label for change in changes})
            write_whole(folder / TABLE_FILE, text + "\n")
            write_ablation_page(folder / PAGE_FILE, config, run, changes, results, table, jobs)
        print(text)
        logger.info("%s: the page; %s: all numbers", folder / PAGE_FILE, folder / RESULTS_FILE)
        if draw is not None:
            draw(table, results)

    return compare_gradients if config.gradients else work


def write_gradients(folder: Path, run: TrainConfig, changes: Sequence[Change], pairs: int) -> str:
    """Compares the variants' gradients before training, writes numbers and picture, and returns the table."""
    names = {change.name: change.label for change in changes}
    with TemporaryDirectory() as scratch:
        trainer = fresh_trainer(run_of(run, VARIANTS["prior"], run.seed, Path(scratch) / "run", 1, 1, 0))
        try:
            found = gradients_at_start(trainer, run, changes, pairs)
        finally:
            trainer.accelerator.free_memory()
    write_json(folder / GRADIENTS_FILE, asdict(found))
    draw_gradients(found, names, folder / GRADIENTS_PICTURE)
    return text_of_gradients(found, names)


def jobs_of(config: AblationConfig, run: TrainConfig, changes: Sequence[Change], judge: Judge | None) -> list[Job]:
    """A job for each variant and seed, seed by seed, so that an interrupted ablation has whole rows; "base" has one."""
    jobs = []
    for number, seed in enumerate(config.seeds):
        for change in changes:
            if number and not change.trained:
                continue
            folder = Path(config.output_dir) / RUNS / change.name / f"seed-{seed}"
            settings = run_of(run, change, seed, folder, config.max_steps, config.points, config.samples)
            jobs.append(Job(change, seed, settings, folder, tuple(config.times), config.judged_pairs, judge))
    return jobs


def _check_pairs(run: TrainConfig, changes: Sequence[Change]) -> None:
    """Refuses pairs that the mask of a variant cannot be made of; the coverage of all is taken, whatever their loss does."""
    parts = [records for records in load_records(run) if records]
    datasets = [dataset_of(records, run.data, run.model.backbone) for records in parts]
    problems = []
    for change in changes:
        changed = change.of(run)
        masked = replace(changed, focus=replace(changed.focus, mask="focus"))
        check_match_count(masked.focus, datasets)
        problems += [problem for records in parts for problem in prior_problems(masked, records)]
    if problems:
        raise DatasetError(problems)


def check_alone(command: str) -> None:
    """ValueError where a launcher started several processes of a command that spreads its runs itself."""
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    remedy = "one, started without accelerate launch; --workers spreads the runs over GPUs"
    require(alone, command, "several processes", remedy)


def _settings(config: AblationConfig, run: TrainConfig) -> dict[str, Any]:
    """What decides the numbers of all runs; model and pairs by their content."""
    own = {name: value for name, value in asdict(config).items() if name not in FREE}
    contents = {name: content_checksum(path)[:16] for name in ("train", "validation") if (path := getattr(run.data, name))}
    compared = {name: value for name, value in compared_settings(run).items() if name != "seed"}
    steps = {"max_steps": config.max_steps or run.max_steps}
    sampler = {f"samples.{name}": getattr(run.samples, name) for name in ("steps", "guidance", "cfg_scale", "seed")}
    return {"ablation": own, "run": {**compared, **steps, **sampler}, "model": model_contents(run.model), "pairs": contents}


def _is_longer(name: str, begun: Any, now: Any) -> bool:
    """Variants, grids and seeds may be added to: what is there stays as it is."""
    lists = ("variants", "grids", "seeds", "tau", "gamma", "match_count", "layers", "mask_from", "feature_source")
    return name in lists and isinstance(begun, list) and isinstance(now, list) and set(map(str, begun)) <= set(map(str, now))
