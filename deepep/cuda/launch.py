"""Start kernels and wait for their words: through the compiled host runtime, or without it and slower.

A kernel takes one struct by value. On the Python side that is a `ctypes.Structure` which mirrors the C++ one; its
address is what a launch needs.
"""

from __future__ import annotations

import ctypes
import functools
import time
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch

from deepep.cuda import driver

_POLL_PERIOD = 0.0005


def _current_stream(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _current_stream)
"""Give the handle of torch's current stream of a device; by torch's short cut, a tenth of the public way's time."""


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Give rows as kernels, which load 16 bytes at once, take them: contiguous and aligned; a copy where need be."""
    if tensor.data_ptr() % 16 or not tensor.is_contiguous():
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor


def pointer(tensor: torch.Tensor | None) -> int:
    """Give the address of a tensor, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


class Runtime(Protocol):
    """What both runtimes offer."""

    def launch(
        self,
        function: int,
        grid: int,
        block: int,
        smem: int,
        stream: int,
        args: int,
        cooperative: bool = False,
        pdl: bool = False,
    ) -> None:
        """Start a kernel whose only parameter is the struct at address `args`; raises `RuntimeError`.

        `cooperative`: fail rather than start when not all blocks can be resident at once. `pdl`: programmatic dependent
        launch, may start before the stream's previous kernel ends (sm_90 and later).
        """

    def wait_word(self, address: int, value: int, timeout_s: float) -> bool:
        """Wait, without the GIL, until the 64-bit word at a host address has a value; False when the time is up."""


class _SlowRuntime:
    """The same in Python, for installations without a C++ compiler."""

    def launch(
        self,
        function: int,
        grid: int,
        block: int,
        smem: int,
        stream: int,
        args: int,
        cooperative: bool = False,
        pdl: bool = False,
    ) -> None:
        cuda = driver.bindings()
        config = cuda.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
        config.sharedMemBytes, config.hStream = smem, stream
        config.attrs = _attributes(cooperative, pdl)
        config.numAttrs = len(config.attrs)
        parameters = (ctypes.c_void_p * 1)(args)
        driver.call("cuLaunchKernelEx", config, function, ctypes.addressof(parameters), 0)

    def wait_word(self, address: int, value: int, timeout_s: float) -> bool:
        word = ctypes.c_uint64.from_address(address)
        deadline = time.monotonic() + timeout_s
        while word.value != value:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_PERIOD)
        return True


def _attributes(cooperative: bool, pdl: bool) -> list[Any]:
    cuda = driver.bindings()
    wanted = [
        (cooperative, "CU_LAUNCH_ATTRIBUTE_COOPERATIVE", "cooperative"),
        (pdl, "CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION", "programmaticStreamSerializationAllowed"),
    ]
    attributes = []
    for is_wanted, name, field in wanted:
        if is_wanted:
            attribute = cuda.CUlaunchAttribute()
            attribute.id = getattr(cuda.CUlaunchAttributeID, name)
            setattr(attribute.value, field, 1)
            attributes.append(attribute)
    return attributes


@functools.cache
def runtime() -> Runtime:
    """Give the compiled host runtime, or its slow twin (and one warning with the remedy) where it was not built."""
    try:
        from deepep import _runtime
    except ImportError as error:
        warnings.warn(
            f"deepep was installed without its host runtime ({error}): launches are slower; "
            "install a C++ compiler and reinstall deepep",
            RuntimeWarning,
            stacklevel=2,
        )
        return _SlowRuntime()
    return _runtime
