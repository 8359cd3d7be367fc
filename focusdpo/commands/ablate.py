"""`focusdpo ablate`: from a run's settings to trained variants, numbers and a page."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

from focusdpo.data import DatasetError
from focusdpo.data.formats import content_checksum
from focusdpo.foundation.files import write_json, write_whole
from focusdpo.foundation.output_folder import OutputFolder
from focusdpo.foundation.settings import check_begun, require
from focusdpo.studies.ablation import yardsticks
from focusdpo.studies.ablation.equal_drift import DRIFT, EqualDrift, NoDriftError, at_equal_drift
from focusdpo.studies.ablation.gradients import draw_gradients, gradients_at_start, text_of_gradients
from focusdpo.studies.ablation.jobs import JOB_WRITTEN, Job, Judge, Result, fresh_trainer, run_jobs, run_of
from focusdpo.studies.ablation.page import write_ablation_page
from focusdpo.studies.ablation.statistics import Table, how_judged, judged, tabulate, text_of
from focusdpo.studies.ablation.variants import VARIANTS, Change, changes_of
from focusdpo.studies.ablation.yardsticks import Measure
from focusdpo.studies.config import AblationConfig, Grid
from focusdpo.training.batches import check_match_count, dataset_of, load_records, prior_problems
from focusdpo.training.config import TrainConfig
from focusdpo.training.loading import check_files_and_packages
from focusdpo.training.run_files import read_run_config
from focusdpo.training.run_folder import compared_settings, model_contents

logger = logging.getLogger(__name__)

RUNS, SETTINGS_FILE, RESULTS_FILE, TABLE_FILE, PAGE_FILE = "runs", "ablation.json", "results.json", "table.txt", "ablation.html"
# What an ablation writes, see `focusdpo.foundation.output_folder`.
WRITTEN = (
    r"(ablation|results)\.json",
    r"table\.txt",
    r"ablation\.html",
    *(f"{RUNS}/{pattern}" for pattern in JOB_WRITTEN),
)
GRADIENTS, GRADIENTS_FILE, GRADIENTS_PICTURE = "gradients", "gradients.json", "gradients.png"
GRADIENTS_WRITTEN = (r"gradients\.(json|png)",)
# Settings that change no run.
FREE = (
    "config", "output_dir", "workers", "overwrite", "baseline", "primary", "primary_at", "gradients", "gradient_pairs",
)  # fmt: skip
# Of the files of a run; those of an earlier version are not gone on with.
FORMAT = {"points": "values of each item, at halves of the steps"}


def prepare(
    config: AblationConfig,
    judge: Judge | None = None,
    measures: Mapping[str, Measure] | None = None,
    draw: Callable[[Table, EqualDrift | str, Sequence[Result]], None] | None = None,
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
    if config.gradients:
        return _prepare_gradients(config, run, changes)
    settings = _settings(config, run)
    out = OutputFolder("output_dir", folder, "ablate", WRITTEN)
    compare = partial(check_begun, "ablation", folder, may_differ=_is_longer)
    out.check_begun(config.overwrite, SETTINGS_FILE, settings, compare, aside=(TABLE_FILE, PAGE_FILE, RESULTS_FILE))
    taken = {**(measures or {}), **yardsticks.MEASURES}
    check_primary(config, taken, at_the_end=() if config.judge_points else tuple(measures or ()), changes=changes)

    def work() -> None:
        with out.begin():
            jobs = jobs_of(config, run, changes, judge)
            results = run_jobs(jobs, config.workers)
            table, equal = tables_of(config, results, changes, taken)
            content = {
                **settings,
                "variants": [asdict(change) for change in changes],
                "table": asdict(table),
                "equal_drift": asdict(equal) if isinstance(equal, EqualDrift) else {"none": equal},
                "results": [asdict(result) for result in results],
            }
            write_json(folder / RESULTS_FILE, content)
            text = _text(table, equal, {change.name: change.label for change in changes})
            write_whole(folder / TABLE_FILE, text + "\n")
            write_ablation_page(folder / PAGE_FILE, config, run, changes, results, table, jobs, equal)
        print(text)
        logger.info("%s: the page; %s: all numbers", folder / PAGE_FILE, folder / RESULTS_FILE)
        if draw is not None:
            draw(table, equal, results)

    return work


def _prepare_gradients(config: AblationConfig, run: TrainConfig, changes: Sequence[Change]) -> Callable[[], None]:
    """What compares the variants' gradients, in a folder of its own within the ablation's."""
    require(any(change.trained for change in changes), "variants", config.variants, "one that is trained, for --gradients")
    folder = Path(config.output_dir) / GRADIENTS
    out = OutputFolder("output_dir", folder, "ablate", GRADIENTS_WRITTEN)
    out.check(overwrite=True)

    def work() -> None:
        with out.begin():
            print(write_gradients(folder, run, changes, config.gradient_pairs))
        logger.info("%s, %s", folder / GRADIENTS_FILE, folder / GRADIENTS_PICTURE)

    return work


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
            times = tuple(config.times)
            jobs.append(Job(change, seed, settings, folder, times, config.judged_pairs, judge, config.judge_points))
    return jobs


def tables_of(
    config: AblationConfig, results: Sequence[Result], changes: Sequence[Change], measures: Mapping[str, Measure]
) -> tuple[Table, EqualDrift | str]:
    """The table at the end of training and that at equal drift, judged together; why there is none of the latter."""
    table = tabulate(results, changes, config.baseline, measures)
    try:
        if not config.primary:
            raise NoDriftError("no --primary VARIANT MEASURE is set, whose measure would say at which drift")
        equal = at_equal_drift(results, changes, config.baseline, measures, config.primary[1])
    except NoDriftError as error:
        return judged([table], config.primary, config.primary_at)[0], str(error)
    table, there = judged([table, equal.table], config.primary, config.primary_at)
    return table, replace(equal, table=there)


def _text(table: Table, equal: EqualDrift | str, names: Mapping[str, str]) -> str:
    tables, below = [table], [f"Not compared at equal drift: {equal}"]
    if isinstance(equal, EqualDrift):
        tables, below = [table, equal.table], [equal.title(names), text_of(equal.table, names)]
    return "\n\n".join(["\n".join(how_judged(tables, names)), text_of(table, names), *below])


def check_primary(
    config: AblationConfig, measures: Mapping[str, Measure], at_the_end: Sequence[str], changes: Sequence[Change] | None = None
) -> None:
    """ValueError where the primary comparison cannot be made, also for measures that are taken at the end alone.

    changes: all variants; None before there is a run, where those of grids are not known and are taken as they are named.
    """
    if not config.primary:
        return
    variant, measure = config.primary
    known = config.variants if changes is None else [change.name for change in changes]
    names = [name for name in known if name != config.baseline]
    is_open = changes is None and variant.partition("=")[0] in config.grids
    require(is_open or variant in names, "primary", config.primary, f"a variant beside the baseline, one of {names}")
    sided = [name for name, kind in measures.items() if kind.better != "neither"]
    require(measure in sided, "primary", config.primary, f"a measure that has a better side, one of {sided}")
    if config.primary_at == "end":
        return
    require("base" in config.variants, "primary_at", config.primary_at, '"end", or "base" among the variants')
    trained = "base" not in (variant, config.baseline)
    require(trained, "primary_at", config.primary_at, '"end", as "base" is not trained')
    require(DRIFT in measures, "primary_at", config.primary_at, f'"end", as {DRIFT} is not measured')
    require(config.points >= 2, "points", config.points, "at least 2 for a comparison at equal drift")
    remedy = f"true for a comparison at equal drift in {measure}, which the judge gives"
    require(measure not in at_the_end, "judge_points", config.judge_points, remedy)


def _check_pairs(run: TrainConfig, changes: Sequence[Change]) -> None:
    """Refuses pairs that the mask of a variant cannot be made of; the coverage of all is taken, whatever their loss does."""
    parts = [records for records in load_records(run) if records]
    datasets = [dataset_of(records, run.data, run.model.backbone) for records in parts]
    problems = []
    for change in changes:
        changed = change.of(run)
        masked = replace(changed, focus=replace(changed.focus, mask="focus"))
        check_match_count(masked.focus, datasets)
        found = [problem for records in parts for problem in prior_problems(masked, records)]
        problems += [replace(problem, remedy=f"split it, or leave out {change.name}") for problem in found]
    if problems:
        raise DatasetError(list({(problem.file, problem.line, problem.message): problem for problem in problems}.values()))


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
    return {
        "format": FORMAT,
        "ablation": own,
        "run": {**compared, **steps, **sampler},
        "model": model_contents(run.model),
        "pairs": contents,
    }


def _is_longer(name: str, begun: Any, now: Any) -> bool:
    """Variants, grids and seeds may be added to: what is there stays as it is."""
    lists = ("variants", "grids", "seeds", *get_args(Grid))
    return name in lists and isinstance(begun, list) and isinstance(now, list) and set(map(str, begun)) <= set(map(str, now))
