"""What tests of this folder share."""

from __future__ import annotations

import copy
import dataclasses
import functools

import pytest


@pytest.fixture(scope="session")
def kept_cuts():
    return {}


@pytest.fixture(scope="module")
def cut_once(kept_cuts):
    """The same photos are cut out under the same settings once, for all tests: GrabCut takes most of their time."""
    from focusdpo.building.cutting import Cutter

    cut = Cutter.cut

    @functools.wraps(cut)
    def kept(self, name, class_name, files):
        by = (type(self._segmentation), vars(self._segmentation), type(self._encoder), self._config, self._longest)
        key = (name, class_name, repr(by), *(file.read_bytes() for file in files))
        if key not in kept_cuts:
            kept_cuts[key] = cut(self, name, class_name, files)
        found = copy.deepcopy(kept_cuts[key])
        return [dataclasses.replace(one, file=file) for one, file in zip(found, files, strict=True)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cutter, "cut", kept)
        yield
