"""Which implementation runs, and why.

``backend`` of every public function is "triton", "torch" or None. An argument wins over the environment variable
``FOCUSDPO_BACKEND``, which wins over the automatic choice: Triton on accelerator tensors, PyTorch elsewhere and for float64.
With ``TRITON_INTERPRET=1`` set before the import, the Triton kernels run on CPU tensors as well.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any, cast, get_args

import torch
import triton

from focusdpo_kernels.choices import Backend

BACKENDS: tuple[str, ...] = get_args(Backend)
ACCELERATORS: tuple[str, ...] = ("cuda", "xpu")  # ROCm devices call themselves cuda

# Triton decides when a kernel is decorated, so what counts is the value at import.
INTERPRETED: bool = triton.knobs.runtime.interpret


def _mend_interpreter() -> None:
    """Lets `for n in range(N)` run in triton 3.6's interpreter with numpy 2.4 or newer.

    Triton before 3.7 makes a loop bound a Python integer by int() of an array with one element, which numpy 2.4 refuses
    unless the array has no dimension. 3.7 takes the dimension away first, as done here; with older numpy it changes nothing.
    """
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


if INTERPRETED and tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 7):
    _mend_interpreter()


def resolve_backend(backend: str | None, *tensors: torch.Tensor) -> Backend:
    """Chooses the implementation for a call.

    Args:
        backend: "triton", "torch" or None (environment, then automatic).
        tensors: the call's arguments that are computed with; they decide the automatic choice. Masks and priors, which are
            only compared or cast, do not: numpy makes them float64.

    Returns:
        "triton" or "torch".

    Raises:
        ValueError: an unknown name, or Triton asked for tensors that it cannot reach.
        TypeError: Triton asked for float64, which only the PyTorch backend computes.
    """
    source = "argument backend"
    if backend is None:
        backend = os.environ.get("FOCUSDPO_BACKEND") or None
        source = "environment variable FOCUSDPO_BACKEND"
    if backend is None:
        for t in tensors:
            if t.device.type not in ACCELERATORS or t.dtype == torch.float64:
                return "torch"
        return "triton"
    if backend not in BACKENDS:
        raise ValueError(f"{source}: got {backend!r}; expected one of {', '.join(BACKENDS)}")
    if backend == "triton":
        if not (INTERPRETED or all(t.device.type in ACCELERATORS for t in tensors)):
            devices = sorted({t.device.type for t in tensors})
            raise ValueError(
                f"{source}: 'triton' needs tensors on an accelerator, got device {', '.join(devices)}; move them there, "
                "use backend='torch', or set TRITON_INTERPRET=1 before importing to run the kernels in the interpreter"
            )
        if any(t.dtype == torch.float64 for t in tensors):
            raise TypeError(f"{source}: the Triton kernels take fp16, bf16 and fp32; use backend='torch' for float64")
    return cast(Backend, backend)


def device_guard(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's device current: Triton launches on the current one, whatever its arguments say."""
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    if tensor.device.type == "xpu":
        return torch.xpu.device(tensor.device)
    return contextlib.nullcontext()
