"""Two ways to let other processes of this host map a piece of GPU memory: CUDA IPC handles, and VMM file descriptors.

A `Segment` is memory of our own, its `ticket()` a picklable object, and `open_ticket` turns a peer's ticket into an
address here. Sizes are rounded up to the granularity of the allocator, so that nothing else of this process lies in the
pages that peers map.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deepep.cuda import driver
from deepep.errors import DeepEPError

IPC_GRANULARITY = 2 << 20
_LAZY_PEER_ACCESS = 1
_SOCKET_TIMEOUT = 30.0


@dataclass(frozen=True)
class Mapping:
    """A peer's memory as this process sees it; `close` unmaps it and never raises."""

    address: int
    close: Callable[[], None]


class Segment(ABC):
    """GPU memory of this process that others can map.

    Attributes:
        address: of its first byte.
        num_bytes: its size, at least what was asked for.
    """

    kind = ""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.address = address
        self.num_bytes = num_bytes

    @classmethod
    @abstractmethod
    def allocate(cls, num_bytes: int, device: int) -> Segment:
        """Allocate on the current device; raises `CudaError`."""

    @abstractmethod
    def ticket(self) -> Any:
        """What a peer needs to open it, picklable."""

    @staticmethod
    @abstractmethod
    def open_ticket(ticket: Any, device: int) -> Mapping:
        """Map a peer's segment; raises `CudaError` or `OSError`."""

    @abstractmethod
    def free(self) -> None:
        """Give the memory back; never raises."""


class IpcSegment(Segment):
    """Plain device memory with a CUDA IPC handle: works between most processes of one host and one user."""

    kind = "CUDA IPC"

    @classmethod
    def allocate(cls, num_bytes: int, device: int) -> IpcSegment:  # noqa: ARG003 (the current device's allocator)
        """Allocate with the driver's ordinary allocator."""
        num_bytes = round_up(num_bytes, IPC_GRANULARITY)
        return cls(int(driver.call("cuMemAlloc", num_bytes)), num_bytes)

    def ticket(self) -> bytes:
        """The 64 bytes of the IPC handle."""
        return bytes(driver.call("cuIpcGetMemHandle", self.address).reserved)

    @staticmethod
    def open_ticket(ticket: bytes, device: int) -> Mapping:  # noqa: ARG004 (the current context maps it)
        """Map a peer's segment, enabling peer access to its device where that is another one."""
        handle = driver.bindings().CUipcMemHandle()
        handle.reserved = ticket
        address = int(driver.call("cuIpcOpenMemHandle", handle, _LAZY_PEER_ACCESS))
        return Mapping(address, lambda: _quietly("cuIpcCloseMemHandle", address))

    def free(self) -> None:
        """Give the memory back; peers must have closed it."""
        _quietly("cuMemFree", self.address)


class VmmSegment(Segment):
    """Memory of the virtual memory API whose file descriptor travels over a Unix socket."""

    kind = "VMM file descriptors"

    def __init__(self, address: int, num_bytes: int, handle: Any) -> None:
        super().__init__(address, num_bytes)
        self._handle = handle
        self._server: _DescriptorServer | None = None

    @classmethod
    def allocate(cls, num_bytes: int, device: int) -> VmmSegment:
        """Create physical memory that can be exported, and map it."""
        prop = _vmm_properties(device)
        flag = driver.bindings().CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        num_bytes = round_up(num_bytes, int(driver.call("cuMemGetAllocationGranularity", prop, flag)))
        handle = driver.call("cuMemCreate", num_bytes, prop, 0)
        return cls(_map_or_release(handle, num_bytes, device), num_bytes, handle)

    def ticket(self) -> tuple[str, int]:
        """The name of a socket that hands the descriptor out, and the size."""
        if self._server is None:
            kind = driver.bindings().CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
            descriptor = int(driver.call("cuMemExportToShareableHandle", self._handle, kind, 0))
            self._server = _DescriptorServer(descriptor)
        return self._server.name, self.num_bytes

    @staticmethod
    def open_ticket(ticket: tuple[str, int], device: int) -> Mapping:
        """Fetch the peer's descriptor and map its memory."""
        name, num_bytes = ticket
        kind = driver.bindings().CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        descriptor = _fetch_descriptor(name)
        try:
            handle = driver.call("cuMemImportFromShareableHandle", descriptor, kind)
        finally:
            os.close(descriptor)
        address = _map_or_release(handle, num_bytes, device)
        return Mapping(address, lambda: _unmap(address, num_bytes, handle))

    def free(self) -> None:
        """Give the memory back; peers that still map it keep it alive by themselves."""
        if self._server is not None:
            self._server.close()
        _unmap(self.address, self.num_bytes, self._handle)


class _DescriptorServer:
    """Hands a file descriptor to whoever connects, from a daemon thread, until closed."""

    def __init__(self, descriptor: int) -> None:
        self.name = f"\0deepep-{uuid.uuid4().hex}"  # abstract: leaves no file behind
        self._descriptor = descriptor
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(self.name)
        self._socket.listen(1024)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                with connection, contextlib.suppress(OSError):
                    socket.send_fds(connection, [b"1"], [self._descriptor])

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes accept
        self._socket.close()
        os.close(self._descriptor)


def _fetch_descriptor(name: str) -> int:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_SOCKET_TIMEOUT)
        connection.connect(name)
        _, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
    if not descriptors:
        raise OSError("the peer closed its socket without sending a file descriptor")
    return descriptors[0]


def _vmm_properties(device: int) -> Any:
    cuda = driver.bindings()
    prop = cuda.CUmemAllocationProp()
    prop.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    prop.requestedHandleTypes = cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    prop.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    prop.location.id = device
    return prop


def _map_or_release(handle: Any, num_bytes: int, device: int) -> int:
    """Map physical memory into this process, readable and writable by `device`; if that fails, give all of it back."""
    cuda = driver.bindings()
    address = 0
    try:
        address = driver.call("cuMemAddressReserve", num_bytes, 0, 0, 0)
        driver.call("cuMemMap", address, num_bytes, 0, handle, 0)
        access = cuda.CUmemAccessDesc()
        access.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access.location.id = device
        access.flags = cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        driver.call("cuMemSetAccess", address, num_bytes, [access], 1)
    except DeepEPError:
        _unmap(address, num_bytes, handle)  # what was not done yet is not undone, quietly
        raise
    return int(address)


def _unmap(address: int, num_bytes: int, handle: Any) -> None:
    _quietly("cuMemUnmap", address, num_bytes)
    _quietly("cuMemAddressFree", address, num_bytes)
    _quietly("cuMemRelease", handle)


def _quietly(name: str, *args: Any) -> None:
    """Call the driver on the way out: a context that is already broken has nothing left to give back."""
    with contextlib.suppress(DeepEPError):
        driver.call(name, *args)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple
