"""`focusdpo masks`: reads run and pair, loads the model, and draws what the mask sees."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from focusdpo.data import DatasetError, collate, load_pairs
from focusdpo.foundation.output_folder import OutputFolder
from focusdpo.foundation.settings import require
from focusdpo.foundation.text import counted
from focusdpo.studies.config import MasksConfig
from focusdpo.studies.masks import WRITTEN, groups_of, write_masks
from focusdpo.training.batches import check_match_count, dataset_of, prior_problems
from focusdpo.training.config import FocusConfig
from focusdpo.training.loading import checkpoint_of, load_step
from focusdpo.training.run_files import read_run_config

logger = logging.getLogger(__name__)


def prepare(config: MasksConfig) -> Callable[[], None]:
    """Reads run and pair, loads the model, and returns what draws.

    Raises:
        FileNotFoundError, ValueError: run, pair or checkpoint cannot be used.
        FileExistsError, NotADirectoryError: the folder holds something that may not be replaced.
    """
    run = read_run_config("config", config.config)
    out = OutputFolder("out", Path(config.out), "masks", WRITTEN)
    out.check(config.overwrite or out.is_unfinished, "replace it with --overwrite true, or name another folder")
    source = run.data.validation if config.split == "validation" else run.data.train
    if source is None:
        raise ValueError(f"split: {config.config} has no data.validation; expected --split train")
    checkpoint = checkpoint_of("checkpoint", run, config.checkpoint)
    if run.focus.mask != "focus":
        logger.info('focus.mask is %r in this run, whose loss has no such mask: drawn is what "focus" would be', run.focus.mask)
        run.focus = replace(run.focus, mask="focus")
    if config.source is not None:
        alone = {"per_subject": False, "mask_from": "winner"} if config.source == "estimate" else {}
        run.focus = FocusConfig(**{**vars(run.focus), "source": config.source, **alone})
    records = load_pairs(source, run.data.check)
    require(
        config.pair < len(records),
        "pair",
        config.pair,
        f"0 to {len(records) - 1}: {source} has {counted(len(records), 'pair')}",
    )
    record = records[config.pair]
    problems = prior_problems(replace(run, loss=replace(run.loss, granularity="image")), [record])  # the mask alone is drawn
    if problems:
        raise DatasetError(problems)
    dataset = dataset_of([record], run.data, run.model.backbone)
    check_match_count(run.focus, [dataset])
    step = load_step(run, checkpoint)
    numbers = range(len(step.paths)) if run.focus.layers == "all" else run.focus.layers
    groups = groups_of(step.paths, config.layer_groups if run.focus.taps_features else 0, numbers)
    batch = collate([dataset[0]]).to(step.backbone.device)
    about = {
        "settings": asdict(config),
        "run": asdict(run),
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "prompt": record.prompt,
        "classes": [reference.class_name for reference in record.references],
    }

    def work() -> None:
        with out.begin():
            write_masks(config, run, step, batch, groups, about)

    return work
