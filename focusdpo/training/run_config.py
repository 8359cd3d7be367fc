"""The settings of a run, read back from its folder or a YAML file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

from focusdpo.foundation.settings_text import build, read_settings
from focusdpo.training.config import TrainConfig
from focusdpo.training.run_files import CONFIG_FILE


def read_run_config(name: str, run: str | Path) -> TrainConfig:
    """Checked settings. A folder's are those of the run that lies there now, whatever its name was when it was written.

    Args:
        name: of the setting that names the run, for messages.
        run: folder of a run, or a YAML file with the settings of `focusdpo train`.

    Raises:
        FileNotFoundError: there is no such run.
        ValueError: the file does not hold a run's settings.
    """
    path = Path(run)
    is_folder = os.path.isdir(path)  # Path's own raises where a name is too long or a link leads to itself
    file = path / CONFIG_FILE if is_folder else path
    if not os.path.isfile(file):
        hint = f"a folder with {CONFIG_FILE}" if is_folder else "a training run's folder, or its settings as YAML"
        raise FileNotFoundError(f"{name}: no such file: {file}; expected {hint}")
    try:
        settings = read_settings(file, TrainConfig) | ({"output_dir": str(path)} if is_folder else {})
        return cast(TrainConfig, build(TrainConfig, settings))
    except ValueError as error:
        raise ValueError(f"{name}: {file} does not hold the settings of a training run: {error}") from error
