"""What bars write to terminals and elsewhere, through the command line in a process of its own."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import struct
import subprocess
import sys
import termios
import warnings
from types import SimpleNamespace

import pytest
from tqdm import tqdm

from focusdpo.foundation import progress_bars
from focusdpo.foundation.packages import libraries_silenced
from focusdpo.foundation.progress_bars import HIDDEN

SCRIPT = """
import logging, sys
from tqdm.auto import tqdm
from focusdpo.commands import cli
from focusdpo.foundation import progress_bars
def work():
    progress_bars.EVERY = {every}
    for _ in tqdm(range(3), desc="painting", colour="green", mininterval=0):
        logging.getLogger("focusdpo.x").info("an info")
    with tqdm(total=2, desc="a part", leave=False) as bar:
        bar.set_postfix(left=2)
sys.modules["focusdpo.commands.report"] = type(sys)("report")
sys.modules["focusdpo.commands.report"].prepare = lambda config: work
cli.main(["report", "x"])
"""


def command(every=60.0):
    return [sys.executable, "-c", SCRIPT.format(every=every)]


def in_pipe(every, **environment):
    return subprocess.run(command(every), stderr=subprocess.PIPE, check=True, env=os.environ | environment).stderr.decode()


def in_terminal(columns, **environment):
    """What a terminal of so many columns gets, 0 where it does not know."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24 if columns else 0, columns, 0, 0))
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
    child = subprocess.Popen(command(), stderr=theirs, env=kept | {"TERM": "xterm"} | environment)
    os.close(theirs)
    said = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        said += part
    os.close(ours)
    assert child.wait() == 0
    return said.decode()


def test_a_pipe_has_no_bars():
    """Those of less than a minute leave nothing, longer ones a line of the log a minute."""
    assert in_pipe(60.0) == "INFO: an info\n" * 3
    lines = in_pipe(0.0).splitlines()
    assert lines.count("INFO: an info") == 3
    states = [line for line in lines if line != "INFO: an info"]
    assert [re.sub(r" \[.*", "", line) for line in states[:4]] == [
        "INFO: painting:   0% 0/3", "INFO: painting:  33% 1/3", "INFO: painting:  67% 2/3", "INFO: painting: 100% 3/3"
    ]  # fmt: skip
    assert "left=2" in states[-1] and not re.search(r"[\r\x1b█]", "".join(lines))


def test_a_terminal_without_cursor_is_as_a_pipe():
    assert in_terminal(80, TERM="dumb").replace("\r\n", "\n") == "INFO: an info\n" * 3


@pytest.mark.parametrize("columns", [24, 40, 80, 0])
def test_a_bar_is_as_wide_as_its_terminal(columns):
    said = re.sub(r"\x1b\[\d*[Am]", "", in_terminal(columns))
    states = [state.rstrip() for state in re.split(r"[\r\n]", said) if "painting" in state]
    assert len(states) >= 4 and "painting: 100%" in states[-1]
    assert max(map(len, states)) <= (columns or 80)
    assert max(map(len, states)) >= (columns or 80) - 2, "and not narrower"
    assert re.split(r"[\r\n]+", said).count("INFO: an info") == 3, "a line of the log does not tear a bar"


def test_no_color():
    assert "\x1b[32m" in in_terminal(80)
    assert "\x1b[32m" not in in_terminal(80, NO_COLOR="1")


@pytest.mark.parametrize("stderr", [None, SimpleNamespace(write=print, flush=print), SimpleNamespace(isatty=lambda: True)])
def test_a_stderr_of_somebody_elses(monkeypatch, stderr):
    monkeypatch.setattr("sys.stderr", stderr)
    assert progress_bars.terminal_width() is None


def test_a_filter_of_a_module_stays(monkeypatch, recwarn):
    monkeypatch.setattr(warnings, "filters", list(warnings.filters))
    with libraries_silenced():
        warnings.filterwarnings("ignore", "of this module")
        warnings.warn("of another", UserWarning, stacklevel=1)
    warnings.warn("of this module", UserWarning, stacklevel=1)
    warnings.warn("later", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in recwarn] == ["later"]


def test_imports_are_silent(caplog, recwarn):
    other = logging.getLogger("some.library")
    with libraries_silenced():
        other.warning("not installed")
        other.error("broken")
        warnings.warn("is renamed", FutureWarning, stacklevel=1)
    other.warning("later")
    assert [record.message for record in caplog.records] == ["broken", "later"] and not recwarn.list


def test_what_is_hidden_for_one_command_is_not_for_the_next(monkeypatch, caplog):
    monkeypatch.delenv(HIDDEN, raising=False)
    monkeypatch.setattr(progress_bars, "EVERY", 0.0)
    with progress_bars.progress_bars(hidden=True):
        assert os.environ[HIDDEN] and tqdm(range(3), disable=False).disable
    with caplog.at_level(logging.INFO), progress_bars.progress_bars(), tqdm(range(3)) as bar:
        assert HIDDEN not in os.environ and not bar.disable
    assert "0/3" in caplog.text
    monkeypatch.setenv(HIDDEN, "1")
    with progress_bars.progress_bars():
        assert tqdm(range(3), disable=False).disable, "as the environment has it"
    assert os.environ[HIDDEN] == "1" and not tqdm(range(3), disable=False).disable
