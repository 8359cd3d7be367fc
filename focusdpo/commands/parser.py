"""The words after `focusdpo` as a command and its settings, and every --help."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import deque
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, set_loader

import focusdpo
from focusdpo.commands.registry import COMMANDS, GROUPS
from focusdpo.foundation.packages import require_package
from focusdpo.foundation.settings_text import item_of, options, read_option, read_settings, types_of
from focusdpo.foundation.text import message_lines

QUIET = "--quiet"
MISSING = re.compile(r"(the following arguments are required: )([-\w., ]+)")
SECTION = re.compile(r'Parser key "([\w.]+)"')  # an optional one, which has a parser of its own


class Parser(ArgumentParser):  # type: ignore[misc]  # jsonargparse has no types
    """A parser whose messages name what is missing as one types it."""

    positional: tuple[str, ...] = ()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[misc]
        if missing := MISSING.search(message):
            section = SECTION.match(message)
            names = (f"{section[1]}.{name}" if section else name for name in missing[2].replace("--", "").split(", "))
            message = missing[1] + ", ".join(name.upper() if name in self.positional else f"--{name}" for name in names)
        super().error(message, ex)


class PrintCompletion(argparse.Action):
    """Prints the script that completes commands, settings and choices in a shell, and exits."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        try:
            require_package("shtab", "tab completion", "completion")
        except ModuleNotFoundError as error:
            parser.error(str(error))
        script = overview(complete=True).get_completion_script(f"shtab-{values}")
        # What has no choices may be a path.
        print(script.replace("complete -o bashdefault ", "complete -o bashdefault -o default "))
        parser.exit()


def overview(complete: bool = False) -> Parser:
    """The parser of no command: it lists all, and refuses what is none.

    Args:
        complete: whether the commands have their settings, which takes a second.
    """
    parser = Parser(prog="focusdpo", description="FocusDPO for multi-subject image models.", version=focusdpo.__version__)
    help = "Print a script for tab completion, and exit; needs shtab."
    parser.add_argument("--completion", action=PrintCompletion, choices=("bash", "zsh"), default=argparse.SUPPRESS, help=help)
    groups = {"": parser.add_subcommands(title="commands", dest="command")}
    for name, command in COMMANDS.items():
        group, _, last = name.rpartition(" ")
        if group not in groups:
            parent = Parser(prog=f"focusdpo {group}", description=GROUPS[group])
            groups[""].add_subcommand(group, parent, help=GROUPS[group])
            groups[group] = parent.add_subcommands(title="commands", dest="command")
        known = command_parser(name) if complete else Parser(prog=f"focusdpo {name}")
        groups[group].add_subcommand(last, known, help=command.description)
    return parser


def command_parser(name: str) -> Parser:
    """The parser of a command's settings."""
    command = COMMANDS[name]
    config = "[--config FILE.yaml]"
    if command.about_a_run:
        config = "[--config RUN]" if command.config_class.__dataclass_fields__["config"].default is None else "--config RUN"
    usage = " ".join([f"focusdpo {name}", *map(str.upper, command.positional), config, "[--NAME VALUE ...]"])
    parser = Parser(prog=f"focusdpo {name}", description=command.description, usage=usage, parser_mode="settings")
    parser.positional = command.positional
    if not command.about_a_run:
        help = "YAML file with these settings; options after it override it."
        parser.add_argument("--config", action="config", help=help)
    help = "Show warnings and errors only, and no progress bars; results are printed all the same."
    parser.add_argument(QUIET, action="store_true", default=argparse.SUPPRESS, help=help)
    parser.add_class_arguments(command.config_class, as_positional=bool(command.positional))
    return parser


def parse_config(argv: list[str]) -> tuple[str, Any]:
    """The command and its checked configuration; exits with a message for anything wrong."""
    name = command_of(argv)
    if not name:
        parser = overview()
        parser.parse_args(argv)
        parser.error("expected the command first")
    try:
        parser, command = command_parser(name), COMMANDS[name]
        parsed = parser.parse_args(_read_options(name, parser, argv[len(name.split()) :]))
        values = vars(parser.instantiate(parsed))
        return name, command.config_class(**{key: values[key] for key in types_of(command.config_class)})
    except ValueError as error:
        sys.exit(error_message(name, error))


def command_of(argv: list[str]) -> str:
    """The command that the words begin with; an empty text where there is none."""
    return next((name for name in COMMANDS if name.split() == argv[: len(name.split())]), "")


def error_message(name: str, text: object) -> str:
    return message_lines(f"focusdpo {name}: error: {text}")


def _read_options(name: str, parser: Parser, argv: list[str]) -> list[str]:
    """Every option and settings file read by its type, and written as JSON or bare text, which jsonargparse takes as they are.

    A list may follow its option in separate words, as other programs take lists: `--timesteps 0.1 0.5`.
    """
    config, about_a_run = COMMANDS[name].config_class, COMMANDS[name].about_a_run
    kinds = dict(options(config))
    read: list[str] = []
    words = deque(argv)
    while words and words[0] != "--":
        word = words.popleft()
        option, equals, text = word.partition("=")
        setting = option.removeprefix("--").removesuffix("+")
        is_file = setting == "config" and not about_a_run
        if word == QUIET:  # no setting, and no part of --print_config
            continue
        if not option.startswith("--") or not (setting in kinds or is_file):
            read.append(word)
            continue
        texts = [text] if equals else []
        while not equals and words and not words[0].startswith("--") and (not texts or item_of(kinds.get(setting)) is not None):
            texts.append(words.popleft())
        if not texts and not equals and kinds.get(setting) is bool:
            texts = ["true"]  # as other programs take a switch
        if not texts:
            parser.error(f"argument {option}: expected one argument")
        value = read_settings(texts[0], config) if is_file else read_option(setting, texts, kinds[setting])
        read.append(f"{option}={value if isinstance(value, str) else json.dumps(value)}")
    return [*read, *words]


def _load_json(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("is nested too deep") from error


set_loader("settings", _load_json, (ValueError,))
