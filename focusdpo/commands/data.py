"""`focusdpo data ...`: check, shard and import preference pairs."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from focusdpo.training.config import DataConfig

logger = logging.getLogger(__name__)

VALIDATE = "data validate"
# What commands write, see `focusdpo.foundation.output_folder`.
SHARD = r"pairs-\d{5,}-of-\d{5,}\.tar"
IMPORTED = (r"pairs\.jsonl", r"images/\d{7,}_(prior|winner|loser|reference\d+)\.\w+", r"images/whole_\d+x\d+\.png")


@dataclass
class ValidateConfig:
    """Preference pairs to be checked.

    Args:
        path: A dataset, as data.train of a training run names it.
        json: File for the report as JSON; "-" prints it instead of the text.
        check: "full" decodes every image, "headers" reads sizes only.
        resolution: Longest side of winner and loser in pixels, by which layouts are counted.
        backbone: Whose own sizes references have where no number is given.
        reference_resolution: Longest side of a reference image in pixels; null takes the backbone's own size.
        reference_resolution_multiple: Another one for pairs that have several; null is reference_resolution's value.
    """

    path: str
    json: str | None = None
    check: Literal["full", "headers"] = "full"
    resolution: int = 512
    backbone: Literal["flux", "kontext", "flux2", "qwen-edit-plus"] = "flux"
    reference_resolution: int | None = None
    reference_resolution_multiple: int | None = None

    def __post_init__(self) -> None:
        # The settings of a run have their own checks.
        self.data = DataConfig(
            self.path,
            resolution=self.resolution,
            reference_resolution=self.reference_resolution,
            reference_resolution_multiple=self.reference_resolution_multiple,
        )


@dataclass
class ShardConfig:
    """Preference pairs and the WebDataset shards made of them.

    Args:
        source: A dataset, as data.train of a training run names it.
        out_dir: Folder for the shards.
        pairs_per_shard: Pairs in a shard; the last has what is left.
        check: What is looked at before: "full" decodes every image, "headers" reads sizes only.
        overwrite: Delete the shards that an earlier command left in out_dir.
    """

    source: str
    out_dir: str
    pairs_per_shard: int = 1000
    check: Literal["full", "headers"] = "full"
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.pairs_per_shard < 1:
            raise ValueError(f"pairs_per_shard: got {self.pairs_per_shard}; expected at least 1")


@dataclass
class ImportConfig:
    """Another project's list of pairs and the dataset made of it.

    Args:
        source: UNO's json; or parquet files with Pick-a-Pic's columns caption, jpg_0, jpg_1 and label_0: one, a folder or a
            pattern.
        out_dir: Folder for pairs.jsonl and its images.
        losers: With UNO's json: folder that has a loser for each image_tgt_path, at the same path.
        priors: With UNO's json: folder that has the priors, likewise; without it, a prior marks where winner and loser differ.
        references: With Pick-a-Pic's columns: columns of reference images.
        prior: With Pick-a-Pic's columns: column of the prior; without it, a prior marks the whole image.
        overwrite: Delete what an earlier import left in out_dir.
    """

    source: str
    out_dir: str
    losers: str | None = None
    priors: str | None = None
    references: list[str] = field(default_factory=list)
    prior: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        is_uno = self.source.endswith(".json")
        for name in ("losers", "priors") if not is_uno else ("references", "prior"):
            if getattr(self, name):
                other = "parquet files" if not is_uno else "UNO's json"
                raise ValueError(f"{name}: got {getattr(self, name)!r}; expected none with {other}")
        if is_uno and self.losers is None:
            raise ValueError("losers: UNO's json has winners alone; name a folder with a loser for each")
        if not is_uno and not self.references:
            message = "a pair needs 1 to 6 reference images, and Pick-a-Pic itself has none; name the columns that have them"
            raise ValueError(f"references: {message}")


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
        if not 16 <= self.size <= 2048:
            raise ValueError(f"size: got {self.size}; expected 16 to 2048 pixels")


def prepare_validation(config: ValidateConfig) -> Callable[[], None]:
    """Finds the dataset, and returns what checks it: it exits with 1 where training would not start."""
    from focusdpo.data.dataset import SizeRules
    from focusdpo.data.sources import find_sources
    from focusdpo.data.validation import validate
    from focusdpo.foundation.files import check_stamped, stamp, write_stamped
    from focusdpo.training.image_sizes import size_rules

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


def prepare_shards(config: ShardConfig) -> Callable[[], None]:
    """Checks the pairs, and returns what writes the shards.

    Raises:
        FileNotFoundError, DatasetError: there is no such dataset, or it is unfit.
        FileExistsError, NotADirectoryError: the folder holds something that may not be replaced.
    """
    from focusdpo.data.shards import write_shards
    from focusdpo.data.validation import load_pairs
    from focusdpo.foundation.output_folder import OutputFolder
    from focusdpo.foundation.packages import require_package

    require_package("webdataset", "writing shards")
    folder = Path(config.out_dir)
    out = OutputFolder("out_dir", folder, "data shard", [SHARD])
    others = sorted(file.name for file in folder.glob("*.tar") if not re.fullmatch(SHARD, file.name))
    if others:  # they would be read as part of the dataset
        raise FileExistsError(f"out_dir: {folder} holds other shards ({', '.join(others[:5])}); name another folder")
    out.check(config.overwrite or out.is_unfinished, "replace them with --overwrite true, or name another folder")
    records = load_pairs(config.source, config.check)
    sources = {record.file.resolve() for record in records}
    if any(source.parent == folder.resolve() and source.suffix == ".tar" for source in sources):
        raise FileExistsError(f"out_dir: {folder} holds the source itself; name another folder")

    def work() -> None:
        out.begin(clear=True)
        with out:
            shards = write_shards(records, folder, config.pairs_per_shard)
        logger.info("wrote %d pairs to %d shards in %s", len(records), len(shards), folder)

    return work


def prepare_import(config: ImportConfig) -> Callable[[], None]:
    """Finds the source, and returns what imports it.

    Raises:
        FileNotFoundError: there is no such list or folder.
        FileExistsError, NotADirectoryError: the folder holds something that may not be replaced.
    """
    from focusdpo.data.importers import import_pickapic, import_uno
    from focusdpo.data.sources import find_sources
    from focusdpo.foundation.output_folder import OutputFolder

    folder, source = Path(config.out_dir), Path(config.source)
    out = OutputFolder("out_dir", folder, "data import", IMPORTED)
    out.check(config.overwrite or out.is_unfinished, "replace it with --overwrite true, or name another folder")
    for name in ("losers", "priors"):
        value = getattr(config, name)
        if value is not None and not Path(value).is_dir():
            raise FileNotFoundError(f"{name}: no such folder: {value}")
    if config.losers is not None and not source.is_file():
        raise FileNotFoundError(f"source: no such file: {source}")
    files = [] if config.losers is not None else [table.file for table in find_sources(config.source)]

    def work() -> None:
        out.begin(clear=True)
        with out:
            try:
                if config.losers is not None:
                    priors = None if config.priors is None else Path(config.priors)
                    writer = import_uno(source, Path(config.losers), priors, folder)
                else:
                    writer = import_pickapic(files, config.references, config.prior, folder)
            except ValueError as error:
                raise ValueError(f"source: {error}") from error
        logger.info("%s: %s", folder, writer.summary())

    return work


def prepare_page(config: ShowConfig) -> Callable[[], None]:
    """Finds the dataset, and returns what writes the page.

    Raises:
        FileNotFoundError: there is no such dataset.
        ValueError, FileExistsError, NotADirectoryError: the page may not be written there.
    """
    from focusdpo.data.sources import find_sources
    from focusdpo.pages.pairs import check_page, write_page

    find_sources(config.path)
    page = Path(config.out)
    out = check_page(page, config.overwrite)

    def work() -> None:
        cards = write_page(config.path, page, out, config.size)
        logger.info("%s: %d pairs, %d with problems", page, len(cards), sum(bool(card.problems) for card in cards))

    return work
