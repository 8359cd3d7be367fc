"""The ablation: what a variant changes, the same yardsticks for all, statistics, interruption, and the page."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
import yaml

from focusdpo.commands.ablate import jobs_of
from focusdpo.commands.ablate import prepare as prepare_ablation
from focusdpo.data import DatasetError, load_pairs
from focusdpo.demo.scenes import write_dataset
from focusdpo.features import pool_mask
from focusdpo.foundation.journals import Journal
from focusdpo.studies.ablation import jobs as ablation_jobs
from focusdpo.studies.ablation import yardsticks
from focusdpo.studies.ablation.equal_drift import DRIFT
from focusdpo.studies.ablation.jobs import Result, run_jobs
from focusdpo.studies.ablation.page import write_ablation_page
from focusdpo.studies.ablation.statistics import tabulate
from focusdpo.studies.ablation.variants import VARIANTS, changes_of
from focusdpo.studies.ablation.yardsticks import Measure
from focusdpo.studies.config import AblationConfig, Grid
from focusdpo.studies.microcosm.judging import MEASURES as JUDGED
from focusdpo.training.config import DataConfig, FocusConfig, LoraConfig, ModelConfig, OptimConfig, SamplesConfig, TrainConfig
from focusdpo.training.trainer import VALIDATION_SEED, Trainer
from tests import PATIENCE
from tests.backbones import pair_batch
from tests.browser import browser, in_browser
from tests.processes import workers_of


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Eight pairs with a prior for each subject, which some variants need."""
    return write_dataset(tmp_path_factory.mktemp("data") / "pairs", 8, 96, seed=0, per_subject=True)


@pytest.fixture
def run(tmp_path, tiny_flux, pairs):
    return TrainConfig(
        model=ModelConfig(path=str(tiny_flux), dtype="fp32", max_sequence_length=16, gradient_checkpointing=False),
        data=DataConfig(
            train=str(pairs),
            validation=str(pairs),
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
        return AblationConfig(str(file), str(tmp_path / "ablation"), **{"baseline": "dpo"} | values | changes)

    return make


ADDED = {"tau": 0.9, "gamma": 0.9, "match_count": 0.9, "layers": "0,1", "kappa": 0.6}  # the others have all their values


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
    kappas = [change.name for change in changes_of(settings(variants=["dpo", "focus"], grids=["kappa"]), run)]
    assert kappas[2:] == ["kappa=0.5", "kappa=0.75", "kappa=0.9"], "focus has hidden states, and none of these"
    without = settings(variants=["dpo"], grids=["mask_from"])
    assert [change.name for change in changes_of(without, run)] == ["dpo", "mask_from=winner", "mask_from=each"]


def test_every_variant_and_grid_is_trained(run, settings, tmp_path):
    run.max_steps = 2
    grids = list(typing.get_args(Grid))
    few = {"layers": ["late"], "tau": [0.4], "gamma": [0.6], "match_count": [0.25], "kappa": [0.9]}
    config = settings(variants=list(VARIANTS), seeds=[0], grids=grids, samples=0, **few)
    prepare_ablation(config)()
    rows = {row["variant"]: row for row in results_in(tmp_path / "ablation")["table"]["rows"]}
    assert list(rows) == [change.name for change in changes_of(config, run)]
    count = len(VARIANTS)
    assert list(rows)[:count] == list(VARIANTS) and {name.split("=")[0] for name in list(rows)[count:]} == set(grids)

    def error(name):
        (cell,) = (cell for cell in rows[name]["cells"] if cell["measure"] == "lose/inside")
        return cell["estimate"]["mean"]

    losses = ("base", "sft", "dpo", "prior", "subject", "structure", "random", "detail")
    learned = {name: error(name) for name in losses}
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
    prior = pool_mask(batch.prior).any(1)
    names = ("win/whole", "win/inside", "lose/outside", "accuracy/inside", "drift/inside", "drift/outside", "drift/whole")
    expected = {name: [] for name in names}
    for number, t in enumerate((0.3, 0.7)):
        noised = trainer.step.noise(batch, torch.Generator().manual_seed(VALIDATION_SEED + number), torch.full((3,), t))
        policy, output, _ = trainer.step.predictions(noised, batch)
        reference = output.prediction
        errors, basis = ((x - noised.target).double().square().mean(-1) for x in (policy, reference))  # [6, P]

        def mean(values, where):
            return (values * where).sum(-1) / where.sum(-1)

        whole = torch.ones_like(prior)
        expected["win/whole"].append(mean(errors[:3], whole) / mean(basis[:3], whole))
        expected["win/inside"].append(mean(errors[:3], prior) / mean(basis[:3], prior))
        expected["lose/outside"].append(mean(errors[3:], ~prior) / mean(basis[3:], ~prior))
        gained = (mean(errors, prior.repeat(2, 1)) - mean(basis, prior.repeat(2, 1))).unflatten(0, (2, 3))
        expected["accuracy/inside"].append((gained[0] < gained[1]).double())
        moved = (policy - reference).double().square().mean(-1).unflatten(0, (2, 3)).mean(0)
        for region, where in (("inside", prior), ("outside", ~prior), ("whole", whole)):
            expected[f"drift/{region}"].append(mean(moved, where))
    for name, values in expected.items():
        assert found[name] == pytest.approx(torch.stack(values).mean(0).tolist(), rel=1e-4), name


@pytest.mark.parametrize(
    ("steps", "points", "expected"),
    [(40, 5, [3, 6, 12, 24, 40]), (1000, 4, [125, 250, 500, 1000]), (7, 1, [7]), (2, 2, [1, 2]), (3, 9, [1, 2, 3])],
)
def test_a_training_is_judged_at_halves_of_its_steps(run, tmp_path, steps, points, expected):
    settings = ablation_jobs.run_of(run, VARIANTS["dpo"], 0, tmp_path, steps, points, 0)
    due = [step for step in range(1, steps + 1) if step % settings.validate_every == 0 or step == steps]
    assert [step for step in due if ablation_jobs._is_point(step, settings)] == expected


def test_the_reference_model_is_asked_once(run):
    """What it says is kept for the next point, whose numbers are the same; and it is what the next point takes."""
    trainer = Trainer(dataclasses.replace(run, focus=FocusConfig(feature_source="reference")))
    first = yardsticks.judge(trainer, [0.3, 0.7])
    known = {}
    assert yardsticks.judge(trainer, [0.3, 0.7], known=known) == first and known
    predict, asked = trainer.step.predict, []

    def spied(noised, taps=(), which="policy"):
        asked.append(which)
        return predict(noised, taps, which)

    trainer.step.predict = spied
    assert yardsticks.judge(trainer, [0.3, 0.7], known=known) == first and set(asked) == {"policy"}
    known = {draw: dataclasses.replace(kept, prediction=kept.prediction + 1) for draw, kept in known.items()}
    assert yardsticks.judge(trainer, [0.3, 0.7], known=known)["drift/whole"] != first["drift/whole"]


def _collate(samples):
    from focusdpo.data import collate

    return collate(samples)


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
    names = ("base", "sft", "dpo", "focus")
    results = [
        Result(n, 0, dict.fromkeys(measures, [x] * 3), []) for n, x in zip(names, (1, 0.99996, 0.99998, 0.99997), strict=True)
    ]
    table = tabulate(results, [VARIANTS[name] for name in names], "dpo", measures)
    config = AblationConfig("train.yaml", str(tmp_path), samples=0)
    changes = [VARIANTS[row.variant] for row in table.rows]
    (tmp_path / "page").mkdir()
    write_ablation_page(
        tmp_path / "page" / "page.html",
        config,
        TrainConfig(ModelConfig("-"), DataConfig("-"), "-"),
        changes,
        [],
        table,
        [],
        "-",
    )
    seen, _ = in_browser(tmp_path / "page", tmp_path, TABLE, width=width)
    assert "error" not in seen and seen["console"] == [], seen
    assert seen["page"] <= 0 < seen["scrolls"], "in its own box"
    assert seen["before"] == seen["after"] <= 1 and seen["onTop"] and seen["corner"] == [seen["before"], True]
    assert seen["first"] < 0.5 and "0.99996" in seen["text"]


def test_an_interrupted_ablation_goes_on_to_the_same_numbers(run, settings, tmp_path, monkeypatch):
    prepare_ablation(settings())()
    whole = numbers(tmp_path / "ablation")
    assert [(r["variant"], r["seed"]) for r in whole[0]] == [("base", 0), ("dpo", 0), ("dpo", 1)]
    assert all([point["step"] for point in r["curve"]] == [2, 4] for r in whole[0] if r["variant"] != "base")
    page = (tmp_path / "ablation" / "ablation.html").read_text()
    assert "Diffusion-DPO" in page and page.count("data:image/webp") >= 4
    assert len(list((tmp_path / "ablation" / "runs").rglob("*_sample.png"))) == 5, "trained ones before and after"
    loras = list((tmp_path / "ablation" / "runs").glob("*/*/lora"))
    assert len(loras) == 2 and not any((lora / "README.md").exists() for lora in loras), "no cards, which take seconds"

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

    for grid in typing.get_args(Grid):  # may be added to
        prepare_ablation(settings(**{grid: [*getattr(settings(), grid), ADDED[grid]]} if grid in ADDED else {}))
    with pytest.raises(ValueError, match=r"other settings:\n  ablation.times: the begun ablation has \[0.5\], got \[0.25\]"):
        prepare_ablation(settings(times=[0.25]))
    run.samples.seed = 5
    with pytest.raises(ValueError, match="run.samples.seed: the begun ablation has 0, got 5"):
        prepare_ablation(settings())
    run.samples.seed, run.optim.lr = 0, 1e-3
    with pytest.raises(ValueError, match="run.optim.lr: the begun ablation has 0.003, got 0.001"):
        prepare_ablation(settings())


DRAWN = {"drawn": Measure("drawn"), DRIFT: Measure("drift", "neither")}


class Drawing:
    """A judge whose numbers tell models apart; it is killed in a call of its choice."""

    def __init__(self, killed_in=None):
        self.calls, self.killed_in = 0, killed_in

    def __call__(self, trainer, folder):
        self.calls += 1
        if self.calls == self.killed_in:
            raise KeyboardInterrupt
        moved = [float(p.detach().double().square().sum()) for n, p in trainer.module.named_parameters() if "lora_B" in n]
        return {"drawn": [sum(moved[i::8]) for i in range(8)], DRIFT: [sum(moved)] * 8}


def test_values_of_each_point_also_when_killed(settings, tmp_path, monkeypatch):
    """Killed while the judge looks, behind a point that has no checkpoint yet, and at the very end."""
    focus = {"variants": ["base", "dpo", "focus"], "seeds": [0], "samples": 0, "judge_points": True}
    config = settings(**focus, primary=["focus", "drawn"], primary_at="equal drift")
    judge = Drawing()
    prepare_ablation(config, judge, DRAWN)()
    whole = results_in(tmp_path / "ablation")
    assert judge.calls == 1 + 2 * 2, "the last point is the end"
    for result in whole["results"][1:]:
        first, last = result["curve"]
        assert (first["step"], last["step"]) == (2, 4) and last["values"] == result["values"]
        assert len(first["values"]["drawn"]) == 8 and first["values"]["drawn"] != last["values"]["drawn"]
        assert len(first["values"]["win/whole"]) == len(last["values"]["win/whole"])
    equal = whole["equal_drift"]
    assert equal["measure"] == "drawn" and [row["variant"] for row in equal["table"]["rows"]] == ["dpo", "focus"]
    text = (tmp_path / "ablation" / "table.txt").read_text()
    assert "At equal drift, " in text and "At equal drift, " in (tmp_path / "ablation" / "ablation.html").read_text()

    (tmp_path / "ablation").rename(tmp_path / "whole")
    write = Journal.write

    def killed(journal, row, *arguments):
        write(journal, row, *arguments)
        if row["step"] == 4 and "values" in row:
            raise KeyboardInterrupt

    for killed_in in (2, 3):  # at the first point, and at the last
        with pytest.raises(KeyboardInterrupt):
            prepare_ablation(config, Drawing(killed_in), DRAWN)()
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare_ablation(config, Drawing(), DRAWN)()
    with monkeypatch.context() as patched:
        patched.setattr(ablation_jobs, "write_whole", killed_in_the_end)
        with pytest.raises(KeyboardInterrupt):
            prepare_ablation(config, Drawing(), DRAWN)()
    last = Drawing()
    prepare_ablation(config, last, DRAWN)()
    assert results_in(tmp_path / "ablation") == whole and last.calls == 0, "its points were all there"
    _older_files(config, tmp_path / "ablation", whole)


def killed_in_the_end(*_):
    raise KeyboardInterrupt


def _older_files(config, folder, whole):
    """Of a version that kept the means alone: refused, also where only a run's own files are of it."""
    run = folder / "runs" / "focus" / "seed-0"
    (run / "result.json").unlink()
    lines = (run / "judged.jsonl").read_text().splitlines()
    (run / "judged.jsonl").write_text(lines[0] + "\n")
    judge = Drawing()
    prepare_ablation(config, judge, DRAWN)()
    assert results_in(folder) == whole and judge.calls == 1, "a lost line is judged again"
    (run / "result.json").write_text(
        json.dumps({"variant": "focus", "seed": 0, "values": {}, "curve": [{"step": 2, "x": 1.0}]})
    )
    (run / "judged.jsonl").write_text('{"step": 2, "win/whole": 1.0}\n')
    with pytest.raises(ValueError, match=r"judged.jsonl: has no values of single items, .*delete .*seed-0 to train anew"):
        prepare_ablation(config, Drawing(), DRAWN)()
    begun = json.loads((folder / "ablation.json").read_text())
    del begun["format"]
    (folder / "ablation.json").write_text(json.dumps(begun))
    with pytest.raises(
        ValueError, match=r"format.points: the begun ablation has None, got 'values of each item, at halves of the steps'"
    ):
        prepare_ablation(config, Drawing(), DRAWN)


def test_the_judge_is_asked_at_the_end_alone(settings, tmp_path):
    judge = Drawing()
    prepare_ablation(settings(seeds=[0], samples=0, primary=["base", "drawn"]), judge, DRAWN)()
    assert judge.calls == 2
    whole = results_in(tmp_path / "ablation")
    assert "drawn" not in whole["results"][1]["curve"][-1]["values"] and whole["results"][1]["values"]["drawn"]
    assert "no training of dpo has drift/whole and drawn in its course" in whole["equal_drift"]["none"]
    judged_at = {"primary": ["focus", "drawn"], "primary_at": "equal drift", "variants": ["base", "dpo", "focus"]}
    with pytest.raises(ValueError, match="judge_points: got False; expected true for a comparison at equal drift in drawn"):
        prepare_ablation(settings(seeds=[0], samples=0, **judged_at), judge, DRAWN)


def test_a_training_that_gives_up(run, settings, tmp_path, monkeypatch, pairs):
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
    kept = [r for r in load_pairs(str(pairs)) if r.line not in lines]
    assert lines and kept[0].prompt in (tmp_path / "ablation" / "ablation.html").read_text()


def test_two_workers_give_the_same(settings, tmp_path):
    config = settings(variants=["dpo", "focus"], seeds=[3], samples=0)
    prepare_ablation(config)()
    alone = numbers(tmp_path / "ablation")
    (tmp_path / "ablation").rename(tmp_path / "alone")
    options = ["--variants", "dpo", "focus", "--seeds", "3", "--points", "2", "--times", "0.5", "--samples", "0"]
    options += ["--baseline", "dpo", "--workers", "2"]
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
    "primary": ({"primary": ["dpo", "win/whole"]}, "primary: got .* expected a variant other than 'dpo', and a measure"),
    "primary's variant": (
        {"primary": ["focus", "win/whole"]},
        "primary: .* expected a variant beside the baseline, one of .'base'.",
    ),
    "primary's measure": ({"primary": ["base", "coverage"]}, "primary: .* expected a measure that has a better side, one of"),
    "no primary": ({"primary_at": "equal drift"}, "primary_at: got 'equal drift'; expected end, as primary is not set"),
    "primary untrained": (
        {"primary": ["base", "win/whole"], "primary_at": "equal drift"},
        'primary_at: got .* expected "end", as "base" is not trained',
    ),
    "one point": (
        {"primary": ["sft", "win/whole"], "primary_at": "equal drift", "variants": ["base", "sft", "dpo"], "points": 1},
        "points: got 1; expected at least 2",
    ),
    "no base": (
        {"primary": ["sft", "win/whole"], "primary_at": "equal drift", "variants": ["sft", "dpo"]},
        'primary_at: got .* expected "end", or "base" among the variants',
    ),
    "block": ({"grids": ["layers"], "layers": ["0,9"]}, "layers: got '0,9'; expected blocks from 0 to 3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(settings, case, monkeypatch):
    changes, message = REFUSED[case]
    monkeypatch.setitem(yardsticks.MEASURES, DRIFT, DRAWN[DRIFT])
    with pytest.raises(ValueError, match=message):
        prepare_ablation(settings(**changes))


def test_runs_that_cannot_be_judged(run, settings, tmp_path, pairs, tiny_pairs):
    run.loss.loss_type = "sft"
    with pytest.raises(ValueError, match="config: .* expected a preference loss"):
        prepare_ablation(settings())
    run.loss.loss_type = "sigmoid"
    run.data.train = str(tiny_pairs)
    run.focus = FocusConfig(mask="none", per_subject=True)
    with pytest.raises(DatasetError, match="prior: is one mask, but focus.per_subject needs a list"):
        prepare_ablation(settings(variants=["base", "dpo"]))
    run.focus = FocusConfig()
    for variant, setting in (("subject", "loss.granularity=subject"), ("truth", "focus.source=truth")):
        with pytest.raises(DatasetError, match=f"the dataset has 8 problems(.|\n)*prior: is one mask, but {setting} needs"):
            prepare_ablation(settings(variants=["dpo", variant]))
    run.data.train = str(pairs)
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
