"""Which Ray cluster a build runs on: the one that is named, or one of its own; never one that happens to be there."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from focusdpo.foundation.packages import require_package

logger = logging.getLogger(__name__)

VARIABLE = "RAY_ADDRESS"
LOCAL = "local"  # an address: a cluster of its own
ANSWER = 60.0  # seconds that a cluster may take to let a process join
CONNECT = 10.0  # seconds that its port may take
# Tries to join; the alarm ends it also where nobody waits for it any more.
PROBE = """
import signal, sys
signal.alarm(int(sys.argv[2]) + 1)
import ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
"""


def named_cluster(ray_address: str | None) -> tuple[str, str] | None:
    """What names the cluster to join, and its address; None where a build starts its own."""
    if ray_address is not None:
        return None if ray_address == LOCAL else ("ray_address", ray_address)
    address = os.environ.get(VARIABLE, "")
    return None if address in ("", LOCAL) else (VARIABLE, address)


def check_cluster(ray_address: str | None) -> None:
    """Looks whether the cluster that is named can be joined; nothing where none is, or this process belongs to one already.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        ConnectionError: the cluster does not answer.
    """
    ray = require_package("ray", "engine=ray", "ray")
    named = named_cluster(ray_address)
    if named is None or ray.is_initialized():
        return
    setting, address = named
    try:
        _reach(address)
        # Ray tries for minutes, and cannot be interrupted: so another process tries first.
        command = [sys.executable, "-P", "-c", PROBE, address, f"{ANSWER:.0f}"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=ANSWER)
        return
    except subprocess.TimeoutExpired:
        why = f"no answer within {ANSWER:.0f} s"
    except subprocess.CalledProcessError as error:
        why = (error.stderr.strip().splitlines() or [f"status {error.returncode}"])[-1]
    except OSError as error:
        why = error.strerror or str(error)
    remedy = "start that cluster, name another, or take one of its own with --ray_address local"
    raise ConnectionError(f"{setting}: got {address}; no Ray cluster can be joined there ({why}); {remedy}")


def _reach(address: str) -> None:
    """OSError where nothing listens at host:port or ray://host:port; other addresses are Ray's to understand."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), CONNECT).close()


@contextmanager
def joined_cluster(ray_address: str | None) -> Iterator[bool]:
    """Surrounds work on the cluster, and leaves or ends it afterwards, unless this process had joined it before.

    Yields:
        whether it is a cluster of its own, which nobody else uses.

    Raises:
        ConnectionError: the cluster that is named does not answer.
    """
    import ray

    if ray.is_initialized():
        logger.info("Ray: on the cluster that this process has joined already, %s", _address())
        yield False
        return
    check_cluster(ray_address)
    named = named_cluster(ray_address)
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        if named is None:
            ray.init(address=LOCAL, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
            resources = ray.cluster_resources()
            logger.info(
                "Ray: on a cluster of its own, with %g CPUs and %g GPUs", resources.get("CPU", 0), resources.get("GPU", 0)
            )
        else:
            ray.init(address=named[1], log_to_driver=False, logging_level=logging.WARNING)
            logger.info("Ray: on the cluster %s, which %s names", _address(), named[0])
        if is_main:  # Ray has put its own handler there, which leaves with another status; an exit in order ends a cluster too
            signal.signal(signal.SIGTERM, before if callable(before) else lambda number, _: sys.exit(128 + number))
        yield named is None
    finally:
        ray.shutdown()
        if is_main:
            signal.signal(signal.SIGTERM, before)


def _address() -> str:
    import ray

    return str(ray.get_runtime_context().gcs_address)
