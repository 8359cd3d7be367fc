"""Jobs over devices: one after the other, or each in a process with a device of its own."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.queues import Queue

import torch
from tqdm.auto import tqdm

from focusdpo.experiments.ablation.jobs import Job, Result, work_on


def run_jobs(jobs: Sequence[Job], workers: int | None) -> list[Result]:
    """Results in the jobs' order.

    Args:
        jobs: those that are done are only read.
        workers: how many at a time; None takes a worker per GPU, or one.

    Raises:
        Exception: what a job raised; the others' results are on disk, and a new start goes on from there.
    """
    devices = 0 if not jobs or jobs[0].config.cpu else torch.cuda.device_count()
    open_jobs = [job for job in jobs if not job.is_done]
    count = min(workers or max(devices, 1), len(open_jobs))
    bar = tqdm(total=len(jobs), initial=len(jobs) - len(open_jobs), desc="ablation", unit="run")
    if count <= 1:
        for job in open_jobs:
            bar.set_postfix_str(f"{job.change.name}, seed {job.seed}")
            work_on(job)
            bar.update()
    else:
        context = multiprocessing.get_context("spawn")
        places: Queue[int] = context.Queue()
        for place in range(count):
            places.put(place)
        with ProcessPoolExecutor(count, context, _take_place, (places, devices, count)) as pool:
            futures = [pool.submit(work_on, job) for job in open_jobs]
            try:
                for future in as_completed(futures):
                    future.result()
                    bar.update()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    bar.close()
    return [work_on(job) for job in jobs]


def _take_place(places: Queue[int], devices: int, workers: int) -> None:
    """Gives a worker its device, before anything initialises CUDA, or its share of the cores; it ends with its parent."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    place = places.get()
    if devices:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(number) for number in range(devices)]
        os.environ["CUDA_VISIBLE_DEVICES"] = names[place % devices]
        if torch.cuda.device_count() != 1:
            raise RuntimeError("a worker sees several GPUs: CUDA was initialised before it was given its own")
    else:
        torch.set_num_threads(max((os.cpu_count() or 1) // workers, 1))


def _end_with_parent() -> None:
    """A killed command's workers would go on with runs that its next start takes up."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
