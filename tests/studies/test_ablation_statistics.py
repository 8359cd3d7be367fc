"""What an ablation concludes: intervals over seeds and items, so many comparisons, what could have been seen, equal drift."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from scipy import stats

from focusdpo.commands.ablate import _text, tables_of
from focusdpo.studies.ablation.equal_drift import DRIFT, EqualDrift, NoDriftError, at_equal_drift
from focusdpo.studies.ablation.jobs import Point, Result
from focusdpo.studies.ablation.page import curve_figure, drift_figure, interval_figure
from focusdpo.studies.ablation.statistics import Cell, Row, Table, difference, how_judged, judged, tabulate, text_of
from focusdpo.studies.ablation.two_way import Estimate, Spread, estimate
from focusdpo.studies.ablation.variants import VARIANTS, Change
from focusdpo.studies.ablation.yardsticks import Measure
from focusdpo.studies.config import AblationConfig

NAN = float("nan")
NAMES = {name: change.label for name, change in VARIANTS.items()}


def crossed(rng, seeds, items, of_seeds, of_items=1.0, rest=0.5):
    """Values of random seeds and random items, of mean 0."""
    effects = of_seeds * rng.normal(size=(seeds, 1)) + of_items * rng.normal(size=(1, items))
    return effects + rest * rng.normal(size=(seeds, items))


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("of_seeds", [0.02, 0.15, 0.5])  # beside 96 items' 0.1: small, comparable, large
def test_the_interval_covers_other_seeds_and_other_items(seeds, of_seeds):
    rng = np.random.default_rng(0)
    found = [estimate(crossed(rng, seeds, 96, of_seeds), is_difference=True) for _ in range(1000)]
    assert 0.94 <= np.mean([one.low <= 0 <= one.high for one in found]) <= 0.985
    assert all((one.p > 0.05) == (one.low <= 0 <= one.high) for one in found), "p and interval say the same"


@pytest.mark.parametrize("seeds", [3, 5])
def test_where_items_do_not_differ_it_is_not_too_sure(seeds):
    """As where a variant is paired with the baseline: noise alone, and noise with small effects of seeds."""
    rng = np.random.default_rng(0)
    for of_seeds in (0.0, 0.1):
        found = [estimate(crossed(rng, seeds, 96, of_seeds, 0.0, 1.0)) for _ in range(1000)]
        assert np.mean([one.low <= 0 <= one.high for one in found]) >= 0.945


def test_small_p_are_as_rare_as_they_say():
    """With many comparisons each is judged far out in the tail, where three seeds say little."""
    rng = np.random.default_rng(0)
    for of_seeds in (0.15, 0.5):
        p = np.array([estimate(crossed(rng, 3, 96, of_seeds), is_difference=True).p for _ in range(4000)])
        assert (p < 0.001).mean() <= 0.002 and (p < 0.01).mean() <= 0.014
    spread = estimate(crossed(rng, 3, 96, 0.5)).spread
    for tail in (0.4, 0.025, 1e-6):
        assert spread.p(spread.quantile(tail)) == pytest.approx(2 * tail)


def test_missing_values_are_covered_as_well():
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(1000):
        values = crossed(rng, 4, 60, 0.15)
        values[rng.random(values.shape) < 0.1] = NAN
        values[:, 7] = NAN
        found = estimate(values)
        inside.append(found.low <= 0 <= found.high)
        assert found.seeds == 4 and found.items <= 59
    assert 0.94 <= np.mean(inside) <= 0.985


def test_the_components_by_hand():
    """Mean squares of a two-way layout, from its textbook."""
    values = crossed(np.random.default_rng(3), 4, 30, 0.3)
    mean, of_seeds, of_items = values.mean(), values.mean(1), values.mean(0)
    squares = np.array([
        30 * ((of_seeds - mean) ** 2).sum() / 3,
        4 * ((of_items - mean) ** 2).sum() / 29,
        ((values - of_seeds[:, None] - of_items + mean) ** 2).sum() / 87,
    ])  # fmt: skip
    assert squares[0] > squares[2] < squares[1]
    variance = (squares[0] + squares[1] - squares[2]) / 120
    of_seeds, of_items = stats.t.ppf(0.975, [3, 29])
    half = math.sqrt((of_seeds**2 * squares[0] + of_items**2 * (squares[1] - squares[2])) / 120)
    found = estimate(values)
    assert (found.mean, found.low, found.high) == pytest.approx((mean, mean - half, mean + half))
    assert found.spread.variance == pytest.approx(variance)
    few = values[:, :1]
    low, high = stats.t.interval(0.95, 3, loc=few.mean(), scale=stats.sem(few[:, 0]))
    assert (estimate(few).low, estimate(few).high) == pytest.approx((low, high)), "a number a training: over trainings"
    one = values[:1]
    low, high = stats.t.interval(0.95, 29, loc=one.mean(), scale=stats.sem(one[0]))
    assert (estimate(one).low, estimate(one).high) == pytest.approx((low, high)), "one training: over items"


@pytest.mark.parametrize("rate", [0.0, 0.02, 0.5])
@pytest.mark.parametrize("is_difference", [False, True])
def test_one_value_changes_an_interval_a_little(rate, is_difference):
    """Also where all seeds have the same mean, and where all values are one and the same."""
    rng = np.random.default_rng(0)
    row = rng.permutation(np.arange(96) < rate * 96).astype(float)
    values = np.stack([row, rng.permutation(row), rng.permutation(row)])
    before = estimate(values, True, is_difference)
    for place in ((0, 0), (1, 5), (2, 95), (0, 40)):
        changed = values.copy()
        changed[place] = 1 - changed[place]
        after = estimate(changed, True, is_difference)
        assert abs(after.low - before.low) < 0.02 and abs(after.high - before.high) < 0.02, (before, after)


def test_shares_and_their_differences_stay_within_their_bounds():
    rng = np.random.default_rng(0)
    for _ in range(300):
        seeds, items = rng.integers(1, 5), rng.integers(2, 12)
        rates = rng.beta(0.3, 0.3, (seeds, 1)) * np.ones((1, items))
        values, others = rng.binomial(2, rates) / 2, rng.binomial(2, rates) / 2
        found = estimate(values, is_share=True)
        assert 0 <= found.low <= found.mean <= found.high <= 1 and found.low < found.high
        gap = estimate(values - others, is_share=True, is_difference=True)
        assert -1 <= gap.low <= gap.mean <= gap.high <= 1 and gap.low < gap.high
    apart = [[1.0] * 6, [0.5] * 6, [0.0] * 6]
    assert estimate(apart, is_difference=True).high > 1 > estimate(apart, is_share=True, is_difference=True).high


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("logit", [0.0, 2.0, 4.0])
def test_the_interval_of_a_share_covers(seeds, logit):
    rng = np.random.default_rng(0)

    def rates(count, seeds, items):
        effects = 0.3 * rng.normal(size=(count, seeds, 1)) + 2 * rng.normal(size=(count, 1, items))
        return 1 / (1 + np.exp(-logit - effects))

    truth = rates(200_000, 1, 1).mean()
    found = [estimate(values, is_share=True) for values in rng.binomial(4, rates(600, seeds, 96)) / 4]
    assert np.mean([one.low <= truth <= one.high for one in found]) >= 0.925


def test_a_share_that_is_0_or_1_for_all():
    for share in (0.0, 1.0):
        found = estimate(np.full((3, 96), share), is_share=True)
        low, high = stats.binomtest(int(96 * share), 96).proportion_ci(method="wilson")
        assert (found.low, found.high) == pytest.approx((low, high), abs=0.003), "items count, not trainings of the same items"
    gap = estimate(np.zeros((3, 96)), is_share=True, is_difference=True)
    assert -0.04 < gap.low < 0 < gap.high < 0.04 and gap.p == 1
    assert estimate(np.full((3, 96), 0.5), is_share=True, is_difference=True).p < 1e-6, "all told apart, and none was before"
    level = estimate(np.zeros((3, 6)))
    assert level.mean == 0 and np.isnan([level.low, level.high]).all(), "of what has no bounds nothing is known"


def test_what_is_no_share_is_refused():
    for values, is_difference in (([[0.5, 1.2]], False), ([[-0.1, 0.5]], False), ([[-1.5, 0.0]], True)):
        with pytest.raises(ValueError, match=r"values: got .* expected shares, from 0 to 1, or differences of such"):
            estimate(values, True, is_difference)
    assert estimate([[1 + 1e-14, 0.2, -1e-14]], is_share=True).mean == pytest.approx(0.4), "rounding is none"


def test_little_or_nothing_to_go_by():
    for empty in ([[NAN, NAN]], [[NAN], [NAN]]):
        assert np.isnan(estimate(empty).mean) and estimate(empty).seeds == 0
    single = estimate([[0.5]], is_share=True)
    assert single.mean == 0.5 and np.isnan([single.low, single.high]).all()
    rng = np.random.default_rng(0)
    for _ in range(200):  # the same means, of other pairs: rounding is no difference
        before = {seed: (rng.integers(0, 4, 8) / 3).tolist() for seed in range(3)}
        gap = difference({seed: rng.permutation(numbers).tolist() for seed, numbers in before.items()}, before, False)
        assert gap.low < 0 < gap.high, gap


def test_differences_are_paired():
    values = {0: [1.0, 3.0, 2.0], 1: [2.0, NAN, 1.0], 2: [5.0, 5.0, 3.0]}
    other = {2: [4.0, 5.5, 3.0], 0: [0.5, 3.5, 2.0], 7: [9.0] * 3}
    gap = difference(values, other, False)
    assert gap == estimate([[0.5, -0.5, 0.0], [1.0, -0.5, 0.0]], is_difference=True), "seed by seed and item by item"
    beside = difference({7: [1.0, 2.0, 3.0]}, values, False, "values")
    assert beside == estimate([[0.0, -1.0, 1.0], [-1.0, NAN, 2.0], [-4.0, -3.0, 0.0]], is_difference=True), (
        "beside each training"
    )
    assert beside.seeds == 3 and difference(values, {7: [1.0, 2.0, 3.0]}, False, "baseline").mean == -beside.mean
    assert difference({7: [0.0]}, {1: [0.0], 2: [0.0]}, False) is None, "one training that came through has no partner"


def test_what_could_have_been_seen():
    """A true difference of that size is found in 80 % of ablations."""
    rng = np.random.default_rng(0)
    for level in (0.95, 0.999):
        sizes = [estimate(crossed(rng, 10, 60, 0.1)).detectable(level) for _ in range(200)]
        shift = float(np.mean(sizes))
        found = [estimate(crossed(rng, 10, 60, 0.1) + shift, is_difference=True).p <= 1 - level for _ in range(600)]
        assert np.mean(found) == pytest.approx(0.8, abs=0.05), level


def gap_of(p, error=0.1):
    return Estimate(1.0, 0.8, 1.2, p, 3, 96, Spread(0.0, 0.0, error**2, 0.0, 2, 50))


def table_of(ps, at="end"):
    """A table whose differences have these p, a measure each."""
    measures = {f"m{place}": Measure(f"m{place}") for place in range(len(ps))}
    cells = tuple(Cell(f"m{place}", gap_of(NAN), gap_of(p)) for place, p in enumerate(ps))
    return Table((Row("dpo", 3, (), ()), Row("focus", 3, cells, ())), measures, "dpo", at)


def marks(table):
    return [cell.is_better for cell in table.rows[1].cells]


def test_holm():
    """0.001 * 5 and 0.0124 * 4 are below 0.05; 0.02 * 3 is not, nor is what comes behind it."""
    (table,) = judged([table_of([0.02, 0.001, 0.0124, 0.024, 0.9])])
    assert marks(table) == [None, True, True, None, None]
    assert [verdict.p for verdict in table.verdicts] == pytest.approx([0.06, 0.005, 0.0496, 0.06, 0.9])
    levels = [1 - verdict.level for verdict in table.verdicts]
    assert levels == pytest.approx([0.05 / 3, 0.05 / 5, 0.05 / 4, 0.05 / 3, 0.05 / 3]), "what each was compared with"
    assert all(verdict.detectable == gap_of(0.5).detectable(verdict.level) for verdict in table.verdicts)
    assert not any(verdict.is_primary for verdict in table.verdicts)


def test_a_share_cannot_differ_by_more_than_1():
    wide = gap_of(0.5, error=0.6)
    rows = (Row("dpo", 3, (), ()), Row("focus", 3, (Cell("m0", gap_of(0.5), wide),), ()))
    for is_share, text in ((True, "p 0.500, nothing visible"), (False, "p 0.500, visible from 1.71")):
        (table,) = judged([Table(rows, {"m0": Measure("m0", is_share=is_share)}, "dpo")])
        assert table.said(table.rows[1].cells[0], 2) == text


def test_the_primary_comparison_stands_by_itself():
    ps = [0.04, 0.04, 0.04]
    (table,) = judged([table_of(ps)], ("focus", "m1"))
    assert marks(table) == [None, True, None]
    assert [(v.is_primary, v.p, v.level) for v in table.verdicts][1] == (True, 0.04, 0.95)
    assert table.verdicts[0].p == 0.08, "of two others"
    first, second = judged([table_of(ps), table_of([0.011, 0.04, 0.5], "equal drift")], ("focus", "m1"), "equal drift")
    assert marks(first) == [None] * 3 and marks(second) == [None, True, None]
    assert second.verdicts[0].p == pytest.approx(0.055) and second.verdicts[1].is_primary, "five others, in both tables"
    text = "\n".join(how_judged([first, second], NAMES))
    assert "over all others, 5 comparisons with it;" in text and "FocusDPO in m1 at equal drift" in text
    assert "over all 3 comparisons with it" in how_judged([judged([table_of(ps)])[0]], NAMES)[1]


def test_by_chance_nothing_is_marked():
    """Ninety comparisons of what does not differ."""
    rng = np.random.default_rng(0)
    marked = uncorrected = 0
    for _ in range(20):
        results = [
            Result(variant, seed, {f"m{i}": values for i, values in enumerate(rng.normal(size=(30, 40)).tolist())}, [])
            for variant in ("dpo", "sft", "prior", "focus")
            for seed in range(4)
        ]
        measures = {f"m{i}": Measure(f"m{i}") for i in range(30)}
        (table,) = judged([tabulate(results, [VARIANTS[n] for n in ("dpo", "sft", "prior", "focus")], "dpo", measures)])
        assert len(table.verdicts) == 90
        marked += any(verdict.is_better is not None for verdict in table.verdicts)
        uncorrected += any(cell.difference and cell.difference.p < 0.05 for row in table.rows for cell in row.cells)
    assert marked <= 2 and uncorrected > 10


def test_verdicts_and_text():
    rng = np.random.default_rng(0)

    def result(variant, seed, offset, failed=None):
        values = {} if failed else {name: (offset + rng.normal(size=30) / 10).tolist() for name in ("good", "bad", "odd")}
        return Result(variant, seed, values, [], failed)

    measures = {"good": Measure("good"), "bad": Measure("bad", "less"), "odd": Measure("odd", "neither")}
    results = [result(variant, seed, float(variant == "focus")) for variant in ("dpo", "focus") for seed in (0, 1)]
    results += [result("sft", 0, 0, "NaN"), result("prior", 0, 0.0)]
    changes = [VARIANTS[name] for name in ("dpo", "focus", "sft", "prior")]
    (table,) = judged([tabulate(results, changes, "dpo", measures)], ("focus", "bad"))
    assert [cell.is_better for cell in table.rows[1].cells] == [True, False, None]
    assert [cell.difference for cell in table.rows[0].cells] == [None] * 3 and len(table.verdicts) == 4
    text = text_of(table, NAMES)
    assert text.count("  better") == 1 and text.count("  worse") == 1 and text.count("visible") == 4
    assert "SFT on winners: 0 of 1 trainings came through\nseed 0: NaN" in text and "failed" in text
    assert text.count("primary p ") == 1 and text.count("]*") == 6, "one training says so, as does its difference"
    colours = {trace.y[0]: trace.marker.color for trace in interval_figure(table, "bad", NAMES).data}
    assert colours[NAMES["focus"]] != colours[NAMES["prior"]] == colours[NAMES["dpo"]]


def test_shares_in_a_table_and_in_a_band():
    near = {0: [1.0] * 9 + [0.8], 1: [1.0] * 10, 2: [1.0] * 10}
    share = Measure("share", is_share=True)
    points = [Result("dpo", seed, {"share": near[seed]}, [Point(5, {"share": near[seed]})]) for seed in near]
    table = tabulate(points, [VARIANTS["dpo"]], "dpo", {"share": share})
    found = table.rows[0].cells[0].estimate
    assert str(found) == str(estimate(list(near.values()), is_share=True)) and 0.6 < found.low < found.mean < found.high < 1
    band = curve_figure(points, table, "share", {"dpo": "DPO"}).data[1]
    assert list(band.y) == [found.high, found.low], "as at the end: over seeds and items"


def test_digits_are_enough_to_differ():
    """Where all variants would look alike, and there alone; up to six."""
    means = {
        "apart": [1.0, 1.00001, 1.00002, 1.1],
        "close": [1.0, 1.00004, 1.00002, 1.00003],
        "alike": [1.0] * 4,
        "noise": [1.0, 1.0 + 1e-9, 1.0, 1.0],
    }
    names = ("base", "sft", "dpo", "focus")
    results = [Result(n, 0, {m: [values[i]] * 3 for m, values in means.items()}, []) for i, n in enumerate(names)]
    table = tabulate(results, [VARIANTS[name] for name in names], "dpo", {name: Measure(name) for name in means})
    assert {name: table.digits(name, 3) for name in means} == {"apart": 3, "close": 5, "alike": 3, "noise": 3}
    text = text_of(table, {name: name for name in VARIANTS})
    assert "1.00002 [-]" in text and "-0.00002 [-]" in text and "1.1000 [-]" in text, text


MEASURES = {"gain": Measure("what is gained"), DRIFT: Measure("drift", "neither")}
CHANGES = [VARIANTS[name] for name in ("base", "dpo", "focus")]


def training(variant, seed, drifts, gains, failed=None, items=8):
    """A run whose points have these drifts and gains as means of their items."""
    spread = np.linspace(-0.01, 0.01, items) * (1 + seed) * (1 + len(variant))
    curve = [
        Point(5 * (k + 1), {DRIFT: [drift] * items, "gain": (gain + spread).tolist()})
        for k, (drift, gain) in enumerate(zip(drifts, gains, strict=True))
    ]
    return Result(variant, seed, {} if failed else curve[-1].values, curve, failed)


def untrained(items=8):
    values = {DRIFT: [0.0] * items, "gain": [0.2] * items}
    return Result("base", 0, values, [Point(0, values)])


BASELINE = [training("dpo", seed, [0.01, 0.1, 1.0], [0.2, 0.4, 0.6]) for seed in (0, 1)]


def test_equal_drift_by_hand():
    """The baseline goes from 0.2 to 0.6, and has half of it at 0.1; the other moves faster and is at 0.5 there."""
    faster = [training("focus", seed, [0.001, 10.0], [0.3, 0.7]) for seed in (0, 1)]
    found = at_equal_drift([untrained(), *BASELINE, *faster], CHANGES, "dpo", MEASURES, "gain")
    assert found.drift == pytest.approx(0.1) and [row.variant for row in found.table.rows] == ["dpo", "focus"]
    assert [row.cells[0].estimate.mean for row in found.table.rows] == pytest.approx([0.4, 0.5]), "halfway in log drift"
    (cell,) = found.table.rows[1].cells
    assert cell.difference.mean == pytest.approx(0.1) and cell.difference.seeds == 2 and cell.estimate.items == 8
    between = [training("dpo", seed, [0.01, 1.0], [0.2, 0.6]) for seed in (0, 1)]
    found = at_equal_drift([untrained(), *between], CHANGES, "dpo", MEASURES, "gain")
    assert found.drift == pytest.approx(0.1), "linear in log drift"
    peak = [training("dpo", 0, [0.01, 0.1, 1.0, 10.0], [0.2, 0.6, 1.0, 0.1])]
    assert at_equal_drift([untrained(), *peak], CHANGES, "dpo", MEASURES, "gain").drift == pytest.approx(0.1), "its best point"
    less = {**MEASURES, "gain": Measure("loss", "less")}
    falling = [training("dpo", 0, [0.01, 0.1, 1.0], [0.2, 0.1, 0.0])]
    assert at_equal_drift([untrained(), *falling], CHANGES, "dpo", less, "gain").drift == pytest.approx(0.1)


def test_nothing_is_extrapolated():
    slow, fast = training("focus", 0, [0.001, 0.05], [0.2, 0.3]), training("focus", 1, [0.2, 2.0], [0.3, 0.5])
    there = training("focus", 2, [0.01, 1.0], [0.2, 0.3])
    third = training("dpo", 2, [0.01, 0.1, 1.0], [0.2, 0.4, 0.6])
    gone = training("focus", 3, [0.01, 1.0], [0.2, 0.3], "NaN")
    found = at_equal_drift([untrained(), *BASELINE, third, slow, fast, there, gone], CHANGES, "dpo", MEASURES, "gain")
    row = found.table.rows[1]
    assert row.seeds == 1 and row.cells[0].difference.seeds == 1
    text = text_of(found.table, NAMES)
    assert "FocusDPO: 1 of 4 trainings are compared at that drift" in text and "seed 3: NaN" in text
    assert "seed 0: its drift goes from 0.001 to 0.05 at its points, and is not 0.1 between two of them" in text
    none = at_equal_drift([untrained(), *BASELINE, slow, fast], CHANGES, "dpo", MEASURES, "gain")
    assert none.table.rows[1].cells == () and "not reached" in text_of(none.table, NAMES)


NO_DRIFT = {
    "base": ([*BASELINE], "nothing has gain of the model before training, which is the variant"),
    "no points": ([untrained(), Result("dpo", 0, {"gain": [1.0] * 8}, [])], f"no training of dpo has {DRIFT} and gain in its"),
    "failed": ([untrained(), training("dpo", 0, [0.1, 1.0], [0.2, 0.5], "NaN")], "no training of dpo has"),
    "no gain": ([untrained(), training("dpo", 0, [0.1, 1.0], [0.2, 0.1])], "dpo gains nothing in gain at any of its points"),
    "early": ([untrained(), training("dpo", 0, [0.1, 1.0], [0.5, 0.6])], "half of its gain in gain before its first point"),
    "unmoved": ([untrained(), training("dpo", 0, [0.0, 1.0], [0.2, 0.6])], "half of its gain in gain where its drift is 0"),
}


@pytest.mark.parametrize("case", NO_DRIFT)
def test_no_drift_to_compare_at(case):
    results, message = NO_DRIFT[case]
    with pytest.raises(NoDriftError, match=message):
        at_equal_drift(results, CHANGES, "dpo", MEASURES, "gain")
    config = AblationConfig("-", baseline="dpo", variants=["base", "dpo", "focus"], primary=["focus", "gain"])
    table, why = tables_of(config, results, CHANGES, MEASURES)
    assert message in why and message in _text(table, why, NAMES), "the other table is shown"


def test_both_tables_are_judged_together():
    faster = [training("focus", seed, [0.001, 10.0], [0.3, 0.7]) for seed in (0, 1)]
    config = AblationConfig(
        "-", baseline="dpo", variants=["base", "dpo", "focus"], primary=["focus", "gain"], primary_at="equal drift"
    )
    table, equal = tables_of(config, [untrained(), *BASELINE, *faster], CHANGES, MEASURES)
    assert isinstance(equal, EqualDrift) and equal.table.verdicts[0].is_primary and len(table.verdicts) == 2
    text = _text(table, equal, NAMES)
    assert "all others, 2 comparisons with it" in text and "At equal drift, 0.1, where Diffusion-DPO (M = 1) has half" in text
    figure = drift_figure([untrained(), *BASELINE, *faster], equal, NAMES)
    lines = {trace.name: trace for trace in figure.data if trace.mode == "lines"}
    assert list(lines) == [NAMES["dpo"], NAMES["focus"]] and list(lines[NAMES["focus"]].x) == pytest.approx([0.001, 10.0])
    assert figure.layout.xaxis.type == "log" and figure.layout.shapes[0].x0 == pytest.approx(0.1)
    assert json.loads(json.dumps(dataclasses.asdict(equal)))["drift"] == pytest.approx(0.1)
    table, why = tables_of(AblationConfig("-", baseline="dpo", variants=["base", "dpo"]), BASELINE, CHANGES, MEASURES)
    assert "no --primary VARIANT MEASURE is set" in why and table.verdicts == []


def test_a_variant_of_a_grid_may_be_primary():
    config = AblationConfig("-", baseline="dpo", primary=["tau=0.2", "gain"])
    grid = Change("tau=0.2", "tau", {"mask": "focus", "tau": 0.2})
    faster = [training("tau=0.2", seed, [0.001, 10.0], [0.3, 0.7]) for seed in (0, 1)]
    table, _ = tables_of(config, [untrained(), *BASELINE, *faster], [*CHANGES, grid], MEASURES)
    assert [verdict.is_primary for verdict in table.verdicts] == [False, True]
