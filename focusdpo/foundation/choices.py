"""What settings may be chosen from, once for configurations, their --help and what checks them. Imports nothing heavy.

What there is to choose from, by these names, is compared in tests/foundation/test_choices.py.
"""

from __future__ import annotations

from typing import Literal

from focusdpo_kernels.choices import Backend as KernelBackend
from focusdpo_kernels.choices import EntropyMethod, FocusSource, Pooling, Reduction

__all__ = ["EntropyMethod", "FocusSource", "KernelBackend", "Pooling", "Reduction"]  # the kernels' own, beside those below

BackboneName = Literal["flux", "kontext", "flux2", "qwen-edit-plus"]
WeightDtype = Literal["bf16", "fp32"]
Quantization = Literal["nf4", "fp8"]
Optimizer = Literal["adamw", "adamw8bit", "prodigy"]
Autocast = Literal["no", "bf16"]
LossType = Literal["sigmoid", "ipo", "hinge", "sft"]
LoserScale = Literal["sdpo", "sdpo_batch"]
MatchCount = Literal["reference", "prior"] | int | float
MaskFrom = Literal["winner", "each"]
FeatureSource = Literal["policy", "reference"]
StructureSource = FocusSource | Literal["truth"]  # the last is made of a dataset's priors, which the mask itself does not know
Granularity = Literal["image", "subject"]
Check = Literal["full", "headers"]  # of a dataset
LoraForm = Literal["diffusers", "peft", "comfyui", "kohya", "uno"]
ReferencePhotos = Literal["listed", "all"]  # of the metrics
DinoTransform = Literal["folder", "original"]
