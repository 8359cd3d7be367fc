"""The command line: `focusdpo COMMAND`; `focusdpo COMMAND --help` documents every setting."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import select
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

from jsonargparse import ArgumentParser, set_loader
from tqdm.contrib.logging import logging_redirect_tqdm

from focusdpo.building.builder import prepare_build
from focusdpo.building.config import BuildConfig
from focusdpo.building.dreambench import DreamBenchConfig, prepare_dreambench
from focusdpo.commands.convert_lora import ConvertLoraConfig, ConvertUnoConfig, prepare_conversion, prepare_uno_conversion
from focusdpo.commands.data import (
    ImportConfig,
    ShardConfig,
    ShowConfig,
    ValidateConfig,
    prepare_import,
    prepare_page,
    prepare_shards,
    prepare_validation,
)
from focusdpo.commands.evaluate import prepare_evaluation
from focusdpo.commands.models import ModelsConfig, prepare_list
from focusdpo.commands.report import prepare_report
from focusdpo.commands.stress import prepare_stress
from focusdpo.demo.config import DemoConfig
from focusdpo.foundation.launch import ElsewhereError, Launch, is_follower, is_launched, lost_connection, tell_launcher
from focusdpo.foundation.settings_text import item_of, options, read_option, read_settings
from focusdpo.foundation.text import MessageFormatter, message_lines
from focusdpo.metrics.config import EvaluateConfig
from focusdpo.pages.config import ReportConfig
from focusdpo.studies.config import AblationConfig, MasksConfig, MicrocosmConfig, StressConfig
from focusdpo.studies.masks import prepare_masks
from focusdpo.training.config import TrainConfig

logger = logging.getLogger(__name__)

# A command first prepares, which is where a user's mistakes show, and returns the work itself.
Work = Callable[[], None]


def _train(config: TrainConfig) -> Work:
    # Imports torch and diffusers: seconds that --help need not wait for.
    from focusdpo.training.run_folder import finished_at
    from focusdpo.training.trainer import Trainer

    launch = Launch.join()
    if not launch.is_main:
        import diffusers
        import transformers

        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    finished = launch.from_main("the run is looked at", lambda: finished_at(config))
    if finished is not None:
        launch.wait("the run is looked at")  # the first process may take the store along
        message = "%s has finished at step %d of max_steps=%d; a larger --max_steps goes on"
        return lambda: logger.info(message, config.output_dir, finished, config.max_steps)
    return Trainer(config).train


def _ablate(config: AblationConfig) -> Work:
    from focusdpo.commands.ablate import prepare_ablation

    return prepare_ablation(config)


def _microcosm(config: MicrocosmConfig) -> Work:
    from focusdpo.commands.microcosm import prepare_microcosm

    return prepare_microcosm(config)


def _demo(config: DemoConfig) -> Work:
    from focusdpo.demo.run import prepare_demo

    return prepare_demo(config)


@dataclass(frozen=True)
class Command:
    """A subcommand: its settings, what it does with them, its line in --help, and which settings are given by position.

    Where `positional` names any, they are all of the settings without a default. A command whose settings have a `config` of
    their own, which names a training run, takes no file with its settings.
    """

    config_class: type[Any]
    prepare: Callable[[Any], Work]
    description: str
    positional: tuple[str, ...] = ()

    @property
    def about_a_run(self) -> bool:
        return "config" in self.config_class.__dataclass_fields__


# A name of two words is a subcommand of the group that its first word names.
COMMANDS = {
    "train": Command(TrainConfig, _train, "Train a LoRA with FocusDPO on preference pairs."),
    "demo": Command(DemoConfig, _demo, "Build a small dataset of real photos, train on it, and draw what happened."),
    "models": Command(ModelsConfig, prepare_list, "List the backbones, and estimate the memory of training on them."),
    "convert-lora": Command(
        ConvertLoraConfig,
        prepare_conversion,
        "Convert a LoRA between the forms of diffusers, PEFT, ComfyUI, kohya's tools and UNO.",
        positional=("source", "out_dir"),
    ),
    "convert-uno": Command(
        ConvertUnoConfig,
        prepare_uno_conversion,
        "Convert UNO's LoRA to diffusers' format, and back.",
        positional=("source", "out_dir"),
    ),
    "evaluate": Command(EvaluateConfig, prepare_evaluation, "Measure generated images: CLIP-I, CLIP-T, DINO, leakage, FID."),
    "report": Command(
        ReportConfig,
        prepare_report,
        "Write the page of a training run: curves, alarms, masks, samples.",
        positional=("run_dir",),
    ),
    "masks": Command(MasksConfig, prepare_masks, "Draw the masks of one pair of a run, by time and group of blocks."),
    "ablate": Command(AblationConfig, _ablate, "Train variants of a run with several seeds, and compare them."),
    "microcosm": Command(MicrocosmConfig, _microcosm, "Teach a small model a small world, and run the ablation on it."),
    "stress": Command(StressConfig, prepare_stress, "Test whether S tells subjects apart that look alike."),
    "data validate": Command(
        ValidateConfig,
        prepare_validation,
        "Check preference pairs; the exit status is 0 where training may start.",
        positional=("path",),
    ),
    "data show": Command(
        ShowConfig,
        prepare_page,
        "Write a page to look at preference pairs and their problems.",
        positional=("path",),
    ),
    "data shard": Command(
        ShardConfig,
        prepare_shards,
        "Write preference pairs as WebDataset shards.",
        positional=("source", "out_dir"),
    ),
    "data import": Command(
        ImportConfig,
        prepare_import,
        "Make preference pairs of UNO's json or of Pick-a-Pic's columns.",
        positional=("source", "out_dir"),
    ),
    "data build": Command(BuildConfig, prepare_build, "Build preference pairs from scenes with their subjects."),
    "data dreambench": Command(
        DreamBenchConfig, prepare_dreambench, "Write DreamBench's prompts as manifests, and build pairs from its photos."
    ),
}
GROUPS = {"data": "Build, check, look at, convert and shard preference pairs."}


def build_parser(name: str) -> ArgumentParser:
    """The parser of all commands, with the settings of the one that is named: those of the others would take seconds."""
    parser = ArgumentParser(prog="focusdpo", description="FocusDPO for multi-subject image models.", parser_mode="settings")
    commands = parser.add_subcommands(title="commands", dest="command")
    groups = {"": commands}
    for each, command in COMMANDS.items():
        config = "--config RUN" if command.about_a_run else "[--config FILE.yaml]"
        if command.about_a_run and command.config_class.__dataclass_fields__["config"].default is None:
            config = "[--config RUN]"
        usage = " ".join([f"focusdpo {each}", *map(str.upper, command.positional), config, "[--NAME VALUE ...]"])
        known = ArgumentParser(prog=f"focusdpo {each}", description=command.description, usage=usage)
        if not command.about_a_run:
            help = "YAML file with these settings; options after it override it."
            known.add_argument("--config", action="config", help=help)
        if each == name:
            known.add_class_arguments(command.config_class, as_positional=bool(command.positional))
        group, _, last = each.rpartition(" ")
        if group not in groups:
            parent = ArgumentParser(prog=f"focusdpo {group}", description=GROUPS[group])
            commands.add_subcommand(group, parent, help=GROUPS[group])
            groups[group] = parent.add_subcommands(title="commands", dest="command")
        groups[group].add_subcommand(last, known, help=command.description)
    return parser


def parse_config(argv: list[str]) -> tuple[str, Any]:
    """The command and its checked configuration; exits with a message for anything wrong."""
    name = _command_of(argv)
    try:
        read = _read_options(name, argv)
        parser = build_parser(name)
        parsed = parser.parse_args(read)
        words = [parsed.command]
        if words[0] in GROUPS:
            words.append(parsed[words[0]].command)
        name = " ".join(words)
        values = vars(parser.instantiate(parsed)[".".join(words)])
        command = COMMANDS[name]
        kept = {key: value for key, value in values.items() if key != "config" or command.about_a_run}
        return name, command.config_class(**kept)
    except ValueError as error:
        sys.exit(_error(name, error))


def _command_of(argv: list[str]) -> str:
    """The command that the words begin with; an empty text where there is none."""
    return next((name for name in COMMANDS if name.split() == argv[: len(name.split())]), "")


def _read_options(name: str, argv: list[str]) -> list[str]:
    """Every option and settings file read by its type, and written as JSON or bare text, which jsonargparse takes as they are.

    A list may follow its option in separate words, as other programs take lists: `--timesteps 0.1 0.5`.
    """
    if not name:
        return argv
    config, about_a_run = COMMANDS[name].config_class, COMMANDS[name].about_a_run
    kinds = dict(options(config))
    read: list[str] = []
    words = deque(argv)
    while words and words[0] != "--":
        word = words.popleft()
        option, equals, text = word.partition("=")
        name = option.removeprefix("--").removesuffix("+")
        is_file = name == "config" and not about_a_run
        if not option.startswith("--") or not (name in kinds or is_file):
            read.append(word)
            continue
        texts = [text] if equals else []
        while not equals and words and not words[0].startswith("--") and (not texts or item_of(kinds.get(name)) is not None):
            texts.append(words.popleft())
        if not texts:  # which argparse refuses
            read.append(word)
            continue
        value = read_settings(texts[0], config) if is_file else read_option(name, texts, kinds[name])
        read.append(f"{option}={value if isinstance(value, str) else json.dumps(value)}")
    return [*read, *words]


def _load_json(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("is nested too deep") from error


set_loader("settings", _load_json, (ValueError,))


# What failures of the machine say that have no class of their own, as others' code reads and writes: torch, safetensors.
WORKER = re.compile(r"^DataLoader (worker \(pid|timed out)")
DISK = re.compile(r"No space left on device|[Dd]isk quota exceeded|File too large|enforce fail at inline_container")
SYSTEM = re.compile(r"\(os error \d+\)")
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
    told = ((torch, "OutOfMemoryError"), (hub, "UploadError"))
    if WORKER.search(text):
        text += "; as a rule for lack of memory, of which a smaller data.num_workers takes less"
    elif lost := lost_connection(error):
        return lost
    elif not (
        isinstance(error, ElsewhereError | ValueError | OSError | FloatingPointError | MemoryError | ModuleNotFoundError)
        or any(module is not None and isinstance(error, getattr(module, kind)) for module, kind in told)
        or (type(error).__name__ in ("RuntimeError", "SafetensorError") and (DISK.search(text) or SYSTEM.search(text)))
    ):
        return None
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
    name, config, launch = _command_of(words), None, Launch()
    try:
        try:
            launch = _join(name)
            with _one_refusal(launch):
                name, config = parse_config(words)
            _log_to_terminal()
            work = COMMANDS[name].prepare(config)
            with logging_redirect_tqdm():  # a warning does not tear the progress bar
                work()
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
        sys.exit(_error(name, text))


def _join(name: str) -> Launch:
    """The launch that this process belongs to; ValueError where the command is one for a single process."""
    if name == "train":
        launch = Launch.join()
        if not launch.is_main:  # the others say the same, and what one alone has to say it raises
            os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
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
        # Connections break before the word of who broke them is there.
        elsewhere = launch.failure(3.0 if lost_connection(error) else 0.0)
        if elsewhere is None:
            return launch.fail(text)
    launch.pass_on(elsewhere or text)
    return "TORCHELASTIC_ERROR_FILE" not in os.environ


def _error(name: str, text: object) -> str:
    return message_lines(f"focusdpo {name}: error: {text}")


def _log_to_terminal() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(MessageFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("focusdpo").setLevel(logging.INFO)


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
