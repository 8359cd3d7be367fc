"""Alarms over a run's rows, and the metrics that they look at."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator

from focusdpo.loss import Drift, FocusDPOOutput
from focusdpo.mask import FocusMask
from focusdpo.training.config import FocusConfig, LossConfig
from focusdpo.training.health import WINDOW, Health
from focusdpo.training.step import StepResult
from focusdpo.training.step_metrics import Averager, step_metrics

HEALTHY = {
    "loss": 0.6,
    "gradient_factor": 0.9,
    "error/policy_win": 0.1,
    "error/reference_win": 0.1,
    "error/policy_lose": 0.11,
    "error/reference_lose": 0.1,
    "focus/detail_share": 0.1,
    "focus/coverage": 0.5,
    "focus/coverage_chance": 0.8,
    "focus/coverage_floor": 0.1,
}
SICK = {
    "errors_rising": {"error/policy_win": 0.11, "error/policy_lose": 0.12},
    "saturated": {"gradient_factor": 0.01},
    "stuck": {"loss": math.log(2) + 1e-5},
    "tau_never_reached": {"focus/detail_share": 0.0},
    "coverage_at_chance": {"focus/coverage": 0.76},  # a twentieth of the way to the lowest
}


def feed(health, changes, steps, start=1):
    alarms = [health.update({**HEALTHY, **changes, "step": step}) for step in range(start, start + steps)]
    return [alarm for some in alarms for alarm in some]


def test_healthy_runs_raise_nothing(config):
    assert feed(Health(config), {}, 3 * WINDOW) == []
    # What lasts shorter than the window is no alarm.
    health = Health(config)
    for changes in SICK.values():
        assert feed(health, changes, WINDOW // 3) + feed(health, {}, WINDOW) == []


@pytest.mark.parametrize("name", SICK)
def test_alarms(config, name):
    health = Health(config)
    alarms = feed(health, SICK[name], 2 * WINDOW)
    assert [(alarm.name, alarm.step) for alarm in alarms] == [(name, WINDOW)], "once, when the window is full"
    assert feed(health, {}, 2 * WINDOW) == []
    assert [alarm.name for alarm in feed(health, SICK[name], 2 * WINDOW)] == [name], "it may come again"


def test_only_rising_errors_of_both_sides_are_an_alarm(config):
    assert feed(Health(config), {"error/policy_lose": 0.5}, WINDOW) == []
    assert feed(Health(config), {"error/policy_win": 0.5, "error/policy_lose": 0.1}, WINDOW) == []


def test_coverage_at_chance_needs_levels_that_differ_and_a_mask_of_features(config):
    sick = SICK["coverage_at_chance"]
    assert feed(Health(config), {**sick, "focus/coverage": 0.71}, WINDOW) == [], "an eighth of the way"
    assert feed(Health(config), {**sick, "focus/coverage_floor": 0.79}, WINDOW) == [], "nothing to be seen"
    damaged = {**sick, "focus/coverage_floor": None}
    assert feed(Health(config), damaged, WINDOW) == [], "of a row that somebody has edited"
    Health(config).restore([{**HEALTHY, **damaged, "step": step} for step in range(1, 2 * WINDOW)])
    config.focus = FocusConfig(source="estimate")
    assert feed(Health(config), sick, WINDOW) == [], "which has no matches"
    (alarm,) = feed(Health(config), SICK["tau_never_reached"], WINDOW)
    assert "lower focus.kappa" in alarm.message and "match_count" not in alarm.message


def test_settings_that_an_alarm_does_not_fit(config):
    config.focus = FocusConfig(mask="none")
    config.loss = LossConfig(loss_type="ipo")
    sick = {**SICK["saturated"], **SICK["stuck"], **SICK["tau_never_reached"]}
    assert feed(Health(config), sick, 2 * WINDOW) == []


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(config):
    rows = [{**HEALTHY, **SICK["stuck"], "step": step} for step in range(1, WINDOW)]
    health = Health(config)
    health.restore(rows)
    assert [alarm.step for alarm in feed(health, SICK["stuck"], 2, start=WINDOW)] == [WINDOW]
    health = Health(config)
    health.restore([*rows, {**rows[-1], "step": WINDOW}])
    assert feed(health, SICK["stuck"], 2, start=WINDOW + 1) == [], "raised before it stopped"


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def result(t, logits, coverage):
    logits, t, coverage = (torch.tensor(x) for x in (logits, t, coverage))
    zero, patches = torch.zeros_like(logits), torch.zeros(len(t), 4)
    output = FocusDPOOutput(zero.sum(), logits, -logits, logits + 1, zero, zero, zero, (logits > 0).float().mean())
    focus = FocusMask(patches, patches, patches, coverage, patches.bool(), zero, zero.bool(), 0.1, patches[:, None], 0)
    return StepResult(output, focus, t, Drift(zero, zero, zero))


def test_metrics_by_time_and_histogram(accelerator):
    averager = Averager(accelerator)
    averager.add(step_metrics(result([0.1, 0.2, 0.9], [2.0, -2.0, 0.0], [0.0, 0.05, 1.0])), 3)
    averager.add(step_metrics(result([0.2], [5.0], [0.55])), 1)
    row = averager.result()
    assert row["by_time/0.00/share"] == pytest.approx(0.75) and row["by_time/0.75/share"] == pytest.approx(0.25)
    assert row["by_time/0.00/accuracy"] == pytest.approx(2 / 3) and row["by_time/0.75/accuracy"] == pytest.approx(0.5)
    assert row["by_time/0.00/margin"] == pytest.approx(-5 / 3) and row["by_time/0.75/margin"] == pytest.approx(0)
    assert row["by_time/0.00/error/policy_win"] == pytest.approx(8 / 3)
    assert row["by_time/0.00/focus/coverage"] == pytest.approx(0.2)
    assert not any(name.startswith(("by_time/0.25", "by_time/0.50")) for name in row), "no pairs, no numbers"
    histogram = {name: value for name, value in row.items() if "coverage_histogram" in name}
    shares = {name.split("/")[-1]: value for name, value in histogram.items() if value}
    assert shares == pytest.approx({"0.0": 0.5, "0.5": 0.25, "0.9": 0.25})
    assert len(histogram) == 10
    factors = [2 / (1 + math.exp(x)) for x in (2, -2, 0, 5)]
    assert row["gradient_factor"] == pytest.approx(sum(factors) / 4)


def test_metrics_of_subjects_are_means_over_those_that_a_pair_has(accelerator):
    """An absent subject counts in none of them."""
    logits = torch.tensor([[2.0, 0.0], [1.0, -3.0]])
    present = torch.tensor([[True, False], [True, True]])
    zero = torch.zeros_like(logits)
    output = FocusDPOOutput(zero.sum(), logits, -logits, zero, zero, zero, zero, torch.tensor(0.75), present)
    averager = Averager(accelerator)
    drift = torch.tensor([0.1, 0.3])
    averager.add(step_metrics(StepResult(output, None, torch.tensor([0.1, 0.9]), Drift(drift, 2 * drift, 3 * drift))), 2)
    row = averager.result()
    assert row["logit"] == pytest.approx((2 + -1) / 2) and row["margin"] == pytest.approx((-2 + 1) / 2)
    assert row["accuracy"] == 0.75 and row["by_time/0.75/accuracy"] == pytest.approx(0.5)
    factor = (2 / (1 + math.exp(2)) + (2 / (1 + math.exp(1)) + 2 / (1 + math.exp(-3))) / 2) / 2
    assert row["gradient_factor"] == pytest.approx(factor)
    assert [row[f"drift/{name}"] for name in ("whole", "inside", "outside")] == pytest.approx([0.2, 0.4, 0.6])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "estimate", "per_subject": True}, 'focus.per_subject: got True; expected false with source="estimate"'),
        ({"source": "estimate", "mask_from": "each"}, "focus.mask_from: got 'each'; expected \"winner\" with source"),
        ({"kappa": math.inf}, "focus.kappa: got inf; expected a finite number"),
    ],
)
def test_what_an_estimate_cannot_be_with(settings, message):
    with pytest.raises(ValueError, match=message):
        FocusConfig(**settings)
    with pytest.raises(ValueError, match="loss.granularity: got 'subject'; expected 'image' with loss_type='sft'"):
        LossConfig(loss_type="sft", granularity="subject")
