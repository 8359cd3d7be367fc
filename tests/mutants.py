"""Mutation run over the code that decides the loss: `make mutants`, half an hour on two cores, not part of CI.

mutmut changes one thing at a time in a copy of the repository and runs the tests that reach it. A change that no test notices
survives. It has to be explained in survivors.yaml, by a reason that several may share; 95 % have to be killed. After new tests,
`python tests/mutants.py --survivors` runs them on what survived the last time.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import libcst
import yaml

from tests import ROOT

FOLDER = ROOT / "build" / "mutants"
EXPLAINED = Path(__file__).with_name("survivors.yaml")
MUTATED = (
    "focusdpo/loss.py",
    "focusdpo/mask.py",
    "focusdpo/features.py",
    "focusdpo/models/conditioning.py",
    "focusdpo/training/step.py",
    "focusdpo/training/times.py",
    "focusdpo_kernels/reference.py",
)
TESTS = [
    *(f"tests/test_{name}.py" for name in ("loss", "mask", "features")),
    *(f"tests/training/test_{name}.py" for name in ("step", "times")),
    *(
        f"tests/kernels/test_{name}.py"
        for name in ("peers", "similarity", "matching", "entropy", "fusion", "residual", "errors")
    ),
    # Most of reference.py runs where these compare with it.
    *(f"tests/kernels/test_{name}.py" for name in ("cpu_mask", "cpu_residual", "cpu_similarity")),
]
WANTED = 0.95
KILLED = ("killed", "timeout", "segfault")
# A compiler cannot trace what calls a mutant. Mutants run in forks, which wait for ever for threads that their parent had.
UNFIT = "not compile and not trace and not threads2 and not threads5"
SETTINGS = f"""
[tool.mutmut]
source_paths = ["focusdpo", "focusdpo_kernels"]
only_mutate = {list(MUTATED)}
pytest_add_cli_args = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "{UNFIT}"]
pytest_add_cli_args_test_selection = {TESTS}
use_git_change_detection = false
track_dependencies = false

[tool.pytest.ini_options]
filterwarnings = ["ignore:.*torchvision.*"]
"""


class Undecorated(libcst.CSTTransformer):
    """`@a def f` as `def f` and `f = a(f)`: mutmut leaves decorated functions out."""

    def leave_FunctionDef(self, original_node: libcst.FunctionDef, updated_node: libcst.FunctionDef) -> object:  # noqa: N802
        name = libcst.Name(updated_node.name.value)
        value: libcst.BaseExpression = name
        for decorator in reversed(updated_node.decorators):
            value = libcst.Call(decorator.decorator, [libcst.Arg(value)])
        if value is name:
            return updated_node
        again = libcst.SimpleStatementLine([libcst.Assign([libcst.AssignTarget(name)], value)])
        return libcst.FlattenSentinel([updated_node.with_changes(decorators=[]), again])


def mutmut(*arguments: str) -> str:
    """What a command of mutmut prints; its progress goes to the terminal."""
    command = [sys.executable, "-m", "mutmut", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    shown = None if arguments[0] == "run" else subprocess.PIPE
    return subprocess.run(command, cwd=FOLDER, env=environment, stdout=shown, text=True, check=True).stdout or ""


def prepare() -> None:
    """A copy of the repository whose functions have no decorators."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    for part in ("focusdpo", "focusdpo_kernels", "tests"):
        shutil.copytree(ROOT / part, FOLDER / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in MUTATED:
        file = FOLDER / name
        file.write_text(libcst.parse_module(file.read_text()).visit(Undecorated()).code)
    (FOLDER / "pyproject.toml").write_text(SETTINGS)


def change(name: str) -> str:
    """A mutant as `module.function: what was -> what is`, of the lines that differ."""
    lines = mutmut("show", name).splitlines()
    sides = ("-", "---"), ("+", "+++")
    was, now = (" ".join(line[1:].strip() for line in lines if line.startswith(a) and not line.startswith(b)) for a, b in sides)
    function = re.sub(r"x(?:ǁ\w+?ǁ|_)", "", name.rpartition("__mutmut_")[0])
    return f"{function}: {was} -> {now}"


def survived() -> dict[str, bool]:
    """Whether each mutant did, by its name."""
    rows = (line.strip().partition(": ") for line in mutmut("results", "--all", "true").splitlines())
    return {name: status not in KILLED for name, _, status in rows if status}


def main() -> None:
    again = []
    if "--survivors" in sys.argv:
        shutil.copytree(ROOT / "tests", FOLDER / "tests", ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
        again = [name for name, alive in survived().items() if alive]
    else:
        prepare()
    mutmut("run", "--max-children", str(os.cpu_count()), *again)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    survivors = []
    for name, alive in survived().items():
        counts[name.partition(".x")[0]]["survived" if alive else "killed"] += 1
        if alive:
            survivors.append(change(name))
    reasons = {text: why for why, texts in yaml.safe_load(EXPLAINED.read_text()).items() for text in texts}
    total = sum(counts.values(), Counter())
    for module, count in {**counts, "all": total}.items():
        print(f"{module:32} {count['killed']:5} of {count.total():5} killed, {count['killed'] / count.total():.1%}")
    unexplained = [text for text in survivors if text not in reasons]
    stale = sorted(reasons.keys() - set(survivors))
    for title, texts in (("survived, and nothing explains them", unexplained), ("explained, but killed or gone", stale)):
        if texts:
            print(f"\n{title}:", *texts, sep="\n- ")
    if unexplained or total["killed"] < WANTED * total.total():
        sys.exit(1)


if __name__ == "__main__":
    main()
