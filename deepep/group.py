"""Group: rank, size, all-to-all, object gather and barrier over any torch ProcessGroup or an mpi4py communicator.

Nothing here ever hangs: each call takes a limit, and a peer that does not arrive is named in a `CommTimeout`.
"""

from __future__ import annotations

import pickle
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from deepep.errors import BufferDestroyed, CommTimeout, InvalidArgument


class Group(ABC):
    """The ranks that work together, and the host-side collectives among them.

    Collective calls must come in the same order on every rank. Every `Group` made on the same process group or
    communicator has its own tag, so several of them do not mix messages, provided that all ranks make them in the
    same order. After a `CommTimeout` a group is broken: calls raise `BufferDestroyed`.

    Attributes:
        rank: this rank inside the group.
        num_ranks: size of the group.
        raw: the process group or communicator that was passed in.
        is_mpi: whether `raw` is an mpi4py communicator.
    """

    is_mpi = False

    def __init__(self, raw: Any, rank: int, num_ranks: int) -> None:
        self.raw = raw
        self.rank = rank
        self.num_ranks = num_ranks
        self._lock = threading.Lock()
        self._lost: tuple[int, ...] | None = None

    @property
    def lost_ranks(self) -> tuple[int, ...] | None:
        """The ranks whose absence broke this group, or None while it works."""
        return self._lost

    def exchange(self, send: Sequence[torch.Tensor], recv: Sequence[torch.Tensor], *, op: str, timeout: float) -> None:
        """All-to-all: `send[p]` goes to rank p and lands in its `recv[rank]`.

        Args:
            send: one contiguous tensor per rank, any dtype and shape, CPU or CUDA; empty ones send nothing. CUDA
                tensors are read on the current stream, and results are ready on it.
            recv: one contiguous tensor per rank, as many bytes as that rank sends; its own entry is copied here.
            op: what to call this in errors.
            timeout: seconds.

        Raises:
            CommTimeout: peers did not arrive in time, or died; it names exactly these.
            BufferDestroyed: an earlier call failed.
            InvalidArgument: not one contiguous tensor per rank, or the own entries differ in size.
        """
        self._check(send, recv, op, timeout)
        with self._lock:
            if self._lost is not None:
                who = ", ".join(map(str, self._lost)) or "unknown"
                raise BufferDestroyed(f"{op}: this group lost rank(s) {who} earlier; build a new one without them")
            try:
                self._run(send, recv, op, timeout)
            except CommTimeout as error:
                self._lost = error.missing_ranks
                raise

    def all_gather_object(self, obj: Any, *, op: str, timeout: float) -> list[Any]:
        """Every rank's `obj` (picklable), in rank order. Errors and arguments as in `exchange`."""
        deadline = time.monotonic() + timeout
        mine = torch.frombuffer(bytearray(pickle.dumps(obj)), dtype=torch.uint8)
        length = torch.tensor([mine.numel()])
        lengths = [torch.zeros_like(length) for _ in range(self.num_ranks)]
        self.exchange([length] * self.num_ranks, lengths, op=op, timeout=timeout)
        parts = [torch.empty(int(item), dtype=torch.uint8) for item in lengths]
        left = max(0.0, deadline - time.monotonic())
        self.exchange([mine] * self.num_ranks, parts, op=op, timeout=left)
        return [pickle.loads(part.numpy().tobytes()) for part in parts]

    def barrier(self, *, op: str, timeout: float) -> None:
        """Returns once every rank has called it. Errors and arguments as in `exchange`."""
        word = torch.zeros(1, dtype=torch.uint8)
        self.exchange([word] * self.num_ranks, [word.clone() for _ in range(self.num_ranks)], op=op, timeout=timeout)

    @abstractmethod
    def _exchange_bytes(
        self, send: Sequence[torch.Tensor], recv: Sequence[torch.Tensor], op: str, timeout: float
    ) -> None:
        """`exchange` of flat uint8 tensors on this group's device, own entry already done."""

    def _run(self, send: Sequence[torch.Tensor], recv: Sequence[torch.Tensor], op: str, timeout: float) -> None:
        recv[self.rank].reshape(-1).view(torch.uint8).copy_(send[self.rank].reshape(-1).view(torch.uint8))
        if self.num_ranks == 1:
            return
        outgoing = [_to_host(tensor, index == self.rank) for index, tensor in enumerate(send)]
        incoming = [_host_twin(tensor, index == self.rank) for index, tensor in enumerate(recv)]
        if any(tensor.is_cuda for tensor in send):
            torch.cuda.current_stream().synchronize()
        self._exchange_bytes(outgoing, incoming, op, timeout)
        for index, (tensor, host) in enumerate(zip(recv, incoming, strict=True)):
            if index != self.rank and tensor.is_cuda:
                tensor.reshape(-1).view(torch.uint8).copy_(host, non_blocking=True)

    def _check(self, send: Sequence[torch.Tensor], recv: Sequence[torch.Tensor], op: str, timeout: float) -> None:
        if timeout < 0:
            raise InvalidArgument(f"{op}: timeout={timeout}: expected seconds, at least 0")
        for name, tensors in (("send", send), ("recv", recv)):
            if len(tensors) != self.num_ranks:
                raise InvalidArgument(
                    f"{op}: {name} has {len(tensors)} tensors; expected one per rank, {self.num_ranks}"
                )
            if not all(tensor.is_contiguous() for tensor in tensors):
                raise InvalidArgument(f"{op}: {name} has a tensor that is not contiguous")
        if send[self.rank].nbytes != recv[self.rank].nbytes:
            raise InvalidArgument(
                f"{op}: this rank's own entries have {send[self.rank].nbytes} and {recv[self.rank].nbytes} bytes"
            )


def make_group(group: Any = None, comm: Any = None) -> Group:
    """The `Group` over a torch process group or an mpi4py communicator; an already made `Group` is returned as it is.

    Every rank of it must call this, and in the same order if it is called several times.

    Args:
        group: `torch.distributed.ProcessGroup` or `Group`.
        comm: `mpi4py.MPI.Comm`; torch.distributed need not be initialised.

    Raises:
        InvalidArgument: neither or both are given, or this process is not a member.
    """
    if (group is None) == (comm is None):
        found = "neither" if group is None else "both"
        raise InvalidArgument(f"group, comm: {found} given; pass a torch.distributed ProcessGroup or an mpi4py Comm")
    if isinstance(group, Group):
        return group
    if comm is not None:
        from deepep.group_mpi import MpiGroup

        return MpiGroup(comm)
    from deepep.group_torch import make_torch_group

    return make_torch_group(group)


def _to_host(tensor: torch.Tensor, skip: bool) -> torch.Tensor:
    flat = tensor.reshape(-1).view(torch.uint8)
    if skip or not tensor.is_cuda:
        return flat
    return torch.empty(flat.shape, dtype=torch.uint8, pin_memory=True).copy_(flat, non_blocking=True)


def _host_twin(tensor: torch.Tensor, skip: bool) -> torch.Tensor:
    flat = tensor.reshape(-1).view(torch.uint8)
    return flat if skip or not tensor.is_cuda else torch.empty(flat.shape, dtype=torch.uint8, pin_memory=True)
