"""The output folder of a run: what may be written, deleted or gone on from. Looked at before a model is loaded."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from focusdpo.data import PairDataset
from focusdpo.data.records import Problem
from focusdpo.data.sources import content_checksum
from focusdpo.files import fingerprint, hash_of, write_whole
from focusdpo.folders import check_folder, clear_folder, mark_folder
from focusdpo.models import BACKBONES
from focusdpo.models.base import pipeline_folder, pipeline_parts
from focusdpo.models.base_lora import base_lora_checksum
from focusdpo.settings import differences, flat
from focusdpo.training.adapter import targets_of
from focusdpo.training.checkpoints import SETTINGS_FILE, find_checkpoint
from focusdpo.training.config import DataConfig, ModelConfig, TrainConfig
from focusdpo_kernels import env

logger = logging.getLogger(__name__)

BASE_LORA_CONTENT = "model.base_lora (its content)"
CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
VALIDATION_FILE = "validation.jsonl"
ALARMS_FILE = "alarms.jsonl"
ENVIRONMENT_FILE = "environment.json"
REPORT_FILE = "report.html"
LEFT_OUT_FILE = "left_out.jsonl"
MAX_PROBLEMS = 5  # shown in a warning
SAMPLES_FOLDER = "samples"
RUN_FILES = (
    CONFIG_FILE, METRICS_FILE, VALIDATION_FILE, ALARMS_FILE, ENVIRONMENT_FILE, REPORT_FILE, SAMPLES_FOLDER, "checkpoints",
    "tensorboard", "wandb", "lora", "lora_ema",
)  # fmt: skip

# What a resumed run may change: where things lie, how and how often it reports, how long it goes on. Settings, and sections.
FREE = (
    "output_dir", "resume", "overwrite", "max_steps", "checkpoint_every", "checkpoints_total_limit", "validate_every",
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


def model_contents(model: ModelConfig) -> dict[str, str | None]:
    """The parts of a run's model by their content, and the LoRA that is merged into it."""
    pipeline = pipeline_folder(model.path, model.revision)
    lora = None if model.base_lora is None else base_lora_checksum(model.base_lora)[:16]
    parts = {f"model.path ({part}, its content)": fingerprint(pipeline, [part])[:16] for part in pipeline_parts(pipeline)}
    return {**parts, BASE_LORA_CONTENT: lora}


def compared_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide a run's numbers, flat, but for what is known by its content."""
    return {name: value for name, value in flat(config).items() if name not in FREE and name.split(".")[0] not in FREE}


@dataclass
class RunFolder:
    """The output folder of a training run, and the checkpoint that it goes on from."""

    path: Path
    checkpoint: Path | None

    @classmethod
    def prepare(cls, config: TrainConfig) -> RunFolder:
        """Decides whether the run may start.

        Raises:
            FileExistsError, NotADirectoryError: the folder holds something that may not be overwritten.
            FileNotFoundError, ValueError: the checkpoint to resume is not there, or damaged.
        """
        folder = Path(config.output_dir)
        checkpoints = folder / "checkpoints"
        check_folder("output_dir", folder, (LEFT_OUT_FILE,), overwrite=True, hint="")  # every start writes its own
        if not config.resume:
            hint = "continue it with --resume latest, delete it with --overwrite true, or name another folder"
            check_folder("output_dir", folder, RUN_FILES, config.overwrite, hint)
            return cls(folder, None)
        checkpoint = find_checkpoint(config.resume, checkpoints)
        if checkpoint is None:
            logger.warning("resume: no checkpoint under %s yet; starting at step 0", checkpoints)
        elif checkpoint.resolve().parent != checkpoints.resolve():
            hint = "a checkpoint of another run goes on in a new folder"
            check_folder("output_dir", folder, RUN_FILES, False, hint)
        return cls(folder, checkpoint)

    def check_settings(self, settings: dict[str, Any]) -> None:
        """ValueError names every setting that differs from the checkpoint's: the run could not go on to the same numbers."""
        if self.checkpoint is None:
            return
        # A checkpoint may be older than a setting: then the run had what is now the default. Contents it lacks are unknown.
        defaults = compared_settings(TrainConfig(ModelConfig("-"), DataConfig("-"), "-")) | {BASE_LORA_CONTENT: None}
        saved = defaults | json.loads((self.checkpoint / SETTINGS_FILE).read_text())
        now = json.loads(json.dumps({name: settings.get(name) for name in saved}))
        differing = differences("checkpoint", saved, now, lambda name, *_: name in FREE)
        if differing:
            lines = "\n  ".join(differing)
            raise ValueError(f"resume: {self.checkpoint} was made with other settings:\n  {lines}\nuse the run's own settings")

    def report_left_out(self, problems: list[Problem]) -> None:
        """Warns of pairs that are not trained on, and lists them in the folder, before the rest of the run writes there.

        Where there are none, the list of an earlier start goes away.
        """
        file = self.path / LEFT_OUT_FILE
        if not problems:
            file.unlink(missing_ok=True)
            return
        mark_folder(self.path)
        rows = [{"file": str(p.file), "line": p.line, "field": p.field, "reason": p.message} for p in problems]
        write_whole(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        pairs = len({(problem.file, problem.line) for problem in problems})
        first = "\n".join(f"  {problem}" for problem in problems[:MAX_PROBLEMS])
        more = f"\n  and {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
        logger.warning("%d pairs fit no bucket and are left out; %s lists why:\n%s%s", pairs, file, first, more)

    def start(self, config: TrainConfig) -> None:
        """Makes the folder ready to be written. Called last, when nothing can be refused any more."""
        clear_folder(self.path, RUN_FILES if config.overwrite else ())
        (self.path / CONFIG_FILE).write_text(yaml.safe_dump(asdict(config), sort_keys=False))

    def record_start(self, step: int, **found: Any) -> None:
        """Adds a start of the run to environment.json: versions, devices, and what the caller found.

        Starts from the same step or a later one go away: what they computed is about to be computed again.
        """
        file = self.path / ENVIRONMENT_FILE
        starts = [start for start in read_starts(file) if start["step"] < step]
        time = datetime.now(UTC).isoformat(timespec="seconds")
        starts.append({"step": step, "time": time, **found, "environment": env.report(backends=False).splitlines()})
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(starts, indent=1) + "\n")
        partial.replace(file)


def read_starts(file: Path) -> list[dict[str, Any]]:
    """The starts in an environment.json; none where there is no such file, or it is damaged."""
    try:
        starts: list[dict[str, Any]] = json.loads(file.read_text())
        return [start for start in starts if isinstance(start["step"], int)]
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return []
