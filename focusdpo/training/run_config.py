"""The settings of a run, read back from its folder or a YAML file."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser

from focusdpo.training.config import TrainConfig
from focusdpo.training.run_folder import CONFIG_FILE


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
    file = path / CONFIG_FILE if path.is_dir() else path
    if not file.is_file():
        hint = f"a folder with {CONFIG_FILE}" if path.is_dir() else "a training run's folder, or its settings as YAML"
        raise FileNotFoundError(f"{name}: no such file: {file}; expected {hint}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TrainConfig)
    try:
        parsed = vars(parser.instantiate(parser.parse_path(str(file))))
        return TrainConfig(**parsed | ({"output_dir": str(path)} if path.is_dir() else {}))
    except (ArgumentError, ValueError, TypeError) as error:
        raise ValueError(f"{name}: {file} does not hold the settings of a training run: {error}") from error
