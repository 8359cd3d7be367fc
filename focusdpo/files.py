"""What this project reads of files without loading them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import safe_open


class ReadableFile(Protocol):
    """Bytes, wherever they lie: a Path, or an image of `focusdpo.data.sources`."""

    def open(self, mode: Literal["rb"]) -> Any: ...  # a binary file


def checksum(file: ReadableFile) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_whole(path: Path, text: str, errors: str = "strict") -> None:
    """Writes a file at once or not at all, in UTF-8; an earlier one stays until then."""
    write_bytes(path, text.encode("utf-8", errors))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file at once or not at all; an earlier one stays until then."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, whole, with null for numbers that do not exist, such as the interval of a single value."""
    write_whole(path, json.dumps(_without_nan(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """Shapes by name of a safetensors file, from its header alone.

    Raises:
        FileNotFoundError: there is no such file.
        safetensors.SafetensorError: it is of another kind, or its length is not what the header says.
    """
    with safe_open(path, framework="pt") as content:
        return {name: content.get_slice(name).get_shape() for name in list(content.keys())}


def hash_of(*values: str | int) -> str:
    """SHA-256 of values, in hexadecimal."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def fingerprint(pipeline: Path, parts: Iterable[str]) -> str:
    """A hash of the files of a pipeline's parts, the same wherever they lie and whenever they were copied there.

    Of weights it takes names, shapes and the first row of every tensor: text encoders are tens of gigabytes, and no training
    leaves all of these rows as they are.
    """
    files = sorted(file for part in parts for file in (pipeline / part).rglob("*") if file.is_file())
    found: list[str] = []
    for file in files:
        found.append(file.relative_to(pipeline).as_posix())
        found.append(_weights(file) if file.suffix == ".safetensors" else checksum(file))
    return hash_of(*found)


def _weights(file: Path) -> str:
    digest = hashlib.sha256()
    with safe_open(file, framework="pt") as content:
        for name in sorted(content.keys()):
            weight = content.get_slice(name)
            shape = weight.get_shape()
            row = weight[:1] if shape else content.get_tensor(name)
            digest.update(f"{name} {shape} {row.dtype}".encode() + row.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
