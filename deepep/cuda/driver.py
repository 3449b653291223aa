"""The few CUDA driver calls that are not on the fast path, with errors that have a name.

Everything goes through `cuda.bindings` (in the extras `cuda12` and `cuda13`), imported at the first call, so importing
this file needs neither a GPU nor the package. Calls act on the context that is current in the calling thread. torch
makes it current on the thread's first use of a device, which need not come before ours: `ensure_context` does.
"""

from __future__ import annotations

import functools
import threading
from types import ModuleType
from typing import Any

from deepep.errors import BackendUnavailable, DeepEPError

REMEDY = "pip install 'deepep[cuda13]'  # or deepep[cuda12] beside a CUDA 12 driver"


_thread = threading.local()


class CudaError(DeepEPError, RuntimeError):
    """A CUDA driver call failed. The message names the call and CUDA's own text.

    Attributes:
        code: the driver's name of the error, e.g. `"CUDA_ERROR_INVALID_VALUE"`.
    """

    def __init__(self, call: str, code: str, text: str) -> None:
        self.code = code
        super().__init__(f"{call} failed: {code} ({text})")


@functools.cache
def bindings() -> ModuleType:
    """Import `cuda.bindings.driver`; raises `BackendUnavailable` with the remedy where it is missing."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise BackendUnavailable(f"the Python package cuda-bindings is missing ({error}); {REMEDY}") from error
    return driver


def call(name: str, *args: Any) -> Any:
    """Call the driver function `name` and return its results: nothing, one, or a tuple of them.

    Raises:
        CudaError: the driver answered with an error.
        BackendUnavailable: no `cuda.bindings`, or no CUDA driver on this machine.
    """
    driver = bindings()
    try:
        status, *results = getattr(driver, name)(*args)
    except RuntimeError as error:  # cuda.bindings could not open libcuda
        raise BackendUnavailable(f"{name}: no CUDA driver on this machine ({error})") from error
    if status != driver.CUresult.CUDA_SUCCESS:
        _, text = driver.cuGetErrorString(status)
        raise CudaError(name, status.name, text.decode() if text else "no text")
    if not results:
        return None
    return results[0] if len(results) == 1 else tuple(results)


def ensure_context(device: int) -> None:
    """Make the primary context of `device` current in this thread, if none is; nearly free from the second call on.

    A thread of torch's autograd for device 0 has no context before something in it calls the CUDA runtime, and a
    backward pass may begin with an operation of ours.
    """
    if getattr(_thread, "has_context", False):
        return
    if not int(call("cuCtxGetCurrent")):
        call("cuCtxSetCurrent", _primary_context(device))
    _thread.has_context = True


@functools.cache
def _primary_context(device: int) -> Any:
    return call("cuDevicePrimaryCtxRetain", call("cuDeviceGet", device))


def device_attribute(attribute: str, device: int) -> int:
    """Read a device attribute by its driver name, e.g. `"CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT"`."""
    return int(call("cuDeviceGetAttribute", getattr(bindings().CUdevice_attribute, attribute), device))


@functools.cache
def can_start_early(device: int) -> bool:
    """Whether kernels may start before their turn in a stream, captured ones as well (sm_90, a driver of CUDA 12.3)."""
    major = device_attribute("CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR", device)
    return major >= 9 and int(call("cuDriverGetVersion")) >= 12030


@functools.cache
def arch_of(device: int) -> str:
    """Name the architecture of a device as NVRTC does, e.g. `"sm_90"`."""
    prefix = "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_"
    return f"sm_{device_attribute(prefix + 'MAJOR', device)}{device_attribute(prefix + 'MINOR', device)}"
