"""Runs the stages as actors on a Ray cluster: for each worker a chain of them, one for each kind of device."""

from __future__ import annotations

import pickle
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from focusdpo.building.candidate import Candidate
from focusdpo.building.engines import Step, Worker
from focusdpo.building.ray_cluster import joined_cluster
from focusdpo.foundation.workers import GOES_ON, Silence, set_threads

RETRIES = 3  # of an actor that was killed
SETTLING = 10.0  # seconds that GPUs of work that has just ended may take to be free

Segment = tuple[str, list[Step]]  # neighbouring stages on the same kind of device


class StageActor:
    """The stages of one device; a candidate comes and goes pickled, as arrays that Ray keeps cannot be written to.

    Args:
        threads: for each library that has its own.
    """

    def __init__(self, threads: int) -> None:
        self._workers: list[Worker] = []
        set_threads(threads)

    def apply(self, kept: list[Any], segment: int, candidate: bytes) -> tuple[bytes, dict[str, Any] | None]:
        """The candidate after a segment's stages, and what the manifest keeps of it, if it is done.

        Args:
            kept: a reference to all segments, which is looked up once; in a list, so that Ray does not do it at each call. No
                argument of the actor: one that is begun again could not count on it.
            segment: which of them.
            candidate: pickled.
        """
        import ray

        if not self._workers:
            self._workers = [Worker(steps) for _, steps in ray.get(kept[0])]
        done = self._workers[segment](pickle.loads(candidate))
        return (b"", done.outcome()) if done.done else (pickle.dumps(done), None)


@dataclass(frozen=True)
class _Flight:
    """A candidate on its way through a chain: actors by device."""

    candidate: Candidate
    chain: dict[str, Any]
    segment: int
    content: Any  # its last actor's result, which holds what comes next


def run_ray(
    steps: Sequence[Step], candidates: Sequence[Candidate], workers: int, ray_address: str | None = None
) -> Generator[dict[str, Any]]:
    """On the Ray cluster that `ray_address` or RAY_ADDRESS names, or on one of its own.

    Yields each candidate's outcome when it is done.

    Stages on the same kind of device share an actor; there are `workers` of each kind, and one for GPUs has a whole GPU. The
    folders of scenes and output have to be the same on every node.

    Raises:
        ConnectionError: the cluster that is named does not answer.
        ValueError: it has fewer GPUs than workers.
        ChildProcessError: an actor was killed again and again.
    """
    if not candidates:
        return
    import ray

    segments = [(device, list(group)) for device, group in groupby(steps, key=lambda step: step.device)]
    with joined_cluster(ray_address) as is_own:
        shares = _shares({device for device, _ in segments}, min(workers, len(candidates)), is_own)
        chains = [_start(shares) for _ in range(min(workers, len(candidates)))]
        try:
            yield from _fly(segments, candidates, chains)
        finally:
            for actor in (actor for chain in chains for actor in chain.values() if not is_own):
                ray.kill(actor)


def _shares(devices: set[str], workers: int, is_own: bool) -> dict[str, dict[str, float]]:
    """What each kind of actor asks the cluster for; less than a CPU where there are too few.

    An actor that no node has room for would be waited for without end.
    """
    import ray

    there, free = ray.cluster_resources(), ray.available_resources()
    if "cuda" in devices:
        until = time.monotonic() + SETTLING
        while free.get("GPU", 0) < workers <= there.get("GPU", 0) and time.monotonic() < until:
            time.sleep(0.2)
            free = ray.available_resources()
        if free.get("GPU", 0) < workers:
            gpus = f"{there.get('GPU', 0):g} GPUs"
            if there.get("GPU", 0) >= workers:
                gpus += f", {free.get('GPU', 0):g} of them free"
            raise ValueError(
                f"workers: got {workers}, of which each takes a GPU; the Ray cluster has {gpus}. Name fewer workers, or "
                "join a cluster with more GPUs by --ray_address"
            )
    cpus = int(free.get("CPU", 0)) or int(there.get("CPU", 0)) or 1
    actors = workers * len(devices)
    if actors > cpus:
        parts = -(-actors // cpus)  # how many have to share one
        share = (10_000 // parts) / 10_000  # Ray counts in these
    else:
        share = float(cpus // actors) if is_own else 1.0
    return {device: {"num_cpus": share, "num_gpus": float(device == "cuda")} for device in devices}


def _start(shares: dict[str, dict[str, float]]) -> dict[str, Any]:
    """A chain: an actor for each kind of device."""
    import ray

    actor = ray.remote(StageActor)
    often = {"max_restarts": RETRIES, "max_task_retries": RETRIES}
    return {device: actor.options(**share, **often).remote(max(int(share["num_cpus"]), 1)) for device, share in shares.items()}


def _fly(
    segments: Sequence[Segment], candidates: Sequence[Candidate], chains: Sequence[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Sends the candidates through the chains, a few at a time through each, and yields their outcomes as they come."""
    import ray

    kept = ray.put(segments)
    flights: dict[Any, _Flight] = {}  # by the reference to what says whether it is done
    left = iter(candidates)

    def send(candidate: Candidate, chain: dict[str, Any], segment: int, content: Any) -> None:
        apply = chain[segments[segment][0]].apply.options(num_returns=2)
        content, outcome = apply.remote([kept], segment, content)
        flights[outcome] = _Flight(candidate, chain, segment, content)

    def send_next(chain: dict[str, Any]) -> None:
        candidate = next(left, None)
        if candidate is not None:
            send(candidate, chain, 0, pickle.dumps(candidate))

    for _ in range(len(chains[0]) + 1):  # one at work in each actor, and one waiting
        for chain in chains:
            send_next(chain)
    silence = Silence()
    while flights:
        ready, _ = ray.wait(list(flights), timeout=silence.left())
        if not ready:
            silence.tell(flight.candidate.name for flight in flights.values())
        for reference in ready:
            at_work = [other.candidate.name for other in flights.values() if other.chain is flights[reference].chain]
            flight = flights.pop(reference)
            outcome = _get(reference, at_work)
            if outcome is None:
                send(flight.candidate, flight.chain, flight.segment + 1, flight.content)
            else:
                silence.broken()
                send_next(flight.chain)
                yield outcome


def _get(reference: Any, at_work: Sequence[str]) -> dict[str, Any] | None:
    """What an actor says of a candidate; `at_work` names the candidates in its chain, of which any may be what killed it."""
    import ray

    try:
        outcome: dict[str, Any] | None = ray.get(reference)
        return outcome
    except ray.exceptions.RayTaskError as error:  # a stage could not be made
        raise error.cause from error
    except ray.exceptions.RayError as error:
        why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ChildProcessError(
            f"workers: a Ray actor was lost {RETRIES + 1} times while it worked at {', '.join(at_work)} ({why}), as a rule for "
            f"want of memory, of which fewer workers need less; {GOES_ON}"
        ) from error
