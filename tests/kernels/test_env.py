"""The text for bug reports."""

from __future__ import annotations

import torch

from focusdpo_kernels.tools.env import report


def test_report(monkeypatch):
    monkeypatch.setenv("FOCUSDPO_BACKEND", "torch")
    text = report()
    assert f"torch {torch.__version__.split('+')[0]}" in text
    assert "triton 3." in text
    assert "FOCUSDPO_BACKEND=torch" in text
    assert "backend for cpu tensors: torch, by FOCUSDPO_BACKEND" in text
    monkeypatch.setenv("FOCUSDPO_BACKEND", "cuda")
    assert "backend for cpu tensors: refused: environment variable FOCUSDPO_BACKEND: got 'cuda'" in report()
    monkeypatch.delenv("FOCUSDPO_BACKEND")
    assert "backend for cpu tensors: torch, the automatic choice on cpu" in report()
