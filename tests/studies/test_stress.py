"""The stress test: measures on planted cases, verdicts on planted hidden states, every backbone, scenes, resuming."""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from focusdpo.building.composing import at_bottom, compose
from focusdpo.commands import cli
from focusdpo.commands.stress import prepare as prepare_stress
from focusdpo.commands.stress import run_of
from focusdpo.data import LongestSide, PairDataset, collate, load_pairs
from focusdpo.features import pool_mask, reference_token_mask
from focusdpo.metrics.shares import exact_interval
from focusdpo.models.tiny_flux import write_tiny_flux
from focusdpo.studies.config import KINDS, StressConfig
from focusdpo.studies.stress import match_measures, work
from focusdpo.studies.stress.scenes import write_scenes
from focusdpo.studies.stress.subjects import BACKGROUNDS, DREAMBENCH, PHOTOGRAPHED, source_of
from focusdpo.studies.stress.summary import by_scene
from focusdpo.training.config import ModelConfig
from focusdpo.training.loading import load_step
from tests import ROOT
from tests.photo_folder import KNOWN, write_photos
from tests.tiny_flux2 import write_tiny_flux2
from tests.tiny_qwen import write_tiny_qwen

PHOTOS = ROOT.parent / "shared" / "data" / "dreambench"
TIMES = [0.3, 0.8]


def test_confusion_precision_and_recall_of_a_planted_case():
    """Ten tokens, subjects on 0-3 and 4-6. The first matches two of its own, one of the other's, one of the background."""
    regions = torch.zeros(2, 10, dtype=torch.bool)
    regions[0, :4], regions[1, 4:7] = True, True
    matched = torch.zeros(2, 10, dtype=torch.bool)
    matched[0, [0, 1, 5, 9]], matched[1, [4, 5, 6]] = True, True
    assert match_measures.confusion(matched, regions).tolist() == [[0.5, 0.25, 0.25], [0, 1, 0]]
    assert match_measures.recall(matched, regions).tolist() == [0.5, 1]
    precision, recall = match_measures.union_precision_recall(matched, regions)
    assert (precision.item(), recall.item()) == (5 / 6, 5 / 7)  # 0, 1, 4, 5, 6 of 0, 1, 4, 5, 6, 9
    # Exchanged matches are as good for the union: it forgets whose they are.
    assert match_measures.confusion(regions.flip(0), regions).tolist() == [[0, 1, 0], [1, 0, 0]]
    assert [value.item() for value in match_measures.union_precision_recall(regions.flip(0), regions)] == [1, 1]


def test_auc_is_the_share_of_pairs_in_order():
    """Against all pairs counted one by one, with ties, several rows, and without tokens of a kind."""
    scores = torch.randint(0, 6, (3, 2, 40)).float()  # many ties
    positive, negative = torch.rand(40) < 0.3, torch.zeros(40, dtype=torch.bool)
    negative[::3] = True
    negative &= ~positive
    found = match_measures.auc(scores, positive, negative)
    for place in np.ndindex(3, 2):
        a, b = scores[place][positive], scores[place][negative]
        pairs = [(x > y) + 0.5 * (x == y) for x in a.tolist() for y in b.tolist()]
        assert found[place].item() == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    assert match_measures.auc(scores, positive, torch.zeros_like(positive)).isnan().all()
    assert (
        match_measures.auc(
            torch.arange(4.0), torch.tensor([False, False, True, True]), torch.tensor([True, True, False, False])
        )
        == 1
    )


def test_auc_of_each_subject():
    """S of subject 0 is highest on the other subject, lowest on the background."""
    regions = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0]]).bool()
    scores = torch.tensor([[2.0, 2, 3, 1, 1, 1], [0, 0, 5, 0, 0, 0]])
    others, rest = match_measures.auc_by_subject(scores, regions)
    assert others.tolist() == [0, 1] and rest.tolist() == [0.75, 1]


@pytest.mark.parametrize(("regions", "message"), [([[1, 0], [0, 0]], "region 1 has no token"), ([[1, 1], [0, 1]], "share")])
def test_regions_that_cannot_be_measured(regions, message):
    with pytest.raises(ValueError, match=message):
        match_measures.check_regions(torch.tensor(regions).bool())


def config_of(model, out="-", **changes):
    settings = {
        "scenes": 2,
        "resolution": 64,
        "reference_resolution": 48,
        "timesteps": TIMES,
        "resamples": 100,
        "backend": "torch",
        "cpu": True,
    }
    return StressConfig(model=model, output_dir=str(out), **(settings | changes))


@pytest.fixture(scope="module")
def flux_model(tiny_flux):
    return ModelConfig(str(tiny_flux), dtype="fp32", max_sequence_length=16)


@pytest.fixture(scope="module")
def scenes(flux_model, tmp_path_factory):
    """Four scenes: their pairs.jsonl."""
    config = config_of(flux_model, resolution=96)
    return write_scenes(config, source_of(config), tmp_path_factory.mktemp("stress") / "scenes")


def batch_of(scenes, index=0, prompt_rule=None):
    sizes = {"resolution": 96, "reference_rule": LongestSide(48), "prompt_rule": prompt_rule}
    return collate([PairDataset(load_pairs(str(scenes), "headers"), **sizes)[index]])


def plant(step, batch, exchanged, who):
    """Hooks that make each block's image stream say what a token shows: its subject, or background.

    `who` gives the direction of each reference's tokens; subjects in the loser are where `exchanged` has them.
    """
    regions = pool_mask(batch.prior)[0].float()  # [2, P]
    kept = reference_token_mask(batch.reference_masks)[0].float()  # [2, Q]
    target = torch.stack([torch.cat([each, 1 - each.sum(0, keepdim=True)]).T for each in (regions, exchanged.float())])
    reference = torch.cat([kept[who], 1 - kept.sum(0, keepdim=True)]).T.expand(2, -1, -1)

    def hook(module, inputs, output):
        tokens = step.backbone.image_tokens(output)
        tokens.zero_()
        tokens[..., :3] = torch.cat([target, reference], 1)

    return [step.backbone.transformer.get_submodule(path).register_forward_hook(hook) for path in step.paths]


@pytest.mark.parametrize("who", [[0, 1], [1, 0]])
def test_planted_hidden_states_give_the_right_verdict(flux_model, scenes, who):
    """Features that tell the subjects apart, and such that take each for the other."""
    step, batch = load_step(run_of(config_of(flux_model)), None), batch_of(scenes)
    prior = torch.zeros_like(batch.prior)
    prior[0, 0, 16:64, :32], prior[0, 1, 32:80, 48:80] = True, True  # six tokens each
    batch = dataclasses.replace(batch, prior=prior)
    hooks = plant(step, batch, pool_mask(batch.prior)[0].flip(0), who)
    arrays = work.measure_scene(step, batch, TIMES, ["reference", "max"], ["prior"], (0,))
    for hook in hooks:
        hook.remove()
    right = float(who == [0, 1])
    found = by_scene(arrays)
    shape = (2, 2, 5, 1)  # times, poolings, the mean and four blocks, counts
    for name, value in {
        "precision": right,
        "recall": right,
        "confused": 1 - right,
        "union_precision": 1,
        "union_recall": 1,
    }.items():
        assert found[name].shape == shape and np.allclose(found[name], value), name
    assert np.allclose(found["auc_others"], right)
    # All tokens of the background are below both subjects', or tie with the one that is taken for the other.
    assert (found["auc_rest"] == 1).all() if right else (found["auc_rest"] <= 0.5).all()
    assert np.allclose(found["A_union_winner"], 0) and np.allclose(found["A_union_loser"], 0), "the union notices nothing"
    assert np.allclose(found["A_per_subject_winner"], 1 - right) and np.allclose(found["A_per_subject_loser"], right)
    assert arrays["K"][0].tolist() == pool_mask(batch.prior)[0].sum(-1).tolist()


BACKBONES = {
    "flux": write_tiny_flux,
    "kontext": lambda folder: write_tiny_flux(folder, kontext=True),
    "flux2": write_tiny_flux2,
    "qwen-edit-plus": write_tiny_qwen,
}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_scores_of_one_pass_are_those_of_a_pass_each(backbone, scenes, tmp_path):
    """Against the step's own passes: a tap of one block at a time, winners alone, loser as winner."""
    path = BACKBONES[backbone](tmp_path / "model")
    model = ModelConfig(str(path), backbone=backbone, dtype="fp32", max_sequence_length=16)
    step = load_step(run_of(config_of(model)), None)
    batch = batch_of(scenes, 2, step.backbone.prompt_rule)
    noised = step.noise(batch, torch.Generator().manual_seed(1), torch.tensor([0.4]))
    found = work.block_scores(step, noised, batch, ["max", "reference"])

    def alone(pair, paths, pooling):
        tap = step.tap(own, pair, paths, pooling)
        step.predict(own, [tap])
        return tap.scores()

    swapped = dataclasses.replace(batch, winner=batch.loser, loser=batch.winner)
    for image, pair in enumerate((batch, swapped)):
        own = step.noise(pair, torch.Generator().manual_seed(1), torch.tensor([0.4]))
        for o, pooling in enumerate(("max", "reference")):
            expected = torch.cat([alone(pair, paths, pooling) for paths in (step.paths, *([path] for path in step.paths))])
            torch.testing.assert_close(found[o, :, image], expected, rtol=0, atol=2e-5)
    assert not torch.allclose(found[0], found[1]) and not torch.allclose(found[:, :, 0], found[:, :, 1])


def test_regions_are_exact():
    """Red and blue cut-outs without soft edges on black: the regions are where the scene is red, and blue."""
    background = Image.new("RGB", (64, 64))
    cutouts = []
    for colour in ((255, 0, 0, 255), (0, 0, 255, 255)):
        image = Image.new("RGBA", (30, 40), (0, 255, 0, 0))
        ImageDraw.Draw(image).rectangle((4, 5, 25, 33), fill=colour)
        cutouts.append(image)
    boxes = [(0.0, 0.1, 30 / 64, 40 / 64), at_bottom((0.5, 0.1, 30 / 64, 40 / 64))]
    scene, opacities = compose(background, cutouts, boxes)
    regions = [np.asarray(opacity) >= 128 for opacity in opacities]
    pixels = np.asarray(scene)
    assert np.array_equal(regions[0], pixels[..., 0] > 127) and np.array_equal(regions[1], pixels[..., 2] > 127)
    assert regions[0].sum() == 22 * 29 and regions[1].sum() == 22 * 29
    assert not pixels[..., 1].any(), "what is clear leaves no colour"
    assert np.flatnonzero(regions[1].any(1))[-1] == 64 - 40 + 33, "a grounded one stands on the image's edge"


def test_scenes_are_pairs_with_the_same_places_in_both_kinds(scenes):
    records = load_pairs(str(scenes), "full")  # raises for an unsound one
    assert [record.meta["kind"] for record in records] == ["alike", "alike", "easy", "easy"]
    for alike, easy in zip(records[:2], records[2:], strict=True):
        assert alike.meta["background"] == easy.meta["background"]
        assert {name.split()[0] for name in alike.meta["subjects"]} == {"coin"}
        assert sum(name.startswith("coin") for name in easy.meta["subjects"]) == 1
    for index in range(4):
        batch = batch_of(scenes, index)
        priors = batch.prior[0]
        assert priors.shape == (2, 96, 96) and not priors.all(0).any()
        changed = (batch.winner - batch.loser)[0].abs().sum(0) > 0.05
        assert (changed & priors.any(0)).sum() > 0.8 * priors.any(0).sum(), "the loser shows another subject there"
    winner = np.asarray(Image.open(records[0].winner)).astype(int)
    centres = [np.argwhere(np.asarray(Image.open(prior)) > 0).mean(0)[1] for prior in records[0].prior]
    assert abs(centres[0] - centres[1]) > 30 and winner.shape == (96, 96, 3)


def test_every_pair_comes_as_often_and_on_both_sides(flux_model, tmp_path):
    config = config_of(flux_model, scenes=21, resolution=64, reference_resolution=32)
    records = load_pairs(str(write_scenes(config, source_of(config), tmp_path / "scenes")), "headers")
    alike = [record.meta["subjects"] for record in records[:21]]
    assert len({frozenset(names) for names in alike}) == 21 == len(PHOTOGRAPHED["alike"])
    sides = [np.argwhere(np.asarray(Image.open(record.prior[0])) > 0).mean(0)[1] < 32 for record in records[:21]]
    assert 4 < sum(sides) < 17, "reference 1 is not always left"


def test_a_killed_test_goes_on_to_the_same_numbers(flux_model, tmp_path, monkeypatch, capsys):
    """Stopped in the third of four scenes, and gone on with; compared with one that was never stopped."""
    measure, measured = work.measure_scene, []

    def counted(*arguments):
        if len(measured) == 2 and killed:
            raise KeyboardInterrupt
        measured.append(1)
        return measure(*arguments)

    monkeypatch.setattr("focusdpo.commands.stress.measure_scene", counted)
    whole, killed = config_of(flux_model, tmp_path / "whole"), False
    prepare_stress(whole)()
    printed = capsys.readouterr().out
    measured.clear()
    config, killed = dataclasses.replace(whole, output_dir=str(tmp_path / "killed")), True
    with pytest.raises(KeyboardInterrupt):
        prepare_stress(config)()
    assert len(list((tmp_path / "killed" / "measured").iterdir())) == 2 and not (tmp_path / "killed" / "results.json").exists()
    killed = False
    composed = {file: file.stat().st_mtime_ns for file in (tmp_path / "killed" / "scenes").rglob("*.png")}
    prepare_stress(config)()
    assert len(measured) == 4, "two before it was killed, two after"
    assert composed == {file: file.stat().st_mtime_ns for file in composed}
    found, expected = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("killed", "whole"))
    assert found["rows"] == expected["rows"] and len(found["rows"]) > 100 and capsys.readouterr().out == printed
    check_results(found, tmp_path / "killed")

    # A finished one is averaged again without the model; with more scenes only these are measured.
    monkeypatch.setattr("focusdpo.commands.stress.load_step", None)
    prepare_stress(dataclasses.replace(config, level=0.5))()
    monkeypatch.undo()
    with pytest.raises(
        ValueError, match=r"holds a begun test with other settings:\n  settings.timesteps: the begun test has \[0.3, 0.8\], got"
    ):
        prepare_stress(dataclasses.replace(config, timesteps=[0.5]))
    monkeypatch.setattr("focusdpo.commands.stress.measure_scene", counted)
    prepare_stress(dataclasses.replace(config, scenes=3))()
    assert len(measured) == 6
    damaged = tmp_path / "killed" / "measured" / "alike-0001.npz"
    damaged.write_bytes(damaged.read_bytes()[:100])
    prepare_stress(dataclasses.replace(config, scenes=3))()
    assert len(measured) == 7, "a damaged file is measured again"


def check_results(results, folder):
    """The rows' means, from the files of the scenes."""
    rows = {
        (r["kind"], r["t"], r["pooling"], r["layer"], r["count"], r["measure"]): r
        for r in results["rows"]
        if r["subject"] is None
    }
    for kind in KINDS:
        arrays = [work.load_scene(folder / "measured" / f"{kind}-{n:04d}.npz") for n in range(2)]
        diagonal = [np.diagonal(one["confusion"][1, 0, 3, 1][:, :2]).mean() for one in arrays]
        row = rows[kind, 0.8, "reference", "2", "prior", "precision"]
        assert row["mean"] == pytest.approx(np.mean(diagonal))
        if diagonal[0] in (0, 1) and diagonal[0] == diagonal[1]:
            assert (row["low"], row["high"]) == exact_interval(diagonal[0], 2), "a share at its end is bounded"
        elif diagonal[0] == pytest.approx(diagonal[1]):
            assert row["low"] is None, "scenes that agree say nothing of others"
        else:
            assert row["low"] <= row["mean"] <= row["high"]
        auc = [one["auc_others"][0, 1, 0].mean() for one in arrays]
        assert rows[kind, 0.3, "max", "all", None, "auc_others"]["mean"] == pytest.approx(np.mean(auc))
    subjects = {name for scene in results["scenes"]["alike"] for name in scene["subjects"]}
    for layer in ("all", "0", "3"):
        of = [
            r for r in results["rows"] if (r["kind"], r["layer"], r["measure"]) == ("alike", layer, "recall") and r["subject"]
        ]
        assert {r["subject"] for r in of} == subjects and {r["t"] for r in of} == {0.3, 0.8}
        assert layer == "all" or all(r["low"] is None for r in of), "means alone"
    assert results["blocks"] == 4 and results["versions"]["torch"] == torch.__version__
    for name in ("auc", "confusion", "exchange", "examples-alike", "examples-easy"):
        assert Image.open(folder / f"{name}.png").width > 600


def test_the_model_of_a_run_and_what_is_refused(flux_model, tmp_path, monkeypatch):
    out = str(tmp_path / "out")
    with pytest.raises(ValueError, match=r"config, model: got neither; expected a run, or --model.path"):
        StressConfig()
    with pytest.raises(ValueError, match="config, model: got both"):
        StressConfig(config="run", model=flux_model)
    for changes, message in (
        ({"scenes": 1}, "scenes: got 1"),
        ({"resolution": 100}, "resolution: got 100; expected a multiple of 16"),
        ({"timesteps": [0.0]}, "timesteps: got"),
        ({"match_counts": [1.5]}, "match_counts: got 1.5"),
        ({"match_counts": [0.03]}, "match_counts: got 0.03; expected 1 to 16 tokens, or a fraction"),
        ({"match_counts": [17]}, "match_counts: got 17; expected 1 to 16 tokens"),
        ({"poolings": []}, "poolings: got"),
        ({"checkpoint": "none"}, "checkpoint: got 'none'; expected none without --config"),
    ):
        with pytest.raises(ValueError, match=message):
            config_of(flux_model, out, **changes)
    with pytest.raises(FileNotFoundError, match=r"model.path: no such folder: /nowhere"):
        prepare_stress(config_of(ModelConfig("/nowhere"), out))
    with pytest.raises(FileNotFoundError, match=r"^dreambench: no prompts_and_classes.txt in .*; expected a DreamBench folder"):
        prepare_stress(config_of(flux_model, out, dreambench=str(tmp_path)))
    (tmp_path / "prompts_and_classes.txt").write_text("subject_name,class\ndog,dog\n")
    with pytest.raises(FileNotFoundError, match=r"dreambench: .* has no folder with photos"):
        prepare_stress(config_of(flux_model, out, dreambench=str(tmp_path)))
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ModuleNotFoundError, match=r"dreambench needs cv2, which is not installed; .*focusdpo\[build\]"):
        prepare_stress(config_of(flux_model, out, dreambench=str(tmp_path)))
    assert not (tmp_path / "out").exists()


def test_command_line(tiny_flux):
    arguments = [
        "--model.path",
        str(tiny_flux),
        "--model.backbone",
        "kontext",
        "--poolings",
        "max",
        "--timesteps",
        "0.2",
        "0.4",
    ]
    name, config = cli.parse_config(["stress", *arguments, "--match_counts", "prior", "8", "0.25"])
    assert name == "stress" and config.model.backbone == "kontext" and config.poolings == ["max"]
    assert config.match_counts == ["prior", 8, 0.25] and config.timesteps == [0.2, 0.4] and config.config is None
    assert cli.parse_config(["stress", "--config", "run"])[1].config == "run"


def test_dreambench_scenes(flux_model, tmp_path):
    """With photos of their names: references are other photos than the scene's."""
    pytest.importorskip("cv2", reason="needs the extra build: pip install 'focusdpo[build]'")
    names = sorted({name for pairs in DREAMBENCH.values() for pair in pairs for name in pair} | set(BACKGROUNDS))
    shown = {name: KNOWN["espresso cup"].recoloured(index / len(names)) for index, name in enumerate(names)}
    root = write_photos(tmp_path / "dreambench", shown, 3, 128)
    (root / "prompts_and_classes.txt").write_text("subject_name,class\n" + "".join(f"{name},{name}\n" for name in names))
    config = config_of(flux_model, dreambench=str(root), scenes=4)
    records = load_pairs(str(write_scenes(config, source_of(config), tmp_path / "scenes")), "full")
    for record in records:
        assert tuple(sorted(record.meta["subjects"])) in {tuple(sorted(pair)) for pair in DREAMBENCH[record.meta["kind"]]}
        for view in record.meta["views"]:
            assert view["scene_photo"].split("/")[0] == view["reference_photo"].split("/")[0]
            assert view["scene_photo"] != view["reference_photo"]


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="no DreamBench here")
def test_the_real_photos_can_be_cut_out(flux_model):
    pytest.importorskip("cv2", reason="needs the extra build: pip install 'focusdpo[build]'")
    source = source_of(config_of(flux_model, dreambench=str(PHOTOS)))
    for name in sorted({name for pairs in source.pairs.values() for pair in pairs for name in pair}):
        one = source.draw(name, np.random.default_rng(0))
        opaque = np.asarray(one.cutout.getchannel("A")) > 127
        assert opaque.mean() > 0.3 and min(one.cutout.size) > 60, name
        assert np.asarray(one.reference_mask).any() and one.about["scene_photo"] != one.about["reference_photo"]
