"""The commands: names, settings, what they do. Modules are named as text, and imported when their command is asked for."""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from focusdpo.foundation.garbage_collection import collector_paused
from focusdpo.foundation.packages import libraries_silenced


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Where `positional` names any settings, they are all of those without a default. A command whose settings have a `config` of
    their own, which names a training run, takes no file with its settings.

    Args:
        name: two words are a subcommand of the group that the first one names.
        settings: module and class of the settings; it imports nothing heavy, which --help need not wait for.
        description: in --help.
        positional: settings that are given by position.
        in_launch: whether it runs in all processes of a launch; others refuse to.
    """

    name: str
    settings: str
    description: str
    positional: tuple[str, ...] = ()
    in_launch: bool = False

    @property
    def config_class(self) -> type[Any]:
        return _imported(self.settings)

    @property
    def about_a_run(self) -> bool:
        return "config" in self.config_class.__dataclass_fields__

    @property
    def preparation(self) -> str:
        """Module and function that takes the settings: `prepare` in the file that is called as the command is."""
        return f"focusdpo.commands.{re.sub('[ -]', '_', self.name)}:prepare"

    def prepare(self, config: Any) -> Callable[[], None]:
        """Checks everything that a user may have wrong, and returns the work itself."""
        return _imported(self.preparation)(config)


def _imported(name: str) -> Any:
    """What "module:attribute" names.

    What diffusers and PEFT make stays until the end. To look through it for garbage takes long: while they are imported, at the
    end, and whenever a run collects.
    """
    module, _, attribute = name.partition(":")
    is_first = module not in sys.modules
    with collector_paused(is_first), libraries_silenced():
        found = getattr(import_module(module), attribute)
    if is_first:
        gc.freeze()
    return found


_ALL = (
    Command("train", "focusdpo.training.config:TrainConfig", "Train a LoRA with FocusDPO on preference pairs.", in_launch=True),
    Command(
        "sample",
        "focusdpo.sampling.config:SampleConfig",
        "Make images of prompts with references, with a run's LoRA or another.",
        in_launch=True,
    ),
    Command(
        "demo", "focusdpo.demo.config:DemoConfig", "Build a small dataset of real photos, train on it, and draw what happened."
    ),
    Command(
        "models", "focusdpo.commands.config:ModelsConfig", "List the backbones, and estimate the memory of training on them."
    ),
    Command(
        "convert-lora",
        "focusdpo.commands.config:ConvertLoraConfig",
        "Convert a LoRA between the forms of diffusers, PEFT, ComfyUI, kohya's tools and UNO.",
        positional=("source", "out_dir"),
    ),
    Command(
        "convert-uno",
        "focusdpo.commands.config:ConvertUnoConfig",
        "Convert UNO's LoRA to diffusers' format, and back.",
        positional=("source", "out_dir"),
    ),
    Command(
        "evaluate", "focusdpo.metrics.config:EvaluateConfig", "Measure generated images: CLIP-I, CLIP-T, DINO, leakage, FID."
    ),
    Command(
        "report",
        "focusdpo.pages.config:ReportConfig",
        "Write the page of a training run: curves, alarms, masks, samples.",
        positional=("run_dir",),
    ),
    Command(
        "masks", "focusdpo.studies.config:MasksConfig", "Draw the masks of one pair of a run, by time and group of blocks."
    ),
    Command(
        "ablate", "focusdpo.studies.config:AblationConfig", "Train variants of a run with several seeds, and compare them."
    ),
    Command(
        "microcosm", "focusdpo.studies.config:MicrocosmConfig", "Teach a small model a small world, and run the ablation on it."
    ),
    Command("stress", "focusdpo.studies.config:StressConfig", "Test whether S tells subjects apart that look alike."),
    Command(
        "data validate",
        "focusdpo.commands.config:ValidateConfig",
        "Check preference pairs; the exit status is 0 where training may start.",
        positional=("path",),
    ),
    Command(
        "data show",
        "focusdpo.pages.config:ShowConfig",
        "Write a page to look at preference pairs and their problems.",
        positional=("path",),
    ),
    Command(
        "data split",
        "focusdpo.commands.config:SplitConfig",
        "Hold pairs out that share no photo with the others.",
        positional=("source", "out_dir"),
    ),
    Command(
        "data shard",
        "focusdpo.commands.config:ShardConfig",
        "Write preference pairs as WebDataset shards.",
        positional=("source", "out_dir"),
    ),
    Command(
        "data import",
        "focusdpo.commands.config:ImportConfig",
        "Make preference pairs of UNO's json or of Pick-a-Pic's columns.",
        positional=("source", "out_dir"),
    ),
    Command(
        "data compose",
        "focusdpo.building.config:ComposeConfig",
        "Make preference pairs from a folder of photos: cut out, judged, composed, disrupted.",
    ),
    Command("data build", "focusdpo.building.config:BuildConfig", "Build preference pairs from scenes with their subjects."),
    Command(
        "data dreambench",
        "focusdpo.building.config:DreamBenchConfig",
        "Write DreamBench's prompts as manifests, and build pairs from its photos.",
    ),
)
COMMANDS = {command.name: command for command in _ALL}
GROUPS = {"data": "Build, check, look at, convert and shard preference pairs."}
