"""Tensors on disk by key: what a run, or several at once, computes once and reads often.

A key is a hash of all that the content follows from. A file is written under a temporary name and renamed, and carries a
checksum of its content: what a disk has changed is found before it is used, and made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm.auto import tqdm

from focusdpo.foundation.files import comes, tensor_shapes, writing

logger = logging.getLogger(__name__)

Fits = Callable[[dict[str, list[int]]], bool]  # of shapes by name
SHOWN = 1000  # files, whose checking takes long enough for a bar


class DamagedError(ValueError):
    """A file's content is not what was written."""


@dataclass(frozen=True)
class TensorFiles:
    """A folder of safetensors files.

    Args:
        name: the setting that names the folder, for messages.
        folder: the folder; it need not exist.
    """

    name: str
    folder: Path

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"  # in 256 folders: file systems are slow with very large ones

    def read(self, key: str) -> dict[str, Tensor]:
        """The tensors of a key.

        Raises:
            DamagedError: they are not what was written. The file is deleted, so that the next start makes it again.
        """
        path = self.path(key)
        try:
            return _read(path)
        except DamagedError as error:
            with suppress(OSError):  # of others, or read only: then it is to be deleted by hand
                path.unlink(missing_ok=True)
            gone = "deleted; the same command makes it again" if not path.exists() else "to be deleted by hand"
            raise DamagedError(f"{self.name}: {path} was damaged ({error}) and is {gone}") from error

    def read_all(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors by name, whatever their keys; damaged files are left out, with a warning."""
        for path in sorted(self.folder.glob("*/*.safetensors")):
            try:
                yield from _read(path).items()
            except (DamagedError, OSError) as error:
                logger.warning("%s is damaged (%s), made again", path, error)

    def missing(self, wanted: Mapping[str, Fits], progress: bool) -> list[str]:
        """The keys of which there is no sound file with shapes that fit. What was checked before costs no reading."""
        with ThreadPoolExecutor() as pool:  # reading and hashing release the interpreter
            sound = pool.map(self._is_sound, wanted, wanted.values())
            bar = tqdm(
                sound,
                total=len(wanted),
                desc=f"checking {self.name}",
                unit="file",
                disable=not progress or len(wanted) < SHOWN,
                leave=False,
            )
            return [key for key, is_sound in zip(wanted, bar, strict=True) if not is_sound]

    def _is_sound(self, key: str, fits: Fits) -> bool:
        path = self.path(key)
        try:
            state = path.stat()
            if state.st_mtime_ns % SECOND == _seal(key):
                return fits(tensor_shapes(path))
            tensors = _read(path)
        except FileNotFoundError:
            return False
        except (DamagedError, SafetensorError, OSError) as error:
            logger.warning("%s: %s is damaged (%s), made again", self.name, path, error)
            return False
        _set_seal(path, key)
        return fits({name: list(tensor.shape) for name, tensor in tensors.items()})

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        final = self.path(key)
        final.parent.mkdir(parents=True, exist_ok=True)
        contiguous = {name: value.cpu().contiguous() for name, value in tensors.items()}
        checksum = _checksum(safetensors.torch.save(contiguous))
        with writing(final, shared=True) as partial:  # another run may be at the same item
            partial.write_bytes(safetensors.torch.save(contiguous, {CHECKSUM: checksum}))
            _set_seal(partial, key)

    def check(self) -> None:
        """Refuses what is no folder and cannot become one: NotADirectoryError."""
        for folder in (self.folder, *self.folder.parents):
            if folder.exists() and not folder.is_dir():
                raise NotADirectoryError(f"{self.name}: {folder} is a file; name a folder")

    def check_written(self, keys: list[str]) -> None:
        """After all processes have written: FileNotFoundError where one wrote elsewhere."""
        lost = [key for key in keys if not self.path(key).is_file()]
        if lost and comes(self.path(lost[0])):  # late, and so may the others have been
            lost = [key for key in lost if not comes(self.path(key))]
        if lost:
            message = f"{len(lost)} of {len(keys)} files are not in {self.folder} after all were written"
            raise FileNotFoundError(f"{self.name}: {message}; name a folder that all processes share")


CHECKSUM = "sha256"  # in a file's metadata
SECOND = 10**9  # in nanoseconds


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file; DamagedError where they are not what was written."""
    content = path.read_bytes()
    try:
        tensors = safetensors.torch.load(content)  # which looks at the whole header
    except (SafetensorError, KeyError) as error:  # the latter of a type that there is not
        raise DamagedError(str(error)) from error
    written = _split(content)[0].get("__metadata__", {}).get(CHECKSUM)
    if written is None:
        raise DamagedError("it has no checksum")
    if _checksum(content) != written:
        raise DamagedError("its content is not what was written")
    return tensors


def _split(content: bytes) -> tuple[dict[str, Any], memoryview]:
    """A file's header and its tensors' bytes."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), memoryview(content)[8 + length :]


def _checksum(content: bytes) -> str:
    """Of a file's tensors with their names, types and shapes, whatever its metadata."""
    header, tensors = _split(content)
    header.pop("__metadata__", None)
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    digest.update(tensors)
    return digest.hexdigest()


def _seal(key: str) -> int:
    """Nanoseconds, below a second, of the time of a file whose content was found sound: writing to it gives it others.

    A start then need not read all of a cache, which may have terabytes. What changes without a new time `read` still finds.
    """
    return int(key[:12], 16) % SECOND


def _set_seal(path: Path, key: str) -> None:
    state = path.stat()
    with suppress(OSError):  # of somebody else, or where there are no such times: it is read again at the next start
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns // SECOND * SECOND + _seal(key)))
