"""Settings of the pages: of `focusdpo report` and `data show`."""

from __future__ import annotations

from dataclasses import dataclass

from focusdpo.foundation.settings import require


@dataclass
class ReportConfig:
    """The page of a training run.

    Args:
        run_dir: Folder of the run; it may be going on, or have been killed.
        out: HTML file; null writes report.html in the run's folder.
        points: Points of a curve at most. A longer run is shown in bins, each with its mean, lowest and highest value.
        max_images: Sheets of samples and pages of masks in the page, at most: of each pair as many, evenly over the run.
        image_size: Longest side of such an image in pixels.
        overwrite: Replace a page that an earlier command wrote. The run's own report.html is replaced without it.
    """

    run_dir: str
    out: str | None = None
    points: int = 2000
    max_images: int = 120
    image_size: int = 1200
    overwrite: bool = False

    def __post_init__(self) -> None:
        require(self.points >= 10, "points", self.points, "at least 10")
        require(self.max_images >= 0, "max_images", self.max_images, "0 or more")
        require(64 <= self.image_size <= 4096, "image_size", self.image_size, "64 to 4096 pixels")


@dataclass
class ShowConfig:
    """Preference pairs and the page to look at them.

    Args:
        path: A dataset, as data.train of a training run names it.
        out: HTML file; the thumbnails come into a folder beside it, page_files for page.html.
        size: Longest side of a thumbnail in pixels.
        overwrite: Replace a page that an earlier command wrote.
    """

    path: str
    out: str = "page.html"
    size: int = 256
    overwrite: bool = False

    def __post_init__(self) -> None:
        require(16 <= self.size <= 2048, "size", self.size, "16 to 2048 pixels")
