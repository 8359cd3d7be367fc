"""Output folders: what a command may write over, and what it may delete."""

from __future__ import annotations

import shutil
from pathlib import Path

MARKER = ".focusdpo"  # stands in every folder that a command of this project made, so that nothing else gets deleted


def check_folder(name: str, folder: Path, files: tuple[str, ...], overwrite: bool, hint: str) -> None:
    """Refuses to write over what is there: FileExistsError, or NotADirectoryError where no folder can be made.

    Args:
        name: the setting that names the folder.
        folder: the folder; it need not exist.
        files: names in it that the command writes.
        overwrite: whether its earlier files may be deleted.
        hint: what else the user can do.
    """
    try:
        for path in (folder, *folder.parents):
            if path.is_symlink() and not path.exists():
                raise NotADirectoryError(f"{name}: {path} is a link that leads nowhere; name a folder")
            if path.exists() and not path.is_dir():
                raise NotADirectoryError(f"{name}: {path} is a file; name a folder")
    except OSError as error:
        if error.errno is None:  # from above
            raise
        raise NotADirectoryError(f"{name}: {folder} cannot be a folder ({error.strerror}); name another") from error
    existing = [file for file in files if (folder / file).exists()]
    if existing and not overwrite:
        raise FileExistsError(f"{name}: {folder} holds an earlier run ({', '.join(existing)}); {hint}")
    if existing and not (folder / MARKER).exists():
        raise FileExistsError(
            f"{name}: {folder} holds {', '.join(existing)}, which no focusdpo command wrote; --overwrite deletes earlier runs "
            "only, so name another folder"
        )


def clear_folder(folder: Path, files: tuple[str, ...]) -> None:
    """Deletes what an earlier run left, and marks the folder as made by this project."""
    for path in (folder / file for file in files):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    mark_folder(folder)


def mark_folder(folder: Path) -> None:
    """Makes a folder, and marks it as made by this project."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text("Made by focusdpo; --overwrite may delete its files.\n")
