"""The ablation: what a variant changes, the same yardsticks for all, statistics, interruption, and the page."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy import stats

from focusdpo.commands.ablate import jobs_of
from focusdpo.commands.ablate import prepare as prepare_ablation
from focusdpo.data import DatasetError, load_pairs
from focusdpo.features import pool_mask
from focusdpo.studies.ablation import jobs as ablation_jobs
from focusdpo.studies.ablation import yardsticks
from focusdpo.studies.ablation.jobs import Result, run_jobs
from focusdpo.studies.ablation.page import curve_figure, write_ablation_page
from focusdpo.studies.ablation.statistics import Estimate, difference, over_seeds, tabulate, text_of
from focusdpo.studies.ablation.variants import VARIANTS, changes_of
from focusdpo.studies.ablation.yardsticks import Measure
from focusdpo.studies.config import AblationConfig
from focusdpo.studies.microcosm.judging import MEASURES as JUDGED
from focusdpo.training.config import DataConfig, FocusConfig, LoraConfig, ModelConfig, OptimConfig, SamplesConfig, TrainConfig
from focusdpo.training.trainer import VALIDATION_SEED, Trainer
from tests import PATIENCE
from tests.backbones import pair_batch
from tests.browser import browser, in_browser
from tests.processes import workers_of


@pytest.fixture
def run(tmp_path, tiny_flux, tiny_pairs):
    return TrainConfig(
        model=ModelConfig(path=str(tiny_flux), dtype="fp32", max_sequence_length=16, gradient_checkpointing=False),
        data=DataConfig(
            train=str(tiny_pairs),
            validation=str(tiny_pairs),
            resolution=64,
            reference_resolution_multiple=32,
            reference_buckets=["1:1"],
            max_crop=0.9,
            batch_size=4,
            num_workers=0,
            check="headers",
        ),
        output_dir=str(tmp_path / "run"),
        lora=LoraConfig(rank=4, alpha=8),
        optim=OptimConfig(lr=3e-3),
        samples=SamplesConfig(steps=1),
        max_steps=4,
        mixed_precision="no",
        cpu=True,
        backend="torch",
    )


@pytest.fixture
def settings(run, tmp_path):
    """Writes the run and gives the ablation's settings."""
    file = tmp_path / "train.yaml"

    def make(**changes):
        file.write_text(yaml.safe_dump(dataclasses.asdict(run)))
        values = {"variants": ["base", "dpo"], "seeds": [0, 1], "points": 2, "times": [0.5], "samples": 1}
        return AblationConfig(str(file), str(tmp_path / "ablation"), **values | changes)

    return make


def results_in(folder):
    return json.loads((Path(folder) / "results.json").read_text())


def numbers(folder):
    """All that is measured, without where it lies."""
    whole = results_in(folder)
    return whole["results"], whole["table"]


def test_structure_and_detail_alone_are_ends_of_the_fusion(run, tiny_flux):
    """M is M_s whatever A is, or M_d whatever A is."""
    from focusdpo.models import BACKBONES
    from focusdpo.training.adapter import add_adapter
    from focusdpo.training.step import PreferenceStep

    batch = pair_batch(Path(run.data.train), 0)
    for tau in (0.0, 1.0):  # A is between them
        for name in ("structure", "detail"):
            changed = VARIANTS[name].of(dataclasses.replace(run, focus=FocusConfig(tau=tau)))
            backbone = BACKBONES["flux"].from_pretrained(str(tiny_flux), dtype=torch.float32, max_sequence_length=16)
            add_adapter(backbone, run.lora, 0)
            focus = PreferenceStep(backbone, changed.focus, changed.loss)(batch, torch.Generator().manual_seed(0)).focus
            assert focus is not None and 0 < float(focus.coverage) < 1
            expected = focus.structure if name == "structure" else focus.detail
            torch.testing.assert_close(focus.mask, expected)


def test_grids(run, settings):
    run.focus = FocusConfig(tau=0.1)
    config = settings(variants=["dpo", "focus"], grids=["tau", "match_count", "layers"], layers=["all", "late", "0,3"])
    changes = {change.name: change.of(run).focus for change in changes_of(config, run)}
    assert list(changes) == [
        "dpo", "focus", "tau=0.05", "tau=0.2", "tau=0.4", "match_count=prior", "match_count=0.1", "match_count=0.25",
        "layers=late", "layers=0,3",
    ], "a run's own value is the variant focus"  # fmt: skip
    assert changes["tau=0.2"] == FocusConfig(tau=0.2) and changes["match_count=0.1"].match_count == 0.1
    assert changes["layers=late"].layers == [2, 3] and changes["layers=0,3"].layers == [0, 3], "of the model's four blocks"
    without = settings(variants=["dpo"], grids=["mask_from"])
    assert [change.name for change in changes_of(without, run)] == ["dpo", "mask_from=winner", "mask_from=each"]


def test_every_variant_and_grid_is_trained(run, settings, tmp_path):
    run.max_steps = 2
    grids = ["tau", "gamma", "match_count", "layers", "mask_from", "feature_source"]
    config = settings(variants=list(VARIANTS), seeds=[0], grids=grids, layers=["late"], samples=0)
    prepare_ablation(config)()
    rows = {row["variant"]: row for row in results_in(tmp_path / "ablation")["table"]["rows"]}
    assert list(rows) == [change.name for change in changes_of(config, run)]
    assert list(rows)[:7] == list(VARIANTS) and {name.split("=")[0] for name in list(rows)[7:]} == set(grids)

    def error(name):
        (cell,) = (cell for cell in rows[name]["cells"] if cell["measure"] == "lose/inside")
        return cell["estimate"]["mean"]

    learned = {name: error(name) for name in ("base", "sft", "dpo", "prior", "structure", "detail")}
    assert len(set(learned.values())) == len(learned), f"each is another loss: {learned}"
    page = (tmp_path / "ablation" / "ablation.html").read_text()
    assert all(change.label in page for change in changes_of(config, run)), "a row each"


def test_yardsticks_by_hand(run):
    """Errors by region from the model's own predictions, whatever mask it is trained under."""
    trainer = Trainer(dataclasses.replace(run, focus=FocusConfig(mask="none")))
    for name, parameter in trainer.module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    found = yardsticks.judge(trainer, [0.3, 0.7], limit=3)
    assert {len(values) for values in found.values()} == {3} and set(yardsticks.MEASURES) <= set(found)
    batch = next(iter(torch.utils.data.DataLoader(trainer.validation_set, batch_sampler=[[0, 1, 2]], collate_fn=_collate)))
    prior = pool_mask(batch.prior)
    expected = {name: [] for name in ("win/whole", "win/inside", "lose/outside", "accuracy/inside")}
    for number, t in enumerate((0.3, 0.7)):
        noised = trainer.step.noise(batch, torch.Generator().manual_seed(VALIDATION_SEED + number), torch.full((3,), t))
        policy, reference, _ = trainer.step.predictions(noised, batch)
        errors, basis = ((x - noised.target).double().square().mean(-1) for x in (policy, reference))  # [6, P]

        def mean(values, where):
            return (values * where).sum(-1) / where.sum(-1)

        whole = torch.ones_like(prior)
        expected["win/whole"].append(mean(errors[:3], whole) / mean(basis[:3], whole))
        expected["win/inside"].append(mean(errors[:3], prior) / mean(basis[:3], prior))
        expected["lose/outside"].append(mean(errors[3:], ~prior) / mean(basis[3:], ~prior))
        gained = (mean(errors, prior.repeat(2, 1)) - mean(basis, prior.repeat(2, 1))).unflatten(0, (2, 3))
        expected["accuracy/inside"].append((gained[0] < gained[1]).double())
    for name, values in expected.items():
        assert found[name] == pytest.approx(torch.stack(values).mean(0).tolist(), rel=1e-4), name


def _collate(samples):
    from focusdpo.data import collate

    return collate(samples)


def shift_of(values, copies=1):
    return {seed: [x + 0.5 for x in numbers * copies] for seed, numbers in values.items()}


def test_statistics():
    values = {0: [1.0, 3.0], 1: [2.0, float("nan")], 2: [5.0, 5.0]}
    found = over_seeds(values)
    low, high = stats.t.interval(0.95, 2, loc=3.0, scale=stats.sem([2.0, 2.0, 5.0]))
    assert (found.mean, found.low, found.high) == pytest.approx((3.0, low, high))
    shift = shift_of(values)
    gap = difference(shift, values)
    assert gap.mean == 0.5 and np.isnan([gap.low, gap.high]).all() and not gap.differs, "two pairs say nothing of others"
    gap = difference({seed: [x + seed % 2 for x in numbers * 3] for seed, numbers in values.items()}, shift_of(values, 3))
    assert gap == over_seeds({0: [-0.5], 1: [0.5], 2: [-0.5]}), "seed by seed and pair by pair"
    apart, before = {seed: [1.0] * 6 for seed in range(3)}, {0: [0.5] * 6}
    assert difference(apart, before, "baseline") == Estimate(0.5, 0.5, 0.5), "six pairs on one side are no chance"
    third = over_seeds({0: [1 / 3, 1 / 3, 2 / 3, 1.0], 1: [1.0, 2 / 3, 1 / 3, 1 / 3 + 1e-16], 2: [2 / 3, 1 / 3, 1.0, 1 / 3]})
    assert third.high - third.low > 0.1, "means that differ by rounding are equal"
    rng = np.random.default_rng(0)
    for _ in range(200):  # the same means, of other pairs: rounding is no difference
        before = {seed: (rng.integers(0, 4, 8) / 3).tolist() for seed in range(3)}
        gap = difference({seed: rng.permutation(numbers).tolist() for seed, numbers in before.items()}, before)
        assert not gap.differs, gap
    crossed = difference({0: [2.0, 0.5] * 3, 1: [0.5, 2.0] * 3}, {0: [1.0] * 6, 1: [1.0] * 6})
    assert crossed.mean == 0.25 and not crossed.differs, "half of the pairs are on the other side"
    level = over_seeds({0: [0.0] * 6, 1: [0.0] * 6})
    assert level.mean == 0 and np.isnan([level.low, level.high]).all(), "no leak in six is no certainty"
    beside = difference({7: [2.0, 4.0]}, shift, "values").mean
    assert beside == pytest.approx((0.5 - 0.5 - 2.5) / 3), "one that is not trained stands beside all; NaN is missing"
    assert difference({7: [0.0]}, {1: [0.0], 2: [0.0]}) is None, "one training that came through has no partner"
    missing = over_seeds({0: [float("nan")] * 2, 1: [float("nan")] * 2})
    assert np.isnan([missing.mean, missing.low, missing.high]).all() and not missing.differs, "a measure that nothing has"
    alike = over_seeds({0: [0.0, 1.0, 1.0, 1.0], 1: [1.0, 1.0, 1.0, 0.0]})
    assert alike.low < alike.mean < alike.high, "equal means of two trainings are no certainty"
    one = over_seeds({0: np.random.default_rng(0).normal(size=200).tolist()})
    assert one.high - one.low == pytest.approx(2 * 1.96 / np.sqrt(200), rel=0.2), "of one training: over its pairs"


def test_intervals_of_shares_are_shares():
    near = {0: [1.0] * 9 + [0.8], 1: [1.0] * 10, 2: [1.0] * 10}
    assert over_seeds(near).high > 1, "Student's"
    found = over_seeds(near, is_share=True)
    assert found.mean == over_seeds(near).mean and 0 < found.low < found.mean < found.high <= 1
    every = over_seeds({seed: [1.0] * 10 for seed in range(3)}, is_share=True)
    assert every == Estimate(1.0, pytest.approx(0.025**0.1), 1.0), "pairs count, and not trainings of the same pairs"
    change, share = VARIANTS["dpo"], Measure("share", is_share=True)
    table = tabulate([Result("dpo", seed, {"share": near[seed]}, [], None) for seed in near], [change], "dpo", {"share": share})
    assert table.rows[0].cells[0].estimate == found
    every = [Result("dpo", seed, {"share": [1.0] * 10}, [{"step": 5, "share": 1.0}], None) for seed in range(2)]
    band = curve_figure(every, table, "share", {"dpo": "DPO"}).data[1]
    assert list(band.y) == [1.0, pytest.approx(0.025**0.1)]


def rows_of(means, measures):
    """A table of variants whose every pair has one value, by measure."""
    names = ("base", "sft", "dpo", "focus")
    results = [Result(n, 0, {m: [values[i]] * 3 for m, values in means.items()}, []) for i, n in enumerate(names)]
    return tabulate(results, [VARIANTS[name] for name in names], "dpo", measures)


def test_digits_are_enough_to_differ():
    """Where all variants would look alike, and there alone; up to six."""
    means = {
        "apart": [1.0, 1.00001, 1.00002, 1.1],
        "close": [1.0, 1.00004, 1.00002, 1.00003],
        "alike": [1.0] * 4,
        "noise": [1.0, 1.0 + 1e-9, 1.0, 1.0],
    }
    table = rows_of(means, {name: Measure(name) for name in means})
    assert {name: table.digits(name, 3) for name in means} == {"apart": 3, "close": 5, "alike": 3, "noise": 3}
    text = text_of(table, {name: name for name in VARIANTS})
    assert "1.00002 [-]" in text and "-0.00002 [-]" in text and "1.1000 [-]" in text, text


TABLE = """
  const box = page.querySelector(".ablation");
  seen.page = page.documentElement.scrollWidth - view.innerWidth;
  seen.scrolls = box.scrollWidth - box.clientWidth;
  const row = box.querySelector("tbody tr");
  const place = (cell) => cell.getBoundingClientRect();
  const corner = box.querySelector("thead th");
  seen.before = place(row.cells[0]).left - place(box).left;
  box.scrollLeft = 300;
  await pause(100);
  seen.after = place(row.cells[0]).left - place(box).left;
  const { left, top } = place(row.cells[0]);
  seen.onTop = row.cells[0].contains(page.elementFromPoint(left + 5, top + 5));
  const head = place(corner);
  seen.corner = [head.left - place(box).left, page.elementFromPoint(head.left + 5, head.top + 5) === corner];
  seen.first = place(row.cells[0]).width / place(box).width;
  seen.text = box.innerText;
"""


@browser
@pytest.mark.parametrize("width", [1300, 390])
def test_the_table_scrolls_beside_its_first_column(tmp_path, width):
    measures = {**yardsticks.MEASURES, **JUDGED}
    table = rows_of({name: [1.0, 0.99996, 0.99998, 0.99997] for name in measures}, measures)
    config = AblationConfig("train.yaml", str(tmp_path), samples=0)
    changes = [VARIANTS[row.variant] for row in table.rows]
    (tmp_path / "page").mkdir()
    write_ablation_page(
        tmp_path / "page" / "page.html", config, TrainConfig(ModelConfig("-"), DataConfig("-"), "-"), changes, [], table, []
    )
    seen, _ = in_browser(tmp_path / "page", tmp_path, TABLE, width=width)
    assert "error" not in seen and seen["console"] == [], seen
    assert seen["page"] <= 0 < seen["scrolls"], "in its own box"
    assert seen["before"] == seen["after"] <= 1 and seen["onTop"] and seen["corner"] == [seen["before"], True]
    assert seen["first"] < 0.5 and "0.99996" in seen["text"]


def test_verdicts():
    def result(variant, seed, offset, failed=None):
        values = {} if failed else {name: [offset + seed / 100, *[offset + 0.1] * 5] for name in ("good", "bad", "odd")}
        return Result(variant, seed, values, [], failed)

    measures = {"good": Measure("good"), "bad": Measure("bad", "less"), "odd": Measure("odd", "neither")}
    results = [result(variant, seed, float(variant == "focus")) for variant in ("dpo", "focus") for seed in (0, 1)]
    results.append(result("sft", 0, 0, "NaN"))
    table = tabulate(results, [VARIANTS[name] for name in ("dpo", "focus", "sft")], "dpo", measures)
    assert [cell.is_better for cell in table.rows[1].cells] == [True, False, None]
    assert [cell.difference for cell in table.rows[0].cells] == [None] * 3
    text = text_of(table, {"dpo": "DPO", "focus": "Focus", "sft": "SFT"})
    assert (
        text.count("  better") == 1
        and text.count("  worse") == 1
        and "SFT: 0 of 1 trainings came through\nseed 0: NaN" in text
        and "failed" in text
    )


def test_an_interrupted_ablation_goes_on_to_the_same_numbers(run, settings, tmp_path, monkeypatch):
    prepare_ablation(settings())()
    whole = numbers(tmp_path / "ablation")
    assert [(r["variant"], r["seed"]) for r in whole[0]] == [("base", 0), ("dpo", 0), ("dpo", 1)]
    assert all([point["step"] for point in r["curve"]] == [2, 4] for r in whole[0] if r["variant"] != "base")
    page = (tmp_path / "ablation" / "ablation.html").read_text()
    assert "Diffusion-DPO" in page and page.count("data:image/webp") >= 4
    assert len(list((tmp_path / "ablation" / "runs").rglob("*_sample.png"))) == 5, "trained ones before and after"

    (tmp_path / "ablation").rename(tmp_path / "whole")
    calls = []

    def killed(trainer, *arguments):
        """In the middle of the second training, after its first checkpoint."""
        calls.append(trainer.progress.step)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return judge(trainer, *arguments)

    judge = yardsticks.judge
    monkeypatch.setattr(ablation_jobs.yardsticks, "judge", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare_ablation(settings())()
    assert calls[-1] == 4 and not (tmp_path / "ablation" / "results.json").exists()
    prepare_ablation(settings())()
    assert numbers(tmp_path / "ablation") == whole
    done = len(calls)
    prepare_ablation(settings())()
    assert len(calls) == done, "what is done is only read"

    with pytest.raises(ValueError, match=r"other settings:\n  ablation.times: the begun ablation has \[0.5\], got \[0.25\]"):
        prepare_ablation(settings(times=[0.25]))
    run.samples.seed = 5
    with pytest.raises(ValueError, match="run.samples.seed: the begun ablation has 0, got 5"):
        prepare_ablation(settings())
    run.samples.seed, run.optim.lr = 0, 1e-3
    with pytest.raises(ValueError, match="run.optim.lr: the begun ablation has 0.003, got 0.001"):
        prepare_ablation(settings())


def test_a_training_that_gives_up(run, settings, tmp_path, monkeypatch, tiny_pairs):
    """One seed of two fails in mid-course; the pairs of which one is left out keep their own pictures."""
    trained = Trainer._is_finite

    def gives_up(trainer, norm):
        if trainer.config.seed == 1 and trainer.progress.step == 3:
            raise FloatingPointError("no finite gradient")
        return trained(trainer, norm)

    monkeypatch.setattr(Trainer, "_is_finite", gives_up)
    run.data.max_crop = 0.5
    prepare_ablation(settings(variants=["dpo", "focus"]))()
    found = {(r["variant"], r["seed"]): r for r in results_in(tmp_path / "ablation")["results"]}
    assert found["dpo", 1]["failed"] == "no finite gradient" and not found["dpo", 1]["values"] and found["dpo", 0]["values"]
    assert "1 of 2 trainings came through" in (tmp_path / "ablation" / "table.txt").read_text()
    assert "1 of 2 trainings came through; seed 1: no finite gradient" in (tmp_path / "ablation" / "ablation.html").read_text()
    left_out = (tmp_path / "ablation" / "runs" / "dpo" / "seed-0" / "left_out.jsonl").read_text().splitlines()
    lines = {json.loads(line)["line"] for line in left_out}
    kept = [r for r in load_pairs(str(tiny_pairs)) if r.line not in lines]
    assert lines and kept[0].prompt in (tmp_path / "ablation" / "ablation.html").read_text()


def test_two_workers_give_the_same(settings, tmp_path):
    config = settings(variants=["dpo", "focus"], seeds=[3], samples=0)
    prepare_ablation(config)()
    alone = numbers(tmp_path / "ablation")
    (tmp_path / "ablation").rename(tmp_path / "alone")
    options = ["--variants", "dpo", "focus", "--seeds", "3", "--points", "2", "--times", "0.5", "--samples", "0"]
    options += ["--workers", "2"]
    command = [sys.executable, "-m", "focusdpo", "ablate", "--config", config.config, "--output_dir", config.output_dir]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    assert numbers(tmp_path / "ablation") == alone
    assert "pairs told apart within the prior" in done.stdout


def test_after_a_failure_no_other_run_begins(run, settings, tmp_path):
    """Neither do the workers take what waits for them, nor does the command go on behind its error."""
    config = settings(variants=["dpo", "focus"], seeds=[0, 1, 2, 3], samples=0)
    jobs = jobs_of(config, run, [VARIANTS[name] for name in config.variants], None)
    broken = dataclasses.replace(jobs[0].config, model=dataclasses.replace(run.model, path=str(tmp_path / "none")))
    jobs[0] = dataclasses.replace(jobs[0], config=broken)
    with pytest.raises(FileNotFoundError, match="none"):
        run_jobs(jobs, workers=2)
    assert not workers_of(os.getpid())
    assert sum(job.folder.exists() for job in jobs[2:]) <= 2 and not jobs[-1].folder.exists()


REFUSED = {
    "twice": ({"seeds": [1, 1]}, "seeds: got \\[1, 1\\]; expected each once"),
    "baseline": ({"variants": ["sft"]}, "baseline: got 'dpo'; expected one of the variants"),
    "time": ({"times": [0.0]}, "times: got \\[0.0\\]; expected numbers between 0 and 1"),
    "tau": ({"grids": ["tau"], "tau": [2.0]}, "tau: focus.tau: got 2.0; expected 0 to 1"),
    "no values": ({"grids": ["gamma"], "gamma": []}, "gamma: got \\[\\]; expected at least one value"),
    "value twice": ({"grids": ["tau"], "tau": [0.1, 0.1]}, "tau: got \\[0.1, 0.1\\]; expected each once"),
    "layers": ({"grids": ["layers"], "layers": ["last"]}, "layers: got 'last'; expected \"all\""),
    "matches": (
        {"grids": ["match_count"], "match_count": ["prior", 5000]},
        "focus.match_count: got 5000; expected at most 16, the tokens of the smallest target",
    ),
    "block": ({"grids": ["layers"], "layers": ["0,9"]}, "layers: got '0,9'; expected blocks from 0 to 3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(settings, case):
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        prepare_ablation(settings(**changes))


def test_runs_that_cannot_be_judged(run, settings, tmp_path):
    run.loss.loss_type = "sft"
    with pytest.raises(ValueError, match="config: .* expected a preference loss"):
        prepare_ablation(settings())
    run.loss.loss_type = "sigmoid"
    run.focus = FocusConfig(mask="none", per_subject=True)
    with pytest.raises(DatasetError, match="prior: is one mask, but focus.per_subject needs a list"):
        prepare_ablation(settings(variants=["base", "dpo"]))
    run.focus = FocusConfig()
    run.data.validation = None
    with pytest.raises(ValueError, match=r"config: .* expected a run with data.validation"):
        prepare_ablation(settings())
    with pytest.raises(FileNotFoundError, match="config: no such file"):
        prepare_ablation(AblationConfig(str(tmp_path / "none.yaml")))
    (tmp_path / "bad.yaml").write_text("model: {path: x}\nfocus: {tau: 7}\n")
    with pytest.raises(ValueError, match="config: .*bad.yaml does not hold the settings of a training run"):
        prepare_ablation(AblationConfig(str(tmp_path / "bad.yaml")))
    (tmp_path / "ablation").mkdir(exist_ok=True)
    (tmp_path / "ablation" / "table.txt").write_text("mine")
    run.data.validation = run.data.train
    with pytest.raises(FileExistsError, match=r"output_dir: .* holds table.txt, which this command did not write"):
        prepare_ablation(settings())
