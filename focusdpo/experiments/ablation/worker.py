"""A worker process of an ablation: it takes its device, then one run after the other.

Nothing here may import what asks for GPUs at its import, as quantisation libraries do: a process keeps the GPUs it saw first,
and a spawned one imports this module before it is given its own. So the jobs and all that they need are imported last.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from focusdpo.experiments.ablation.jobs import Job

_stop: Event | None = None


def take_place(places: Queue[int], devices: int, workers: int, stop: Event) -> None:
    """Gives this process its GPU, or its share of the cores; it ends with its parent.

    Args:
        places: a number for each worker.
        devices: GPUs of this machine; 0 uses none.
        workers: how many there are.
        stop: set once a job has failed, or the command was interrupted: no worker begins another.
    """
    global _stop
    _stop = stop
    threading.Thread(target=_end_with_parent, daemon=True).start()
    place = places.get()
    if devices:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(number) for number in range(devices)]
        os.environ["CUDA_VISIBLE_DEVICES"] = names[place % devices]
    import torch

    if not devices:
        torch.set_num_threads(max((os.cpu_count() or 1) // workers, 1))
    elif torch.cuda.device_count() != 1:
        raise ChildProcessError("a worker sees several GPUs: CUDA was initialised before it was given its own")


def run_job(job: Job) -> None:
    """Does a job, whose result it leaves in the job's folder."""
    from focusdpo.experiments.ablation.jobs import work_on

    assert _stop is not None
    if _stop.is_set():
        raise ChildProcessError("not begun, as another run has failed or was interrupted")
    try:
        work_on(job)
    except BaseException:
        _stop.set()
        raise


def _end_with_parent() -> None:
    """A killed command's workers would go on with runs that its next start takes up."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
