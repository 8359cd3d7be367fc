"""`focusdpo train`: the one command that runs in all processes of a launch."""

from __future__ import annotations

import logging
from collections.abc import Callable

from focusdpo.foundation.launch import Launch
from focusdpo.training import announcements
from focusdpo.training.config import TrainConfig
from focusdpo.training.run_folder import finished_at
from focusdpo.training.trainer import Trainer

logger = logging.getLogger(__name__)


def prepare(config: TrainConfig) -> Callable[[], None]:
    """Looks at the run's folder, loads model and pairs unless it has finished, and returns the training."""
    launch = Launch.join()
    finished = launch.from_main("the run is looked at", lambda: finished_at(config))
    if finished is not None:
        launch.wait("the run is looked at")  # the first process may take the store along
        return lambda: logger.info("%s\n  a larger --max_steps goes on", announcements.finished(config, finished))
    return Trainer(config, callbacks=[announcements.Announcements()]).train
