"""The sizes that a run brings pairs to, by its settings and its backbone."""

from __future__ import annotations

from typing import Any

from focusdpo.data.references import LongestSide, ReferenceRule, UnoReferences
from focusdpo.training.config import DataConfig, parse_ratios


def rules_of(backbone: str) -> tuple[ReferenceRule, ReferenceRule | None]:
    """How a backbone's own pipeline brings references to size, and how its text encoder sees them, where it does."""
    if backbone == UnoReferences.name:  # of no pipeline of diffusers, which takes 200 MB
        return UnoReferences(), None
    from focusdpo.models import BACKBONES

    return BACKBONES[backbone].reference_rule, BACKBONES[backbone].prompt_rule


def reference_rules(data: DataConfig, backbone: str) -> tuple[ReferenceRule, ReferenceRule]:
    """How references of pairs with one, and with several, are brought to size."""
    one, several = data.reference_resolution, data.reference_resolution_multiple
    rule = rules_of(backbone)[0] if one is None else LongestSide(one)
    return rule, rule if several is None else LongestSide(several)


def size_rules(data: DataConfig, backbone: str) -> dict[str, Any]:
    """What `focusdpo.data.dataset.SizeRules` takes."""
    one, several = reference_rules(data, backbone)
    return {
        "resolution": data.resolution,
        "reference_rule": one,
        "reference_rule_multiple": several,
        "prompt_rule": rules_of(backbone)[1],
        "buckets": parse_ratios("data.buckets", data.buckets),
        "reference_buckets": parse_ratios("data.reference_buckets", data.reference_buckets),
    }
