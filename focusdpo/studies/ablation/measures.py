"""What a number is called, and which way is better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Measure:
    """A measure of a trained model.

    label: what it is. better: whether more of it is better, or less, or neither by itself.
    """

    label: str
    better: Literal["more", "less", "neither"] = "more"
