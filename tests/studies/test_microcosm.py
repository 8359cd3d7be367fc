"""The microcosm: its world, the resumable learning, the judgement, and the whole command at its smallest size."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from focusdpo.building.dreambench import read_classes
from focusdpo.commands import cli
from focusdpo.commands.microcosm import PICTURES, WRITTEN, _settings
from focusdpo.commands.microcosm import prepare as prepare_microcosm
from focusdpo.data import load_pairs
from focusdpo.foundation.output_folder import OutputFolder
from focusdpo.studies.config import MicrocosmConfig
from focusdpo.studies.microcosm import learning
from focusdpo.studies.microcosm.classifier import halves
from focusdpo.studies.microcosm.identities import identities_of
from focusdpo.studies.microcosm.judging import verdicts
from focusdpo.studies.microcosm.learning import learn
from focusdpo.studies.microcosm.pairs import write_pairs
from focusdpo.studies.microcosm.stages import Stages
from focusdpo.studies.microcosm.world import draw_scene
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
            assert differs[prior > 0].any() and own.class_name == instance.class_name and own is not instance
        assert [r.class_name for r in record.references] == [identities[i].class_name for i in meta["identities"]]


def test_scenes_are_of_two_classes(identities):
    scenes = [draw_scene(identities, 32, np.random.default_rng(seed)) for seed in range(50)]
    assert all(identities[a].class_name != identities[b].class_name for a, b in (scene.identities for scene in scenes))
    assert len({scene.identities for scene in scenes}) > 40


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
    """Four identities of classes a, a, b, b. Left should be 0, right 2."""
    seen = torch.tensor([[0, 2], [1, 0], [2, 3]])  # all right; another instance, the other subject; the other subject, instance
    logits = nn.functional.one_hot(seen, 4).float()
    logits[1, 0, 2] = 0.5  # the other subject is likelier than the own, and a third one is seen: no leak
    found = verdicts(logits, torch.tensor([[0, 2]] * 3), ["a", "a", "b", "b"])
    assert found["identity"] == [1, 0, 0]
    assert found["wrong instance"] == [0, 0.5, 0.5]
    assert found["class"] == [1, 0.5, 0.5]
    assert found["leakage"] == [0, 0.5, 0.5]
    twice = verdicts(logits.repeat_interleave(2, 0), torch.tensor([[0, 2]] * 6), ["a", "a", "b", "b"], samples=2)
    assert twice == found, "a value for each scene"


def test_halves():
    images = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6).float()
    regions = halves(images)
    assert torch.equal(regions[2], images[1, :, :, :3]) and torch.equal(regions[1], images[0, :, :, 3:])


def test_settings_reach_the_runs(tmp_path):
    settings = MicrocosmConfig(out=str(tmp_path), size="smoke", lr=0.5, beta=7.0, tuning_steps=9, reduction="masked_mean")
    run = Stages(settings).train_config()
    assert (run.optim.lr, run.loss.beta, run.loss.reduction, run.max_steps) == (0.5, 7.0, "masked_mean", 9)


def results_of(folder):
    found = json.loads((folder / "ablation" / "results.json").read_text())
    return found["results"], found["table"]


def test_the_whole_command_also_when_killed(tmp_path):
    """Killed with SIGKILL whenever a stage has begun, and run to its end: the same numbers as without."""
    folder, environment = tmp_path / "whole", os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    arguments = ["--size", "smoke", "--out", str(folder), "--variants", "base", "focus", "--seeds", "0", "--cpu", "true"]
    cli.main(["microcosm", *arguments])
    with pytest.raises(ValueError, match="ablation.variants: the begun ablation has .'base', 'focus'., got .'base'."):
        prepare_microcosm(MicrocosmConfig(out=str(folder), size="smoke", variants=["base"], seeds=[0], cpu=True))
    for name in (*PICTURES, "model/model_index.json", "pairs/held_out/pairs.jsonl", "ablation/ablation.html", "facts.json"):
        assert (folder / name).is_file(), name
    results, table = results_of(folder)
    assert {r["variant"]: len(r["values"]["identity"]) for r in results} == {"base": 4, "focus": 4}
    assert "FID" in table["measures"] and "accuracy/inside" in table["measures"]
    images = [load_file(path)["images"] for path in sorted(folder.rglob("generated.safetensors"))]
    assert len(images) == 2 and images[0].shape == (4, 3, 64, 64) and not torch.equal(images[0], images[1])

    moved = folder.rename(tmp_path / "moved")
    prepare_microcosm(MicrocosmConfig(out=str(moved), size="smoke", variants=["base", "focus"], seeds=[0, 1], cpu=True))
    (moved / "model").rename(moved / "elsewhere")
    prepare_microcosm(MicrocosmConfig(out=str(moved), size="smoke", variants=["base", "focus"], seeds=[0], cpu=True))

    killed = tmp_path / "killed"
    arguments[3] = str(killed)
    command = [sys.executable, "-m", "focusdpo", "microcosm", *arguments]
    for sign in ("classifier.safetensors", "ablation/runs/focus"):
        with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
            while not (killed / sign).exists() and child.poll() is None:
                time.sleep(0.02)
            assert child.poll() is None, sign
            child.send_signal(signal.SIGKILL)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    assert results_of(killed) == (results, table)
    assert "identity accuracy of generated regions" in done.stdout


def test_refused_by_name(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="tuning_steps: got 0; expected at least 1"):
        MicrocosmConfig(tuning_steps=0)
    with pytest.raises(ValueError, match="seeds: got \\[1, 1\\]; expected each once"):
        MicrocosmConfig(seeds=[1, 1])
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
    (tmp_path / "c" / "ablation").mkdir()
    with pytest.raises(
        ValueError, match="(?s)tuning.lr: .* has 0.5, got 0.001.*'mean', got 'masked_mean'.*, delete .*ablation to tune"
    ):
        prepare_microcosm(MicrocosmConfig(out=str(tmp_path / "c"), size="smoke", reduction="masked_mean"))
    with pytest.raises(ValueError, match="grids: .* expected no grid over layers with size='smoke'"):
        prepare_microcosm(MicrocosmConfig(out=str(tmp_path / "d"), size="smoke", grids=["layers"]))


def test_overwriting_starts_anew(tmp_path):
    """Nothing that a kill left is gone on from."""
    out = OutputFolder("out", tmp_path, "microcosm", WRITTEN)
    out.begin(clear=False)
    for name in ("autoencoder", "classifier", "model"):
        (tmp_path / f"{name}.state").write_text("another world's")
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / "notes.state").write_text("mine")
    out.begin(clear=True)
    assert [path.name for path in tmp_path.iterdir() if path.name != ".focusdpo"] == ["notes.state"]
