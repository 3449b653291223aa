"""Group: rank, size, all-to-all, object gather and barrier over any torch ProcessGroup or an mpi4py communicator.

Nothing here ever hangs: each call takes a limit, and a peer that does not arrive is named in a `CommTimeout`.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import pickle
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from deepep.errors import BufferDestroyed, CommTimeout, InvalidArgument


@dataclass(frozen=True)
class Limit:
    """A time limit that started when this was made.

    Attributes:
        timeout: seconds.
        start: on the clock of `time.monotonic`.
    """

    timeout: float
    start: float = field(default_factory=time.monotonic)

    @property
    def end(self) -> float:
        """When it is over, on the clock of `time.monotonic`."""
        return self.start + self.timeout

    @property
    def left(self) -> float:
        """Seconds that are left, at least 0."""
        return max(0.0, self.end - time.monotonic())


_numbers = itertools.count()


class Group(ABC):
    """The ranks that work together, and the host-side collectives among them.

    Collective calls must come in the same order on every rank. Every `Group` made on the same process group or
    communicator has its own tag, so several of them do not mix messages, provided that all ranks make them in the
    same order. After a `CommTimeout` a group is broken: calls raise `BufferDestroyed`.

    Attributes:
        rank: this rank inside the group.
        num_ranks: size of the group.
        raw: the process group or communicator that was passed in.
    """

    def __init__(self, raw: Any, rank: int, num_ranks: int, device: torch.device) -> None:
        self.raw = raw
        self.rank = rank
        self.num_ranks = num_ranks
        self._number = next(_numbers)
        self._lock = threading.Lock()
        self._device = device
        self._lost: tuple[int, ...] | None = None

    @property
    def members(self) -> tuple[int, ...]:
        """Numbers of the processes in the order of their ranks: equal for groups of the same processes, else not."""
        return (-1, self._number)

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
        with self._guard(op):
            self._run(send, recv, op, Limit(timeout))

    def all_gather_object(self, obj: Any, *, op: str, timeout: float, skip: Collection[int] = ()) -> list[Any]:
        """Every rank's `obj` (picklable), in rank order, None for ranks in `skip`; otherwise as `exchange`."""
        limit = Limit(timeout)
        mine = torch.frombuffer(bytearray(pickle.dumps(obj)), dtype=torch.uint8)
        length = torch.tensor([mine.numel()], device="cpu")
        lengths = [torch.zeros_like(length[:0] if peer in skip else length) for peer in range(self.num_ranks)]
        self._check(self._to_all(length, skip), lengths, op, timeout)
        with self._guard(op):
            self._run(self._to_all(length, skip), lengths, op, limit)
            parts = [torch.empty(int(item.sum()), dtype=torch.uint8, device="cpu") for item in lengths]
            self._run(self._to_all(mine, skip), parts, op, limit)
        return [pickle.loads(part.numpy().tobytes()) if part.numel() else None for part in parts]

    def _to_all(self, message: torch.Tensor, skip: Collection[int]) -> list[torch.Tensor]:
        return [message[:0] if peer in skip else message for peer in range(self.num_ranks)]

    def barrier(self, *, op: str, timeout: float) -> None:
        """Returns once every rank has called it. Errors and arguments as in `exchange`."""
        word = torch.zeros(1, dtype=torch.uint8, device="cpu")
        self.exchange([word] * self.num_ranks, [word.clone() for _ in range(self.num_ranks)], op=op, timeout=timeout)

    @abstractmethod
    def _exchange_bytes(
        self, send: Sequence[torch.Tensor], recv: Sequence[torch.Tensor], op: str, limit: Limit
    ) -> None:
        """`exchange` of flat uint8 tensors on `self._device`; own entries are to be left alone."""

    @contextlib.contextmanager
    def _guard(self, op: str) -> Iterator[None]:
        with self._lock:
            if self._lost is not None:
                who = ", ".join(map(str, self._lost)) or "unknown"
                raise BufferDestroyed(
                    f"{op}: this group broke when it lost rank(s) {who}; build a new group, and a new buffer on it"
                )
            try:
                yield
            except CommTimeout as error:
                self._lost = error.missing_ranks
                raise
            except BaseException:
                self._lost = ()  # interrupted half-way: nobody knows which messages got through
                raise

    def _run(self, send: Sequence[torch.Tensor], recv: Sequence[torch.Tensor], op: str, limit: Limit) -> None:
        outgoing, incoming = [_flat(tensor) for tensor in send], [_flat(tensor) for tensor in recv]
        results = list(incoming)
        incoming[self.rank].copy_(outgoing[self.rank])
        if self.num_ranks == 1:
            return
        for peer in range(self.num_ranks):
            if peer != self.rank:
                outgoing[peer] = _moved(outgoing[peer], self._device)
                incoming[peer] = _twin(incoming[peer], self._device)
        if self._device.type == "cpu" and any(tensor.is_cuda for tensor in send):
            torch.cuda.current_stream().synchronize()  # the copies above are asynchronous
        self._exchange_bytes(outgoing, incoming, op, limit)
        for result, staged in zip(results, incoming, strict=True):
            if result is not staged:
                # Back to the host a copy must wait: nobody would know when it is done.
                result.copy_(staged, non_blocking=result.is_cuda)

    def _check(self, send: Sequence[torch.Tensor], recv: Sequence[torch.Tensor], op: str, timeout: float) -> None:
        if not 0 <= timeout < math.inf:
            raise InvalidArgument(f"{op}: timeout={timeout}: expected seconds, at least 0 and finite")
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
    return _over_torch(group)


def torch_members(group: Any) -> tuple[int, ...]:
    """Give the global ranks of a torch process group; none where torch does not know them."""
    import torch.distributed as dist

    try:
        return tuple(dist.get_process_group_ranks(group))
    except (KeyError, RuntimeError, ValueError):
        return ()  # made without torch's registry


def _over_torch(group: Any) -> Group:
    import torch.distributed as dist

    if not isinstance(group, dist.ProcessGroup):
        raise InvalidArgument(
            f"group={group!r}: expected a torch.distributed ProcessGroup that this process is a member of"
        )
    backends = dict(item.split(":") for item in dist.get_backend_config(group).split(","))
    if backends.get("cpu") == "gloo":
        from deepep.group_gloo import GlooGroup

        return GlooGroup(group)
    from deepep.group_collective import CollectiveGroup

    return CollectiveGroup(group, "cuda" if "cuda" in backends else "cpu")


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    # Not `reshape`: it keeps whatever stride a single element has, and `view` wants 1.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _moved(flat: torch.Tensor, device: torch.device) -> torch.Tensor:
    return flat if flat.device.type == device.type else _twin(flat, device).copy_(flat, non_blocking=flat.is_cuda)


def _twin(flat: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Room for the bytes of `flat` on `device`: itself if it is there, else new (pinned on the host)."""
    if flat.device.type == device.type:
        return flat
    return torch.empty(flat.shape, dtype=torch.uint8, device=device, pin_memory=device.type == "cpu")
