"""Output folders: which files in one a command wrote, so that it replaces and deletes these alone; and one writer at a time.

A command names what it writes by patterns. When its work begins it claims all that fits them: what did and was not its own has
been refused by then. When its work is through, it lists each file with its size, and short texts with a hash: a file that a
person puts there, or changes, after that is not the command's any more. What fits no pattern is never touched.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from focusdpo.foundation.files import checksum, comes, read_object, write_json, writing_folder
from focusdpo.foundation.folder_lock import FolderLock
from focusdpo.foundation.launch import Launch
from focusdpo.foundation.text import first_of

logger = logging.getLogger(__name__)

OWN = ".focusdpo"  # in an output folder: a list for each command that wrote there, and the lock
LEGACY = b"Made by focusdpo;"  # a file of that name began so in versions that kept no list
BELOW = "**"  # last part of a pattern: whatever lies there, however deep
LINK = ["link"]  # listed of a symbolic link, whatever it leads to
WRITTEN = "written"  # a note: what stood in files that people edit
PARTIAL = re.compile(r"\.(.+?)(\.(\w+-)?\d+)?\.partial")  # see partial_of; versions before 0.2 named no machine
# Up to how many bytes a file is listed with its hash: texts may be edited to others of the same length; images hardly can.
HASHED = dict.fromkeys((".csv", ".html", ".json", ".jsonl", ".md", ".txt", ".yaml"), 2**20) | {".safetensors": 2**30}
# A pipeline that diffusers saved under the name model, as patterns.
PIPELINE_WRITTEN = (r"model/model_index\.json", r"model/[a-z_0-9]+/[\w.-]+\.(json|jinja|model|safetensors|txt)")
DELETE = "delete it with --overwrite true, or name another folder"
SHOWN = ".seen-by-all-"  # begins the name of a file that tells whether all processes of a launch see one folder


def under(folder: str, patterns: Iterable[str]) -> tuple[str, ...]:
    """The patterns of a command whose output folder lies within another's, and of its lists; `folder` is a pattern too."""
    return tuple(f"{folder}/{pattern}" for pattern in (*patterns, rf"{re.escape(OWN)}/{BELOW}"))


@dataclass(frozen=True)
class _Found:
    """Something in the folder that fits a pattern.

    kind: "file"; "tree", a folder that is the command's with all that lies in it; "partial", what a write that was cut short
    has left; "other", a folder in a file's place or the other way round.
    """

    name: str
    kind: str


class OutputFolder:
    """A folder that a command writes to, locked from `check` on until `release`, or until the process ends.

    As a context manager it surrounds the work: `with out.begin():` makes the folder ready, and what is there at the end is
    listed, as through unless the work raised.

    Args:
        setting: names the folder in messages.
        path: the folder; it need not exist.
        command: that writes. Other commands have lists of their own in the same folder.
        patterns: regular expressions of the files that it writes, relative to the folder, with "/" between parts alone. A last
            part "**" stands for all that lies in a folder, which another tool may have written for it.
        leads: whether this is the process of a launch that locks the folder; others ask it for leave, and lock nothing.
    """

    def __init__(self, setting: str, path: Path, command: str, patterns: Sequence[str], leads: bool = True) -> None:
        self.setting = setting
        self.path = path
        self.command = command
        self._parts = [[re.compile(part) if part != BELOW else BELOW for part in each.split("/")] for each in patterns]
        self._whole = [re.compile(each.replace(BELOW, ".+")) for each in patterns]
        self._lock = FolderLock(path / OWN, leads)
        self._claimed = False
        self._notes: dict[str, Any] = {}
        # What `check` was told, or `check_begun` found: whether work that was begun here is gone on with, and how.
        self.goes_on = False
        self._aside: Sequence[str] = ()
        self._proven: Sequence[str] = ()
        self._settings: tuple[str, Any] | None = None  # of work that can be gone on with: its file, and what belongs there

    # What is there.

    @property
    def _list_file(self) -> Path:
        return self.path / OWN / f"{self.command.replace(' ', '-')}.json"

    def _read_list(self) -> Mapping[str, Any] | None:
        """What the command said at its last start or end; None where it said nothing, or it is damaged."""
        try:
            value = read_object(self._list_file)
            files, notes = value["files"], value["notes"]
            sound = isinstance(files, dict | None) and isinstance(notes, dict)
            return value if sound and all(isinstance(written, list) for written in (files or {}).values()) else None
        except (OSError, ValueError, KeyError):
            return None

    @property
    def has_list(self) -> bool:
        """Whether the command has written here before."""
        return self._read_list() is not None

    @property
    def is_unfinished(self) -> bool:
        """Whether the command has begun to write here, and was not through."""
        value = self._read_list()
        return value is not None and not value.get("through", value["files"] is not None)

    def is_as_written(self, *names: str) -> bool:
        """Whether the command was through when it last wrote here, and these files are there as it wrote them."""
        value = self._read_list()
        listed: dict[str, Any] = ({} if value is None else value["files"]) or {}
        return not self.is_unfinished and all(name in listed and self._is_same(name, listed[name]) for name in names)

    @property
    def is_legacy(self) -> bool:
        """Whether a version that kept no lists wrote here."""
        marker = self.path / OWN
        return marker.is_file() and marker.read_bytes().startswith(LEGACY)

    def _is_same(self, name: str, written: Sequence[Any]) -> bool:
        path = self.path / name
        try:
            if not written:
                return path.is_dir()
            if written == LINK:
                return path.is_symlink()
            same = path.is_file() and path.stat().st_size == written[0]
            return same and (len(written) < 2 or checksum(path) == written[1])
        except OSError:
            return False

    def _fitting(self) -> Iterator[_Found]:
        """What fits a pattern, by name."""
        seen: set[str] = set()
        for found in _walk(self.path, "", self._parts):
            if found.name not in seen:
                seen.add(found.name)
                yield found

    def _sides(self) -> tuple[list[_Found], list[_Found]]:
        """What is the command's own, and what of others is in its way."""
        value = self._read_list()
        listed = None if value is None else value["files"]
        claimed = self._claimed or (self.goes_on if value is None else listed is None)
        own: list[_Found] = []
        others: list[_Found] = []
        for found in self._fitting():
            if found.kind in ("file", "tree") and listed:
                # Who goes on with what was begun finds its damaged files himself.
                is_own = found.name in listed and (self.goes_on or self._is_same(found.name, listed[found.name]))
            else:
                is_own = found.kind == "partial" or (found.kind != "other" and claimed)
            (own if is_own else others).append(found)
        return own, others

    # Before the work.

    def lock(self) -> None:
        """Keeps other processes out from now on; `check` does so too.

        Raises:
            NotADirectoryError, PermissionError, BlockingIOError: as `check`.
        """
        self._check_place()
        self._lock.acquire(self.setting, self.command)

    def check(
        self, overwrite: bool, hint: str = DELETE, goes_on: bool = False, aside: Sequence[str] = (), proven: Sequence[str] = ()
    ) -> None:
        """Refuses to write over what is there, and keeps other processes out from now on.

        Args:
            overwrite: whether the command's own earlier files may be replaced.
            hint: what else the user can do.
            goes_on: whether work that was begun there is gone on with: its files are expected, and may be damaged.
            aside: names of those that people edit: `begin` keeps what they made of them, renamed.
            proven: folders whose files prove themselves, and need not be in the list.

        Raises:
            FileExistsError: it holds an earlier run, or something that this command did not write is in the way.
            NotADirectoryError, PermissionError: it can be no folder, or not be written to.
            BlockingIOError: another process writes there.
        """
        self.lock()
        self.goes_on, self._aside, self._proven = goes_on, aside, proven
        try:
            own = self._refuse_others()
            whole = [found for found in own if found.kind != "partial"]
            if whole and not (overwrite or goes_on):
                tops = ", ".join(dict.fromkeys(found.name.split("/")[0] for found in whole))
                raise FileExistsError(f"{self.setting}: {self.path} holds an earlier run ({tops}); {hint}")
        except OSError:
            self.release()
            raise

    def check_begun(
        self,
        overwrite: bool,
        file: str,
        settings: Any,
        compare: Callable[[dict[str, Any], Any], None],
        aside: Sequence[str] = (),
        proven: Sequence[str] = (),
    ) -> None:
        """As `check`, of work that goes on where an earlier start left it, unless it is to be overwritten.

        Args:
            overwrite, aside, proven: as there.
            file: in the folder, where `begin` leaves the settings for the next start.
            settings: what decides the results.
            compare: of the settings that the work was begun with and those of now, as JSON has them: ValueError where it cannot
                be gone on with under these.

        Raises:
            ValueError: from `compare`, or the file is damaged; others as `check`.
        """
        self._settings = (file, settings)
        begun = self.path / file
        goes_on = not overwrite and begun.is_file()
        if goes_on:
            try:
                before = read_object(begun)
            except ValueError as error:
                raise ValueError(
                    f"{self.setting}: {begun} is damaged ({error}), so that nothing tells how the work there was begun; start "
                    "anew with --overwrite true, or name another folder"
                ) from error
            compare(before, json.loads(json.dumps(settings)))
        self.check(overwrite, goes_on=goes_on, aside=aside, proven=proven)

    def _check_place(self) -> None:
        try:
            for path in (self.path, *self.path.parents):
                if path.is_symlink() and not path.exists():
                    raise NotADirectoryError(f"{self.setting}: {path} is a link that leads nowhere; name a folder")
                if path.exists() and not path.is_dir():
                    raise NotADirectoryError(f"{self.setting}: {path} is a file; name a folder")
            marker = self.path / OWN
            if marker.exists() and not marker.is_dir() and not self.is_legacy:
                raise FileExistsError(
                    f"{self.setting}: {marker} is no folder of this project; move it away, or name another folder"
                )
        except OSError as error:
            if error.errno is None:  # from above
                raise
            raise NotADirectoryError(
                f"{self.setting}: {self.path} cannot be a folder ({error.strerror}); name another"
            ) from error

    def _refuse_others(self) -> list[_Found]:
        """What is the command's own; FileExistsError where something else is in the way."""
        own, others = self._sides()
        names = [found.name for found in others if found.name.split("/")[0] not in self._proven]
        if names:
            why = "which this command did not write, or which was changed since"
            if self.is_legacy:
                why = "and an earlier version, which kept no list of its files, wrote to this folder"
            raise FileExistsError(
                f"{self.setting}: {self.path} holds {first_of(names)}, {why}; only what this command wrote is "
                "replaced: move it away, or name another folder"
            )
        return own

    # The work.

    def check_shared(self, launch: Launch) -> None:
        """Refuses a folder that is not the same one for all processes of a launch: the first one writes a file to it.

        Raises:
            FileNotFoundError: in a process that does not see it; ElsewhereError in the others.
        """
        if launch.size == 1:
            return
        own = self.path / OWN
        folder = own if own.is_dir() else self.path
        name = launch.from_main("the output folder was made", lambda: self._show(folder))
        seen = comes(self.path / name)
        try:
            launch.wait(f"{self.setting} is looked for, which all processes have to see, for a minute at most")
        finally:
            if launch.is_main:
                (self.path / name).unlink(missing_ok=True)
        if not seen:
            raise FileNotFoundError(
                f"{self.setting}: {self.path.absolute()} does not hold what process 0 has just written to its own; name a "
                "folder on a disk that all machines share, by its absolute path"
            )

    def _show(self, folder: Path) -> str:
        """Writes an empty file of a new name, relative to the folder."""
        for left in folder.glob(f"{SHOWN}*"):  # by a launch that was killed
            left.unlink(missing_ok=True)
        file = folder / f"{SHOWN}{uuid.uuid4().hex}"
        file.touch()
        return file.relative_to(self.path).as_posix()

    def begin(self, clear: bool | None = None) -> OutputFolder:
        """Makes the folder ready, and returns it: nothing is refused after that.

        Args:
            clear: delete the command's own earlier files, instead of going on with them; by default unless `goes_on`.

        Raises:
            FileExistsError: as `check`, which may have been a while ago.
        """
        own = self._refuse_others()
        if self.is_legacy:
            (self.path / OWN).unlink()
        self._lock.acquire(self.setting, self.command)
        if not self.goes_on if clear is None else clear:
            for found in own:
                self._delete(found)
        else:
            value = self._read_list() or {"files": {}, "notes": {}}
            self._notes = dict(value["notes"])
            known = self._notes.get(WRITTEN, {}) | (value["files"] or {})
            self._notes[WRITTEN] = {name: known[name] for name in self._aside if name in known}
            for name in self._aside:
                self._keep_edited(name)
        self._lock.keep()
        self._claimed = True
        self._write_list(None)
        if self._settings is not None:
            write_json(self.path / self._settings[0], self._settings[1])
        return self

    def _keep_edited(self, name: str) -> None:
        path, written = self.path / name, self._notes[WRITTEN].get(name)
        if path.exists() and written is not None and not self._is_same(name, written):
            kept = free_name(path.with_name(f"{path.name}.edited"))
            path.rename(kept)
            logger.info("%s: was changed since it was written; kept as %s", path, kept.name)

    def has_written(self, name: str) -> None:
        """Says that a file which people edit has just been written: until all is through, nothing else tells what was in it."""
        path = self.path / name
        self._notes.setdefault(WRITTEN, {})[name] = [path.stat().st_size, *self._hash(path)]
        self._write_list(None)

    def remember(self, name: str, value: Any) -> None:
        """Keeps a note beside the list, for the next start; a JSON value."""
        self._notes[name] = value
        self._write_list(None)

    def recall(self, name: str) -> Any:
        """A note of this start or the last; None where there is none."""
        value = self._read_list()
        return None if value is None else value["notes"].get(name)

    def remove(self, path: Path) -> None:
        """Deletes the command's own files at or below a path, and folders that become empty: in order of their names."""
        files = path.rglob("*") if path.is_dir() else [path] if os.path.lexists(path) else []
        for name in sorted(file.relative_to(self.path).as_posix() for file in files if not file.is_dir()):
            if any(pattern.fullmatch(name) for pattern in self._whole):
                self._delete(_Found(name, "file"))
        if path.is_dir() and not path.is_symlink():
            for place, _, _ in os.walk(path, topdown=False):
                with suppress(OSError):  # another's files are in it
                    os.rmdir(place)

    def tidy(self) -> None:
        """Deletes what writes that were cut short have left."""
        for found in list(self._fitting()):
            if found.kind == "partial":
                self._delete(found)

    @contextmanager
    def writing_folder(self, path: Path) -> Iterator[Path]:
        """As `focusdpo.foundation.files.writing_folder`; of an earlier one the files of others stay, and no more."""
        with writing_folder(path) as partial:
            yield partial
            self.remove(path)

    def finish(self, through: bool = True) -> None:
        """Lists what is there: the work is through, or was stopped and may go on."""
        files: dict[str, list[Any]] = {}
        for found in self._fitting():
            path = self.path / found.name
            if found.kind == "tree":
                files[found.name] = []
            elif found.kind == "file" and path.is_symlink():
                files[found.name] = LINK
            elif found.kind == "file" and path.is_file():
                files[found.name] = [path.stat().st_size, *self._hash(path)]
        self._write_list(files, through)
        self._claimed = False
        self.release()

    def release(self) -> None:
        """Lets other processes write there."""
        self._lock.release()

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.finish(through=kind is None)

    @staticmethod
    def _hash(path: Path) -> list[str]:
        return [checksum(path)] if path.stat().st_size <= HASHED.get(path.suffix, 0) else []

    def _write_list(self, files: Mapping[str, Sequence[Any]] | None, through: bool = False) -> None:
        self._list_file.parent.mkdir(parents=True, exist_ok=True)
        value = {"command": self.command, "through": through, "files": files, "notes": self._notes}
        write_json(self._list_file, value)

    def _delete(self, found: _Found) -> None:
        path = self.path / found.name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        for parent in path.parents:
            if parent == self.path or parent.is_symlink():
                break
            with suppress(OSError):  # another's files are in it
                parent.rmdir()


def step_folders(folder: Path) -> list[tuple[int, Path]]:
    """The folders step-000250 and so on in a folder, with their numbers, in order; not step-best or step-000250.good."""
    found = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in folder.glob("step-*"))
    return sorted((int(match[1]), path) for match, path in found if match and path.is_dir())


def free_name(path: Path) -> Path:
    """The path, or the first of it with -2, -3 and so on that is not taken."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(free for free in itertools.chain([path], numbered) if not os.path.lexists(free))


def _walk(folder: Path, prefix: str, patterns: Sequence[Sequence[Any]]) -> Iterator[_Found]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except FileNotFoundError:
        return
    for entry in entries:
        name, below = f"{prefix}{entry.name}", []
        partial = PARTIAL.fullmatch(entry.name)
        for first, *rest in patterns:
            if first.fullmatch(entry.name):
                if rest == [BELOW] and entry.is_dir():
                    yield _Found(name, "tree")
                elif rest and entry.is_dir():
                    below.append(rest)
                else:  # a folder in a file's place, or the other way round, is nobody's output
                    is_file = entry.is_symlink() or not entry.is_dir()
                    yield _Found(name, "file" if is_file and not rest else "other")
            elif partial and first.fullmatch(partial[1]):
                yield _Found(name, "partial")
        if below:
            yield from _walk(Path(entry.path), f"{name}/", below)
