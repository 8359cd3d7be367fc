"""Which layers and whose a LoRA's names mean, whatever its form."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from focusdpo.foundation.text import first_of
from focusdpo.models.lora_names import FAMILIES, Family, family_of
from focusdpo.models.lora_settings import PREFIX, Settings

PEFT_PREFIX = "base_model.model."
FAMILY_KEY = "focusdpo_family"  # in the metadata of the files that this project writes

# The last is OneTrainer's: diffusers' names with underscores.
PREFIXES = (PREFIX, PEFT_PREFIX, "diffusion_model.", "lora_unet_", "lora_transformer_")
_KEY = re.compile(r"(.+)\.(?:(lora_A|lora_B|lora_down|lora_up)(?:\.default)?\.weight|(alpha))")
_SIDES = {"lora_A": "a", "lora_down": "a", "lora_B": "b", "lora_up": "b", None: "alpha"}
# Parts of names that no plain LoRA of a transformer has.
_OTHER_KINDS = {
    r"dora_scale|lora_magnitude_vector": "is a DoRA, which scales the model's own weights too",
    r"\.hada_": "is a LoHa",
    r"\.lokr_": "is a LoKr",
    r"^(text_encoder|lora_te)": "also updates a text encoder",
    r"\.(lora_B\.bias|diff_b|diff|bias)$": "also updates biases or whole weights",
}


def either(families: Iterable[Family]) -> str:
    return " or ".join(family.name for family in families)


def inner(stem: str) -> str:
    """A name without the prefix of its form."""
    prefix = next((prefix for prefix in PREFIXES if stem.startswith(prefix)), "")
    return stem.removeprefix(prefix)


def layer_keys(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """A LoRA's names by layer and side ("a", "b", "alpha"); ValueError where they are no plain LoRA's or incomplete."""
    names = sorted(names)
    for pattern, kind in _OTHER_KINDS.items():
        others = [name for name in names if re.search(pattern, name)]
        if others:
            raise ValueError(f"it {kind} ({first_of(others)}); a plain LoRA of the transformer alone is taken")
    stems: dict[str, dict[str, str]] = {}
    odd = []
    for name in names:
        match = _KEY.fullmatch(name)
        if match is None or _SIDES[match[2]] in stems.get(match[1], {}):
            odd.append(name)
        else:
            stems.setdefault(match[1], {})[_SIDES[match[2]]] = name
    odd += [name for keys in stems.values() if not {"a", "b"} <= keys.keys() for name in keys.values()]
    if odd:
        raise ValueError(f"{len(odd)} of {len(names)} names are no pair of lora_A and lora_B: {first_of(sorted(odd))}")
    return stems


def families_of(
    stems: Mapping[str, Mapping[str, str]],
    shapes: Mapping[str, Sequence[int]],
    metadata: Mapping[str, str],
    settings: Settings | None,
    backbone: str | None,
) -> tuple[Family, ...]:
    """The families that a LoRA can be for; several where that cannot be told, and then its names mean the same in all.

    Args:
        stems: as `layer_keys` gives them.
        shapes: of the matrices, by name.
        metadata: of the file.
        settings: PEFT's, where there are any.
        backbone: setting of `model.backbone` that it has to be for; None takes all.

    Raises:
        ValueError: it is for another model, or which one it is for has to be said.
    """
    unknown = {family: [stem for stem in stems if family.find(inner(stem)) is None] for family in FAMILIES}
    families = [family for family in FAMILIES if not unknown[family]]
    if not families:
        nearest = min(FAMILIES, key=lambda family: len(unknown[family]))
        odd = sorted(name for stem in unknown[nearest] for name in stems[stem].values())
        raise ValueError(
            f"{len(odd)} of {len(shapes)} names are no pair of matrices for a layer of {either(FAMILIES)}: {first_of(odd)} "
            f"(it is nearest to {nearest.name}); is it for another model?"
        )
    mapping: Any = (settings or {}).get("auto_mapping")
    said = [metadata.get(FAMILY_KEY), mapping.get("base_model_class") if isinstance(mapping, dict) else None]
    pairs = {inner(stem): [shapes[keys[side]] for side in "ab"] for stem, keys in stems.items()}
    fits: tuple[Callable[[Family], bool], ...] = (
        lambda family: family.name in said or family.transformer in said,
        lambda family: all(_has_shape(family, name, *shapes) for name, shapes in pairs.items()),
        lambda family: all(_in_range(family, name) for name in pairs),
    )
    for fit in fits:
        families = [family for family in families if fit(family)] or families
    found = check_backbone(tuple(families), backbone)
    if any(family.find(inner(stem)) != found[0].find(inner(stem)) for family in found for stem in stems):
        raise ValueError(f"{either(found)} has such names, for different layers; {name_backbone(found)}")
    return found


def check_backbone(families: tuple[Family, ...], backbone: str | None) -> tuple[Family, ...]:
    """The families, or the backbone's alone; ValueError where that is none of them."""
    if backbone is None:
        return families
    wanted = family_of(backbone)
    if wanted not in families:
        raise ValueError(f"it is for {either(families)}, but backbone {backbone!r} is {wanted.name}")
    return (wanted,)


def name_backbone(families: Sequence[Family]) -> str:
    """What to do where a LoRA can be for several families."""
    return f"say which with --backbone: {' or '.join(family.backbones[0] for family in families)}"


def _has_shape(family: Family, name: str, a: Sequence[int], b: Sequence[int]) -> bool:
    module = family.find(name)
    return module is None or module.shape is None or b[0] * module.shape[1] == a[1] * module.shape[0]


def _in_range(family: Family, name: str) -> bool:
    module = family.find(name)
    blocks, _, rest = module.layers[0].partition(".") if module else ("", "", "")
    return blocks not in family.blocks or int(rest.split(".")[0]) < family.blocks[blocks]
