"""Jobs over devices: one after the other, or each in a process with a device of its own."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from tqdm.auto import tqdm

from focusdpo.foundation.workers import Pool, WorkerDiedError
from focusdpo.studies.ablation.jobs import Job, Result, work_on
from focusdpo.studies.ablation.worker import run_job, take_place

logger = logging.getLogger(__name__)


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
    with Pool(count, run_job, _name, partial(take_place, devices=devices), hears_signals=True) as pool:
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
