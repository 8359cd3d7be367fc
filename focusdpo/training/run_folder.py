"""The output folder of a run: what may be written, deleted or gone on from. Looked at before a model is loaded."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from focusdpo.data import PairDataset
from focusdpo.data.formats import content_checksum
from focusdpo.data.lines import Problem
from focusdpo.foundation.files import KNOWN_DIGESTS, fingerprint, hash_of, is_stamped, write_json, write_whole
from focusdpo.foundation.launch import Launch
from focusdpo.foundation.output_folder import OutputFolder, step_folders
from focusdpo.foundation.settings import differences, flat
from focusdpo.foundation.text import counted, first_of
from focusdpo.models import BACKBONES
from focusdpo.models.base import pipeline_folder, pipeline_parts
from focusdpo.models.base_lora import NAME, lora_checksum
from focusdpo.models.lora_reading import LORA_FILE
from focusdpo.training.adapter import targets_of
from focusdpo.training.checkpoints import LAST_CHECKPOINT, SETTINGS_FILE, find_checkpoint
from focusdpo.training.config import DataConfig, ModelConfig, TrainConfig
from focusdpo.training.run_files import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    LEFT_OUT_FILE,
    REPORT_FILE,
    WRITTEN,
    read_starts,
    settings_text,
)
from focusdpo_kernels.tools import env

logger = logging.getLogger(__name__)

EARLIER = re.compile(r"model\.path \(\w+, its content\)")  # a hash of the first rows of each tensor alone
BASE_LORA_CONTENT = "model.base_lora (its content)"

# What a resumed run may change: where things lie, how and how often it reports, how long it goes on. Settings, and sections.
FREE = (
    "output_dir", "resume", "overwrite", "max_steps", "collective_timeout", "checkpoint_every",
    "checkpoints_total_limit", "validate_every",
    "deterministic", "cpu", "backend", "model.path", "model.revision", "model.base_lora", "data.train", "data.validation",
    "data.check", "data.cache", "data.reference_cache", "data.num_workers",
    "samples", "push_to_hub", "trackers", "project", "run_name",
)  # fmt: skip


def settings_of(config: TrainConfig, processes: int, train_set: PairDataset) -> dict[str, Any]:
    """What decides a run's numbers, flat: kept in each checkpoint and compared when a run is resumed.

    What may lie elsewhere is in it by its content: the model's parts, the merged LoRA, the pairs and their images' sizes.
    """
    model = config.model
    layouts = hash_of(*map(str, train_set.sizes))
    scheduler = fingerprint(pipeline_folder(model.path, model.revision), ["scheduler"])[:16]
    is_constant = config.optim.scheduler.startswith("constant")
    return {
        **compared_settings(config),
        # Kept predictions were computed pair by pair, and are rounded otherwise than those of a batch.
        "data.reference_cache (whether there is one)": config.data.reference_cache is not None,
        "max_steps, which optim.scheduler depends on": None if is_constant else config.max_steps,
        "loss.shift (the scheduler it comes from)": scheduler if config.loss.shift == "auto" else None,
        "lora.target_modules": targets_of(config.lora, BACKBONES[model.backbone]),
        **model_contents(model),
        "data.train (its content)": content_checksum(config.data.train)[:16],
        "data.train (number of pairs)": len(train_set),
        "data.train (sizes of its images)": layouts[:16],
        "number of processes": processes,
    }


def shared_settings(config: TrainConfig, launch: Launch, train_set: PairDataset) -> dict[str, Any]:
    """`settings_of` a run for all processes of its launch: the first one of each machine reads what has to be read.

    Raises:
        ValueError: a machine has another model or other pairs than the first one.
    """

    held_out = "data.validation (its content)"

    def read() -> list[Any]:
        settings, path = settings_of(config, launch.size, train_set), config.data.validation
        compared = settings | {held_out: None if path is None or launch.size == 1 else content_checksum(path)}
        return [settings, compared, KNOWN_DIGESTS]

    settings, compared, digests = launch.once_a_machine("model and pairs are hashed", read)
    KNOWN_DIGESTS.update(digests)
    first = launch.gather("model and pairs are hashed", compared if launch.is_local_main else None)[0]
    differing = differences("first machine", first, json.loads(json.dumps(compared)) if launch.size > 1 else first)
    if differing:
        lines = "\n  ".join(differing)
        raise ValueError(f"this machine is to train something else than the first one:\n  {lines}\nuse the same files on all")
    return dict(settings)


def model_contents(model: ModelConfig) -> dict[str, str | None]:
    """The parts of a run's model by their content, and the LoRA that is merged into it."""
    pipeline = pipeline_folder(model.path, model.revision)
    lora = None if model.base_lora is None else lora_checksum(NAME, model.base_lora)[:16]
    parts = {f"model.path ({part}, all of it)": fingerprint(pipeline, [part])[:16] for part in pipeline_parts(pipeline)}
    return {**parts, BASE_LORA_CONTENT: lora}


def compared_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide a run's numbers, flat, but for what is known by its content."""
    return {name: value for name, value in flat(config).items() if name not in FREE and name.split(".")[0] not in FREE}


@dataclass
class RunFolder:
    """The output folder of a training run, the checkpoint that it goes on from, and whether that is one of the folder's own."""

    out: OutputFolder
    checkpoint: Path | None
    goes_on: bool = False
    left_out: list[Problem] = field(default_factory=list)

    @classmethod
    def prepare(cls, config: TrainConfig, launch: Launch) -> RunFolder:
        """Decides whether the run may start.

        Args:
            config: of the run.
            launch: whose first process decides, and locks the folder, for all.

        Raises:
            ElsewhereError: in other processes of the launch, where the first one raised one of these.
            FileNotFoundError: also where another process of the launch does not see the folder of the first.
            FileExistsError, NotADirectoryError, PermissionError: the folder holds something that may not be overwritten, or
                cannot be written to.
            BlockingIOError: another process writes there.
            FileNotFoundError, ValueError: the checkpoint to resume is not there, or damaged.
        """
        run = cls(output_folder(config, leads=False), None)

        def decide() -> tuple[str | None, bool]:
            nonlocal run
            run = cls(output_folder(config), None)
            run.out.lock()  # before anything that another process may be writing is looked at
            run._choose_checkpoint(config)
            return None if run.checkpoint is None else str(run.checkpoint), run.goes_on

        try:
            checkpoint, run.goes_on = launch.from_main("the output folder was looked at", decide)
            run.out.check_shared(launch)
            run.checkpoint = None if checkpoint is None else Path(checkpoint)
            if run.checkpoint is not None and not (run.checkpoint / SETTINGS_FILE).is_file():
                raise FileNotFoundError(f"resume: {run.checkpoint.absolute()} is not there for all processes of the launch")
        except BaseException:
            run.out.release()
            raise
        return run

    def _choose_checkpoint(self, config: TrainConfig) -> None:
        out, checkpoints = self.out, self.path / CHECKPOINTS_FOLDER
        if not config.resume:
            out.check(
                config.overwrite, "continue it with --resume latest, delete it with --overwrite true, or name another folder"
            )
            return
        self.checkpoint = find_checkpoint(config.resume, checkpoints)
        if self.checkpoint is None:
            written = out.recall(LAST_CHECKPOINT)
            if written is not None:
                raise FileNotFoundError(
                    f"resume: no checkpoint under {checkpoints}, though this run has written {written}; bring it back, start "
                    "anew with --overwrite true, or name another folder"
                )
            out.check(_is_begun(out), "name another folder")
            logger.warning("resume: no checkpoint under %s yet; starting at step 0", checkpoints)
        elif self.checkpoint.resolve().parent == checkpoints.resolve():
            self.goes_on = True
            out.check(False, "", goes_on=True, aside=(CONFIG_FILE, "lora/README.md"), proven=(CHECKPOINTS_FOLDER,))
        else:
            out.check(_is_begun(out), "a checkpoint of another run goes on in a new folder")

    @property
    def path(self) -> Path:
        return self.out.path

    def check_settings(self, settings: dict[str, Any]) -> None:
        """ValueError names every setting that differs from the checkpoint's: the run could not go on to the same numbers."""
        if self.checkpoint is None:
            return
        # A checkpoint may be older than a setting: then the run had what is now the default. Contents it lacks are unknown.
        defaults = compared_settings(TrainConfig(ModelConfig("-"), DataConfig("-"), "-")) | {BASE_LORA_CONTENT: None}
        saved = defaults | json.loads((self.checkpoint / SETTINGS_FILE).read_text())
        unknown = [name for name in saved if EARLIER.fullmatch(name)]
        if unknown:
            logger.warning("resume: %s knows the model by a hash of an earlier version, which is not compared", self.checkpoint)
        saved = {name: value for name, value in saved.items() if name not in unknown}
        now = json.loads(json.dumps({name: settings.get(name) for name in saved}))
        differing = differences("checkpoint", saved, now, lambda name, *_: name in FREE)
        if differing:
            lines = "\n  ".join(differing)
            raise ValueError(f"resume: {self.checkpoint} was made with other settings:\n  {lines}\nuse the run's own settings")

    def report_left_out(self, problems: list[Problem]) -> None:
        """Warns of pairs that are not trained on; `start` lists them in the folder."""
        self.left_out = problems
        if not problems:
            return
        file = self.path / LEFT_OUT_FILE
        pairs = len({(problem.file, problem.line) for problem in problems})
        first = first_of(problems, separator="\n  ")
        fit = (
            f"{counted(pairs, 'pair')} {'fits' if pairs == 1 else 'fit'} no bucket and {'is' if pairs == 1 else 'are'} left out"
        )
        logger.warning("%s; %s lists why:\n  %s", fit, file, first)

    def start(self, config: TrainConfig) -> None:
        """Makes the folder ready to be written. Called last, when nothing can be refused any more."""
        self.out.begin(clear=not self.goes_on)
        page = self.path / REPORT_FILE
        if not self.goes_on and page.is_file() and is_stamped(page, "report"):
            page.unlink()  # of the earlier run
        self.out.tidy()
        write_whole(self.path / CONFIG_FILE, settings_text(config))
        self.out.has_written(CONFIG_FILE)
        file = self.path / LEFT_OUT_FILE
        rows = [{"file": str(p.file), "line": p.line, "field": p.field, "reason": p.message} for p in self.left_out]
        if rows:
            write_whole(file, "".join(json.dumps(row) + "\n" for row in rows))
        else:
            file.unlink(missing_ok=True)

    def record_start(self, step: int, **found: Any) -> None:
        """Adds a start of the run to environment.json: versions, devices, and what the caller found.

        Starts from the same step or a later one go away: what they computed is about to be computed again.
        """
        file = self.path / ENVIRONMENT_FILE
        starts = [start for start in read_starts(file) if start["step"] < step]
        time = datetime.now(UTC).isoformat(timespec="seconds")
        starts.append({"step": step, "time": time, **found, "environment": env.report(backends=False).splitlines()})
        write_json(file, starts)


def output_folder(config: TrainConfig, leads: bool = True) -> OutputFolder:
    """The folder of a run, whatever it holds; `leads` as there."""
    return OutputFolder("output_dir", Path(config.output_dir), "train", WRITTEN, leads)


def finished_at(config: TrainConfig) -> int | None:
    """The step at which the run that is to be resumed has finished; None where something is left to do.

    Raises:
        FileNotFoundError, ValueError: as `RunFolder.prepare`.
    """
    out = output_folder(config)
    folders = ("lora", "lora_ema") if config.optim.ema_decay else ("lora",)
    if config.resume is None or config.push_to_hub.repo_id is not None:
        return None
    if not out.is_as_written("lora/README.md", *(f"{folder}/{LORA_FILE}" for folder in folders)):
        return None
    checkpoint = find_checkpoint(config.resume, out.path / CHECKPOINTS_FOLDER)
    own = {path.resolve(): step for step, path in step_folders(out.path / CHECKPOINTS_FOLDER)}
    step = -1 if checkpoint is None else own.get(checkpoint.resolve(), -1)
    return step if step >= config.max_steps else None


def _is_begun(out: OutputFolder) -> bool:
    """Whether a run was begun there that has written no checkpoint yet: it has nothing that is not made again."""
    return out.is_unfinished and out.recall(LAST_CHECKPOINT) is None
