"""Files as a whole: hashes of their content, writing them at once or not at all, and whose they are."""

from __future__ import annotations

import functools
import glob
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, Protocol

from safetensors import safe_open

COMES = 65.0  # seconds in which a network file system shows what others wrote: Linux keeps for a minute what was not there
HOST = re.sub(r"\W", "_", socket.gethostname())
PART = 2**26  # bytes of a large file that are hashed at once


class ReadableFile(Protocol):
    """Bytes, wherever they lie: a Path, or an image of `focusdpo.data.formats`."""

    def open(self, mode: Literal["rb"]) -> Any: ...  # a binary file


def checksum(file: ReadableFile) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def comes(file: Path) -> bool:
    """Whether a file that another process has written is there, or comes within a minute, as on a network file system."""
    until = time.monotonic() + COMES
    while not file.exists():
        if time.monotonic() > until:
            return False
        with suppress(OSError):
            os.listdir(file.parent)  # which asks anew where it can
        time.sleep(0.1)
    return True


def partial_of(path: Path, shared: bool = False) -> Path:
    """The name under which a file or folder is written before it gets its own, so that what has that is whole.

    Args:
        path: the file or folder.
        shared: whether other processes, on this machine or others, may write it at the same time: each has its own name.
    """
    return path.with_name(f".{path.name}.{HOST}-{os.getpid()}.partial" if shared else f".{path.name}.partial")


def write_whole(path: Path, text: str) -> None:
    """Writes a file at once or not at all, in UTF-8; an earlier one stays until then."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file at once or not at all; an earlier one stays until then."""
    with writing(path) as partial:
        partial.write_bytes(content)


@contextmanager
def writing(path: Path, shared: bool = False) -> Iterator[Path]:
    """Gives the name to write a file under; it gets its own where nothing was raised, and is deleted otherwise.

    Args:
        path: the file.
        shared: as in `partial_of`; what killed processes of this machine have left is deleted.
    """
    partial = partial_of(path, shared)
    if shared:
        for left in path.parent.glob(f".{glob.escape(path.name)}.{HOST}-*.partial"):
            if not _lives(left.name.removesuffix(".partial").rpartition("-")[2]):
                left.unlink(missing_ok=True)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def writing_folder(path: Path) -> Iterator[Path]:
    """Gives an empty folder to write to; it gets its own name where nothing was raised, and is deleted otherwise.

    Where there is a folder of that name, its files of the same names are replaced, and others stay.
    """
    partial = partial_of(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if not path.exists():
            partial.rename(path)
            return
        for file in sorted(file for file in partial.rglob("*") if not file.is_dir()):
            target = path / file.relative_to(partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _lives(process: str) -> bool:
    try:
        with suppress(ValueError, OverflowError, PermissionError):
            os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    return True


def stamp(command: str) -> str:
    """What a text may have in it, once, to be known as the command's own until somebody changes it: see `write_stamped`."""
    return f"written by focusdpo {command}, sha256 {'0' * 64}"


def write_stamped(path: Path, text: str, command: str, errors: str = "strict") -> None:
    """Writes a text, whole, that has `stamp(command)` in it; its zeros become the hash of the text."""
    content = text.encode("utf-8", errors)
    seal, empty = stamp(command).encode(), b"0" * 64
    digest = hashlib.sha256(content).hexdigest().encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path, shared=True) as partial:
        partial.write_bytes(content.replace(seal, seal.replace(empty, digest), 1))


def is_stamped(path: Path, command: str) -> bool:
    """Whether a command wrote a file with `write_stamped`, and nobody has changed it since."""
    content = path.read_bytes()
    seal, empty = re.escape(stamp(command).encode()), b"0" * 64
    found = re.search(seal.replace(empty, b"([0-9a-f]{64})"), content)
    if found is None:
        return False
    start, end = found.span(1)
    return hashlib.sha256(content[:start] + empty + content[end:]).hexdigest().encode() == found[1]


def check_stamped(name: str, path: Path, command: str, overwrite: bool, hint: str) -> None:
    """Refuses to write one file over what is there.

    Args:
        name: the setting that names the file.
        path: the file.
        command: that wants to write it.
        overwrite: whether a file that it wrote before may be replaced; another's never is.
        hint: what the user can do where it may not.

    Raises:
        FileExistsError, NotADirectoryError, PermissionError: with the setting's name.
    """
    for folder in path.parents:
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{name}: {folder} is a file; name a file in a folder")
    if path.is_symlink() and not path.exists():
        raise FileExistsError(f"{name}: {path} is a link that leads nowhere; name another file")
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{name}: {path} is {'a folder' if path.is_dir() else 'no regular file'}; name a file")
    existing = next(folder for folder in path.absolute().parents if folder.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"{name}: {existing} cannot be written to; name another place")
    if not path.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{name}: {path} exists; {hint}")
    if not is_stamped(path, command):
        raise FileExistsError(
            f"{name}: {path} was not written by `focusdpo {command}`, or was changed since, and is left as it is; name another "
            "file"
        )


def read_object(file: Path) -> dict[str, Any]:
    """The object of a JSON file; ValueError says what the file holds instead."""
    try:
        value = json.loads(file.read_bytes())
    except RecursionError as error:
        raise ValueError(f"it is nested too deeply ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}")
    return value


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, whole, with null for numbers that do not exist, such as the interval of a single value."""
    write_whole(path, json.dumps(_without_nan(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> Any:
    """What `write_json` wrote, with NaN for null."""
    return _with_nan(json.loads(path.read_text()))


def _with_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_nan(item) for item in value]
    return math.nan if value is None else value


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

    All bytes are read, in threads: text encoders with a few newly trained tokens differ from the old ones in a few rows. 24 GB
    take 12 s of CPU time, spread over the cores, where a core hashes 2 GB/s, and the time that the disk needs, which loading
    the model then saves. A process reads a file once.
    """
    files = sorted(file for part in parts for file in (pipeline / part).rglob("*") if file.is_file())
    with ThreadPoolExecutor() as pool:
        digests = pool.map(functools.partial(_remembered, "parts", _hash_parts), files)
        named = [(file.relative_to(pipeline).as_posix(), digest) for file, digest in zip(files, digests, strict=True)]
    return hash_of(*itertools.chain.from_iterable(named))


def remembered_checksum(file: Path) -> str:
    """`checksum` of a file that this process reads once, while it stays as it is."""
    return _remembered("sha256", checksum, file)


def _hash_parts(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal; of a large one, of its parts, hashed side by side."""
    size = file.stat().st_size
    if size <= PART:
        return checksum(file)

    def digest_of(start: int) -> str:
        with file.open("rb") as stream:
            stream.seek(start)
            return hashlib.sha256(stream.read(PART)).hexdigest()

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        return hash_of(*pool.map(digest_of, range(0, size, PART)))


# By kind, place, size and times of a file. Processes of one machine give each other what they have: see `Launch`.
KNOWN_DIGESTS: dict[str, str] = {}


def _remembered(kind: str, compute: Callable[[Path], str], file: Path) -> str:
    stat = file.stat()
    key = f"{kind} {file.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
    if key not in KNOWN_DIGESTS:
        KNOWN_DIGESTS[key] = compute(file)
    return KNOWN_DIGESTS[key]
