"""What settings may be chosen from, once for configurations, their --help and what checks them. Imports nothing heavy.

The kernels and the drop-in modules, which import no room, have lists of their own for what they take:
tests/foundation/test_choices.py compares them.
"""

from __future__ import annotations

from typing import Literal

BackboneName = Literal["flux", "kontext", "flux2", "qwen-edit-plus"]
WeightDtype = Literal["bf16", "fp32"]
Quantization = Literal["nf4", "fp8"]
Optimizer = Literal["adamw", "adamw8bit", "prodigy"]
Autocast = Literal["no", "bf16"]
KernelBackend = Literal["triton", "torch"]
LossType = Literal["sigmoid", "ipo", "hinge", "sft"]
LoserScale = Literal["sdpo", "sdpo_batch"]
Reduction = Literal["mean", "sum", "masked_mean"]
MatchCount = Literal["reference", "prior"] | int | float
MaskFrom = Literal["winner", "each"]
FeatureSource = Literal["policy", "reference"]
EntropyMethod = Literal["kde", "histogram"]
Pooling = Literal["reference", "max"]
Check = Literal["full", "headers"]  # of a dataset
LoraForm = Literal["diffusers", "peft", "comfyui", "kohya", "uno"]
ReferencePhotos = Literal["listed", "all"]  # of the metrics
DinoTransform = Literal["folder", "original"]
