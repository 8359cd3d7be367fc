"""`focusdpo evaluate`: every file and model is checked first, then a resumable run, then results and a picture."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from focusdpo.foundation.output_folder import OutputFolder
from focusdpo.foundation.packages import require_package
from focusdpo.metrics.config import EvaluateConfig


def prepare(config: EvaluateConfig) -> Callable[[], None]:
    """Checks settings, manifest, images, models and regions, and returns the evaluation.

    Raises:
        ModuleNotFoundError: an optional dependency is missing; says how to install it.
        FileNotFoundError, ValueError: manifest, images, models or regions are not fit; all problems of one kind at once.
        FileExistsError, NotADirectoryError: the output folder holds something that may not be replaced.
    """
    require_package("torchmetrics", "evaluate", "evaluation")  # which these import
    from focusdpo.metrics.evaluation import evaluate
    from focusdpo.metrics.inputs import read_inputs
    from focusdpo.metrics.report import FILES

    out = OutputFolder("output_dir", Path(config.output_dir), "evaluate", [re.escape(name) for name in FILES])
    hint = "replace its results with --overwrite true (embeddings stay), or name another folder"
    out.check(config.overwrite or out.is_unfinished, hint)
    inputs = read_inputs(config)

    def work() -> None:
        with out.begin():
            evaluate(config, inputs)

    return work
