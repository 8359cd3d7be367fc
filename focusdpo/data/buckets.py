"""Pairs that fit no aspect-ratio bucket: an image would lose too much of its area, or a mask all that is inside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from PIL import Image
from tqdm.auto import tqdm

from focusdpo.data.dataset import PairDataset, reference_mask
from focusdpo.data.images import read_mask, read_size
from focusdpo.data.lines import DatasetError, Problem
from focusdpo.data.references import Placement
from focusdpo.foundation.files import ReadableFile

Masks = dict[str, Callable[[], Image.Image | None]]  # by their field, read when asked for


def leave_out_misfits(dataset: PairDataset, max_crop: float, progress: bool = True) -> list[Problem]:
    """Takes the pairs that fit no bucket out of a dataset.

    Args:
        dataset: changed in place; without buckets, every pair fits.
        max_crop: share of an image's area that may be cut away, 0 to 1.
        progress: show a progress bar.

    Returns:
        Why each pair was taken out, in the order of the pairs; a pair may have several reasons.

    Raises:
        DatasetError: with all reasons, where no pair is left; or a mask cannot be read.
    """
    if dataset.buckets is None and dataset.reference_buckets is None:
        return []
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda index: list(_misfits(dataset, index, max_crop)), range(len(dataset)))
        reasons = list(tqdm(found, total=len(dataset), desc="choosing buckets", unit="pair", disable=not progress, leave=False))
    problems = [problem for of_pair in reasons for problem in of_pair]
    kept = [index for index, of_pair in enumerate(reasons) if not of_pair]
    if problems and not kept:
        file = dataset.records[0].file
        raise DatasetError(problems, f"no pair of {file} fits data.buckets, data.reference_buckets and data.max_crop")
    dataset.keep(kept)
    return problems


def _misfits(dataset: PairDataset, index: int, max_crop: float) -> Iterator[Problem]:
    record, placements = dataset.records[index], dataset.placements[index]

    def misfits(field: str, image: ReadableFile, placement: Placement, masks: Masks) -> Iterator[Problem]:
        before, size = read_size(image), placement.size
        shapes = f"{before[0]}x{before[1]} px to the nearest bucket, {size[0]}x{size[1]} px"
        if (share := float(placement.lost(before))) > max_crop:
            message = f"loses {share:.1%} of its area from {shapes}, data.max_crop allows {max_crop:.1%}"
            yield Problem(record.file, record.line, field, message, "add a bucket for its shape, or cut it by hand")
        for name, read in masks.items():
            try:
                mask = read()
            except (OSError, ValueError, SyntaxError) as error:
                message = f"cannot be read as an image ({error})"
                problem = Problem(record.file, record.line, name, message, "data.check=full lists all such files")
                raise DatasetError([problem]) from error
            # One of several priors may be empty from the start.
            if mask is not None and mask.getbbox() is not None and not placement.mask(mask).any():
                message = f"has nothing left inside when {field} is cut from {shapes}"
                yield Problem(record.file, record.line, name, message, "cut both by hand, around the subject")

    if dataset.buckets is not None:
        priors: Masks = {name: partial(read_mask, path) for name, path in record.prior_fields.items()}
        yield from misfits("winner", record.winner, placements.target, priors)
    if dataset.reference_buckets is not None:
        for number, (reference, placement) in enumerate(zip(record.references, placements.references, strict=True)):
            name = f"references[{number}].{'image' if reference.mask is None else 'mask'}"
            masks: Masks = {name: partial(reference_mask, reference)}
            yield from misfits(f"references[{number}].image", reference.image, placement, masks)
