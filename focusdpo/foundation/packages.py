"""Optional packages."""

from __future__ import annotations

import importlib
from typing import Any


def require_package(module: str, what: str, extra: str = "data") -> Any:
    """An optional package; ModuleNotFoundError says which extra brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{what} needs {module}, which is not installed; pip install 'focusdpo[{extra}]'") from error
