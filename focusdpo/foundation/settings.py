"""Checks of settings, alike in every command."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

SHOWN = 400  # characters of a value, in a message

Parts = Mapping[str, Mapping[str, Any]]  # settings by the part they belong to, and by name


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """ValueError with the setting's name, what came and what is expected, unless the condition holds."""
    if not condition:
        text = repr(value)
        raise ValueError(f"{name}: got {text if len(text) <= SHOWN else f'{text[:SHOWN]}…'}; expected {expected}")


def flat(config: Any) -> dict[str, Any]:
    """A configuration's settings, and its sections' by dotted names, in their order."""
    settings: dict[str, Any] = {}
    for name, value in asdict(config).items():
        settings |= {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
    return settings


def differences(
    what: str,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    may_differ: Callable[[str, Any, Any], bool] = lambda *_: False,
) -> list[str]:
    """A line for each setting that is another, or on one side only.

    Args:
        what: has the settings of before, such as "checkpoint".
        before, now: settings as JSON has them.
        may_differ: of a setting's name, its earlier and its present value, whether that is no hindrance.
    """
    return [
        f"{name}: the {what} has {before.get(name)!r}, got {now.get(name)!r}"
        for name in {**before, **now}
        if before.get(name) != now.get(name) and not may_differ(name, before.get(name), now.get(name))
    ]


def check_begun(
    what: str,
    folder: object,
    begun: Parts,
    now: Parts,
    may_differ: Callable[[str, Any, Any], bool] = lambda *_: False,
    setting: str = "output_dir",
    remedy: str = "start anew with --overwrite true",
) -> None:
    """ValueError names every setting in which something that was begun in a folder differs from what is asked for now.

    Args:
        what: is being gone on with, such as "ablation".
        folder: where.
        begun, now: settings as JSON has them.
        may_differ: of a setting's name, its begun and its present value, whether that is no hindrance.
        setting: that names the folder.
        remedy: beside going on with the begun settings and naming another folder.
    """
    differing = [
        f"{part}.{line}"
        for part, values in now.items()
        for line in differences(f"begun {what}", begun.get(part, {}), values, may_differ)
    ]
    if differing:
        lines = "\n  ".join(differing)
        raise ValueError(
            f"{setting}: {folder} holds a begun {what} with other settings:\n  {lines}\ngo on with its own, {remedy}, or name "
            "another folder"
        )
