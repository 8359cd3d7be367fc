"""Checks of settings, alike in every command."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Parts = Mapping[str, Mapping[str, Any]]  # settings by the part they belong to, and by name


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """ValueError with the setting's name, what came and what is expected, unless the condition holds."""
    if not condition:
        raise ValueError(f"{name}: got {value!r}; expected {expected}")


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
        f"{part}.{name}: the begun {what} has {before!r}, got {value!r}"
        for part, values in now.items()
        for name, value in values.items()
        if (before := begun.get(part, {}).get(name)) != value and not may_differ(name, before, value)
    ]
    if differing:
        lines = "\n  ".join(differing)
        raise ValueError(
            f"{setting}: {folder} holds a begun {what} with other settings:\n  {lines}\ngo on with its own, {remedy}, or name "
            "another folder"
        )
