"""WebDataset shards: tar files whose members open at random, and writing them.

A pair is KEY.json, the record, and one member KEY.NAME for each image, where the record has NAME for its path.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Literal

from tqdm.auto import tqdm

from focusdpo.data.images import ImageBytes, open_file, open_image
from focusdpo.data.lines import Problem
from focusdpo.data.records import PairRecord
from focusdpo.data.writing import pair_line
from focusdpo.foundation.files import ReadableFile, writing
from focusdpo.foundation.packages import require_package

BLOCK = 512  # bytes, of a tar


@dataclass(frozen=True)
class TarMember:
    """A file in a tar that is not compressed: where its bytes lie."""

    shard: Path
    name: str
    offset: int
    size: int

    def open(self, mode: Literal["rb"] = "rb") -> BinaryIO:
        with self.shard.open(mode) as stream:
            stream.seek(self.offset)
            data = stream.read(self.size)
        if len(data) < self.size:
            raise OSError(f"{self.shard} ends within {self.name}")
        return BytesIO(data)

    def __str__(self) -> str:
        return f"{self.shard}/{self.name}"


def list_samples(shard: Path) -> tuple[dict[str, dict[str, TarMember]], list[Problem]]:
    """The members of each pair by their names after the key, in the shard's order, and what is wrong with the tar.

    The line of a problem is the pair's number; that of a problem of the whole is 1.
    """
    samples: dict[str, dict[str, TarMember]] = {}
    problems: list[tuple[str, Problem]] = []  # by the pair's key
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                folder, slash, name = member.name.rpartition("/")
                stem, dot, extension = name.partition(".")
                key = f"{folder}{slash}{stem}"
                if not (stem and dot and extension):
                    message = f"{member.name} belongs to no pair"
                    remedy = "leave it out of the shard"
                    problems.append(("", Problem(shard, 1, member.name, message, remedy, "warning")))
                elif not member.isreg() or member.issparse():
                    message = f"{member.name} is a link or has holes"
                    problems.append((key, Problem(shard, 1, extension, message, "store the file itself")))
                elif extension in samples.setdefault(key, {}):
                    message = f"{member.name} stands twice"
                    problems.append((key, Problem(shard, 1, extension, message, "give every pair its own key")))
                else:
                    samples[key][extension] = TarMember(shard, member.name, member.offset_data, member.size)
            end = tar.offset
        with shard.open("rb") as stream:
            stream.seek(end)
            ended = stream.read(BLOCK) == bytes(BLOCK)
        if not ended:  # tarfile takes the end of the file for the end of the archive
            raise tarfile.ReadError("the end mark is missing")
    except (tarfile.TarError, EOFError) as error:
        message = f"is cut, compressed or damaged ({error})"
        problems.append(("", Problem(shard, 1, "file", message, "copy or write it again, as a tar that is not compressed")))
    lines = {key: line for line, key in enumerate(samples, start=1)}
    return samples, [replace(problem, line=lines.get(key, 1)) for key, problem in problems]


def write_shards(records: Sequence[PairRecord], folder: Path, pairs_per_shard: int, progress: bool = True) -> list[Path]:
    """Writes checked records, in their order, as shards; the images' bytes stay as they are.

    The same records give the same bytes. A shard has its name only once it is whole.
    """
    webdataset = require_package("webdataset", "writing shards")
    bar = tqdm(total=len(records), desc="writing shards", unit="pair", disable=not progress, leave=False)
    written = []
    count = -(-len(records) // pairs_per_shard)
    for number in range(count):
        name = f"pairs-{number:05}-of-{count:05}.tar"  # of how many, so that a missing one is noticed
        first = number * pairs_per_shard
        with writing(folder / name) as partial, webdataset.TarWriter(str(partial), encoder=False, mtime=0) as writer:
            for index, record in enumerate(records[first : first + pairs_per_shard], start=first):
                writer.write({"__key__": f"{index:08}", **_members(record)})
                bar.update()
        written.append(folder / name)
    bar.close()
    return written


def image_suffix(data: bytes) -> str:
    """The usual ending of an image's format; raises what `open_image` does where it is none."""
    with open_image(ImageBytes(data)) as image:
        return {"JPEG": "jpg", "MPO": "jpg"}.get(image.format or "", (image.format or "").lower())


def _members(record: PairRecord) -> dict[str, bytes]:
    members: dict[str, bytes] = {}

    def add(name: str, file: ReadableFile) -> str:
        with open_file(file) as stream:
            data = stream.read()
        name = f"{name}.{image_suffix(data)}"
        members[name] = data
        return name

    references = [(one.image, one.mask, one.class_name) for one in record.references]
    prior = list(record.prior) if record.per_subject else record.prior[0]
    line = pair_line(add, record.prompt, references, record.winner, record.loser, prior, record.meta)
    return {"json": json.dumps(line).encode(), **members}
