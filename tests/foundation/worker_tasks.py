"""What the workers in test_workers.py do; imports little, as each of them imports this."""

from __future__ import annotations

import os
import time


class OddError(Exception):
    """One that cannot be unpickled."""

    def __init__(self, first, second):
        super().__init__(first)


def work(task):
    kind, value = task
    if kind == "sleep":
        time.sleep(value)
    elif kind == "kill":
        os.kill(os.getpid(), value)
    elif kind == "exit":
        os._exit(value)
    elif kind == "raise":
        raise value
    elif kind == "fail":
        time.sleep(value)
        raise ZeroDivisionError
    elif kind == "odd":
        raise OddError("odd", 2)
    elif kind == "touch":
        time.sleep(1)
        value.touch()
    return os.getpid()


def note_place(place, folder):
    (folder / str(place)).touch()


class Threads:
    """How many threads each library has; they are imported with it."""

    def __call__(self, task):
        import cv2
        import torch

        return torch.get_num_threads(), cv2.getNumThreads(), os.environ["OMP_NUM_THREADS"]

    def __setstate__(self, state):
        import cv2  # noqa: F401
        import torch  # noqa: F401

    def __getstate__(self):
        return {"unpickled": "by __setstate__"}
