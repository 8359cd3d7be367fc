"""The microcosm: its world, the resumable learning, the judgement, and the whole command at its smallest size."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from focusdpo.building.composing import compose, on_white
from focusdpo.building.dreambench import read_classes
from focusdpo.commands import cli
from focusdpo.commands.microcosm import BASE_PICTURES, PICTURES, WRITTEN, _ablate, _betas_begun, _settings
from focusdpo.commands.microcosm import prepare as prepare_microcosm
from focusdpo.data import load_pairs
from focusdpo.foundation.output_folder import OutputFolder
from focusdpo.studies.ablation.equal_drift import at_equal_drift
from focusdpo.studies.ablation.jobs import Point, Result
from focusdpo.studies.ablation.statistics import tabulate
from focusdpo.studies.ablation.variants import VARIANTS, changes_of
from focusdpo.studies.ablation.yardsticks import Measure
from focusdpo.studies.config import SIZES, MicrocosmConfig
from focusdpo.studies.microcosm import learning
from focusdpo.studies.microcosm.gates import Correspondence
from focusdpo.studies.microcosm.identities import MAX_OF_A_CLASS, identities_of
from focusdpo.studies.microcosm.judge import IdentityJudge, classify, halves, load_judge, train_judge
from focusdpo.studies.microcosm.judging import verdicts
from focusdpo.studies.microcosm.learning import learn
from focusdpo.studies.microcosm.model import Latents, build_model, train_flow
from focusdpo.studies.microcosm.pairs import write_pairs
from focusdpo.studies.microcosm.stages import Stages
from focusdpo.studies.microcosm.tuning import Betas, _best, chosen_betas
from focusdpo.studies.microcosm.verdicts import Outcome, compared, text_of_verdicts
from focusdpo.studies.microcosm.world import BOXES, VIEWS, World, compose_world, draw_disruption, draw_scene
from focusdpo.training.times import at_times
from tests import PATIENCE, ROOT

SHARED = ROOT.parent / "shared" / "data" / "dreambench"


@pytest.fixture(scope="module")
def identities():
    return identities_of(None, 128)


def test_pairs_differ_inside_the_prior_alone_and_show_whom_they_say(identities, tmp_path):
    records = load_pairs(str(write_pairs(tmp_path, identities, 12, 64, 32, seed=5)))
    again = load_pairs(str(write_pairs(tmp_path / "again", identities, 12, 64, 32, seed=5)))
    for record, other in zip(records, again, strict=True):
        winner, loser, *priors = (np.asarray(Image.open(path)) for path in (record.winner, record.loser, *record.prior))
        assert np.array_equal(winner, np.asarray(Image.open(other.winner))) and record.per_subject
        differs, meta = (winner != loser).any(-1), record.meta
        assert not differs[np.maximum(*priors) == 0].any()
        for number, prior in enumerate(priors):
            own, instance = (identities[meta[name][number]] for name in ("identities", "loser_identities"))
            half = prior[:, 32:] if number else prior[:, :32]
            assert half.any() and prior.sum() == half.sum(), "the first subject is on the left, the second on the right"
            exchanged = meta["loser_identities"][number] == meta["identities"][1 - number]
            assert differs[prior > 0].any() and own is not instance and (exchanged or own.class_name == instance.class_name)
        assert [r.class_name for r in record.references] == [identities[i].class_name for i in meta["identities"]]


def test_half_of_the_scenes_show_two_instances_of_one_class(identities):
    """And losers show the other reference's subject, or a third of the own class, as often."""
    rngs = [np.random.default_rng(seed) for seed in range(400)]
    scenes = [draw_scene(identities, 32, rng) for rng in rngs]
    classes = [identity.class_name for identity in identities]
    alike = [classes[a] == classes[b] for a, b in (scene.identities for scene in scenes)]
    assert 160 < sum(alike) < 240 and all(a != b for a, b in (scene.identities for scene in scenes))
    assert len({scene.identities for scene in scenes}) > 200
    shown = [draw_disruption(identities, scene, rng) for scene, rng in zip(scenes, rngs, strict=True)]
    exchanged = []
    for scene, pair in zip(scenes, shown, strict=True):
        for own, other, loser in zip(scene.identities, scene.identities[::-1], pair, strict=True):
            exchanged.append(loser == other)
            assert loser == other or (classes[loser] == classes[own] and loser not in scene.identities)
    assert 340 < sum(exchanged) < 460
    assert max(classes.count(name) for name in classes) == 3 * MAX_OF_A_CLASS, "each subject as it is and in two other colours"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the photos of DreamBench are not here")
def test_dreambench_holds_photos_out(monkeypatch):
    """Of two of its subjects, as each takes half a second to be cut out."""
    classes = {name: kind for name, kind in read_classes(SHARED).items() if name in ("dog5", "duck_toy")}
    monkeypatch.setattr("focusdpo.studies.microcosm.identities.read_classes", lambda *_: classes)
    found = identities_of(str(SHARED), 96)
    assert {one.class_name for one in found} == {"dog", "toy"} and len(found) == 6
    for one in found:
        assert one.views and one.held_out and not set(map(id, one.views)) & set(map(id, one.held_out))
        assert all(image.mode == "RGBA" and max(image.size) == 96 for image in (*one.views, *one.held_out))


def test_learning_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    """Killed between two states, with dropout and a moving average."""

    def train(folder, stop=None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        seen = []

        def loss(generator):
            seen.append(len(seen))
            if stop is not None and len(seen) > stop:
                raise KeyboardInterrupt
            x = torch.randn(16, 4, generator=generator)
            return (model(x) - x.sum(1, keepdim=True)).square().mean()

        folder.mkdir(exist_ok=True)
        losses = learn("test", model, loss, steps=30, lr=1e-2, seed=3, state_file=folder / "x.state", ema_decay=0.9)
        return losses, [p.detach().clone() for p in model.parameters()]

    monkeypatch.setattr(learning, "SAVE_SECONDS", 0.0)  # a state after each step
    losses, weights = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", stop=17)
    assert (tmp_path / "killed" / "x.state").is_file()
    again, resumed = train(tmp_path / "killed")
    assert again == losses and len(losses) == 30 and losses[-1] < losses[0]
    assert all(torch.equal(a, b) for a, b in zip(weights, resumed, strict=True))


def test_a_loss_that_is_not_finite_ends_the_learning(tmp_path, monkeypatch):
    """Whole steps alone are kept: the state is the one before it."""
    monkeypatch.setattr(learning, "SAVE_SECONDS", 0.0)
    model, steps = nn.Linear(4, 1), iter([0.0, 0.0, float("nan"), 0.0])

    def loss(generator):
        return model(torch.ones(1, 4)).square().mean() + next(steps)

    with pytest.raises(FloatingPointError, match="test: the loss is nan in step 3"):
        learn("test", model, loss, steps=4, lr=1e-2, seed=0, state_file=tmp_path / "x.state")
    assert len(torch.load(tmp_path / "x.state")["losses"]) == 2


def test_verdicts_by_hand():
    """Four identities of classes a, a, b, b, and nobody. Left should be 0, right 2."""
    seen = torch.tensor([[0, 2], [1, 0], [2, 4]])  # all right; another instance, the other subject; the other subject, nobody
    logits = nn.functional.one_hot(seen, 5).float()
    logits[1, 0, 2] = 0.5  # the other subject is likelier than the own, and a third one is seen: no leak
    found = verdicts(logits, torch.tensor([[0, 2]] * 3), ["a", "a", "b", "b"])
    assert found["identity"] == [1, 0, 0]
    assert found["wrong instance"] == [0, 0.5, 0]
    assert found["class"] == [1, 0.5, 0]
    assert found["leakage"] == [0, 0.5, 0.5]
    assert found["nobody"] == [0, 0, 0.5]
    twice = verdicts(logits.repeat_interleave(2, 0), torch.tensor([[0, 2]] * 6), ["a", "a", "b", "b"], samples=2)
    assert twice == found, "a value for each scene"


def test_the_judge_names_and_sees_nobody(tmp_path):
    """Two identities that a colour tells apart, and gray scenes without either."""
    scenes = torch.full((12, 3, 64, 64), 90, dtype=torch.uint8)
    who = torch.randint(2, (12, 2), generator=torch.Generator().manual_seed(0))
    for scene, pair in zip(scenes, who, strict=True):
        for half, number in enumerate(pair.tolist()):
            scene[2 * number, 20:50, 32 * half + 6 : 32 * half + 26] = 250
    empty = torch.full((6, 3, 64, 64), 90, dtype=torch.uint8)
    torch.manual_seed(0)
    judge = IdentityJudge(2)
    before = [p.clone() for p in judge._encoder._network.parameters()]
    train_judge(judge, World(scenes, who, scenes, [], scenes[:0]), scenes, empty, 60, 0, tmp_path / "judge.state")
    logits, features = classify(judge, torch.cat([scenes, empty]) / 255)
    assert logits.shape == (18, 2, 3) and features.shape[:2] == (18, 2)
    assert torch.equal(logits[:12].argmax(-1), who) and (logits[12:].argmax(-1) == 2).all()
    assert all(torch.equal(a, b) for a, b in zip(before, judge._encoder._network.parameters(), strict=True))
    assert not any("encoder" in name for name in judge.state_dict())


def test_judges_that_are_loaded_look_through_one_encoder(tmp_path):
    """And one that is to learn starts from the same weights whether or not there was one before."""
    torch.manual_seed(1)
    first = IdentityJudge(2)
    save_file(first.state_dict(), tmp_path / "judge.safetensors")
    one, other = (load_judge(tmp_path / "judge.safetensors", 2) for _ in range(2))
    assert one._encoder is other._encoder and torch.equal(one.head.weight, first.head.weight)
    torch.manual_seed(1)
    assert torch.equal(IdentityJudge(2).head.weight, first.head.weight)


def test_mismatched_scenes_show_others_in_both_places(identities):
    """Before the same background."""
    size = SIZES["smoke"]
    world = compose_world(identities, 4, 3, size, 0)
    assert world.mismatched.shape == (3, 3, size.resolution, size.resolution)
    inside = torch.zeros(size.resolution, size.resolution, dtype=torch.bool)
    for left, top, width, height in BOXES:
        x, y, w, h = (round(side * size.resolution) for side in (left, top, width, height))
        inside[y - 1 : y + h + 2, x - 1 : x + w + 2] = True
    differs = (world.scenes[:3] != world.mismatched).any(1)
    assert not (differs & ~inside).any() and all(half.any() for scene in differs for half in scene.chunk(2, dim=1))
    plain = compose_world(identities, 4, 0, size, 0)
    assert torch.equal(plain.scenes, world.scenes) and torch.equal(plain.references, world.references)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_share_of_what_the_flow_learns_from_is_mismatched(identities, tmp_path, monkeypatch, share):
    """References and prompts stay those of the scene that is asked for."""
    size, shown = replace(SIZES["smoke"], flow_batch=64), []

    def spied(clean, noise, t):
        shown.append(clean.mean((1, 2)))
        return at_times(clean, noise, t)

    monkeypatch.setattr("focusdpo.studies.microcosm.model.at_times", spied)
    backbone = build_model(size, identities, 0)
    asked, prompts = torch.tensor([[0, 1], [1, 0], [2, 3]]), ["a cat", "a cup", "a coin"]
    pictures = torch.zeros(len(asked), 3, size.resolution, size.resolution)
    references = torch.zeros(4 * VIEWS, 3, size.reference_resolution, size.reference_resolution)
    world = World(pictures, asked, references, prompts, pictures[:2])
    tokens, channels = (size.resolution // 16) ** 2, 4 * size.latent_channels
    scenes = torch.tensor([0.0, 1.0, 2.0])[:, None, None].expand(-1, tokens, channels)
    given = torch.arange(4.0).repeat_interleave(VIEWS)[:, None, None].expand(-1, 4, channels)
    predict, pairs = backbone.predict, []

    def seen(noisy, t, text, references, layout):
        pairs.append(references.mean(2)[:, ::4])
        return predict(noisy, t, text, references, layout)

    monkeypatch.setattr(backbone, "predict", seen)
    train_flow(backbone, world, Latents(scenes, given, scenes[:2] + 10), size, 4, share, 0, tmp_path / "state")
    values = torch.cat(shown)
    assert abs(float((values >= 10).float().mean()) - share) < 0.1
    assert torch.equal(torch.cat(pairs), asked[(values % 10).long()].float())
    assert set(values.tolist()) == {0.0: {0, 1, 2}, 0.25: {0, 1, 2, 10, 11}, 1.0: {10, 11}}[share]


@pytest.mark.parametrize("size", [(50, 31), (20, 77), (64, 64)])
def test_a_subject_lies_in_its_half_as_in_its_reference(size):
    """To the pixel, whole tokens away: which is what a small model can copy."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    cutout = Image.fromarray(noise).convert("RGBA")
    scene, _ = compose(Image.new("RGB", (192, 192), "white"), [cutout, cutout], BOXES, centred=True)
    reference, _ = on_white(cutout, (96, 96))
    for left in (0, 96):
        assert np.array_equal(scene.crop((left, 48, left + 96, 144)), reference)


def test_weights_are_checked_by_hash(monkeypatch):
    monkeypatch.setattr("focusdpo.building.encoder.EfficientNetLite0.SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"efficientnet-lite0.*pth: its SHA-256 is 5793.*; expected 0000"):
        IdentityJudge(2)


def test_a_base_whose_features_know_nothing_cannot_test_them():
    knows = Correspondence((0.2, 0.8), [0.7, 0.8], [0.9, 0.9], [0.3, 0.4], [0.7, 0.7], [0.2, 0.2])
    assert knows.why_not() is None and "it can test the learned field" in knows.text()
    blind = replace(knows, own_other=[0.6, 0.6])
    assert "AUC of 0.60, below 0.65" in str(blind.why_not()) and "cannot test" in blind.text()
    assert "A is 0.68, where an S that knows nothing has 0.70" in str(replace(knows, coverage=[0.68, 0.68]).why_not())


MEASURED = {"identity": Measure("identity"), "leakage": Measure("leakage", "less"), "drift/whole": Measure("drift", "neither")}


def outcome_of(gains, seeds=5, items=40, missing=()):
    """An ablation whose variants gain so much identity a step, along a drift that rises tenfold each; noise of items is shared.

    missing: trainings that gave up, as variant and seed.
    """
    rng = np.random.default_rng(0)
    nothing = {name: [0.0] * items for name in ("identity", "leakage")}
    shared, results = rng.random(items), [Result("base", 0, nothing, [Point(0, nothing)])]
    for variant, gain in gains.items():
        for seed in range(seeds):
            curve = []
            for step in (1, 2, 3, 4):
                values = (gain * step + 0.1 * shared + 0.01 * rng.standard_normal(items)).tolist()
                numbers = {"identity": values, "leakage": (0.01 * rng.standard_normal(items)).tolist()}
                curve.append(Point(step, numbers | {"drift/whole": [10.0**step] * items}))
            failed = "not finite" if (variant, seed) in missing else None
            results.append(Result(variant, seed, {} if failed else curve[-1].values, curve, failed))
    changes = [VARIANTS[name] for name in ("base", *gains)]
    equal = at_equal_drift(results, changes, "prior", MEASURED, "identity")
    return Outcome(tabulate(results, changes, "prior", MEASURED), equal, results)


PRIMARY = (["focus", "identity"], "equal drift")


def test_what_follows_from_the_comparisons():
    """A true place that helps, a learned one that is no better than random, on one base; on the other the reverse."""
    found = {
        "early": outcome_of({"prior": 0.1, "truth": 0.2, "structure": 0.1, "random": 0.1, "focus": 0.1, "estimate": 0.1}),
        "middle": outcome_of({"prior": 0.1, "truth": 0.1, "structure": 0.2, "random": 0.1, "focus": 0.2, "estimate": 0.2}),
    }
    comparisons = compared(found, (), *PRIMARY)
    text = text_of_verdicts(found, comparisons, {"early": None, "middle": None})
    early, middle = text.split("\nmiddle model")
    assert "weighting within the prior can help here" in early and "was not seen to help" in middle
    assert "learned field is not told from random" in early and "the features are at fault" in early
    assert "learned field is better than random places" in middle and "at fault" not in middle
    assert "The estimate field is not told from" in early and "The estimate field is better than" in middle
    assert "FocusDPO is not told from the prior alone." in early and "FocusDPO is better than the prior alone." in middle
    [chosen] = [one for one in comparisons if one.cell.verdict.is_primary]
    assert (chosen.base, chosen.at, chosen.fixed) == ("middle", "equal drift", ("focus", "prior", "identity"))
    assert chosen.text().endswith("better (primary)") and "on the middle model, is judged by itself" in text
    # Values are taken at the drift at which the prior has half of its gain, between two points.
    place = float(np.log10(found["middle"].equal.drift))
    assert 1 < place < 2 and chosen.cell.difference.mean == pytest.approx(0.1 * place, abs=0.01)
    # Holm's correction is over all bases, and p of the smallest is multiplied by how many others there are.
    others = [one.cell for one in comparisons if one is not chosen]
    least = min(others, key=lambda cell: cell.difference.p)
    assert least.verdict.p == pytest.approx(least.difference.p * len(others)) and f"over all {len(others)} others" in text
    blind = text_of_verdicts(found, comparisons, {"early": "A is at chance", "middle": None})
    assert "This base cannot test the learned field: A is at chance." in blind.split("\nmiddle model")[0]


def test_no_other_comparison_becomes_the_primary_one():
    """Where the prior gains nothing on the middle model there is no equal drift there, and no other was fixed in advance."""
    outcome = outcome_of({"prior": 0.1, "focus": 0.2})
    found = {"early": outcome, "middle": outcome._replace(equal="prior gains nothing")}
    comparisons = compared(found, (), *PRIMARY)
    assert {one.at for one in comparisons if one.base == "early"} == {"equal drift", "end"}
    assert {one.at for one in comparisons if one.base == "middle"} == {"end"}
    assert not any(one.cell.verdict.is_primary for one in comparisons)
    text = text_of_verdicts(found, comparisons, {"early": None, "middle": None})
    assert "No comparison is judged by itself; " in text and f"over all {len(comparisons)};" in text
    assert "not compared at equal drift: prior gains nothing" in text


def test_comparisons_without_numbers_are_named():
    gains = {"prior": 0.1, "dpo": 0.1, "focus": 0.1, "detail": 0.1}
    trainings = [("detail", seed) for seed in range(5)] + [("focus", 0)]
    found = {"late": outcome_of(gains, missing=trainings)}
    lines = {(one.at, one.fixed): one.text() for one in compared(found, (), *PRIMARY)}
    assert lines["end", ("detail", "prior", "identity")].endswith("failed")
    assert lines["equal drift", ("detail", "prior", "identity")].endswith("not reached")
    assert lines["end", ("focus", "dpo", "identity")].endswith("4 of 5 trainings")
    assert not any(one.fixed == ("focus", "dpo", "identity") for one in compared(found, {"late"}, *PRIMARY)), "one arm"
    other = compared(found, (), ["detail", "leakage"], "end")
    assert other[0].fixed == ("detail", "prior", "leakage"), "a primary comparison that is none of the fixed ones"


@pytest.mark.parametrize(
    ("is_one_arm", "variants"), [(True, ["base", "prior", "focus"]), (False, ["base", "dpo", "prior", "focus"])]
)
def test_of_one_arm_the_prior_alone_is_trained(tmp_path, monkeypatch, is_one_arm, variants):
    asked = []

    def prepare(config, judge, measures, draw):
        asked.append(config.variants)
        return lambda: draw("a table", "no drift", [])

    monkeypatch.setattr("focusdpo.commands.microcosm.ablate.prepare", prepare)
    monkeypatch.setattr("focusdpo.commands.microcosm._draw_base", lambda *_: None)
    stages = Stages(MicrocosmConfig(out=str(tmp_path), size="smoke", variants=["base", "dpo", "prior", "focus"]))
    assert _ablate(stages, "middle", Betas(1.0, 2.0, {}), is_one_arm).table == "a table"
    assert asked == [variants]


def test_beta_is_chosen_by_what_is_drawn(tmp_path, monkeypatch):
    """Of each arm by itself, on the middle model and the tuning pairs; the size's own unless scenes tell another from it."""
    seen = []
    gains = {("prior", 400.0): [1.0, 0.5, 0.5, 0.5], ("focus", 25.0): [0.5, 1.0, 1.0, 0.5]}

    def run_jobs(jobs, workers):
        seen.extend(jobs)
        known = [gains.get((job.change.name, job.config.loss.beta), [0.0, 0.5, 0.5, 0.5]) for job in jobs]
        return [Result(job.change.name, job.seed, {"identity": values}, []) for job, values in zip(jobs, known, strict=True)]

    monkeypatch.setattr("focusdpo.studies.microcosm.tuning.run_jobs", run_jobs)
    betas = chosen_betas(Stages(MicrocosmConfig(out=str(tmp_path), size="smoke")))
    assert (betas.prior, betas.focus) == (100, 25), "one scene of four is one standard error, and no more"
    assert len(seen) == 6 and dict(betas.identity["prior"]) == {100: 0.375, 25: 0.375, 400: 0.625}
    assert {job.config.data.validation for job in seen} == {str(tmp_path / "pairs" / "tuning")}
    assert {job.config.model.path for job in seen} == {str(tmp_path / "middle" / "model")}
    assert not {job.seed for job in seen} & set(MicrocosmConfig().seeds)
    given = chosen_betas(Stages(MicrocosmConfig(out=str(tmp_path), size="smoke", beta=3.0)))
    assert (given.prior, given.focus) == (3, 3) and len(seen) == 6
    monkeypatch.setattr(
        "focusdpo.studies.microcosm.tuning.run_jobs",
        lambda jobs, _: [Result(j.change.name, j.seed, {}, [], "no") for j in jobs],
    )
    failed = chosen_betas(Stages(MicrocosmConfig(out=str(tmp_path), size="smoke")))
    assert (failed.prior, failed.focus) == (100, 100) and "25: failed, 100: failed, 400: failed; none better" in failed.text()


def test_of_the_betas_that_are_told_apart_the_best_is_chosen():
    tried = {1.0: [0.0, 0.5, 0.5, 0.5], 4.0: [1.0, 0.5, 0.5, 0.5], 0.25: [0.2, 0.7, 0.7, 0.7]}
    assert _best(tried) == 0.25, "the best of all is one scene ahead, and no more"
    assert _best(tried | {1.0: []}) == 4, "its own training gave up"


def test_halves():
    images = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6).float()
    regions = halves(images)
    assert torch.equal(regions[2], images[1, :, :, :3]) and torch.equal(regions[1], images[0, :, :, 3:])


def test_settings_reach_the_runs(tmp_path):
    settings = MicrocosmConfig(out=str(tmp_path), size="smoke", lr=0.5, tuning_steps=9, reduction="masked_mean")
    run = Stages(settings).train_config("late", 7.0)
    assert (run.optim.lr, run.loss.beta, run.loss.reduction, run.max_steps) == (0.5, 7.0, "masked_mean", 9)
    assert run.model.path == str(tmp_path / "late" / "model")
    assert run.loss.draws == 2, "18 of 12 pairs: none meets a noise twice"
    decides = _settings(Stages(settings))["tuning"]
    assert (decides["draws"], decides["judged_pairs"]) == (2, 3), "compared when a folder is gone on with"
    ablation = settings.ablation("middle", 2.0)
    betas = {change.name: change.of(run).loss.beta for change in changes_of(ablation, run)}
    assert betas["prior"] == betas["dpo"] == betas["subject"] == 2 and betas["focus"] == betas["structure"] == 7
    elsewhere = [change.name for change in changes_of(settings.ablation("late"), run)]
    assert elsewhere == [name for name in settings.variants if name in settings.everywhere] and "detail" not in elsewhere


def results_of(folder):
    found = json.loads((folder / "late" / "ablation" / "results.json").read_text())
    return found["results"], found["table"]


def test_the_whole_command_also_when_killed(tmp_path, monkeypatch):
    """Killed with SIGKILL whenever a stage has begun, and run to its end: the same numbers as without. Beta is chosen after."""
    folder, environment = tmp_path / "whole", os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    variants, cpu = ["--variants", "base", "prior", "focus", "--seeds", "0"], ["--cpu", "true", "--beta", "100"]
    arguments = ["--size", "smoke", "--out", str(folder), *variants, *cpu, "--bases", "late"]
    cli.main(["microcosm", *arguments])
    same = {"out": str(folder), "size": "smoke", "seeds": [0], "cpu": True, "bases": ["late"], "beta": 100.0}
    with pytest.raises(ValueError, match="ablation.variants: the begun ablation has .'base', 'prior', 'focus'., got "):
        prepare_microcosm(MicrocosmConfig(**same, variants=["base", "prior"], primary=[], primary_at="end"))
    of_base = (
        *BASE_PICTURES,
        "model/model_index.json",
        "ablation/ablation.html",
        "gates.json",
        "ablation/gradients/gradients.png",
    )
    for name in (*PICTURES, *(f"late/{name}" for name in of_base), "pairs/held_out/pairs.jsonl", "facts.json", "verdicts.txt"):
        assert (folder / name).is_file(), name
    results, table = results_of(folder)
    assert {r["variant"]: len(r["values"]["identity"]) for r in results} == {"base": 4, "prior": 4, "focus": 4}
    assert "FID" in table["measures"] and "accuracy/inside" in table["measures"]
    assert {len(r["values"]["accuracy/inside"]) for r in results} == {3}, "two thirds of the held-out pairs"
    images = [load_file(path)["images"] for path in sorted((folder / "late").rglob("generated.safetensors"))]
    assert len(images) == 3 and images[0].shape == (4, 3, 64, 64) and not torch.equal(images[0], images[1])
    assert len(list((folder / "references").rglob("*.safetensors"))) == 4, "two steps of two pairs, the same for both variants"
    moved = folder.rename(tmp_path / "moved")
    same |= {"out": str(moved), "variants": ["base", "prior", "focus"]}
    kept = next((moved / "references").rglob("*.safetensors"))
    shutil.copy(kept, kept.with_name(f"{kept.parent.name}{'0' * 62}.safetensors"))  # of another run of train.yaml
    prepare_microcosm(MicrocosmConfig(**same | {"seeds": [0, 1]}))
    (moved / "late" / "model").rename(moved / "elsewhere")
    prepare_microcosm(MicrocosmConfig(**same))

    killed = tmp_path / "killed"
    arguments[3] = str(killed)
    command = [sys.executable, "-m", "focusdpo", "microcosm", *arguments]
    for sign in ("judge.safetensors", "late/ablation/runs/focus"):
        with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
            while not (killed / sign).exists() and child.poll() is None:
                time.sleep(0.02)
            assert child.poll() is None, sign
            child.send_signal(signal.SIGKILL)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    assert results_of(killed) == (results, table)
    assert "identity accuracy of generated regions" in done.stdout and "Cosines of mean gradients" in done.stdout
    assert (killed / "verdicts.txt").read_text().strip() in done.stdout

    monkeypatch.setattr("focusdpo.studies.microcosm.tuning.FACTORS", (1.0,))
    tried = chosen_betas(Stages(MicrocosmConfig(**same | {"out": str(killed), "beta": None})))
    assert tried.prior == tried.focus == 100 and all(0 <= found[0][1] <= 1 for found in tried.identity.values())
    assert json.loads((killed / "beta.json").read_text())["identity"] == {"prior": [list(tried.identity["prior"][0])]} | {
        "focus": [list(tried.identity["focus"][0])]
    }


def test_refused_by_name(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="tuning_steps: got 0; expected at least 1"):
        MicrocosmConfig(tuning_steps=0)
    with pytest.raises(ValueError, match="seeds: got \\[1, 1\\]; expected each once"):
        MicrocosmConfig(seeds=[1, 1])
    # What an ablation would refuse when all before it is learnt.
    with pytest.raises(ValueError, match="primary: got .'focus', 'identity'.; expected a variant beside the baseline, one of "):
        prepare_microcosm(MicrocosmConfig(out=str(tmp_path / "a"), size="smoke", everywhere=["base", "prior", "random"]))
    with pytest.raises(ValueError, match="everywhere: got .'base', 'focus'.; expected 'prior' among them"):
        MicrocosmConfig(everywhere=["base", "focus"])
    with pytest.raises(ValueError, match="grids: got .'tau'.; expected none without the middle model among bases"):
        MicrocosmConfig(bases=["late"], grids=["tau"])
    with pytest.raises(ValueError, match='primary_at: got .equal drift.; expected "end", or "base" among the variants'):
        prepare_microcosm(MicrocosmConfig(out=str(tmp_path / "a"), size="smoke", variants=["prior", "focus"]))
    with pytest.raises(ValueError, match="judge_points: got False; expected true for a comparison at equal drift in identity"):
        prepare_microcosm(MicrocosmConfig(out=str(tmp_path / "a"), size="smoke", judge_points=False))
    with pytest.raises(FileNotFoundError, match="dreambench: no prompts_and_classes.txt"):
        prepare_microcosm(MicrocosmConfig(out=str(tmp_path / "a"), size="smoke", dreambench=str(tmp_path)))
    for name, class_name in (("dog1", "dog"), ("dog2", "dog"), ("cup", "cup")):
        (tmp_path / "one" / name).mkdir(parents=True)
        for number in range(1 if class_name == "cup" else 2):
            Image.new("RGB", (80, 80)).save(tmp_path / "one" / name / f"0{number}.jpg")
    rows = "subject_name,class\ndog1,dog\ndog2,dog\ncup,cup\n\nPrompts\n"
    (tmp_path / "one" / "prompts_and_classes.txt").write_text(f"Classes\n{rows}")
    with pytest.raises(ValueError, match="dreambench: got .* expected subjects of two classes at least, with two photographs"):
        prepare_microcosm(MicrocosmConfig(out=str(tmp_path / "a"), size="smoke", dreambench=str(tmp_path / "one")))
    small = MicrocosmConfig(out=str(tmp_path / "a"), size="smoke", backend="triton", cpu=True)
    with monkeypatch.context() as several:
        several.setenv("WORLD_SIZE", "2")
        with pytest.raises(ValueError, match="microcosm: got 'several processes'"):
            prepare_microcosm(small)
    with monkeypatch.context() as compiled:
        compiled.setattr("focusdpo_kernels.backend.INTERPRETED", False)
        with pytest.raises(ValueError, match="argument backend: 'triton' needs tensors on an accelerator"):
            prepare_microcosm(small)
    (tmp_path / "b" / "pairs" / "train").mkdir(parents=True)
    (tmp_path / "b" / "pairs" / "train" / "pairs.jsonl").write_text("mine")
    with pytest.raises(FileExistsError, match=r"out: .* holds pairs/train/pairs.jsonl, which this command did not write"):
        prepare_microcosm(MicrocosmConfig(out=str(tmp_path / "b"), size="smoke"))
    (tmp_path / "c").mkdir()
    begun = _settings(Stages(MicrocosmConfig(size="smoke", lr=0.5)))
    (tmp_path / "c" / "microcosm.json").write_text(json.dumps(begun))
    with pytest.raises(ValueError, match="out: .* holds a begun microcosm .*\n  world.seed: the begun .* has 0, got 1\n"):
        prepare_microcosm(MicrocosmConfig(out=str(tmp_path / "c"), size="smoke", seed=1))
    prepare_microcosm(MicrocosmConfig(out=str(tmp_path / "c"), size="smoke"))  # the world may be tuned otherwise
    (tmp_path / "c" / "middle" / "ablation").mkdir(parents=True)
    with pytest.raises(
        ValueError, match="(?s)tuning.lr: .* has 0.5, got 0.001.*'mean', got 'masked_mean'.*, delete .*middle/ablation to tune"
    ):
        prepare_microcosm(MicrocosmConfig(out=str(tmp_path / "c"), size="smoke", reduction="masked_mean"))
    with pytest.raises(ValueError, match="grids: .* expected no grid over layers with size='smoke'"):
        prepare_microcosm(MicrocosmConfig(out=str(tmp_path / "d"), size="smoke", grids=["layers"]))


def test_beta_that_was_chosen_is_gone_on_with(tmp_path):
    """Whatever the gates of a later start take; another one that is given is refused by name before any work."""
    settings = {"out": str(tmp_path), "size": "smoke", "cpu": True, "bases": ["late"]}
    begun = _settings(Stages(MicrocosmConfig(**settings)))
    (tmp_path / "microcosm.json").write_text(json.dumps(begun))
    (tmp_path / "late" / "ablation").mkdir(parents=True)
    (tmp_path / "late" / "ablation" / "ablation.json").write_text(
        json.dumps({"ablation": {"prior_beta": 25.0}, "run": {"loss.beta": 400.0}})
    )
    assert _betas_begun(tmp_path, "late") == Betas(25.0, 400.0, {})
    prepare_microcosm(MicrocosmConfig(**settings))
    with pytest.raises(ValueError, match=r"tuning.beta: the begun microcosm has None, got 100\.0"):
        prepare_microcosm(MicrocosmConfig(**settings, beta=100.0))


def test_overwriting_starts_anew(tmp_path):
    """Nothing that a kill left is gone on from."""
    out = OutputFolder("out", tmp_path, "microcosm", WRITTEN)
    out.begin(clear=False)
    for name in ("autoencoder", "judge", "early"):
        (tmp_path / f"{name}.state").write_text("another world's")
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / ".model.partial").mkdir()
    (tmp_path / "notes.state").write_text("mine")
    out.begin(clear=True)
    assert [path.name for path in tmp_path.rglob("*") if ".focusdpo" not in path.parts and path.name != "early"] == [
        "notes.state"
    ]
