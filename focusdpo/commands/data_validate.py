"""`focusdpo data validate`: preference pairs checked, and what is wrong with them as text or JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from focusdpo.commands.config import ValidateConfig
from focusdpo.data.dataset import SizeRules
from focusdpo.data.formats import find_sources
from focusdpo.data.validation import validate
from focusdpo.foundation.files import check_stamped, stamp, write_stamped
from focusdpo.training.image_sizes import size_rules

VALIDATE = "data validate"


def prepare(config: ValidateConfig) -> Callable[[], None]:
    """Finds the dataset, and returns what checks it: it exits with 1 where training would not start."""
    find_sources(config.path)
    if config.json not in (None, "-"):
        check_stamped("json", Path(config.json), VALIDATE, True, "")

    def work() -> None:
        report = validate(config.path, config.check, SizeRules(**size_rules(config.data, config.backbone)))
        print(json.dumps(report.as_json(), indent=1) if config.json == "-" else report)
        if config.json not in (None, "-"):
            sealed = report.as_json() | {"written_by": stamp(VALIDATE)}
            write_stamped(Path(config.json), json.dumps(sealed, indent=1) + "\n", VALIDATE)
        if not report.may_start:
            sys.exit(1)

    return work
