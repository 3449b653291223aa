"""Start kernels and wait for their words: through the compiled host runtime, or without it and slower.

A kernel takes one struct by value. On the Python side that is a `ctypes.Structure` which mirrors the C++ one.
"""

from __future__ import annotations

import ctypes
import functools
import time
import warnings
from dataclasses import dataclass
from types import ModuleType

import torch

from deepep.cuda import driver

_ATTRIBUTE_COOPERATIVE = "CU_LAUNCH_ATTRIBUTE_COOPERATIVE"
_ATTRIBUTE_CLUSTER = "CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION"
_ATTRIBUTE_OVERLAP = "CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION"
_INTERRUPT_PERIOD = 0.001


@functools.cache
def runtime() -> ModuleType | None:
    """Give the compiled host runtime, or None (and one warning with the remedy) where the package was built without it."""
    try:
        from deepep import _runtime  # type: ignore[attr-defined]
    except ImportError as error:
        warnings.warn(
            f"deepep was installed without its host runtime ({error}): launches are slower and waits hold the GIL; "
            "install a C++ compiler and reinstall deepep",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return _runtime


@dataclass(frozen=True)
class Launch:
    """How to start a kernel.

    Attributes:
        function: handle from `jit.Module.function`.
        num_blocks: size of the one-dimensional grid.
        num_threads: per block.
        shared_bytes: dynamic shared memory per block.
        cluster: blocks per cluster (sm_90 and later), 1 for none.
        cooperative: fail rather than start when not all blocks can be resident at once.
        overlap_previous: programmatic dependent launch: may start before the stream's previous kernel ends (sm_90 and later).
    """

    function: int
    num_blocks: int
    num_threads: int
    shared_bytes: int = 0
    cluster: int = 1
    cooperative: bool = False
    overlap_previous: bool = False

    def start(self, arguments: ctypes.Structure, stream: int | None = None) -> None:
        """Start the kernel on `stream` (a handle; torch's current stream if None); raises `CudaError` or `RuntimeError`."""
        if stream is None:
            stream = torch.cuda.current_stream().cuda_stream
        module = runtime()
        if module is None:
            self._start_slowly(arguments, stream)
            return
        module.launch(
            self.function,
            self.num_blocks,
            self.num_threads,
            self.shared_bytes,
            stream,
            arguments,
            self.cluster,
            self.cooperative,
            self.overlap_previous,
        )

    def _start_slowly(self, arguments: ctypes.Structure, stream: int) -> None:
        cuda = driver.bindings()
        config = cuda.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = self.num_blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = self.num_threads, 1, 1
        config.sharedMemBytes, config.hStream = self.shared_bytes, stream
        config.attrs = self._attributes()
        config.numAttrs = len(config.attrs)
        # An array of one parameter address; the struct and the array live until the call returns.
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        driver.call("cuLaunchKernelEx", config, self.function, ctypes.addressof(parameters), 0)

    def _attributes(self) -> list[object]:
        cuda = driver.bindings()
        wanted = {
            _ATTRIBUTE_COOPERATIVE: ("cooperative", self.cooperative),
            _ATTRIBUTE_OVERLAP: ("programmaticStreamSerializationAllowed", self.overlap_previous),
        }
        attributes = []
        for name, (field, is_wanted) in wanted.items():
            if is_wanted:
                attribute = cuda.CUlaunchAttribute()
                attribute.id = getattr(cuda.CUlaunchAttributeID, name)
                setattr(attribute.value, field, 1)
                attributes.append(attribute)
        if self.cluster > 1:
            attribute = cuda.CUlaunchAttribute()
            attribute.id = getattr(cuda.CUlaunchAttributeID, _ATTRIBUTE_CLUSTER)
            attribute.value.clusterDim.x, attribute.value.clusterDim.y, attribute.value.clusterDim.z = (
                self.cluster,
                1,
                1,
            )
            attributes.append(attribute)
        return attributes


def wait_for_words(
    address: int, num_words: int, epoch: int, timeout: float, stop_address: int = 0
) -> tuple[list[int], list[int]]:
    """Wait until pinned words `epoch << 32 | value` carry `epoch`, without holding the GIL.

    Args:
        address: host address of the first of `num_words` 64-bit words.
        num_words: how many.
        epoch: 32 bits that mark this call's words.
        timeout: seconds.
        stop_address: host address of a word that ends the wait as soon as it carries `epoch`, or 0.

    Returns:
        The values of all words, and the indices of those that did not come (empty: all is well).
    """
    module = runtime()
    if module is not None:
        return module.wait_for_words(address, num_words, epoch, timeout, stop_address)
    words = (ctypes.c_uint64 * num_words).from_address(address)
    stop = ctypes.c_uint64.from_address(stop_address) if stop_address else ctypes.c_uint64(epoch + 1 << 32)
    deadline = time.monotonic() + timeout
    while any(word >> 32 != epoch for word in words) and stop.value >> 32 != epoch and time.monotonic() < deadline:
        time.sleep(_INTERRUPT_PERIOD)
    taken = list(words)
    return [word & 0xFFFFFFFF for word in taken], [i for i, word in enumerate(taken) if word >> 32 != epoch]
