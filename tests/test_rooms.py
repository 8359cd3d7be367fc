"""The rooms of the house: which folder may import which, read from the imports themselves, also those within functions."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT

# Each may import those before it. `commands` knows all.
ROOMS = ("foundation", "data", "models", "drawing", "training", "building", "metrics", "pages", "sampling", "studies", "demo")
LOSS = ("loss", "mask", "features")  # the drop-in call: beside each other, they import the kernels alone
KERNELS = "focusdpo_kernels"
LESS = {"metrics": {"foundation", "data"}}  # what is measured must not depend on how it was trained or drawn


def imported(file: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Lines and names of the modules that a file imports, wherever in it."""
    package = file.relative_to(root).parts[:-1]
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from focusdpo import data` imports a room as `import focusdpo.data` does.
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.fullmatch(r"focusdpo\.[\w.]+(:\w+)?", node.value)
        ):
            yield node.lineno, node.value.split(":")[0]  # a module as text, to be imported later


def room_of(parts: tuple[str, ...]) -> str:
    """A room, one of the drop-in's modules, "focusdpo" for the package itself, or the name of another package."""
    if parts[0] != "focusdpo":
        return parts[0]
    return parts[1] if len(parts) > 1 and (parts[1] in (*ROOMS, *LOSS, "commands")) else "focusdpo"


def allowed(room: str) -> set[str]:
    if room == KERNELS:
        return set()
    if room in LOSS:
        return {KERNELS, *LOSS}
    if room == "focusdpo":  # whose public names are the drop-in's; python -m focusdpo is the command line
        return {*LOSS, "commands"}
    before = ROOMS if room == "commands" else LESS.get(room, ROOMS[: ROOMS.index(room)])
    return {"focusdpo", KERNELS, *LOSS, *before}


def wrong_imports(root: Path) -> list[str]:
    """A line for each import that goes upwards."""
    found = []
    for file in sorted([*root.glob("focusdpo/**/*.py"), *root.glob(f"{KERNELS}/**/*.py")]):
        room = room_of(file.relative_to(root).with_suffix("").parts)
        for line, name in imported(file, root):
            other = room_of(tuple(name.split(".")))
            ours = name.split(".")[0] in ("focusdpo", KERNELS, "tests", "benchmarks")
            if ours and other != room and other not in allowed(room):
                found.append(f"{file.relative_to(root)}:{line} imports {name}")
    return found


def test_arrows_point_downwards():
    assert wrong_imports(ROOT) == []


def test_every_folder_is_a_room():
    folders = {file.parent.name for file in ROOT.glob("focusdpo/*/__init__.py")}
    assert folders == {*ROOMS, "commands"}
    assert {file.stem for file in ROOT.glob("focusdpo/*.py")} == {"__init__", "__main__", *LOSS}
    assert all(file.parent.joinpath("__init__.py").exists() for file in ROOT.glob("focusdpo*/**/*.py")), (
        "a folder is no package"
    )


def test_contributors_are_sent_to_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = [line for line in text.split("## Where does it go?")[1].split("\n## ")[0].splitlines() if line.startswith("| ")][1:]
    named = [re.findall(r"`(focusdpo[\w/.]+)`", row) for row in rows]
    assert len(rows) == 12 and all(1 <= len(files) <= 3 for files in named)
    assert [file for files in named for file in files if not (ROOT / file).exists()] == []


@pytest.mark.parametrize("room", [*ROOMS, "commands"])
def test_no_two_files_of_a_room_have_one_name(room):
    names = [file.name for file in (ROOT / "focusdpo" / room).rglob("*.py") if file.name != "__init__.py"]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("focusdpo_kernels/new.py", "from focusdpo.foundation import files"),
        ("focusdpo/loss.py", "from focusdpo.foundation.files import stamp"),
        ("focusdpo/metrics/new.py", "from focusdpo.training.config import TrainConfig"),
        ("focusdpo/metrics/new.py", "def f():\n    from focusdpo import studies"),
        ("focusdpo/data/new.py", "from .. import models"),
        ("focusdpo/data/new.py", "from ..models.base import Backbone"),
        ("focusdpo/studies/new.py", "import focusdpo.commands.cli"),
        ("focusdpo/training/new.py", "import torch, focusdpo.pages.html as html"),
        ("focusdpo/training/new.py", "from tests import tiny_qwen"),
        ("focusdpo/training/new.py", "LATER = 'focusdpo.studies.masks:draw'"),
    ],
)
def test_an_arrow_upwards_is_seen(file, line, tmp_path):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(f"{line}\n")
    assert len(wrong_imports(tmp_path)) == 1
