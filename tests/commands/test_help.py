"""Every --help comes at once: without the libraries that the commands themselves need, and without a word on stderr."""

from __future__ import annotations

import resource
import subprocess
import sys

HEAVY = {"torch", "numpy", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "torchao", "matplotlib"}
ALL_HELP = f"""
import sys
from focusdpo.commands import cli
for words in ([], ["data"], *(name.split() for name in cli.COMMANDS)):
    try:
        cli.main([*words, "--help"])
    except SystemExit as stop:
        assert stop.code == 0, words
print("imported:", sorted({HEAVY!r} & {{name.split(".")[0] for name in sys.modules}}))
"""


def cpu_seconds(*arguments):
    """CPU time of a Python process, children included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run.stderr == ""
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_no_help_imports_what_its_command_needs():
    run = subprocess.run([sys.executable, "-c", ALL_HELP], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.count("usage: focusdpo") == 22 and run.stdout.endswith("imported: []\n")


def test_help_takes_no_longer_than_torch_to_import():
    """The best of several tries: other processes take their share of the caches."""
    torch = min(cpu_seconds("-c", "import torch") for _ in range(2))
    for words in ([], ["train"], ["data", "build"]):
        assert any(cpu_seconds("-m", "focusdpo", *words, "--help") <= 1.3 * torch for _ in range(3)), words
