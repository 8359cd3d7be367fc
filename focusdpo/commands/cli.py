"""The command line: `focusdpo COMMAND`; `focusdpo COMMAND --help` documents every setting."""

from __future__ import annotations

import io
import logging
import os
import re
import select
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

from focusdpo.commands.parser import QUIET, command_of, error_message, parse_config
from focusdpo.commands.registry import COMMANDS
from focusdpo.foundation.launch import ElsewhereError, Launch, is_follower, is_launched, lost_connection, tell_launcher
from focusdpo.foundation.progress_bars import progress_bars
from focusdpo.foundation.text import MessageFormatter, working_folder

# What failures of the machine say that have no class of their own, as others' code reads and writes: torch, safetensors.
WORKER = re.compile(r"^DataLoader (worker \(pid|timed out)")
DISK = re.compile(r"No space left on device|[Dd]isk quota exceeded|File too large|enforce fail at inline_container")
SYSTEM = re.compile(r"\(os error \d+\)")
ABSOLUTE = re.compile(r"(?:^|[\s'\"(:=])/")  # a path in a message that says by itself where it leads
# A worker of a DataLoader fails with its traceback as the message, whose end is the message that it had there.
WORKERS_TRACEBACK = re.compile(r"^Caught \w+ in DataLoader worker .*\n  File [^\n]*\n(    [^\n]*\n)*", re.DOTALL)


def failure(error: Exception, config: Any = None) -> str | None:
    """What to tell a user of a failure that is not this program's; None of a bug, whose traceback is wanted.

    Args:
        error: what was raised.
        config: settings of the command, whose output folder is named where a disk is full: the system does not say which.
    """
    text = WORKERS_TRACEBACK.sub("", str(error)).strip() or type(error).__name__
    torch, hub = sys.modules.get("torch"), sys.modules.get("focusdpo.training.hub")
    known = ((torch, "OutOfMemoryError"), (hub, "UploadError"))
    if WORKER.search(text):
        text += "; as a rule for lack of memory, of which a smaller data.num_workers takes less"
    elif lost := lost_connection(error):
        return lost
    elif not (
        isinstance(error, ElsewhereError | ValueError | OSError | FloatingPointError | MemoryError | ModuleNotFoundError)
        or any(module is not None and isinstance(error, getattr(module, kind)) for module, kind in known)
        or (type(error).__name__ in ("RuntimeError", "SafetensorError") and (DISK.search(text) or SYSTEM.search(text)))
    ):
        return None
    if isinstance(error, FileNotFoundError) and not ABSOLUTE.search(text):
        text += f"; paths are relative to {working_folder()}" + ", and ~ is a name like others" * ("~" in text)
    if DISK.search(text) and getattr(error, "filename", None) is None:
        places = ((name, getattr(config, name, None)) for name in ("output_dir", "out_dir", "out"))
        where = next((f"{name}: {place}: " for name, place in places if place), "")
        text = f"{where}{text}" + "; the disk is full, as a rule" * ("enforce fail" in text)
    return text


def main(argv: list[str] | None = None) -> None:
    """Entry point of `focusdpo` and `python -m focusdpo`.

    The exit status is 0, 1 after a failure, 2 where argparse does not understand the words, 128 and the signal's number after
    one; 141 where nobody reads the output any more.
    """
    words = sys.argv[1:] if argv is None else argv
    name, config, launch = command_of(words), None, Launch()
    try:
        try:
            launch = _join(name)
            with _one_refusal(launch):
                name, config = parse_config(words)
            quiet = QUIET in words
            _log_to_terminal(quiet)
            with progress_bars(hidden=quiet or not launch.is_main):
                COMMANDS[name].prepare(config)()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        if launch.is_main:
            print(f"\nfocusdpo {name}: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            sys.exit(128 + signal.SIGPIPE)
        text = failure(error, config)
        if not _is_the_reason(launch, error, text or f"{type(error).__name__}: {error}"):
            sys.exit(1)
        if text is None:
            raise
        sys.exit(error_message(name, text))


def _join(name: str) -> Launch:
    """The launch that this process belongs to; ValueError where the command is one for a single process."""
    if name in COMMANDS and COMMANDS[name].in_launch:
        launch = Launch.join()
        if not launch.is_main:  # the others say the same, and what one alone has to say it raises
            logging.disable(logging.WARNING)
            warnings.simplefilter("ignore")
        return launch
    if is_launched():
        text = "a launcher has started several processes, and this command runs in one; start it without launcher"
        tell_launcher(f"focusdpo {name}: error: {text}")
        if is_follower():
            sys.exit(1)
        raise ValueError(text)
    return Launch()


@contextmanager
def _one_refusal(launch: Launch) -> Iterator[None]:
    """Has one process of a launch say what is wrong with the command line, which all of them read."""
    if launch.size == 1:
        yield
        return
    helped, said = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(helped), redirect_stderr(said):
            yield
    except SystemExit as end:
        text = end.code if isinstance(end.code, str) else said.getvalue()
        if end.code and not launch.fail(text.strip()):
            sys.exit(1)
        if end.code or launch.is_main:
            sys.stdout.write(helped.getvalue())
            sys.stderr.write(said.getvalue())
        raise


def _is_the_reason(launch: Launch, error: Exception, text: str) -> bool:
    """Whether a failure is to be told here: not where another process failed before, which the launcher tells."""
    if launch.size == 1:
        return True
    elsewhere: str | None = str(error)
    if not isinstance(error, ElsewhereError):
        # Connections break before the word of who broke them is there; of one that was killed only the launcher can tell, and
        # it takes the first word that it hears for the cause.
        elsewhere = launch.failure(10.0 if lost_connection(error) else 0.0)
        if elsewhere is None:
            return launch.fail(text)
    launch.pass_on(elsewhere or text)
    return "TORCHELASTIC_ERROR_FILE" not in os.environ


def _log_to_terminal(quiet: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(MessageFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("focusdpo").setLevel(logging.WARNING if quiet else logging.INFO)


def _reader_is_gone() -> bool:
    """Whether the output goes into a pipe without a reader, as behind `| head`; nothing more is then written to it."""
    gone = False
    for stream in (sys.stdout, sys.stderr):
        try:
            number = stream.fileno()
        except (OSError, ValueError):  # no file of the system
            continue
        pipe = select.poll()
        pipe.register(number, 0)
        if any(events & select.POLLERR for _, events in pipe.poll(0)):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            gone = True
    return gone


if __name__ == "__main__":
    main()
