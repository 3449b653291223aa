"""`SymmetricMemory`: the same bytes at the same offset on every rank of a host, each rank able to address all of them.

Lifetime. `close` is local: it waits for this rank's own kernels (all of them bounded), says in every peer's memory
that this rank is out, and unmaps. The rank's own memory is given back once every peer has said so or is dead, which is
looked up at the next construction or `close` in this process; what is left then goes with the process. So no rank ever
waits for another to close, and no rank's memory goes away under a peer's running kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deepep.backends.ipc.segments import IpcSegment, Mapping, Segment, VmmSegment, round_up
from deepep.cuda import driver
from deepep.errors import BackendUnavailable, CommTimeout, DeepEPError
from deepep.group import Group

WINDOW_ALIGNMENT = 4096
_KINDS: tuple[type[Segment], ...] = (IpcSegment, VmmSegment)
_THIS_PROCESS = uuid.uuid4().hex
_graveyard: list[_Remains] = []


@dataclass(frozen=True)
class _Card:
    """What a rank tells the others about its memory."""

    process: str
    pid: int
    device_uuid: str
    address: int
    ticket: Any
    error: str


@dataclass
class _Remains:
    """What is left of a memory after `close`: freed when no peer maps it any more."""

    own: Segment
    leave_address: int
    mappings: list[Mapping]
    leave_words: list[int]
    pids: list[int]

    def close(self) -> None:
        """Tell the peers that this rank is out, and unmap their memory. Leaves nothing to do a second time."""
        words, self.leave_words = self.leave_words, []
        mappings, self.mappings = self.mappings, []
        if not words:
            return
        with contextlib.suppress(DeepEPError):
            driver.call("cuCtxSynchronize")
        for word, pid in zip(words, self.pids, strict=True):
            # Nobody reads a dead rank's memory, and writing to it may fail; the others must hear in any case.
            if _is_alive(pid):
                with contextlib.suppress(DeepEPError):
                    driver.call("cuMemsetD32", word, 1, 1)
        with contextlib.suppress(DeepEPError):
            driver.call("cuCtxSynchronize")
        for mapping in mappings:
            mapping.close()

    def try_free(self) -> bool:
        """Free the memory if every peer has left or died; says whether it is gone."""
        self.close()
        left = (ctypes.c_uint32 * len(self.pids))()
        try:
            driver.call("cuMemcpyDtoH", ctypes.addressof(left), self.leave_address, ctypes.sizeof(left))
        except DeepEPError:
            return True  # the context is broken: the process's end is the only way to give memory back
        if all(word or not _is_alive(pid) for word, pid in zip(left, self.pids, strict=True)):
            self.own.free()
            return True
        return False


class SymmetricMemory:
    """`num_bytes` of zeroed GPU memory on every rank, mapped by all of them. Construction is collective.

    Attributes:
        num_bytes: usable bytes, the same on every rank.
        base: address of this rank's first byte.
        peer_bases: address of every rank's first byte as this rank sees it, by rank.
        peer_table: a device array of these addresses, uint64 `[R]`.
        kind: how it is shared, for people.
        device: index of the device it lies on.
    """

    def __init__(self, group: Group, num_bytes: int, device: int, timeout: float) -> None:
        """Allocate and map.

        Args:
            group: the ranks, all on this host.
            num_bytes: per rank, the same on all of them.
            device: index of this rank's CUDA device.
            timeout: seconds to wait for the other ranks.

        Raises:
            BackendUnavailable: a rank could not allocate, or could not map another's; names them, on every rank.
            CommTimeout: a rank did not arrive.
        """
        self.num_bytes, self.device = num_bytes, device
        self._timeout = timeout
        self._remains: _Remains | None = None
        with torch.cuda.device(device):
            driver.ensure_context(device)
            collect_remains()
            torch.cuda.current_stream(device).synchronize()
            failures: list[str] = []
            for kind in _KINDS:
                failure = self._build(group, kind)
                if failure is None:
                    return
                failures.append(failure)
        raise BackendUnavailable("GPU memory cannot be shared between these ranks; " + "; ".join(failures))

    @property
    def is_alive(self) -> bool:
        """Whether it can still be used."""
        return self._remains is not None

    def offset_of(self, tensor: torch.Tensor) -> int | None:
        """Byte offset of a contiguous tensor that lies inside this rank's memory, or None."""
        offset = tensor.data_ptr() - self.base
        inside = tensor.is_cuda and offset >= 0 and offset + tensor.nbytes <= self.num_bytes
        return offset if inside and tensor.is_contiguous() else None

    def as_tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Give a tensor over this rank's bytes from `offset` on. It must not be used after `close`."""
        num_bytes = dtype.itemsize
        for size in shape:
            num_bytes *= size
        if num_bytes == 0:
            return torch.empty(shape, dtype=dtype, device=f"cuda:{self.device}")
        view = _CudaArray(self, self.base + offset, num_bytes)
        return torch.as_tensor(view, device=f"cuda:{self.device}").view(dtype).view(shape)

    def retire(self) -> None:
        """What a destructor may do: no CUDA call, no wait. The rest happens at the next construction or `close`."""
        remains, self._remains = self._remains, None
        if remains is not None:
            _graveyard.append(remains)

    def close(self) -> None:
        """Unmap the peers and give the memory back as soon as they have left. May be called twice, never raises."""
        self.retire()
        with contextlib.suppress(DeepEPError, RuntimeError), torch.cuda.device(self.device):
            driver.ensure_context(self.device)
            collect_remains()

    def __del__(self) -> None:
        self.retire()

    def _build(self, group: Group, kind: type[Segment]) -> str | None:
        """Try one way of sharing; says why it failed, the same on every rank."""
        leave_offset = round_up(self.num_bytes, WINDOW_ALIGNMENT)
        table_offset = leave_offset + round_up(4 * group.num_ranks, 16)
        total = table_offset + 8 * group.num_ranks
        own, card = self._allocate(kind, total)
        mappings: dict[int, Mapping] = {}
        try:
            cards = self._gather(group, card)
            mappings, error = _open_all(cards, group.rank, kind, self.device)
            errors = self._gather(group, error)
            bad = {rank: text for rank, text in enumerate(errors) if text}
            if own is None or bad:
                _close(mappings)
                self._gather(group, None)  # everyone has unmapped
        except CommTimeout:
            _close(mappings)
            if own is not None:
                own.free()
            raise
        if own is None or bad:
            if own is not None:
                own.free()
            return f"{kind.kind}: " + ", ".join(f"rank {rank}: {text}" for rank, text in bad.items())
        addresses = [
            own.address if rank == group.rank else mappings[rank].address if rank in mappings else peer.address
            for rank, peer in enumerate(cards)
        ]
        self.kind, self.base, self.peer_bases = kind.kind, own.address, tuple(addresses)
        self.peer_table = own.address + table_offset
        table = (ctypes.c_uint64 * group.num_ranks)(*addresses)
        driver.call("cuMemcpyHtoD", self.peer_table, ctypes.addressof(table), ctypes.sizeof(table))
        others = [rank for rank in range(group.num_ranks) if rank != group.rank]
        words = [addresses[rank] + leave_offset + 4 * group.rank for rank in range(group.num_ranks)]
        pids = [cards[rank].pid for rank in range(group.num_ranks)]
        self._remains = _Remains(
            own, own.address + leave_offset, [mappings[r] for r in others if r in mappings], words, pids
        )
        return None

    def _allocate(self, kind: type[Segment], num_bytes: int) -> tuple[Segment | None, _Card]:
        own, ticket, error = None, None, ""
        try:
            own = kind.allocate(num_bytes, self.device)
            driver.call("cuMemsetD8", own.address, 0, own.num_bytes)
            driver.call("cuCtxSynchronize")
            ticket = own.ticket()
        except (DeepEPError, OSError) as failure:
            error = str(failure)
        device_uuid = str(torch.cuda.get_device_properties(self.device).uuid)
        address = 0 if own is None else own.address
        return own, _Card(_THIS_PROCESS, os.getpid(), device_uuid, address, ticket, error)

    def _gather(self, group: Group, obj: Any) -> list[Any]:
        return group.all_gather_object(obj, op="map GPU memory of the other ranks", timeout=self._timeout)


class _CudaArray:
    """The interface by which torch takes over foreign GPU memory; keeps the owner alive as long as the tensor."""

    def __init__(self, owner: SymmetricMemory, address: int, num_bytes: int) -> None:
        self.owner = owner
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 2,
        }


def collect_remains() -> None:
    """Close what destructors left open, and free memory that no peer maps any more. Never raises."""
    waiting, _graveyard[:] = list(_graveyard), []
    _graveyard.extend(remains for remains in waiting if not remains.try_free())


def _open_all(cards: list[_Card], rank: int, kind: type[Segment], device: int) -> tuple[dict[int, Mapping], str]:
    """Map every peer of another process; gives the mappings by rank and what went wrong, if anything."""
    mappings: dict[int, Mapping] = {}
    if cards[rank].error:
        return mappings, cards[rank].error
    for peer, card in enumerate(cards):
        if card.process == _THIS_PROCESS and card.pid == os.getpid():
            continue
        if card.error:
            return mappings, f"rank {peer} has no memory to map"
        error = _check_peer_access(card, device)
        try:
            if not error:
                mappings[peer] = kind.open_ticket(card.ticket, device)
        except (DeepEPError, OSError) as failure:
            error = str(failure)
        if error:
            return mappings, f"cannot map rank {peer} ({error})"
    return mappings, ""


def _close(mappings: dict[int, Mapping]) -> None:
    for mapping in mappings.values():
        mapping.close()


def _check_peer_access(card: _Card, device: int) -> str:
    """Say why this device cannot address the peer's, where that is known beforehand; "" otherwise."""
    for other in range(torch.cuda.device_count()):
        is_peers = other != device and str(torch.cuda.get_device_properties(other).uuid) == card.device_uuid
        if is_peers and not torch.cuda.can_device_access_peer(device, other):
            return f"GPU {device} cannot access GPU {other}: no NVLink or PCIe peer access between them"
    return ""


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state != "Z"  # dead, and its parent has not looked yet
