"""The runs of an ablation: variants trained with seeds, judged on the way and at their end, here or on a GPU each."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils.memory import clear_device_cache
from tqdm.auto import tqdm

from focusdpo.foundation.files import write_whole
from focusdpo.foundation.journals import Journal, read_metrics, up_to
from focusdpo.foundation.output_folder import step_folders, under
from focusdpo.foundation.workers import Pool, WorkerDiedError, take_gpu
from focusdpo.studies.ablation import yardsticks
from focusdpo.studies.ablation.variants import Change
from focusdpo.training.config import HubConfig, SamplesConfig, TrainConfig
from focusdpo.training.run_files import SAMPLES_FOLDER, WRITTEN
from focusdpo.training.step import ModelOutput
from focusdpo.training.trainer import Trainer

logger = logging.getLogger(__name__)

RESULT_FILE = "result.json"
JUDGED_FILE = "judged.jsonl"
REMEMBERED = 2**28  # bytes of held-out pairs that are kept in memory from point to point
# What a job writes into an ablation's folder of runs; the last is the microcosm's judge.
JOB_WRITTEN = under(r"[\w=.,+-]+/seed-\d+", (*WRITTEN, r"result\.json", r"judged\.jsonl", r"generated\.safetensors"))


class Judge(Protocol):
    """Further numbers of a trained model: values by name, one for each held-out item, in the same order for every run."""

    def __call__(self, trainer: Trainer, folder: Path) -> dict[str, list[float]]: ...


@dataclass(frozen=True)
class Job:
    """A variant and a seed.

    folder: for the run's files and `result.json`, which is written last. judge: asked at the end, beside the yardsticks, and
    with `judge_points` at each point on the way.
    """

    change: Change
    seed: int
    config: TrainConfig
    folder: Path
    times: tuple[float, ...]
    judged_pairs: int | None
    judge: Judge | None = None
    judge_points: bool = False

    @property
    def is_done(self) -> bool:
        return read_result(self) is not None


@dataclass(frozen=True)
class Point:
    """A model in the course of its training. values: by measure, one for each held-out pair or other item."""

    step: int
    values: dict[str, list[float]]

    def mean(self, measure: str) -> float:
        return float(torch.tensor(self.values[measure], dtype=torch.float64).nanmean())


@dataclass(frozen=True)
class Result:
    """What a job gave.

    values: of the trained model, per held-out pair or other item, by name. curve: its points, the one before training of what
    is not trained. failed: why there are no values, where training gave up.
    """

    variant: str
    seed: int
    values: dict[str, list[float]]
    curve: list[Point]
    failed: str | None = None


def run_of(
    run: TrainConfig, change: Change, seed: int, folder: Path, max_steps: int | None, points: int, samples: int
) -> TrainConfig:
    """The settings of a job: the run's, but for the change, the seed, and what it writes where.

    It is judged at its end, and before that each time after half as many steps (`_is_point`): drift, in whose logarithm
    variants are compared, grows fastest at the start.
    """
    steps = run.max_steps if max_steps is None else max_steps
    every = max(-(-steps // points), 1)
    shown = replace(run.samples, every=steps, count=samples, manifest=None) if samples else SamplesConfig()
    return replace(
        change.of(run),
        output_dir=str(folder),
        seed=seed,
        max_steps=steps,
        validate_every=-(-steps // 2 ** (points - 1)),
        checkpoint_every=min(run.checkpoint_every or every, every),
        checkpoints_total_limit=1,
        samples=shown,
        trackers=[],
        push_to_hub=HubConfig(),
        resume=None,
        overwrite=False,
    )


def work_on(job: Job) -> Result:
    """Does a job from wherever an earlier start left it; one that is done is read."""
    result = read_result(job)
    if result is None:
        result = _train(job) if job.change.trained else _judge_untrained(job)
        clear_device_cache(garbage_collection=True)  # here, where nothing holds the trainer any more
        gc.freeze()  # what the libraries have made takes long to look through, after each of a worker's jobs
        job.folder.mkdir(parents=True, exist_ok=True)
        write_whole(job.folder / RESULT_FILE, json.dumps(asdict(result)))
    return result


def run_jobs(jobs: Sequence[Job], workers: int | None) -> list[Result]:
    """Results in the jobs' order.

    Args:
        jobs: those that are done are only read.
        workers: how many at a time; None takes a worker per GPU, or one.

    Raises:
        Exception: what a job raised. Jobs that had begun are waited for, and no other is begun; results are on disk, and a new
            start goes on from there.
        ChildProcessError: a worker was killed, and the others with it; they go on from their checkpoints.
    """
    devices = 0 if not jobs or jobs[0].config.cpu else torch.cuda.device_count()
    open_jobs = [job for job in jobs if not job.is_done]
    count = min(workers or max(devices, 1), len(open_jobs))
    bar = tqdm(total=len(jobs), initial=len(jobs) - len(open_jobs), desc="ablation", unit="run")
    if count <= 1:
        for job in open_jobs:
            bar.set_postfix_str(_name(job))
            work_on(job)
            bar.update()
    else:
        _spread(open_jobs, count, devices, bar)
    bar.close()
    return [work_on(job) for job in jobs]


def _spread(jobs: Sequence[Job], count: int, devices: int, bar: tqdm[Any]) -> None:
    with Pool(count, work_on, _name, partial(take_gpu, devices=devices), hears_signals=True) as pool:
        try:
            for _ in pool.run(jobs):
                bar.update()
        except WorkerDiedError:
            raise
        except BaseException:
            logger.info("ablation: waiting for the runs that have begun; no other is begun")
            pool.finish()
            raise


def _name(job: Job) -> str:
    return f"{job.change.name}, seed {job.seed}"


def read_result(job: Job) -> Result | None:
    """What a job gave; None where it is not done, or its file is damaged, which is said: the job is done again."""
    file = job.folder / RESULT_FILE
    try:
        content = json.loads(file.read_bytes())
        return Result(**content | {"curve": [Point(**point) for point in content["curve"]]})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        logger.warning("%s is damaged (%s), the run is judged again", file, error)
        return None


def _train(job: Job) -> Result:
    started = (job.folder / "checkpoints").is_dir()
    config = replace(job.config, resume="latest" if started else None, overwrite=not started)
    values: dict[str, list[float]] = {}
    failed: str | None = None
    known: dict[int, ModelOutput] = {}
    trainer = fresh_trainer(config, partial(_judge_point, job, known))
    try:
        trainer.train()
    except FloatingPointError as error:
        failed = str(error)
    else:
        values = _last_values(job, known, trainer)
    finally:
        trainer.accelerator.free_memory()
    return Result(job.change.name, job.seed, values, _points(job), failed)


def _judge_untrained(job: Job) -> Result:
    trainer = fresh_trainer(replace(job.config, overwrite=True))
    try:
        trainer.samples.make(0, trainer)
        values = _ask(job, {}, trainer, True)
    finally:
        trainer.accelerator.free_memory()
    return Result(job.change.name, job.seed, values, [Point(0, values)])


def fresh_trainer(config: TrainConfig, evaluation: Callable[[Trainer], None] | None = None) -> Trainer:
    """A trainer beside those that were there before: accelerate's state is one for a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    trainer = Trainer(config, evaluation=evaluation, writes_card=False)
    if config.data.num_workers == 0:  # whose processes would each keep them
        trainer.validation_set.remember(REMEMBERED)
    return trainer


def _ask(job: Job, known: dict[int, ModelOutput], trainer: Trainer, judge: bool) -> dict[str, list[float]]:
    """What the yardsticks say of a model, and with `judge` the job's judge."""
    values = yardsticks.judge(trainer, job.times, job.judged_pairs, known)
    return values | job.judge(trainer, job.folder) if judge and job.judge is not None else values


def _judge_point(job: Job, known: dict[int, ModelOutput], trainer: Trainer) -> None:
    """A point of the curve; before the first step all are what "base" has."""
    step = trainer.progress.step
    if not _is_point(step, job.config):
        return
    point = Point(step, _ask(job, known, trainer, job.judge_points))
    file = Journal(job.folder / JUDGED_FILE, up_to(step - 1))
    file.write(vars(point))
    file.close()


def _is_point(step: int, run: TrainConfig) -> bool:
    """Whether a run is judged there: after its first `validate_every` steps, twice as many, and so on, and at its end."""
    times, rest = divmod(step, run.validate_every)
    return step == run.max_steps or (rest == 0 and times.bit_count() == 1)


def _points(job: Job) -> list[Point]:
    """The points so far; ValueError where they are of an earlier version."""
    file = job.folder / JUDGED_FILE
    rows = read_metrics(file)
    if any(not isinstance(row.get("values"), dict) for row in rows):
        raise ValueError(
            f"{file}: has no values of single items, as an earlier version wrote it; delete {job.folder} to train anew"
        )
    return [Point(row["step"], row["values"]) for row in rows]


def _last_values(job: Job, known: dict[int, ModelOutput], trainer: Trainer) -> dict[str, list[float]]:
    """All numbers of a trained model; those of its last point are taken as they are."""
    points = _points(job)
    if not points or points[-1].step != job.config.max_steps:  # its line was lost
        _judge_point(job, known, trainer)
        points = _points(job)
    values = points[-1].values
    return values if job.judge is None or job.judge_points else values | job.judge(trainer, job.folder)


def sample_images(folder: Path) -> dict[int, Path]:
    """The last samples of a run, by held-out pair."""
    steps = step_folders(folder / SAMPLES_FOLDER)
    files = steps[-1][1].glob("*_sample.png") if steps else ()
    return {int(file.name.partition("_")[0]): file for file in files}
