"""Intervals cover a known population's mean as often as they say."""

from __future__ import annotations

import pytest

pytest.importorskip("scipy", reason="needs the extra evaluation: pip install 'focusdpo[evaluation]'")

from focusdpo.metrics.report import FEWEST
from tests.metrics.coverage import CONCENTRATED, MEANS, RATES, Design, coverage, exponential, intervals, singles, skewed


@pytest.mark.parametrize("name", MEANS)
def test_intervals_of_means_cover_as_often_as_they_say(name):
    assert 0.92 <= coverage(MEANS[name], 2000 if "skewed" in name else 1000) <= 0.97


@pytest.mark.parametrize("name", RATES)
def test_intervals_of_rates_cover_as_often_as_they_say(name):
    assert 0.92 <= coverage(RATES[name], 1000) <= 0.97


@pytest.mark.parametrize("name", ["8 x 25, about 0.04", "8 x 25, about 0.96", *CONCENTRATED])
def test_intervals_of_rates_are_rates(name):
    low, high = intervals((RATES | CONCENTRATED)[name], 300).T
    assert (low >= 0).all() and (high <= 1).all() and (low < high).all()


def test_prompts_alone_say_nothing_of_other_subjects():
    """What the bounds above are for."""
    assert coverage(MEANS["30 subjects x 25 prompts"], 100, Design.over_prompts) < 0.6
    assert coverage(MEANS["30 x 5"], 100, Design.over_prompts) < 0.85


def test_the_fewest_that_get_an_interval():
    """Of subjects of skewness 1 as often as they say, of skewness 2 a little less often."""
    mild, strong = (singles(FEWEST, 1, spread=(1, 0, 0, 0), effect=effect) for effect in (skewed, exponential))
    assert 0.92 <= coverage(mild, 2000) <= 0.97 and coverage(strong, 2000) >= 0.88
