"""What both generations of buffer share: construction, agreement between ranks, and how one operation is run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import torch

from deepep import env
from deepep.backends import registry
from deepep.backends.base import Backend, BackendOptions, CombineRequest, DispatchRequest
from deepep.errors import (
    BackendUnavailable,
    BufferDestroyed,
    CommTimeout,
    DeepEPError,
    InvalidArgument,
    UnsupportedOperation,
)
from deepep.event import Event, EventOverlap
from deepep.group import make_group
from deepep.stream import CommStream
from deepep.topology import Topology
from deepep.validate import Bounds, raise_unless_equal, wrong_kind
from deepep.version import __version__

Request = TypeVar("Request", DispatchRequest, CombineRequest)
Result = TypeVar("Result")

_LONGEST = 1e9  # seconds; what is more, no clock takes

# Handles work with every buffer of the same backend over the same processes; each such set has a number.
_owner_numbers: dict[tuple[Any, ...], int] = {}

REFUSABLE = (InvalidArgument, AttributeError, TypeError, ValueError)
"""What checks of arguments raise; the last three where one is so wrong that the checks themselves trip over it."""


class Front:
    """A group, its topology and one backend, with the checks and the stream handling around every operation.

    Attributes:
        group: what the user passed, a process group or communicator.
        rank: of this process in the group.
        group_size: R.
        topology: of the group.
        timeout: longest wait for a peer, seconds.
    """

    def __init__(
        self,
        group: Any,
        comm: Any,
        backend: str | None,
        timeout: float | None,
        topology: Topology | None,
        options: dict[str, Any],
        *,
        default_timeout: float = env.DEFAULT_TIMEOUT,
        problem: DeepEPError | None = None,
    ) -> None:
        # What is wrong here, `problem` included, is reported when ranks agree, so that none waits for one that left.
        self._broken: str | None = None
        self._missing: set[int] = set()  # the ranks whose absence broke it
        self._backend: Backend | None = None
        self._comm_stream = CommStream()
        try:
            self.timeout = _checked_timeout(timeout, default_timeout)
        except InvalidArgument as error:
            self.timeout, problem = env.DEFAULT_TIMEOUT, problem or error
        self._group = make_group(group, comm)
        self.group = self._group.raw
        self.rank = self._group.rank
        self.group_size = self._group.num_ranks
        on_cuda = torch.cuda.is_available()
        # Asked for even where it was given: only so do ranks find out that others were given none.
        found = Topology.discover(self._group, use_cuda=on_cuda, timeout=self.timeout)
        if topology is not None and not isinstance(topology, Topology):
            problem = problem or InvalidArgument(f"topology is a {type(topology).__name__}; pass a deepep.Topology")
            topology = None
        self.topology = topology or found
        chosen = self._agree_on_backend(registry.requested(backend), on_cuda, options, problem)
        self._owner = _owner_numbers.setdefault((chosen.name, *self._group.members), len(_owner_numbers))
        self._capabilities = able = chosen.capabilities()
        self._bounds = Bounds(self.group_size, self.topology.num_scaleout_ranks, able.max_topk, env.debug())
        self._devices, self._layouts = able.devices, tuple(able.layouts)  # a tuple finds an enum by identity, at once
        self._backend = chosen(self._group, self.topology, BackendOptions(timeout=self.timeout, **options))

    @property
    def backend(self) -> str:
        """The name of the backend that moves this buffer's rows."""
        return self._alive("backend").name

    @property
    def traffic(self) -> dict[str, int]:
        """Rows and bytes this rank has sent to other ranks since construction."""
        traffic = self._alive("traffic").traffic
        return {"num_rows": traffic.num_rows, "num_bytes": traffic.num_bytes}

    def destroy(self) -> None:
        """Release everything this buffer holds here. May be called twice; never waits for other ranks."""
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.destroy()

    def get_comm_stream(self) -> torch.cuda.Stream:
        """Give the stream that asynchronous calls of this buffer run on; `UnsupportedOperation` without a GPU."""
        return self._comm_stream.get()

    def get_dispatch_input_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Give a tensor inside the window: a dispatch of it is not staged.

        The tensors of one kind share their memory. Ask before CUDA graphs are captured: what they stage may lie where a
        larger tensor is given later.

        Args:
            shape: [T, H] of the payload.
            dtype: of the payload.

        Raises:
            UnsupportedOperation: the backend reads nothing in place.
        """
        return self._alive("get_dispatch_input_buffer").dispatch_input_buffer(shape, dtype)

    def get_combine_input_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Give a tensor inside the window: a combine of it is not staged; otherwise as the dispatch one."""
        return self._alive("get_combine_input_buffer").combine_input_buffer(shape, dtype)

    def _agree_on_backend(
        self, wanted: str, on_cuda: bool, options: dict[str, Any], problem: DeepEPError | None
    ) -> type[Backend]:
        """Choose on every rank, then compare, so that all ranks build the same backend or raise the same error."""
        chosen = None
        if problem is None:
            try:
                self._check_construction(options)
                chosen = registry.select(wanted, self.topology, on_cuda=on_cuda)
            except (BackendUnavailable, InvalidArgument) as error:
                problem = error
        mine = {"version": __version__, "backend": chosen and chosen.name, "hosts": self.topology.hosts, **options}
        everyone = self._group.all_gather_object((mine, problem), op="construction", timeout=self.timeout)
        problems = {rank: theirs for rank, (_, theirs) in enumerate(everyone) if theirs is not None}
        for rank, theirs in problems.items():
            raise type(theirs)(f"rank(s) {sorted(problems)} cannot build the buffer; rank {rank}: {theirs}")
        for name in mine:
            raise_unless_equal("construction", name, [said[name] for said, _ in everyone])
        if chosen is None:
            raise TypeError("without a problem there is a backend")
        return chosen

    def _check_construction(self, options: dict[str, Any]) -> None:
        if self.topology.num_ranks != self.group_size:
            raise InvalidArgument(
                f"topology describes {self.topology.num_ranks} ranks and the group has {self.group_size}"
            )
        for name, value in options.items():
            if not isinstance(value, Integral) or int(value) < 0:
                raise InvalidArgument(f"{name} is {value!r}; it must be a whole number, at least 0")

    def _alive(self, op: str) -> Backend:
        if self._backend is None:
            raise BufferDestroyed(f"{op}: this buffer was destroyed; build a new one")
        if self._broken is not None:
            raise BufferDestroyed(f"{op}: this buffer broke earlier ({self._broken}); destroy it and build a new one")
        return self._backend

    def _update_mask(self, op: str, rank: int, mask: bool) -> None:
        """Mask a rank, or take it back; a buffer that broke goes on once all the ranks it missed are masked.

        What else broke with them stays so: a backend or a group that cannot go on says that itself.
        """
        broken, self._broken = self._broken, None
        try:
            self._alive(op).update_mask(rank, mask)
        finally:
            self._broken = broken
        if mask and broken is not None:
            self._missing.discard(rank)
            self._broken = broken if self._missing else None

    def _checking(self, op: str) -> _Checking:
        return _Checking(self._alive(op), op)

    def _dispatch(
        self, op: str, backend: Backend, request: DispatchRequest, is_async: bool, previous_event: Event | None
    ) -> tuple[Any, EventOverlap]:
        self._fit(op, backend, request.x, request.layout)
        return self._serve(backend.dispatch, request, is_async, previous_event)

    def _combine(
        self, op: str, backend: Backend, request: CombineRequest, is_async: bool, previous_event: Event | None
    ) -> tuple[Any, EventOverlap]:
        self._fit(op, backend, request.x, request.routing.layout)
        return self._serve(backend.combine, request, is_async, previous_event)

    def _fit(self, op: str, backend: Backend, x: torch.Tensor, layout: Any) -> None:
        """Raise `UnsupportedOperation`, on every rank, where the backend does not take such a tensor or layout."""
        device = "cuda" if x.is_cuda else x.device.type
        if device not in self._devices:
            only = ", ".join(sorted(self._devices))
            problem = f"does not work on {device} tensors (only {only}); use backend='reference', which takes both"
        elif layout not in self._layouts:
            problem = f"has no {layout.value} rows; use backend='reference'"
        else:
            return
        refuse(backend, op, UnsupportedOperation(f"{op}: backend '{backend.name}' {problem}"))

    def _serve(
        self, work: Callable[[Request], Result], request: Request, is_async: bool, previous_event: Event | None
    ) -> tuple[Result, EventOverlap]:
        if is_async or previous_event is not None:
            return self._run(lambda: work(request), (request,), request.x.is_cuda, is_async, previous_event)
        # As `_run` would, in fewer steps: 0.3 us less before the first kernel.
        try:
            return work(request), EventOverlap()
        except BaseException as error:
            self._note(error)
            raise

    def _run(
        self,
        work: Callable[[], Result],
        inputs: Iterable[object],
        on_cuda: bool,
        is_async: bool,
        previous_event: Event | None,
    ) -> tuple[Result, EventOverlap]:
        try:
            return self._comm_stream.run(work, inputs, on_cuda, is_async, previous_event)
        except BaseException as error:
            self._note(error)
            raise

    def _note(self, error: BaseException) -> None:
        """Remember what an operation ended with, where the buffer is not usable after it."""
        if isinstance(error, CommTimeout):
            # Who is missing may be unknown; then no mask mends it.
            self._broken, self._missing = str(error), set(error.missing_ranks) or {-1}
        elif not isinstance(error, (InvalidArgument, UnsupportedOperation, BufferDestroyed)):
            # Those three all ranks know of, or they came before anything began. After others, out of memory perhaps,
            # peers wait for what does not come, and nobody may take the next call for the rest of this one.
            self._broken, self._missing = f"{type(error).__name__}: {error}", {-1}


class _Checking:
    """Turns a refused argument into the same error on every rank, before anything is sent; see `REFUSABLE`.

    A class, since a generator's context takes three times as long.
    """

    __slots__ = ("_backend", "_op")

    def __init__(self, backend: Backend, op: str) -> None:
        self._backend, self._op = backend, op

    def __enter__(self) -> Backend:
        return self._backend

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, REFUSABLE):
            refuse(self._backend, self._op, error)


def refuse(backend: Backend, op: str, error: Exception) -> NoReturn:
    """Tell the other ranks that this one does not take part in an operation, and why, and raise that."""
    refused = error if isinstance(error, DeepEPError) else wrong_kind(op, error)
    cause = error.__cause__ if refused is error else error
    try:
        backend.refuse(op, refused)
    except DeepEPError as unreached:
        cause = unreached
    raise refused from cause


def _checked_timeout(timeout: float | None, default: float) -> float:
    """Give the limit for waiting: the argument, else `DEEPEP_TIMEOUT`, else `default`, in seconds."""
    limit = env.timeout(default) if timeout is None else timeout
    if not isinstance(limit, Real) or not 0 < limit < math.inf:
        raise InvalidArgument(f"timeout is {limit!r}; it must be a positive, finite number of seconds")
    return min(float(limit), _LONGEST)
