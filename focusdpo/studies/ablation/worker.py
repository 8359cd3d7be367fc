"""What a worker process of an ablation does: it takes its device, then one run after the other.

Nothing here may import what asks for GPUs at its import, as quantisation libraries do: a process keeps the GPUs it saw first,
and a worker imports this module before it is given its own. So the jobs and all that they need are imported last.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from focusdpo.studies.ablation.jobs import Job


def take_place(place: int, devices: int) -> None:
    """Gives this process its GPU.

    Args:
        place: the worker's number.
        devices: GPUs of this machine; 0 uses none.

    Raises:
        ChildProcessError: CUDA was initialised before.
    """
    if not devices:
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(devices)]
    os.environ["CUDA_VISIBLE_DEVICES"] = names[place % devices]
    import torch

    if torch.cuda.device_count() != 1:
        raise ChildProcessError("a worker sees several GPUs: CUDA was initialised before it was given its own")


def run_job(job: Job) -> None:
    """Does a job, whose result it leaves in the job's folder."""
    from focusdpo.studies.ablation.jobs import work_on

    work_on(job)
