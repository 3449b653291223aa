"""`ReferenceBackend`: the class behind the name "reference"."""

from __future__ import annotations

import weakref
from typing import ClassVar

import torch

from deepep.backends.base import (
    Availability,
    Backend,
    BackendOptions,
    Capabilities,
    CombineRequest,
    CombineResult,
    DispatchRequest,
    DispatchResult,
    Layout,
    Routing,
)
from deepep.backends.reference.combine import combine
from deepep.backends.reference.dispatch import dispatch
from deepep.backends.reference.notify import Notice, notify
from deepep.backends.reference.pool import row_pool
from deepep.errors import DeepEPError, InvalidArgument
from deepep.group import Group
from deepep.topology import Topology


class ReferenceBackend(Backend):
    """All-to-all in plain torch over any group, on CPU and CUDA tensors. Slow is allowed, wrong is not.

    Masks are honoured; a rank that fails to arrive without being masked is a `CommTimeout`, since the group under this
    backend does not survive one.
    """

    name: ClassVar[str] = "reference"

    def __init__(self, group: Group, topology: Topology, options: BackendOptions) -> None:
        super().__init__(group, topology, options)
        self.masked: list[int] = []
        self._local: dict[bool, torch.Tensor] = {}
        # By identity: routings hold tensors, which know no equality that would do.
        self._combine_buffers: dict[int, tuple[weakref.ref[Routing], torch.Tensor]] = {}

    @classmethod
    def probe(cls) -> Availability:
        """Always available: torch is all it needs."""
        return Availability(True)

    @classmethod
    def capabilities(cls) -> Capabilities:
        """Everything but speed and graph capture."""
        return Capabilities(devices=frozenset({"cpu", "cuda"}), layouts=frozenset(Layout), spans_hosts=True)

    def dispatch(self, request: DispatchRequest) -> DispatchResult:
        """Send tokens to the ranks of their experts."""
        with torch.no_grad():  # as kernels see it: the operations differentiate themselves (`deepep.autograd`)
            return dispatch(self, request)

    def combine(self, request: CombineRequest) -> CombineResult:
        """Bring rows home and reduce them."""
        with torch.no_grad():
            return combine(self, request)

    def barrier(self) -> None:
        """Return once every rank has called this."""
        self.group.barrier(op="barrier", timeout=self.options.timeout)

    def destroy(self) -> None:
        """Drop the buffers; the group belongs to the user."""
        self._local.clear()
        self._combine_buffers.clear()
        row_pool.clear()

    def refuse(self, op: str, error: DeepEPError) -> None:
        """Take part in the exchange of notices, only to say no."""
        notify(self.group, Notice(op, {}, refusal=str(error)), self.options.timeout, self.masked)

    def update_mask(self, rank: int, masked: bool) -> None:
        """Leave `rank` out of operations, or take it back in."""
        others = [other for other in self.masked if other != rank]
        self.masked = sorted([*others, rank]) if masked else others

    def query_mask(self, mask_status: torch.Tensor) -> None:
        """Write 1 for each masked rank, 0 for the others."""
        mask_status.zero_()
        mask_status[self.masked] = 1

    def clean_mask(self) -> None:
        """Take every masked rank back in."""
        self.masked = []

    def clean_low_latency_buffer(self, num_max_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Wait for all ranks that are not masked, and compare shapes with them; there is no window to clean."""
        terms: dict[str, object] = {"num_max_tokens_per_rank": num_max_tokens_per_rank, "hidden": hidden}
        terms["num_experts"] = num_experts
        notify(self.group, Notice("clean_low_latency_buffer", terms), self.options.timeout, self.masked)

    def next_combine_buffer(self, routing: Routing, hidden: int) -> torch.Tensor:
        """Give the tensor that the next zero-copy combine of this routing reads."""
        room = self.group.num_ranks * routing.num_max_tokens_per_rank
        num_local_experts = routing.num_experts // self.group.num_ranks
        device = routing.dst_rank.device
        buffer = torch.empty(num_local_experts, room, hidden, dtype=torch.bfloat16, device=device)
        # What belongs to routings that are gone will not be asked for any more.
        held = {key: pair for key, pair in self._combine_buffers.items() if pair[0]() is not None}
        self._combine_buffers = {**held, id(routing): (weakref.ref(routing), buffer)}
        return buffer

    def take_combine_buffer(self, routing: Routing) -> torch.Tensor:
        """Give the tensor that the user has filled for this routing.

        Raises:
            InvalidArgument: none was asked for since the last zero-copy combine.
        """
        known, buffer = self._combine_buffers.pop(id(routing), (None, None))
        if buffer is None or known is None or known() is not routing:
            raise InvalidArgument(
                "low_latency_combine: zero_copy=True reads get_next_low_latency_combine_buffer(handle); "
                "call that first and fill it"
            )
        return buffer

    def local_buffer(self, use_rdma_buffer: bool) -> torch.Tensor:
        """Give memory of the size asked for at construction; nothing travels through it here."""
        if use_rdma_buffer not in self._local:
            size = self.options.num_rdma_bytes if use_rdma_buffer else self.options.num_bytes
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self._local[use_rdma_buffer] = torch.zeros(size, dtype=torch.uint8, device=device)
        return self._local[use_rdma_buffer]

    def count_wait(self, stats: torch.Tensor | None, num_rows: torch.Tensor, seconds: float) -> None:
        """Add the time of an exchange to each rank that sent rows in it: all are waited for together here."""
        if stats is not None:
            waited = torch.where(num_rows.cpu() > 0, max(int(seconds * 1e6), 1), 0)
            waited[self.group.rank] = 0
            stats += waited.to(stats)
