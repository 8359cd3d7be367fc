"""The page of a folder's cut-outs: what each photo's mask is, the verdict, and a tick to strike it out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import quote

from focusdpo.building.cut_out_files import HEAD, names_of
from focusdpo.building.cutting import CutOut
from focusdpo.foundation.files import stamp, write_stamped
from focusdpo.pages.html import TEMPLATES

COMMAND = "data compose"


def write_page(page: Path, cut_outs: Sequence[CutOut], decided: Mapping[str, Mapping[str, bool]]) -> None:
    """Writes the page.

    Args:
        page: the HTML file, in the folder that the pictures lie in.
        cut_outs: all of them, those of a subject together.
        decided: what a person has decided, by subject and photo; elsewhere the verdict counts.
    """
    subjects = [
        (name, ones[0].class_name, [_card(one, decided.get(name, {}).get(one.file.name)) for one in ones])
        for name, found in groupby(cut_outs, key=lambda one: one.name)
        if (ones := list(found))
    ]
    used = sum(card["used"] for _, _, cards in subjects for card in cards)
    text = TEMPLATES.get_template("cut_outs.html").render(
        title=f"{used} of {len(cut_outs)} cut-outs are used", subjects=subjects, head=json.dumps(HEAD), stamp=stamp(COMMAND)
    )
    write_stamped(page, text, COMMAND, errors="backslashreplace")


def _card(one: CutOut, decided: bool | None) -> dict[str, Any]:
    scores = ", ".join(f"{name} {value:.2f}" for name, value in one.scores.items())
    return {
        "photo": one.file.name,
        "picture": quote(names_of(one.name, one.file.name)[2]),
        "verdict": one.refused,
        "scores": scores,
        "used": bool(one.mask.any()) and (one.refused is None if decided is None else decided),
        "decided": decided is not None,
    }
