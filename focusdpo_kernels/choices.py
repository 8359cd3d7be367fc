"""What the kernels' settings may be, as types. Without torch: configurations and their --help read them as well."""

from __future__ import annotations

from typing import Literal

Backend = Literal["triton", "torch"]
Pooling = Literal["reference", "max"]
EntropyMethod = Literal["kde", "histogram"]
Reduction = Literal["mean", "sum", "masked_mean"]
FocusSource = Literal["features", "estimate", "random"]
