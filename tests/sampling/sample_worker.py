"""Started by tests/sampling/test_folder.py as processes of a launch: `focusdpo sample`. With CASE "fails" rank 1 fails."""

from __future__ import annotations

import os
import sys

from PIL import Image

from focusdpo.commands.cli import main
from focusdpo.foundation import progress_bars

progress_bars.EVERY = 0.0  # every state of a bar is a line

if os.environ.get("CASE") == "fails" and os.environ["RANK"] == "1":

    def full(image: Image.Image, *arguments: object) -> None:
        raise OSError("no space on rank 1")

    Image.Image.save = full  # type: ignore[method-assign, assignment]

main(["sample", *sys.argv[1:]])
