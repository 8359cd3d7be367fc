"""Gradients of an ablation's variants before training: what is the same, and what differs."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
import yaml
from PIL import Image

from focusdpo.commands import cli
from focusdpo.commands.ablate import prepare
from focusdpo.demo.scenes import write_dataset
from focusdpo.features import pool_mask
from focusdpo.studies.ablation.gradients import gradients_at_start
from focusdpo.studies.ablation.jobs import fresh_trainer
from focusdpo.studies.ablation.variants import VARIANTS
from focusdpo.studies.config import AblationConfig
from focusdpo.training.batches import in_order
from focusdpo.training.config import FocusConfig
from focusdpo.training.seeding import seeded
from focusdpo.training.step import PreferenceStep
from focusdpo.training.trainer import VALIDATION_SEED
from tests.runs import tiny_config

NAMES = ["base", "sft", "dpo", "prior", "subject", "structure", "random", "truth", "estimate", "detail", "focus"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Pairs with a prior for each subject."""
    return write_dataset(tmp_path_factory.mktemp("data") / "pairs", 6, 96, seed=0, per_subject=True)


@pytest.fixture
def run(tmp_path, tiny_flux, pairs):
    settings = {"data.validation": str(pairs), "data.resolution": 96, "data.batch_size": 1}
    return tiny_config(tiny_flux, pairs, tmp_path, settings)


@pytest.mark.parametrize(("source", "asked"), [("policy", 1), ("reference", 5)])
def test_against_gradients_taken_one_by_one(run, monkeypatch, source, asked):
    """The reference model is asked once for all variants, and by those that listen to it."""
    run = dataclasses.replace(run, focus=FocusConfig(match_count=5, tau=0.5, feature_source=source))
    trainer = fresh_trainer(run)
    changes = [VARIANTS[name] for name in NAMES]
    predict, looked = PreferenceStep.predict, []

    def spied(step, noised, taps=(), which="policy"):
        looked.append(which)
        return predict(step, noised, taps, which)

    with monkeypatch.context() as patch:
        patch.setattr(PreferenceStep, "predict", spied)
        found = gradients_at_start(trainer, run, changes, 4)
    assert looked.count("policy") == 4 * 10 and looked.count("reference") == 4 * asked
    assert found.variants == tuple(NAMES[1:]) and found.pairs == 4
    means = []
    for name in NAMES[1:]:
        config = VARIANTS[name].of(run)
        total = 0
        first = [batch for batch in in_order(trainer.train_set, 1) if batch[0] < 4]
        for place, indices in enumerate(first):
            batch = next(iter(torch.utils.data.DataLoader(trainer.train_set, batch_sampler=[indices], collate_fn=_collate)))
            step = PreferenceStep(trainer.backbone, config.focus, config.loss, "torch")
            loss = step(batch, seeded(VALIDATION_SEED, place)).output.loss
            total = total + torch.cat([g.flatten() for g in torch.autograd.grad(loss, trainer.parameters)]).double()
        means.append(total / 4)
    for i, one in enumerate(means):
        assert found.norms[i] == pytest.approx(float(one.norm()), rel=1e-4)
        for j, other in enumerate(means):
            cosine = float(torch.nn.functional.cosine_similarity(one, other, dim=0))
            assert found.cosines[i][j] == pytest.approx(cosine, abs=1e-4)


def _collate(items):
    from focusdpo.data import collate

    return collate(items)


def test_diffusion_dpo_is_the_prior_on_pairs_that_are_equal_outside(run):
    """What docs/method.md says of the baseline, where nothing at all differs outside of the prior: all that is left is what
    attention brings there, which is most in a small random model.
    """
    trainer = fresh_trainer(run)
    # In tokens: the autoencoder's own sees beyond the prior's border.
    encode = trainer.step._clean

    def cleaned(batch):
        clean = encode(batch)
        inside = pool_mask(batch.prior).any(1)[..., None]
        win, lose = clean.chunk(2)
        return torch.cat([win, torch.where(inside, lose, win)])

    PreferenceStep._clean, kept = lambda self, batch: cleaned(batch), PreferenceStep._clean
    try:
        found = gradients_at_start(trainer, run, [VARIANTS[name] for name in ("dpo", "prior", "subject", "sft")], 6)
    finally:
        PreferenceStep._clean = kept
    dpo, prior = found.cosines[:2]
    assert dpo[1] > 0.9 and prior[2] > 0.98, found.cosines
    assert dpo[3] < 0.6, "another loss altogether"
    assert found.norms[2] == pytest.approx(found.norms[1] / 2, rel=0.1), "each subject's loss counts one half"


def test_the_command(run, tmp_path, capsys):
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump(dataclasses.asdict(run)))
    out = tmp_path / "ablation"
    words = ["--gradients", "--gradient_pairs", "4", "--variants", "base", "prior", "estimate"]
    cli.main(["ablate", "--config", str(file), "--output_dir", str(out), *words])
    kept = json.loads((out / "gradients" / "gradients.json").read_text())
    assert kept["variants"] == ["prior", "estimate"] and kept["pairs"] == 4 and not (out / "runs").exists()
    assert all(-1 <= cosine <= 1.000001 for row in kept["cosines"] for cosine in row)
    printed = capsys.readouterr().out
    assert "Cosines of mean gradients before training, over 4 pairs" in printed and "the estimate field alone" in printed
    assert Image.open(out / "gradients" / "gradients.png").width > 300
    assert not math.isnan(kept["noise"][0])
    # It binds nothing: other variants are compared, and trained, in the same folder, and it is written anew.
    cli.main(["ablate", "--config", str(file), "--output_dir", str(out), *words[:-1], "detail"])
    few = ["--variants", "prior", "--seeds", "0", "--max_steps", "1", "--samples", "0", "--points", "1"]
    cli.main(["ablate", "--config", str(file), "--output_dir", str(out), *few])
    cli.main(["ablate", "--config", str(file), "--output_dir", str(out), *words])
    assert (out / "results.json").is_file() and json.loads((out / "gradients" / "gradients.json").read_text()) == kept
    with pytest.raises(ValueError, match="variants: got .* expected one that is trained, for --gradients"):
        prepare(AblationConfig(str(file), str(out), variants=["base"], baseline="base", gradients=True))
