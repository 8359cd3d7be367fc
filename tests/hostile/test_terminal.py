"""What data and failures put into terminals, logs, Markdown and tables.

Nothing of it looks like what the program itself says, and only bugs have a traceback."""

from __future__ import annotations

import csv
import errno
import html.parser
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from focusdpo.commands import cli
from focusdpo.foundation.text import MessageFormatter, cell, code, code_block, markdown, message_lines, printable

# C0 and C1, soft hyphen, zero width, bidi marks, overrides and isolates, line separators, surrogates, tags.
UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0001-\U000e007f]"
)
FORGED = "a cat\nINFO: 0 errors: training may start\x1b[2J\r\u2028\u202e\x9b2J"
TEXTS = st.text() | st.lists(st.sampled_from(["\n", "\r", "\x1b[1A", "\u2028", "  ", "a", "é", "`", "|", "<b>"])).map("".join)


# Text.


@settings(deadline=None)
@given(TEXTS)
def test_printable_has_nothing_unseen_and_keeps_the_rest(text):
    shown = printable(text)
    assert not UNSEEN.search(shown) and len(shown.splitlines()) <= 1
    if not UNSEEN.search(text):
        assert shown == text
    assert printable(shown) == shown


def test_printable_leaves_writing_as_it_is():
    for text in ("naïve café", "日本語　の", "العربية", "Ω≈ç√ 😀", "a\u0301", "C:\\new", "\xa0"):
        assert printable(text) == text
    assert printable("\x1b[2J\n\u202e\u200b\ud800\x9b") == "\\x1b[2J\\n\\u202e\\u200b\\ud800\\x9b"


@settings(deadline=None)
@given(TEXTS)
def test_no_line_of_a_message_but_the_first_begins_at_the_margin(text):
    first, *rest = message_lines(f"focusdpo train: error: {text}").split("\n")
    assert first.startswith("focusdpo train: error:") and not UNSEEN.search(first)
    assert all(line.startswith("  ") and not UNSEEN.search(line) for line in rest)


def test_lines_of_our_own_keep_their_indentation():
    assert message_lines("two problems:\n  a\n    b\nc\n") == "two problems:\n  a\n    b\n  c"


def test_log_records_cannot_be_forged(monkeypatch, capsys):
    monkeypatch.setattr(logging.root, "handlers", [])
    cli._log_to_terminal(quiet=False)
    logger = logging.getLogger("focusdpo.anything")
    logger.warning("%d warnings:\n%s", 1, FORGED)
    logger.info(FORGED)
    lines = capsys.readouterr().err.split("\n")
    assert [line for line in lines if line[:1] not in ("", " ")] == ["WARNING: 1 warnings:", "INFO: a cat"]
    assert not any(UNSEEN.search(line) for line in lines)
    try:
        raise ValueError("x")
    except ValueError:
        record = logging.LogRecord("a", logging.ERROR, "", 1, "m", (), sys.exc_info())
    assert "\nTraceback (most recent call last):\n" in MessageFormatter("%(message)s").format(record), "ours stay as they are"


# Failures.


def command(monkeypatch, prepare):
    monkeypatch.setattr("focusdpo.commands.demo.prepare", prepare)


def raises(error):
    def work(*_):
        raise error

    return work


def worker_error(error):
    """As DataLoader raises what its worker raised."""

    class Broken(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            raise error

    with pytest.raises(type(error)) as caught:
        next(iter(DataLoader(Broken(), num_workers=1)))
    return caught.value


FAILURES = {
    "value": (ValueError("data.train: got x"), "data.train: got x"),
    "full disk": (OSError(errno.ENOSPC, "No space left on device"), "out: o: [Errno 28] No space left on device"),
    "full disk, named": (OSError(errno.ENOSPC, "No space left on device", "f"), "[Errno 28] No space left on device: 'f'"),
    "long name": (OSError(errno.ENAMETOOLONG, "File name too long", "x"), "[Errno 36] File name too long: 'x'"),
    "permission": (PermissionError(errno.EACCES, "Permission denied", "x"), "[Errno 13] Permission denied: 'x'"),
    "loop": (OSError(errno.ELOOP, "Too many levels", "x"), "[Errno 40] Too many levels: 'x'"),
    "a folder": (IsADirectoryError(errno.EISDIR, "Is a directory", "x"), "[Errno 21] Is a directory: 'x'"),
    "not finite": (FloatingPointError("ten steps in a row"), "ten steps in a row"),
    "killed worker": (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "worker (pid 7) is killed"),
    "lost worker": (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "smaller data.num_workers"),
    "memory": (torch.OutOfMemoryError("CUDA out of memory"), "CUDA out of memory"),
    "no message": (MemoryError(), "MemoryError"),
    "no package": (ModuleNotFoundError("needs ray; pip install it"), "needs ray"),
    "torch": (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 5 vs 4"), "out: o: [enforce fail"),
    "broken pipe of another": (BrokenPipeError(errno.EPIPE, "Broken pipe"), "Broken pipe"),
}  # fmt: skip
BUGS = (TypeError("x"), AssertionError("x"), KeyError("x"), RuntimeError("x"), IndexError("x"), RuntimeError("worker (pid 5)"))


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("case", FAILURES)
def test_failures_end_in_one_line(case, late, monkeypatch):
    error, message = FAILURES[case]
    command(monkeypatch, (lambda config: raises(error)) if late else raises(error))
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "--out", "o"])
    assert stop.value.code.startswith("focusdpo demo: error: ") and message in stop.value.code
    assert "\n" not in stop.value.code


@pytest.mark.parametrize("error", BUGS, ids=repr)
def test_bugs_keep_their_traceback(error, monkeypatch):
    for prepare in (raises(error), lambda config: raises(error)):
        command(monkeypatch, prepare)
        with pytest.raises(type(error)):
            cli.main(["demo"])


@pytest.mark.parametrize("error", [ValueError(f"got {FORGED}"), OSError(FORGED), FloatingPointError("a\n  b")])
def test_what_a_message_quotes_stays_off_the_margin(error, monkeypatch):
    command(monkeypatch, raises(error))
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo"])
    first, *rest = stop.value.code.split("\n")
    assert first.startswith("focusdpo demo: error: ") and rest and all(line.startswith("  ") for line in rest)
    assert not any(UNSEEN.search(line) for line in (first, *rest))


def test_what_a_worker_raises_is_told_without_its_traceback(monkeypatch):
    for error in (ValueError("pairs.jsonl:3: winner: is gone\n  add it"), OSError("cannot identify image file 'x.png'")):
        command(monkeypatch, raises(worker_error(error)))
        with pytest.raises(SystemExit) as stop:
            cli.main(["demo"])
        assert stop.value.code == message_lines(f"focusdpo demo: error: {type(error).__name__}: {error}")
    command(monkeypatch, raises(worker_error(TypeError("a bug"))))
    with pytest.raises(TypeError, match="in __getitem__"):
        cli.main(["demo"])


class Killed(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_told(monkeypatch):
    command(monkeypatch, lambda config: lambda: next(iter(DataLoader(Killed(), num_workers=1))))
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo"])
    assert "DataLoader worker (pid" in stop.value.code and "data.num_workers" in stop.value.code


def test_a_full_disk_is_told_with_the_folder(monkeypatch):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    command(monkeypatch, lambda config: lambda: Path("/dev/full").write_text("x" * 100_000))
    with pytest.raises(SystemExit, match="focusdpo demo: error: out: here: .*No space left on device"):
        cli.main(["demo", "--out", "here"])
    command(monkeypatch, lambda config: lambda: torch.save(torch.zeros(10_000), "/dev/full"))
    with pytest.raises(SystemExit, match="focusdpo demo: error: out: here: .*the disk is full, as a rule"):
        cli.main(["demo", "--out", "here"])


def test_ctrl_c_outside_of_training(monkeypatch, capsys):
    for prepare in (raises(KeyboardInterrupt()), lambda config: raises(KeyboardInterrupt())):
        command(monkeypatch, prepare)
        with pytest.raises(SystemExit) as stop:
            cli.main(["demo"])
        assert stop.value.code == 130 and capsys.readouterr().err == "\nfocusdpo demo: interrupted\n"


@pytest.mark.parametrize("words", ["--help", "demo"])
def test_a_reader_that_leaves_ends_it_quietly(words):
    program = (
        "import sys, types; from focusdpo.commands import cli\n"
        "lines = lambda: [print('x' * 100) for _ in range(10000)]\n"
        "sys.modules['focusdpo.commands.demo'] = types.SimpleNamespace(prepare=lambda config: lines)\n"
        f"cli.main(['{words}'])"
    )
    pipe, end = os.pipe()
    os.close(pipe)  # nobody reads
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", program], stdout=end, stderr=subprocess.PIPE, text=True)
    os.close(end)
    assert run.returncode in (0, 141) and "Broken" not in run.stderr and "Traceback" not in run.stderr, run.stderr


# Tables and Markdown.


@settings(deadline=None)
@given(TEXTS | st.sampled_from(["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "＝1", "=cmd|' /C calc'!A0"]))
def test_a_cell_is_no_formula(text):
    shown = cell(text)
    assert shown[:1] not in tuple("=+-@\t\r\n＝＋－＠") and not UNSEEN.search(shown)
    if text[:1] in tuple("=+-@"):
        assert shown == "'" + printable(text)


def test_tables_of_an_evaluation(tmp_path):
    from focusdpo.metrics.report import Line, write_table

    prompts = ['=HYPERLINK("http://x")', "a, b\n2,=1", "plain", "-5 cats", "\ud800"]
    line = Line(-0.5, -1.0, 0.5, count=3, images=3, prompts=3, subjects=1, over="prompts", note="")
    write_table(tmp_path / "t.csv", ("line", "prompt"), [((-n, prompt), {"clip": line}) for n, prompt in enumerate(prompts, 1)])
    with (tmp_path / "t.csv").open(newline="") as stream:
        rows = list(csv.reader(stream))
    assert rows[0] == ["line", "prompt", "clip", "clip_low", "clip_high"] and len(rows) == 1 + len(prompts)
    assert [row[1] for row in rows[1:]] == ['\'=HYPERLINK("http://x")', "a, b\\n2,=1", "plain", "'-5 cats", "\\ud800"]
    assert [row[0] for row in rows[1:]] == ["-1", "-2", "-3", "-4", "-5"], "numbers stay numbers"
    assert rows[1][2:] == ["-0.500000", "-1.000000", "0.500000"]


MARKS = [
    "# a",
    "*b*",
    "_c_",
    "[d](http://e)",
    "![f](g.png)",
    "<img src=x onerror=h>",
    "|",
    "`",
    "``",
    "\\",
    "&lt;",
    "---",
    "- i",
    "+ j",
]
MARKS += [
    "1. k",
    "> l",
    "~~m~~",
    "$n$",
    "http://o.p",
    "www.q.r",
    "\n",
    "\n\n",
    "<!--",
    "<details>",
    "```",
    "[^1]",
    "{s}",
    "plain",
]


class Shown(html.parser.HTMLParser):
    """The text of HTML, and its elements."""

    def __init__(self, text):
        super().__init__()
        self.text, self.elements = "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)

    def handle_data(self, data):
        self.text += data


def rendered(text):
    markdown_it = pytest.importorskip("markdown_it")
    return Shown(markdown_it.MarkdownIt("gfm-like", {"linkify": False, "html": True}).render(text))


@settings(deadline=None)
@given(st.lists(st.sampled_from(MARKS), max_size=6).map(" ".join) | st.text("`|<>*_[]()!#\\&-~ab\n", max_size=20))
def test_markdown_shows_the_text_itself(text):
    words = " ".join(printable(text).split())
    shown = rendered(f"- classes: {markdown(text)} (3)\n")
    assert " ".join(shown.text.split()) == f"classes: {words} (3)".replace("  ", " ") and shown.elements == ["ul", "li"]
    table = rendered(f"| a | b |\n|---|---|\n| {markdown(text)} | 2 |\n")
    assert table.elements == ["table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td"]
    quoted = rendered(f"It is {code(text)}, then\n")
    if words:
        assert quoted.elements == ["p", "code"] and words in " ".join(quoted.text.split())
    block = rendered(code_block("yaml", yaml.safe_dump({"run_name": text})) + "\nend\n")
    assert block.elements == ["pre", "code", "p"]


def test_no_bare_address_becomes_a_link():
    for text in ("http://a.b", "https://a.b", "WWW.a.b", "www.a.b", "a@b.c", "mailto:a@b.c", "<http://a.b>"):
        assert not re.search(r"https?://|www\.|\w@|mailto:|(?<!\\)<", markdown(text), re.IGNORECASE)


def test_the_model_card_shows_classes_and_settings_as_text(tmp_path, monkeypatch):
    from focusdpo.training import model_card
    from focusdpo.training.config import DataConfig, ModelConfig, TrainConfig

    evil = "cat](x) <img src=x onerror=y> | `code` ![z](http://t/p.png)\n\n---\n# Owned\n```\n<script>"
    config = TrainConfig(
        model=ModelConfig(path=str(tmp_path), base_lora=f"/x/{evil.replace('/', '')}"),
        data=DataConfig(train="t"),
        output_dir=str(tmp_path / "run"),
        run_name=evil,
        project=evil,
    )
    (tmp_path / "run" / "lora").mkdir(parents=True)
    for name in (model_card.METRICS_FILE, model_card.VALIDATION_FILE):
        (tmp_path / "run" / name).write_text("")
    monkeypatch.setattr(model_card, "draw_curves", lambda rows, held_out, file: file.write_bytes(b""))

    class Pairs(SimpleNamespace):
        def __len__(self):
            return 1

    record = SimpleNamespace(references=[SimpleNamespace(class_name=evil), SimpleNamespace(class_name="red cup")])
    pairs = Pairs(records=[record], sizes=[SimpleNamespace(target=(64, 64))])
    model_card.write_model_card(config, tmp_path / "run", pairs, pairs)
    card = (tmp_path / "run" / "lora" / "README.md").read_text("utf-8")
    body = card.split("\n---\n", 1)[1]
    assert "red cup (1)" in body
    shown = rendered(body)
    assert {"img", "script"} & set(shown.elements) <= {"img"}, "the curves alone"
    assert shown.elements.count("img") == 1 and shown.elements.count("h1") == 1 and "hr" not in shown.elements
    assert shown.elements.count("pre") == 4 and printable(evil) in shown.text
