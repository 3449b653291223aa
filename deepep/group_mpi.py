"""`MpiGroup`: an mpi4py communicator, by polled point-to-point messages of host memory.

NOTES. MPI has no time limits, so everything is non-blocking and polled. A rank that gives up says so to its peers by a
farewell, so that they do not take it for missing when they reach their own limit later.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from mpi4py import MPI

from deepep import env
from deepep.errors import CommTimeout, InvalidArgument
from deepep.group import Group, Limit

_FAREWELL_TAG = 1
_FIRST_TAG = 2
# MPI counts are C ints; longer messages go in pieces.
_MAX_PIECE = 1 << 30
_NUM_EAGER_POLLS = 200
_POLL_INTERVAL = 50e-6


class _Shared:
    """What all groups on one communicator have in common.

    Attributes:
        comm: a duplicate of the user's communicator, so that no message of ours meets one of theirs.
        next_tag: for the next group.
        farewells: peers that have given up.
    """

    def __init__(self, comm: MPI.Comm) -> None:
        self.comm, request = comm.Idup()
        limit = Limit(env.timeout())
        if not _poll(request.Test, limit):
            others = [rank for rank in range(comm.Get_size()) if rank != comm.Get_rank()]
            raise CommTimeout("make_group", others, limit.timeout, "duplicating the communicator")
        self.next_tag = _FIRST_TAG
        self.farewells: set[int] = set()


_keyval: int | None = None


class MpiGroup(Group):
    """An mpi4py intracommunicator. The first group on a communicator duplicates it, which is collective.

    Args:
        comm: `mpi4py.MPI.Intracomm`.

    Raises:
        InvalidArgument: not a communicator, or null.
        CommTimeout: the duplication did not finish within `DEEPEP_TIMEOUT` seconds.
    """

    is_mpi = True

    def __init__(self, comm: Any) -> None:
        if not isinstance(comm, MPI.Intracomm) or comm == MPI.COMM_NULL:
            raise InvalidArgument(f"comm={comm!r}: expected an mpi4py.MPI.Intracomm that this process is a member of")
        super().__init__(comm, comm.Get_rank(), comm.Get_size(), torch.device("cpu"))
        self._shared = _shared_of(comm)
        self._tag = self._shared.next_tag
        self._shared.next_tag += 1
        # MPI writes to the memory of unfinished messages until it is finalised.
        self._unfinished: list[Any] = []

    def _exchange_bytes(
        self, send: Sequence[torch.Tensor], recv: Sequence[torch.Tensor], op: str, limit: Limit
    ) -> None:
        pending: list[tuple[int, MPI.Request]] = []
        for step in range(1, self.num_ranks):
            peer = (self.rank + step) % self.num_ranks
            comm = self._shared.comm
            pending += [(peer, comm.Irecv(piece, peer, self._tag)) for piece in _pieces(recv[peer])]
            pending += [(peer, comm.Isend(piece, peer, self._tag)) for piece in _pieces(send[peer])]
        requests = [request for _, request in pending]
        self._unfinished.append((send, recv, pending))
        if _poll(lambda: MPI.Request.Testall(requests), limit):
            self._unfinished.pop()
            return
        # Testall, unlike Test, says nothing about single requests and leaves them all alive.
        late = {peer for peer, request in pending if not request.Test()}
        self._say_farewell()
        self._hear_farewells()
        missing = late - self._shared.farewells
        if missing:
            raise CommTimeout(op, sorted(missing), limit.timeout)
        raise CommTimeout(op, sorted(late), limit.timeout, "they gave up waiting earlier")

    def _say_farewell(self) -> None:
        for peer in range(self.num_ranks):
            if peer != self.rank:
                self._unfinished.append(self._shared.comm.Isend([None, 0, MPI.BYTE], peer, _FAREWELL_TAG))

    def _hear_farewells(self) -> None:
        status = MPI.Status()
        while self._shared.comm.Iprobe(MPI.ANY_SOURCE, _FAREWELL_TAG, status):
            self._shared.comm.Recv([None, 0, MPI.BYTE], status.Get_source(), _FAREWELL_TAG)
            self._shared.farewells.add(status.Get_source())


def _shared_of(comm: MPI.Comm) -> _Shared:
    # Kept as an attribute of the communicator, because MPI gives handles of freed communicators to new ones.
    global _keyval
    if _keyval is None:
        _keyval = MPI.Comm.Create_keyval()
    shared: Any = comm.Get_attr(_keyval)
    if shared is None:
        shared = _Shared(comm)
        comm.Set_attr(_keyval, shared)
    return shared


def _pieces(flat: torch.Tensor) -> list[Any]:
    array = flat.numpy()
    return [[array[first : first + _MAX_PIECE], MPI.BYTE] for first in range(0, array.size, _MAX_PIECE)]


def _poll(is_done: Callable[[], bool], limit: Limit) -> bool:
    """Whether `is_done` became true in time. Sleeps between polls, without the GIL."""
    num_polls = 0
    while not is_done():
        if limit.left == 0:
            return False
        num_polls += 1
        time.sleep(0.0 if num_polls < _NUM_EAGER_POLLS else _POLL_INTERVAL)
    return True
