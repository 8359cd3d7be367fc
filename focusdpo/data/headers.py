"""Headers of images, read once: a dataset of 100,000 pairs has 700,000 files, which take a minute to open.

What a file's header says is kept by its identity: device, number, size and times, as the file system has them. A file that is
changed or replaced, with its time kept too, has another one. Content is not looked at here; `data.check: full` does that.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from focusdpo.data.images import Header, check_depth, read_header
from focusdpo.data.shards import TarMember
from focusdpo.foundation.files import ReadableFile, hash_of, writing

logger = logging.getLogger(__name__)

FORMAT = 1  # of the kept file
FEWEST = 2_000  # files of a dataset that is worth keeping
MERGED = 2**16  # new entries that are sorted in at once


def kept_folder() -> Path:
    """Where headers are kept: $FOCUSDPO_CACHE, or else focusdpo in the user's folder for caches. It may be deleted any time."""
    chosen = os.environ.get("FOCUSDPO_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "focusdpo"


class HeaderIndex:
    """Headers by the identity of their files; for threads."""

    def __init__(self) -> None:
        self._keys = np.empty(0, np.uint64)  # sorted
        self._numbers = np.empty(0, np.uint32)  # of each key's header
        self._used = np.empty(0, np.bool_)  # since `kept` was entered
        self._new: dict[int, int] = {}
        self._headers: list[Header] = []
        self._number_of: dict[Header, int] = {}
        self._lock = threading.Lock()

    def header(self, file: ReadableFile, mask: bool = False) -> Header:
        """As `read_header`."""
        key = _identity(file)
        known = None if key is None else self._find(key)
        if known is None:
            known = read_header(file, mask)
            if key is not None:
                self._add(key, known)
        check_depth(known.mode, mask)
        return known

    def _find(self, key: int) -> Header | None:
        with self._lock:
            number = self._new.get(key)
            if number is None and len(self._keys):
                place = int(self._keys.searchsorted(np.uint64(key)))
                if place < len(self._keys) and int(self._keys[place]) == key:
                    self._used[place] = True
                    number = int(self._numbers[place])
            return None if number is None else self._headers[number]

    def _add(self, key: int, header: Header) -> None:
        with self._lock:
            self._new[key] = self._number(header)
            if len(self._new) >= MERGED:
                self._merge()

    def _number(self, header: Header) -> int:
        if header not in self._number_of:
            self._number_of[header] = len(self._headers)
            self._headers.append(header)
        return self._number_of[header]

    def _merge(self) -> None:
        keys = np.concatenate([self._keys, np.fromiter(self._new.keys(), np.uint64, len(self._new))])
        numbers = np.concatenate([self._numbers, np.fromiter(self._new.values(), np.uint32, len(self._new))])
        used = np.concatenate([self._used, np.ones(len(self._new), np.bool_)])
        self._keys, first = np.unique(keys, return_index=True)
        self._numbers, self._used = numbers[first], used[first]
        self._new = {}

    @contextmanager
    def kept(self, path: str | Path) -> Iterator[None]:
        """Within it, what a dataset's headers say is taken from where the last pass over it has kept them, and kept again."""
        file = kept_folder() / f"headers-{hash_of(FORMAT, str(Path(path).resolve()))[:32]}.npz"
        with self._lock:
            self._merge()
            self._used[:] = False
            loaded = self._load(file)
            before = len(self._keys)
        yield
        with self._lock:
            self._merge()
            used = int(self._used.sum())
            if used >= FEWEST and (len(self._keys) > before or used != loaded):
                self._save(file)

    def _load(self, file: Path) -> int:
        """Takes in what was kept; of how many files."""
        try:
            with np.load(file) as arrays:  # takes no pickles, and a zip's parts have checksums
                keys, numbers = arrays["keys"].astype(np.uint64), arrays["numbers"].astype(np.uint32)
                rows = json.loads(arrays["headers"].tobytes())
            headers = [Header((int(row[0]), int(row[1])), str(row[2]), bool(row[3]), bool(row[4])) for row in rows]
            mine = np.array([self._number(header) for header in headers], np.uint32)
            numbers = mine[numbers]
        except FileNotFoundError:
            return 0
        except (OSError, EOFError, ValueError, KeyError, IndexError, TypeError, zipfile.BadZipFile) as error:
            logger.info("%s cannot be read (%s), headers are read anew", file, error)
            return 0
        self._keys, first = np.unique(np.concatenate([self._keys, keys]), return_index=True)
        self._numbers = np.concatenate([self._numbers, numbers])[first]
        self._used = np.zeros(len(self._keys), np.bool_)
        return len(keys)

    def _save(self, file: Path) -> None:
        rows = [(*header.size, *dataclasses.astuple(header)[1:]) for header in self._headers]
        arrays = {"keys": self._keys[self._used], "numbers": self._numbers[self._used]}
        arrays["headers"] = np.frombuffer(json.dumps(rows).encode(), np.uint8)
        with suppress(OSError):  # no home, a full disk: the next start reads them again
            file.parent.mkdir(parents=True, exist_ok=True)
            with writing(file, shared=True) as partial, partial.open("wb") as stream:
                np.savez(stream, **arrays)  # type: ignore[arg-type]  # names are no keywords of its own


def _identity(file: ReadableFile) -> int | None:
    """Of a file, or a member of a tar; None of what is in memory or in a table, or is not there."""
    path = file.shard if isinstance(file, TarMember) else file
    if not isinstance(path, Path):
        return None
    try:
        state = os.stat(path)
    except (OSError, ValueError):
        return None
    place = (file.offset, file.size) if isinstance(file, TarMember) else (0, 0)
    # Python's hash of whole numbers has 64 bits, and is the same in every process.
    return hash((state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns, *place)) % 2**64


INDEX = HeaderIndex()  # of this process
