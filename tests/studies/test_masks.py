"""`focusdpo masks`: the masks it draws are those of the loss, its numbers follow from its fields, refusals."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgba
from matplotlib.text import Text
from PIL import Image

from focusdpo.commands import cli
from focusdpo.commands.masks import prepare as prepare_masks
from focusdpo.data import collate, load_pairs
from focusdpo.demo.scenes import write_dataset
from focusdpo.drawing import overlays
from focusdpo.features import pool_mask
from focusdpo.mask import FocusMask, focus_mask
from focusdpo.studies import masks
from focusdpo.studies.config import MasksConfig
from focusdpo.studies.masks import groups_of
from focusdpo.training.batches import dataset_of
from focusdpo.training.config import DataConfig, FocusConfig, LoraConfig, ModelConfig, TrainConfig
from focusdpo.training.loading import load_step
from focusdpo.training.run_files import read_run_config

GRID = (6, 6)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Two pairs with a prior per reference: the first one's is the written prior, the second one's its mirror image."""
    file = write_dataset(tmp_path_factory.mktemp("data") / "pairs", 2, 96, seed=0)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        prior = Image.open(file.parent / line["prior"])
        prior.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(file.parent / f"mirrored_{line['prior']}")
        line["prior"] = [line["prior"], f"mirrored_{line['prior']}"]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return file


@pytest.fixture(scope="module")
def run(tiny_flux, pairs, tmp_path_factory):
    """The settings of a run as YAML."""
    folder = tmp_path_factory.mktemp("run")
    config = TrainConfig(
        model=ModelConfig(path=str(tiny_flux), dtype="fp32", max_sequence_length=16),
        data=DataConfig(
            train=str(pairs), validation=str(pairs), resolution=96, reference_resolution_multiple=48, check="headers"
        ),
        output_dir=str(folder / "run"),
        lora=LoraConfig(rank=4, alpha=4),
        focus=FocusConfig(tau=0.75, per_subject=True),
        mixed_precision="no",
        backend="torch",
        cpu=True,
    )
    file = folder / "train.yaml"
    file.write_text(yaml.safe_dump(dataclasses.asdict(config)))
    return file


@pytest.fixture(scope="module")
def step_and_batch(run, pairs):
    config = read_run_config("config", run)
    step = load_step(config, None)
    return step, collate([dataset_of(load_pairs(str(pairs), "headers"), config.data, "flux")[1]])


@pytest.fixture(scope="module")
def drawn(run, tmp_path_factory):
    """The output of the command for the second pair."""
    out = tmp_path_factory.mktemp("masks") / "out"
    arguments = ["--pair", "1", "--timesteps", "0.2", "0.7", "--layer_groups", "2", "--checkpoint", "none", "--seed", "3"]
    cli.main(["masks", "--config", str(run), *arguments, "--out", str(out)])
    return out


def test_all_blocks_give_the_mask_of_the_loss(step_and_batch, drawn):
    step, batch = step_and_batch
    fields = np.load(drawn / "fields.npz")
    for t in (0.2, 0.7):
        expected = step(batch, torch.Generator().manual_seed(3), torch.tensor([t])).focus
        assert torch.equal(torch.from_numpy(fields[f"all/t={t}/mask"]).flatten(), expected.mask[0])
        torch.testing.assert_close(torch.from_numpy(fields[f"all/t={t}/S"]).flatten(1), expected.scores[0])


def test_a_group_is_what_a_run_that_taps_these_blocks_sees(step_and_batch, drawn, run):
    config = read_run_config("config", run)
    config.focus = dataclasses.replace(config.focus, layers=[2, 3])
    step, batch = load_step(config, None), step_and_batch[1]
    expected = step(batch, torch.Generator().manual_seed(3), torch.tensor([0.7])).focus
    fields = np.load(drawn / "fields.npz")
    torch.testing.assert_close(torch.from_numpy(fields["blocks 2-3/t=0.7/S"]).flatten(1), expected.scores[0])
    assert not np.allclose(fields["blocks 2-3/t=0.7/S"], fields["all/t=0.7/S"], atol=1e-4)
    assert torch.equal(torch.from_numpy(fields["blocks 2-3/t=0.7/structure"]).flatten(), expected.structure[0])


def test_the_numbers_follow_from_the_fields(drawn):
    """Everything in the JSON once more, in numpy, from S, priors and sizes alone."""
    content = json.loads((drawn / "masks.json").read_text())
    fields = np.load(drawn / "fields.npz")
    assert list(content["groups"]) == ["all", "blocks 0-1", "blocks 2-3"] and content["grid"] == list(GRID)
    for name, group in content["groups"].items():
        assert [one["t"] for one in group["timesteps"]] == [0.2, 0.7]
        for one in group["timesteps"]:
            scores = fields[f"{name}/t={one['t']}/S"].reshape(2, -1)
            priors = fields[f"{name}/t={one['t']}/prior"].reshape(2, -1)
            left = np.zeros_like(priors)
            for r, subject in enumerate(one["subjects"]):
                inside, outside = scores[r][priors[r]], scores[r][~priors[r]]
                assert subject["S_inside"] == pytest.approx({"min": inside.min(), "mean": inside.mean(), "max": inside.max()})
                assert subject["S_outside"]["mean"] == pytest.approx(outside.mean())
                assert subject["K"] == subject["reference_tokens"] == subject["matches"] and 0 < subject["K"] < 36
                best = np.argsort(-scores[r], kind="stable")[: subject["K"]]
                assert subject["matches_within_prior"] == pytest.approx(priors[r][best].mean())
                assert subject["prior_tokens"] == priors[r].sum()
                left[r] = priors[r] & ~np.isin(np.arange(36), best)
            coverage = left.any(0).sum() / priors.any(0).sum()
            assert one["coverage"] == pytest.approx(coverage)
            assert one["branch"] == ("detail" if coverage <= 0.75 else "structure") and one["tau"] == 0.75


def test_pictures(drawn):
    names = {path.name for path in (drawn / "groups").iterdir()}
    assert names == {"all.png", "blocks-0-1.png", "blocks-2-3.png"}
    shapes = {np.asarray(Image.open(drawn / "groups" / name)).shape for name in names}
    assert len(shapes) == 1 and min(next(iter(shapes))[:2]) > 600
    assert Image.open(drawn / "coverage.png").width > 600


@pytest.fixture
def figures(monkeypatch):
    """Those that are drawn, instead of their files."""
    kept = []
    monkeypatch.setattr(overlays.Figure, "savefig", lambda figure, *args, **options: kept.append(figure))
    return kept


def planted(coverage):
    """A mask of two subjects: the first matches tokens 0 and 1, the second 1 and 2; subject 1's prior is token 0."""
    scores = torch.zeros(1, 2, 36)
    scores[0, 0, :2], scores[0, 1, 1:3] = 1, 1
    prior = torch.zeros(1, 36, dtype=torch.bool)
    prior[0, :4] = True
    zeros = torch.zeros(1, 36)
    a = torch.tensor([coverage])
    return FocusMask(zeros, zeros, zeros, a, prior, torch.zeros(1), torch.zeros(1, dtype=torch.bool), 0.1, scores, 2)


def test_matches_are_drawn_in_their_subjects_colours():
    figure, axis = plt.subplots()
    matched = overlays.token_fields(planted(0.5).matched[0], GRID)
    overlays.show_matches(axis, np.zeros((96, 96, 3), np.float32), matched, [], "M'")
    stripes = np.asarray(axis.images[-1].get_array()).reshape(*GRID, -1, 4)
    first, second = (to_rgba(colour, 0.85) for colour in overlays.SUBJECTS[:2])
    assert np.allclose(stripes[0, 0], first) and np.allclose(stripes[0, 2], second)
    assert np.allclose(stripes[0, 1, 0], first) and np.allclose(stripes[0, 1, -1], second), "both match it"
    assert not stripes[0, 3:].any() and not stripes[1:].any()
    plt.close(figure)


@pytest.mark.parametrize(("coverage", "branch"), [(0.5, "structure: A > 0.1"), (0.05, "detail: A ≤ 0.1")])
def test_the_page_names_the_branch_and_the_range_of_s(step_and_batch, figures, coverage, branch, tmp_path):
    overlays.draw_overlays(step_and_batch[1], [overlays.MaskAtTime(0.3, planted(coverage))], tmp_path / "page.png", "title")
    titles = [axis.get_title() for axis in figures[0].axes]
    assert f"M ({branch})" in titles and "M': 2 + 2 matches" in titles
    chance = (1 - 2 / 36) ** 2  # two subjects of two matches in 36 tokens
    assert f"$M_s$: A = {coverage:.2f}\nby chance {chance:.2f}, least 0.00" in titles
    labels = [text.get_text() for axis in figures[0].axes for text in axis.get_yticklabels()]
    assert "1.000" in labels and "0.000" in labels, "the ends of the scale of S"


def test_an_estimate_and_a_random_field_are_drawn(run, drawn, figures, tmp_path):
    """With their numbers, of a forward pass; no groups of blocks, and no S of a reference that an estimate does not have."""
    for source, called in (("estimate", "aligned"), ("random", "left out at random")):
        figures.clear()
        out = tmp_path / source
        prepare_masks(MasksConfig(str(run), 1, timesteps=[0.3], checkpoint="none", out=str(out), source=source))()
        kept = json.loads((out / "masks.json").read_text())
        (name, group) = next(iter(kept["groups"].items()))
        numbers = group["timesteps"][0]
        assert name == "all" and numbers["source"] == source
        assert len(kept["groups"]) == (1 if source == "estimate" else 4)
        fields = np.load(out / "fields.npz")
        left = int(numbers["prior_tokens"] - fields["all/t=0.3/structure"].sum())
        titles = [axis.get_title() for axis in figures[0].axes]
        assert f"{called}: {left} tokens" in titles
        assert ("s of the estimate" in titles) == (source == "estimate") != ("S of reference 2" in titles)
        chance = numbers["coverage_chance"]
        assert (numbers["aligned"] == left and chance is None) if source == "estimate" else 0 < chance < 1


def cropped(batch, height, width):
    pictures = {name: getattr(batch, name)[..., :height, :width] for name in ("winner", "loser", "prior")}
    return dataclasses.replace(batch, **pictures)


def masks_of(batch, times):
    def one(i):
        prior = pool_mask(batch.prior).any(1)
        scores = torch.rand(1, 2, prior.shape[-1], generator=torch.Generator().manual_seed(i))
        return focus_mask(scores, prior, batch.winner, match_count=0.2, tau=0.1, check_range=False, backend="torch")

    return [overlays.MaskAtTime(i / 10, one(i)) for i in range(times)]


@pytest.mark.parametrize("times", [1, 2, 6])
@pytest.mark.parametrize("size", [(96, 96), (96, 32), (32, 96)], ids=["square", "tall", "wide"])
def test_nothing_is_cut(step_and_batch, figures, tmp_path, size, times):
    """All of a figure's text lies within it, the labels of its colour bars among them."""
    batch = cropped(step_and_batch[1], *size)
    each = masks_of(batch, times)
    overlays.draw_overlays(batch, each, tmp_path / "page.png", "a prompt")
    for groups in (1, 4):
        overlays.draw_coverage({f"blocks {i}": each for i in range(groups)}, tmp_path / "coverage.png", "coverage A of pair 1")
    for figure in figures:
        figure.draw_without_rendering()
        for text in figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_visible() and artist.get_text()):
            box = text.get_window_extent()
            assert box.x0 >= 0 <= box.y0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text.get_text()


def test_a_reference_is_drawn_with_its_mask(step_and_batch, figures, tmp_path):
    """As the tokens that count in S: outlined in its colour, the others dim."""
    batch = step_and_batch[1]
    mask = torch.zeros_like(batch.reference_masks[1])
    mask[..., :16, :] = True
    batch = dataclasses.replace(batch, reference_masks=(batch.reference_masks[0], mask))
    overlays.draw_overlays(batch, masks_of(batch, 1), tmp_path / "page.png", "title")
    axis = figures[0].axes[1]
    image, drawn = batch.references[1][0].permute(1, 2, 0).numpy(), np.asarray(axis.images[0].get_array())
    assert np.allclose(drawn[:16], image[:16]) and np.allclose(drawn[16:], 0.35 * image[16:])
    assert image.shape == (48, 16, 3) and axis.get_title() == "reference 2: 1 of 3 tokens"
    line = axis.lines[-1]
    assert line.get_color() == overlays.SUBJECTS[1] and np.nanmax(line.get_ydata()) == 16


def test_dollar_signs_of_a_prompt_are_no_formula(step_and_batch, tmp_path):
    title = "prices $5 {each and $6, $$ on it_^"
    overlays.draw_overlays(step_and_batch[1], [overlays.MaskAtTime(0.3, planted(0.5))], tmp_path / "page.png", title)
    assert Image.open(tmp_path / "page.png").width > 500


def test_groups_are_contiguous_and_even():
    paths = [f"b{i}" for i in range(11)]
    groups = groups_of(paths, 3, range(11))
    assert list(groups) == ["all", "blocks 00-02", "blocks 03-06", "blocks 07-10"]
    assert [path for name in list(groups)[1:] for path in groups[name]] == groups["all"] == paths
    assert groups_of(paths[:2], 2, range(2)) == {"all": paths[:2], "block 0": ["b0"], "block 1": ["b1"]}
    named = groups_of(["b4", "b9", "b20"], 2, [4, 9, 20])
    assert named == {"all": ["b4", "b9", "b20"], "block 04": ["b4"], "blocks 09-20": ["b9", "b20"]}, (
        "as focus.layers calls them"
    )


def test_one_forward_pass_a_time(step_and_batch, monkeypatch):
    step, batch = step_and_batch
    calls = []
    predict = step.backbone.predict
    monkeypatch.setattr(step.backbone, "predict", lambda *arguments: calls.append(1) or predict(*arguments))
    step.masks(batch, 0.5, 0, groups_of(step.paths, 4, range(4)))
    assert len(calls) == 1


def test_a_run_that_was_moved_is_looked_at_itself(run, tmp_path):
    """Its own checkpoint, and not that of a run that lies where it was trained."""
    settings = yaml.safe_load(run.read_text()) | {"output_dir": str(tmp_path / "run"), "max_steps": 1, "checkpoint_every": 1}
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump(settings))
    cli.main(["train", "--config", str(file)])
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    for name in ("run", "copy"):
        config = MasksConfig(str(tmp_path / name), timesteps=[0.5], layer_groups=0, out=str(tmp_path / f"{name}-masks"))
        prepare_masks(config)()
        about = json.loads((tmp_path / f"{name}-masks" / "masks.json").read_text())
        assert about["checkpoint"] == str(tmp_path / name / "checkpoints" / "step-000001")
    shutil.rmtree(tmp_path / "copy" / "checkpoints")
    with pytest.raises(FileNotFoundError, match="checkpoint: no checkpoint under .*copy/checkpoints yet"):
        prepare_masks(dataclasses.replace(config, out=str(tmp_path / "third")))


def test_an_interrupted_call_is_repeated_and_a_whole_one_kept(run, drawn, tmp_path, monkeypatch):
    config = MasksConfig(str(run), timesteps=[0.5], layer_groups=0, checkpoint="none", out=str(tmp_path / "out"))
    work = prepare_masks(config)
    monkeypatch.setattr(masks, "numbers_of", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        work()
    monkeypatch.undo()
    assert (tmp_path / "out" / "groups" / "all.png").is_file()
    prepare_masks(config)()
    with pytest.raises(FileExistsError, match=r"out: .* holds an earlier run \(.*masks.json\); replace it with --overwrite"):
        prepare_masks(config)
    prepare_masks(dataclasses.replace(config, overwrite=True))
    (tmp_path / "other").mkdir()
    shutil.copy(drawn / "masks.json", tmp_path / "other")
    with pytest.raises(FileExistsError, match="which this command did not write"):
        prepare_masks(dataclasses.replace(config, out=str(tmp_path / "other"), overwrite=True))


REFUSED = {
    "no such pair": ({"pair": 2}, r"pair: got 2; expected 0 to 1: .* has 2 pairs"),
    "no checkpoint yet": ({"checkpoint": "latest"}, r"checkpoint: no checkpoint under .*; expected one, or 'none'"),
    "more groups than blocks": ({"layer_groups": 5}, "layer_groups: got 5; expected 0 to 4, the number of tapped blocks"),
    "no run": ({"config": "/nowhere"}, "config: no such file: /nowhere"),
    "a time of noise alone": ({"timesteps": [0.5, 1.0]}, r"timesteps: got \[0.5, 1.0\]; expected numbers between 0 and 1"),
    "a time twice": ({"timesteps": [0.5, 0.5]}, "timesteps: .* each once"),
    "no time": ({"timesteps": []}, r"timesteps: got \[\]"),
    "negative": ({"pair": -1}, "pair: got -1; expected 0 or more"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(run, tmp_path, case):
    changes, message = REFUSED[case]
    settings = {"config": str(run), "checkpoint": "none", "out": str(tmp_path / "out")} | changes
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare_masks(MasksConfig(**settings))
    assert not (tmp_path / "out").exists()


def changed(run, tmp_path, **sections):
    settings = yaml.safe_load(run.read_text())
    for section, values in sections.items():
        settings[section] |= values
    file = tmp_path / "changed.yaml"
    file.write_text(yaml.safe_dump(settings))
    return str(file)


def test_runs_that_lack_something_are_refused(run, tmp_path):
    alone = changed(run, tmp_path, data={"validation": None})
    with pytest.raises(ValueError, match=r"split: .* has no data.validation; expected --split train"):
        prepare_masks(MasksConfig(alone, checkpoint="none", out=str(tmp_path / "out")))
    common = write_dataset(tmp_path / "pairs", 1, 96, seed=1)
    without = changed(run, tmp_path, data={"validation": str(common)})
    with pytest.raises(ValueError, match=r"pairs.jsonl:1: prior: is one mask, but focus.per_subject needs a list"):
        prepare_masks(MasksConfig(without, checkpoint="none", out=str(tmp_path / "out")))


def test_a_run_without_the_mask_shows_what_it_would_be(run, drawn, tmp_path, caplog):
    plain = changed(run, tmp_path, focus={"mask": "none"})
    config = MasksConfig(plain, 1, "train", [0.7], 0, "none", 3, str(tmp_path / "out"))
    with caplog.at_level("INFO", "focusdpo"):
        prepare_masks(config)()
    assert "focus.mask is 'none' in this run" in caplog.text
    here, there = np.load(tmp_path / "out" / "fields.npz"), np.load(drawn / "fields.npz")
    assert np.array_equal(here["all/t=0.7/mask"], there["all/t=0.7/mask"])


def test_a_run_that_keeps_what_the_reference_says_is_drawn(run, drawn, tmp_path):
    """Its draws go with its cache; and where its loss has a sigmoid for each subject, the mask needs no prior of each."""
    kept = {"cache": str(tmp_path / "cache"), "reference_cache": str(tmp_path / "references")}
    cached = changed(run, tmp_path, data=kept, loss={"draws": 2, "granularity": "subject"})
    prepare_masks(MasksConfig(cached, 1, "train", [0.7], 0, "none", 3, str(tmp_path / "out")))()
    here, there = np.load(tmp_path / "out" / "fields.npz"), np.load(drawn / "fields.npz")
    assert np.array_equal(here["all/t=0.7/mask"], there["all/t=0.7/mask"]) and not (tmp_path / "references").exists()
