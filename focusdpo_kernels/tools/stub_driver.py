"""A CUDA driver that does nothing: Triton's real host path, and a count of launches, where there is no GPU.

The interpreter runs kernels in Python and ahead-of-time compilation runs none: neither takes the way of a call on a GPU. With
this driver a call on CPU tensors is specialised, compiled for sm_90, assembled by ptxas and handed to Triton's own launcher,
which launches into `stub_driver.c`. It finds arguments that a launcher refuses, sizes that recompile, and kernels that are
launched in vain. **Nothing executes**: outputs hold whatever their memory held.

    from focusdpo_kernels.tools import stub_driver

    stub_driver.install()  # in a process of its own, and TRITON_INTERPRET not set
    with stub_driver.launches() as names:
        patch_entropy(torch.rand(1, 3, 64, 64))
    assert names == ["_entropy_kernel"]
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from focusdpo_kernels import backend

SOURCE = Path(__file__).with_name("stub_driver.c")
TARGET = GPUTarget("cuda", 90, 32)

_library: ctypes.CDLL | None = None
# Lists of the `launches()` that are open. Backward passes may launch from another thread than the one that opened them.
_open: list[list[str]] = []
_lock = threading.Lock()


def install() -> None:
    """Makes the library launch its kernels on CPU tensors, into a driver that does nothing. Lasts until the process ends.

    Kernels are cached in a folder of their own (`stub-driver` beside Triton's cache) unless TRITON_CACHE_DIR is set.

    Raises:
        RuntimeError: kernels were imported for the interpreter, a GPU is present, another driver is loaded, there is no C
            compiler, or Triton's launcher asks for a function that this driver has not (a new version of Triton).
    """
    global _library
    if _library is not None:
        return
    if backend.INTERPRETED or triton.knobs.runtime.interpret:
        raise RuntimeError("stub driver: TRITON_INTERPRET is set, and interpreted kernels cannot be compiled; unset it")
    # Counting asks NVML, while torch.cuda.is_available() would load the GPU's own driver.
    if torch.cuda.device_count() or torch.xpu.device_count():
        raise RuntimeError("stub driver: a GPU is present; run the kernels on it, or hide it (CUDA_VISIBLE_DEVICES='')")
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1", mode=os.RTLD_NOLOAD)  # raises where this process has not loaded one
        raise RuntimeError(
            "stub driver: this process has loaded another libcuda.so.1, to which Triton's launcher would bind; "
            "call install() before anything asks for a GPU"
        )
    # What Triton builds for this driver would serve a real one as well, since it only names libcuda.so.1. A folder of its own
    # makes that no matter of trust.
    cache = Path(os.environ.setdefault("TRITON_CACHE_DIR", triton.knobs.cache.get_triton_dir("stub-driver")))
    path = _build(cache)
    os.environ["TRITON_LIBCUDA_PATH"] = str(path.parent)
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    library.focusdpo_stub_launches.restype = ctypes.c_long
    triton.runtime.driver.set_active(_driver())
    backend.ACCELERATORS = (*backend.ACCELERATORS, "cpu")
    _library = library


@contextlib.contextmanager
def launches() -> Iterator[list[str]]:
    """A list to which the name of every Triton kernel launched inside is appended, in order, from any thread.

    Raises:
        RuntimeError: `install` was not called, or the driver was asked for another number of launches than the list has.
    """
    if _library is None:
        raise RuntimeError("stub driver: call install() first")
    names: list[str] = []
    with _lock:
        before = _library.focusdpo_stub_launches()
        _open.append(names)
    try:
        yield names
    finally:
        with _lock:
            # By identity: two empty lists are equal.
            _open[:] = [other for other in _open if other is not names]
            reached = _library.focusdpo_stub_launches() - before
    if reached != len(names):
        raise RuntimeError(f"stub driver: {len(names)} launches were seen ({names}), but {reached} reached the driver")


def _build(cache: Path) -> Path:
    """Compiles the driver into the cache, once for each state of its source."""
    source = SOURCE.read_bytes()
    folder = cache / f"libcuda-{hashlib.sha256(source).hexdigest()[:16]}"
    path = folder / "libcuda.so.1"
    if path.exists():
        return path
    # The compiler that Triton takes for its own helpers.
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    if compiler is None:
        raise RuntimeError("stub driver: found no C compiler, which Triton needs as well; install gcc, or set CC to one")
    folder.mkdir(parents=True, exist_ok=True)
    # Several processes may build at once: each its own file, and the last to finish replaces those before it by an equal one.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = Path(scratch) / path.name
        command = [compiler, "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", "-o", str(built), str(SOURCE)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            detail = getattr(error, "stderr", None) or error
            raise RuntimeError(f"stub driver: {' '.join(command)} failed: {detail}") from error
        os.replace(built, path)
    return path


def _driver() -> Any:
    """Triton's own CUDA driver, with what it asks PyTorch's CUDA for answered here."""
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    def launcher(src: Any, metadata: Any) -> Callable[..., None]:
        return _recorded(CudaLauncher(src, metadata), metadata.name)

    driver = object.__new__(CudaDriver)  # its __init__ would ask torch.cuda for its functions
    try:
        driver.utils = CudaUtils()
    except ImportError as error:
        raise RuntimeError(
            f"stub driver: the launcher of triton {triton.__version__} asks for a function that {SOURCE.name} has not: {error}"
        ) from error
    driver.launcher_cls = launcher
    driver.get_current_device = lambda: 0
    driver.set_current_device = lambda device: None
    driver.get_current_stream = lambda device=0: 0
    driver.get_device_capability = lambda device=0: divmod(TARGET.arch, 10)
    driver.get_current_target = lambda: TARGET
    driver.get_active_torch_device = lambda: torch.device("cpu")
    driver.get_device_interface = lambda: torch.cpu
    return driver


def _recorded(launcher: Callable[..., None], name: str) -> Callable[..., None]:
    def launch(grid_x: int, grid_y: int, grid_z: int, *arguments: Any) -> None:
        # Together, so that no `launches()` opens or closes between the driver's count and the name.
        with _lock:
            launcher(grid_x, grid_y, grid_z, *arguments)
            if grid_x * grid_y * grid_z > 0:  # Triton does not hand an empty grid to the driver
                for names in _open:
                    names.append(name)

    return launch
