"""Settings offer what there is: no more, and no less."""

from __future__ import annotations

from typing import get_args

import pytest

from focusdpo import loss, mask
from focusdpo.foundation import choices
from focusdpo.models import BACKBONES, lora_writing, precision
from focusdpo.training import optimizers
from focusdpo_kernels import backend, checks, similarity


@pytest.mark.parametrize(
    ("choice", "there"),
    [
        (choices.BackboneName, BACKBONES),
        (choices.WeightDtype, precision.DTYPES),
        (choices.Quantization, precision.PACKAGES),
        (choices.Quantization, precision.BITS),
        (choices.Optimizer, optimizers.STATE_BYTES),
        (choices.Optimizer, ("adamw", *optimizers.PACKAGES)),
        (choices.LoraForm, lora_writing.FILES),
        (choices.KernelBackend, backend.BACKENDS),
        (choices.EntropyMethod, checks.METHODS),
        (choices.FocusSource, mask.SOURCES),
        (choices.Reduction, checks.REDUCTIONS),
        (choices.Pooling, similarity.POOLINGS),
        (choices.LossType, loss.LOSS_TYPES),
        (choices.LoserScale, [name for name in loss.LOSER_SCALES if name is not None]),
    ],
)
def test_choices_are_what_there_is(choice, there):
    assert set(get_args(choice)) == set(there)
