"""`MpiGroup`: an mpi4py communicator, by polled point-to-point messages of host memory.

NOTES. MPI has no time limits, so everything is non-blocking and polled. A rank that gives up tells its peers by a
farewell with the ranks it misses; they then fail as well and name those ranks, not the one that gave up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

from deepep import env
from deepep.errors import CommTimeout, InvalidArgument
from deepep.group import Group, Limit

# MPI writes to the memory of unfinished messages until it is finalised: they outlive their groups.
_unfinished: list[Any] = []
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
        farewells: per (tag of a group, peer that gave up in it) the ranks it missed.
    """

    def __init__(self, comm: MPI.Comm) -> None:
        self.comm, request = comm.Idup()
        limit = Limit(env.timeout())
        if not _poll(request.Test, limit):
            others = [rank for rank in range(comm.Get_size()) if rank != comm.Get_rank()]
            raise CommTimeout("make_group", others, limit.timeout, "duplicating the communicator")
        self.next_tag = _FIRST_TAG
        self.farewells: dict[tuple[int, int], set[int]] = {}


_keyval: int | None = None


class MpiGroup(Group):
    """An mpi4py intracommunicator. The first group on a communicator duplicates it, which is collective.

    Args:
        comm: `mpi4py.MPI.Intracomm`.

    Raises:
        InvalidArgument: not a communicator, or null.
        CommTimeout: the duplication did not finish within `DEEPEP_TIMEOUT` seconds.
    """

    def __init__(self, comm: Any) -> None:
        if not isinstance(comm, MPI.Intracomm) or comm == MPI.COMM_NULL:
            raise InvalidArgument(f"comm={comm!r}: expected an mpi4py.MPI.Intracomm that this process is a member of")
        super().__init__(comm, comm.Get_rank(), comm.Get_size(), torch.device("cpu"))
        self._shared = _shared_of(comm)
        self._tag = self._shared.next_tag
        self._shared.next_tag += 1

    @property
    def members(self) -> tuple[int, ...]:
        """Ranks in the world."""
        with_all = self.raw.Get_group().Translate_ranks(None, MPI.COMM_WORLD.Get_group())
        return tuple(int(rank) for rank in with_all)

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
        kept = (send, recv, requests)
        _unfinished.append(kept)
        finished = False

        def is_over() -> bool:
            nonlocal finished
            finished = MPI.Request.Testall(requests)
            return finished or self._has_farewells()

        try:
            _poll(is_over, limit)
        except BaseException:
            self._say_farewell(())  # interrupted: the others need not wait
            raise
        if finished:
            _unfinished[:] = [other for other in _unfinished if other is not kept]
            return
        # Testall, unlike Test, leaves single requests alive until all are done.
        error = self._verdict({peer for peer, request in pending if not request.Test()}, op, limit)
        self._say_farewell(error.missing_ranks)
        raise error

    def _has_farewells(self) -> bool:
        comm, status = self._shared.comm, MPI.Status()
        while comm.Iprobe(MPI.ANY_SOURCE, _FAREWELL_TAG, status):
            message = np.empty(1 + self.num_ranks, dtype=np.int64)
            comm.Recv(message, status.Get_source(), _FAREWELL_TAG)
            self._shared.farewells[int(message[0]), status.Get_source()] = set(np.flatnonzero(message[1:]).tolist())
        return any(tag == self._tag for tag, _ in self._shared.farewells)

    def _verdict(self, late: set[int], op: str, limit: Limit) -> CommTimeout:
        left = {peer: missed for (tag, peer), missed in self._shared.farewells.items() if tag == self._tag}
        missing = set().union(*left.values()) - {self.rank}
        if missing:
            return CommTimeout(op, sorted(missing), limit.timeout, "as a peer says, which has given up")
        if left:
            return CommTimeout(op, sorted(left), limit.timeout, "they have given up waiting for this rank")
        return CommTimeout(op, sorted(late), limit.timeout)

    def _say_farewell(self, missing: Iterable[int]) -> None:
        message = np.zeros(1 + self.num_ranks, dtype=np.int64)
        message[0] = self._tag
        message[[1 + rank for rank in missing]] = 1
        for peer in range(self.num_ranks):
            if peer != self.rank:
                request = self._shared.comm.Isend(message, peer, _FAREWELL_TAG)
                _unfinished.append((message, request))


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
