"""Shared fixtures. Without a GPU the Triton kernels run in the interpreter, which has to be chosen before they are imported."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # "0": through a stub driver, see benchmarks/stub_tests.py

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as of what a script starts with &; children would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # after the choice of the interpreter

pytest.register_assert_rewrite("tests.backbones")

LONG = bool(os.environ.get("FOCUSDPO_LONG_TESTS"))  # also what would take too long for every run
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF_AND_FULL = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def device() -> torch.device:
    return DEVICE


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fills every freshly allocated tensor with NaN, so that an output that is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from focusdpo.models.tiny_flux import write_tiny_flux

    return write_tiny_flux(tmp_path_factory.mktemp("model") / "tiny-flux")


@pytest.fixture(scope="session")
def tiny_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight small pairs of composed photographs; returns their pairs.jsonl."""
    from focusdpo.demo.scenes import write_dataset

    return write_dataset(tmp_path_factory.mktemp("data") / "pairs", 8, 96, seed=0)


@pytest.fixture
def config(request: pytest.FixtureRequest, tiny_flux: Path, tiny_pairs: Path, tmp_path: Path) -> Any:
    """A tiny run with the settings that the test's module names by dotted names in SETTINGS."""
    from tests.runs import tiny_config

    places = {"pairs": tiny_pairs, "folder": tmp_path}
    settings = getattr(request.module, "SETTINGS", {})
    filled = {name: value.format(**places) if isinstance(value, str) else value for name, value in settings.items()}
    return tiny_config(tiny_flux, tiny_pairs, tmp_path, filled)


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Forgets accelerate's global state after each test that made some."""
    yield
    if "accelerate.state" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """PyTorch's default for tensors of no named type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is kept of a dataset's headers, here and in processes that tests start."""
    os.environ["FOCUSDPO_CACHE"] = str(tmp_path_factory.mktemp("cache"))
