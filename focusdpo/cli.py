"""The command line: `focusdpo COMMAND`; `focusdpo COMMAND --help` documents every setting."""

from __future__ import annotations

import json
import logging
import sys
import typing
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from typing import Any

from jsonargparse import ArgumentParser
from tqdm.contrib.logging import logging_redirect_tqdm

from focusdpo.convert import ConvertLoraConfig, ConvertUnoConfig, prepare_conversion, prepare_uno_conversion
from focusdpo.data.building.builder import prepare_build
from focusdpo.data.building.config import BuildConfig
from focusdpo.data.building.dreambench import DreamBenchConfig, prepare_dreambench
from focusdpo.data_commands import (
    ImportConfig,
    ShardConfig,
    ShowConfig,
    ValidateConfig,
    prepare_import,
    prepare_page,
    prepare_shards,
    prepare_validation,
)
from focusdpo.demo.config import DemoConfig
from focusdpo.evaluation.metrics.config import EvaluateConfig
from focusdpo.evaluation.metrics.evaluate import prepare_evaluation
from focusdpo.evaluation.run_page.command import prepare_report
from focusdpo.evaluation.run_page.config import ReportConfig
from focusdpo.experiments.ablation.config import AblationConfig
from focusdpo.experiments.masks import MasksConfig, prepare_masks
from focusdpo.experiments.microcosm.config import MicrocosmConfig
from focusdpo.experiments.stress.command import prepare_stress
from focusdpo.experiments.stress.config import StressConfig
from focusdpo.list_models import ModelsConfig, prepare_list
from focusdpo.training.config import TrainConfig

# A command first prepares, which is where a user's mistakes show, and returns the work itself.
Work = Callable[[], None]


def _train(config: TrainConfig) -> Work:
    import torch  # seconds that --help need not wait for, as for diffusers behind the next one

    from focusdpo.training.hub import UploadError
    from focusdpo.training.trainer import Trainer

    def told(work: Callable[[], Any]) -> Any:
        try:
            return work()
        except (torch.OutOfMemoryError, UploadError) as error:
            sys.exit(f"focusdpo train: error: {error}")

    trainer = told(lambda: Trainer(config))
    return lambda: told(trainer.train)


def _ablate(config: AblationConfig) -> Work:
    from focusdpo.experiments.ablation.command import prepare_ablation

    return prepare_ablation(config)


def _microcosm(config: MicrocosmConfig) -> Work:
    from focusdpo.experiments.microcosm.command import prepare_microcosm

    return prepare_microcosm(config)


def _demo(config: DemoConfig) -> Work:
    from focusdpo.demo.run import prepare_output, run_demo

    prepare_output(config)
    return lambda: run_demo(config)


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


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="focusdpo", description="FocusDPO for multi-subject image models.")
    commands = parser.add_subcommands(title="commands", dest="command")
    groups = {"": commands}
    for name, command in COMMANDS.items():
        config = "--config RUN" if command.about_a_run else "[--config FILE.yaml]"
        if command.about_a_run and command.config_class.__dataclass_fields__["config"].default is None:
            config = "[--config RUN]"
        usage = " ".join([f"focusdpo {name}", *map(str.upper, command.positional), config, "[--NAME VALUE ...]"])
        options = ArgumentParser(prog=f"focusdpo {name}", description=command.description, usage=usage)
        if not command.about_a_run:
            help = "YAML file with these settings; options after it override it."
            options.add_argument("--config", action="config", help=help)
        options.add_class_arguments(command.config_class, as_positional=bool(command.positional))
        group, _, last = name.rpartition(" ")
        if group not in groups:
            parent = ArgumentParser(prog=f"focusdpo {group}", description=GROUPS[group])
            commands.add_subcommand(group, parent, help=GROUPS[group])
            groups[group] = parent.add_subcommands(title="commands", dest="command")
        groups[group].add_subcommand(last, options, help=command.description)
    return parser


def parse_config(argv: list[str]) -> tuple[str, Any]:
    """The command and its checked configuration; exits with a message for anything wrong."""
    parser = build_parser()
    parsed = parser.parse_args(_join_lists(argv))
    words = [parsed.command]
    if words[0] in GROUPS:
        words.append(parsed[words[0]].command)
    name = " ".join(words)
    try:
        values = vars(parser.instantiate(parsed)[".".join(words)])
        command = COMMANDS[name]
        kept = {key: value for key, value in values.items() if key != "config" or command.about_a_run}
        return name, command.config_class(**kept)
    except ValueError as error:
        sys.exit(f"focusdpo {name}: error: {error}")


@dataclass(frozen=True)
class _ListOption:
    """An option that takes a list: whether it takes nothing else, and whether the items are text alone."""

    pure: bool
    of_text: bool


def _list_options(settings: type[Any], prefix: str = "--") -> Iterator[tuple[str, _ListOption]]:
    """Options that take a list, by name."""
    for name, kind in typing.get_type_hints(settings).items():
        if isinstance(kind, type) and is_dataclass(kind):
            yield from _list_options(kind, f"{prefix}{name}.")
        else:
            kinds = [kind] if typing.get_origin(kind) is list else typing.get_args(kind)
            lists = [one for one in kinds if typing.get_origin(one) is list]
            if lists:
                yield f"{prefix}{name}", _ListOption(len(kinds) == 1, all(typing.get_args(one) == (str,) for one in lists))


def _join_lists(argv: list[str]) -> list[str]:
    """`--timesteps 0.1 0.5` as `--timesteps [0.1, 0.5]`, as other programs take lists; jsonargparse knows the second form."""
    command = next((name for name in COMMANDS if name.split() == argv[: len(name.split())]), None)
    options = {} if command is None else dict(_list_options(COMMANDS[command].config_class))
    joined: list[str] = []
    words = deque(argv)
    while words:
        joined.append(words.popleft())
        option = options.get(joined[-1])
        if option is None:
            continue
        values = []
        while words and not words[0].startswith("--"):
            values.append(words.popleft())
        is_list = len(values) > 1 or (len(values) == 1 and option.pure and not values[0].startswith("["))
        joined += [json.dumps(values if option.of_text else [_value(value) for value in values])] if is_list else values
    return joined


def _value(text: str) -> Any:
    """A number, or else the text; YAML would take 4:3 for the number 243."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def main(argv: list[str] | None = None) -> None:
    """Entry point of `focusdpo` and `python -m focusdpo`."""
    name, config = parse_config(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("focusdpo").setLevel(logging.INFO)
    try:
        work = COMMANDS[name].prepare(config)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"focusdpo {name}: error: {error}")
    with logging_redirect_tqdm():  # a warning does not tear the progress bar
        work()


if __name__ == "__main__":
    main()
