"""What a run reports, averaged over batches and processes."""

from __future__ import annotations

import resource
import sys

import torch
from accelerate import Accelerator
from torch import Tensor

from focusdpo.loss import pair_accuracy
from focusdpo.training.run_files import COVERAGE_BINS, TIME_BINS
from focusdpo.training.step import StepResult

BY_TIME, SHARE = "by_time/", "share"


def step_metrics(result: StepResult) -> dict[str, Tensor]:
    """Scalars of one batch, on its device: means over its pairs.

    Those of a bin of times, by_time/0.25/margin for t from 0.25 to 0.50, count pairs outside it as 0; `Averager` divides by the
    share of those inside.
    """
    output, focus, drift = result.output, result.focus, result.drift
    by_time = {
        "margin": output.by_pair(output.margin),
        "accuracy": output.by_pair(pair_accuracy(output.logits)),
        "error/policy_win": output.by_pair(output.policy_win),
        "error/policy_lose": output.by_pair(output.policy_lose),
    }
    metrics = {
        "loss": output.loss.detach(),
        **{name: value.mean() for name, value in by_time.items()},
        "accuracy": output.accuracy,
        "logit": output.by_pair(output.logits).mean(),
        "error/reference_win": output.by_pair(output.reference_win).mean(),
        "error/reference_lose": output.by_pair(output.reference_lose).mean(),
        # Of the sigmoid loss: 1 at a logit of 0, near 0 where a pair has no more to teach.
        "gradient_factor": 2 * output.by_pair(torch.sigmoid(-output.logits)).mean(),
        "time": result.t.mean(),
        **{f"drift/{name}": value.mean() for name, value in drift._asdict().items()},
    }
    if focus is not None:
        metrics |= {
            "focus/coverage": focus.coverage.mean(),
            "focus/detail_share": focus.uses_detail.float().mean(),
            "focus/coverage_floor": focus.coverage_floor.mean(),
            "focus/detail_unreachable": _known(focus.coverage_floor > focus.tau, focus.coverage_floor).mean(),
            "focus/all_matched": focus.all_matched.float().mean(),
        }
        if focus.source != "estimate":  # which has no number of matches
            metrics["focus/coverage_chance"] = focus.coverage_chance.mean()
        by_time["focus/coverage"] = focus.coverage
        bins = _bins(focus.coverage, COVERAGE_BINS)
        metrics |= {
            f"focus/coverage_histogram/{i / COVERAGE_BINS:.1f}": (bins == i).float().mean() for i in range(COVERAGE_BINS)
        }
    bins = _bins(result.t, TIME_BINS)
    for i in range(TIME_BINS):
        inside = bins == i
        place = f"{BY_TIME}{i / TIME_BINS:.2f}"
        metrics[f"{place}/{SHARE}"] = inside.float().mean()
        # Not a product: a pair that is not a number would make those of all bins so.
        metrics |= {f"{place}/{name}": torch.where(inside, value, 0.0).mean() for name, value in by_time.items()}
    return metrics


def _bins(values: Tensor, count: int) -> Tensor:
    """The bin from 0 to 1 of each value; of one that is not a number -1, which is none."""
    return torch.where(values.isnan(), -1, (values * count).long().clamp(0, count - 1))


def _known(fact: Tensor, of: Tensor) -> Tensor:
    """1 or 0 as numbers, and NaN where what the fact is of is not a number."""
    return torch.where(of.isnan(), of, fact.to(of.dtype))


class Averager:
    """Means of metrics over batches of different size, then over processes."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._sums: dict[str, Tensor] = {}
        self._pairs = 0

    def add(self, metrics: dict[str, Tensor], pairs: int) -> None:
        self._pairs += pairs
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0) + value.double() * pairs

    def result(self) -> dict[str, float]:
        """The means of all processes, and the pairs they are over as "pairs"; starts anew."""
        names = list(self._sums)
        count = torch.tensor(float(self._pairs), dtype=torch.float64, device=self._accelerator.device)
        values = torch.stack([self._sums[name].to(count) for name in names] + [count])
        total = self._accelerator.reduce(values, reduction="sum").tolist()
        self._sums, self._pairs = {}, 0
        means = {name: value / total[-1] for name, value in zip(names, total, strict=False)}
        return _of_bins(means) | {"pairs": total[-1]}


def _of_bins(means: dict[str, float]) -> dict[str, float]:
    """Metrics of each bin of times over its own pairs; a bin without pairs has none."""
    result = {}
    for name, value in means.items():
        if not name.startswith(BY_TIME):
            result[name] = value
            continue
        place = name.split("/", 2)[1]
        share = means[f"{BY_TIME}{place}/{SHARE}"]
        if share > 0:
            result[name] = value if name.endswith(f"/{SHARE}") else value / share
    return result


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory of this process in MiB: allocated on the accelerator, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes / 2**20 if sys.platform == "darwin" else kibibytes / 2**10
