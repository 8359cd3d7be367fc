"""Puts a run's page together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from markupsafe import Markup

from focusdpo.drawing.training_curves import BY_TIME, PANELS, Panel
from focusdpo.foundation.journals import read_metrics
from focusdpo.foundation.output_folder import step_folders
from focusdpo.pages.html import COLOURS, plot, write_page
from focusdpo.pages.run.binning import read_run
from focusdpo.pages.run.facts import changed_settings, facts, read_alarms
from focusdpo.pages.run.films import read_films
from focusdpo.pages.run.plotly_figures import heat_map, panel_figure
from focusdpo.training.run_files import (
    CONFIG_FILE,
    COVERAGE_BINS,
    ENVIRONMENT_FILE,
    METRICS_FILE,
    SAMPLES_FOLDER,
    TIME_BINS,
    VALIDATION_FILE,
    read_run_config,
    read_starts,
)

# Which panels stand under which heading.
LEARNING = ("loss", "margin", "accuracy", "error_change", "errors", "drift", "gradient_factor")
FOCUS = ("focus", "coverage_floor")
COURSE = ("gradient_norm", "learning_rate", "beta", "skipped", "speed", "memory")
TIME_COLOURS = ("#4a63d3", "#1f9e89", "#c29a1c", "#d9512c")  # of bins of t, from early to late
MAX_LISTED = 200  # alarms in the table


def write_run_page(
    folder: Path, page: Path, points: int = 2000, max_images: int = 120, image_size: int = 1200, progress: bool = True
) -> None:
    """Writes the page of a run, which may be going on.

    Args:
        folder: of the run.
        page: the HTML file.
        points: of a curve at most.
        max_images: sheets of samples and pages of masks, at most.
        image_size: pixels of the longest side of one.
        progress: show progress bars.
    """
    config = read_run_config("run_dir", folder)
    panels = dict(PANELS)
    if config.loss.loss_type != "sigmoid":  # ln 2 means nothing to other losses
        panels["loss"] = replace(panels["loss"], level=None)
    by_time = [_by_bin(panel) for panel in BY_TIME.values()]
    histogram = [f"focus/coverage_histogram/{i / COVERAGE_BINS:.1f}" for i in range(COVERAGE_BINS)]
    lines = [line for panel in (*panels.values(), *by_time) for line in panel.lines] + histogram
    run = read_run(folder / METRICS_FILE, lines, points, progress)
    held_out = read_metrics(folder / VALIDATION_FILE)
    alarms = read_alarms(folder)
    starts = read_starts(folder / ENVIRONMENT_FILE)

    def drawn(shown: Sequence[Panel], name: str, colours: Sequence[str] = COLOURS) -> list[Markup]:
        figures = [panel_figure(panel, run, held_out, alarms or [], colours) for panel in shown]
        return [plot(figure, f"{name}-{i}") for i, figure in enumerate(figures) if figure is not None]

    focus = drawn([panels[name] for name in FOCUS], "focus")
    coverage = heat_map(run, histogram, config.focus.tau)
    if coverage is not None:
        focus.append(plot(coverage, "coverage-histogram"))
    write_page(
        page,
        "report",
        config.run_name or "/".join(folder.resolve().parts[-2:]),
        "run.html",
        folder=str(folder),
        facts=facts(folder, config, run, held_out, alarms, starts),
        run=run,
        alarms=None if alarms is None else alarms[-MAX_LISTED:],
        more_alarms=max(len(alarms or ()) - MAX_LISTED, 0),
        alarm_counts=Counter(alarm["name"] for alarm in alarms or ()).most_common(),
        learning=drawn([panels[name] for name in LEARNING], "learning"),
        focus=focus,
        mask=config.focus.mask,
        by_time=drawn(by_time, "by-time", TIME_COLOURS),
        course=drawn([panels[name] for name in COURSE], "course"),
        held_out=held_out,
        films=read_films(folder / SAMPLES_FOLDER, max_images, image_size, progress),
        has_samples=bool(step_folders(folder / SAMPLES_FOLDER)),
        changed=changed_settings(config),
        settings=(folder / CONFIG_FILE).read_text(encoding="utf-8", errors="replace"),
        starts=starts,
    )


def _by_bin(panel: Panel) -> Panel:
    """A panel of BY_TIME with a line for each bin of times."""
    (name,) = panel.lines
    edges = [i / TIME_BINS for i in range(TIME_BINS + 1)]
    return replace(panel, lines={f"by_time/{low:.2f}/{name}": f"t {low:.2f} to {high:.2f}" for low, high in pairwise(edges)})
