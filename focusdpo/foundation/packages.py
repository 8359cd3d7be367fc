"""Packages: optional ones, and versions."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any


def require_package(module: str, what: str, extra: str = "data") -> Any:
    """An optional package; ModuleNotFoundError says which extra brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{what} needs {module}, which is not installed; pip install 'focusdpo[{extra}]'") from error


def version_of(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
