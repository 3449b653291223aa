"""`IpcBackend`: the class behind the name "ipc"."""

from __future__ import annotations

import contextlib
import importlib.util
from typing import TYPE_CHECKING, ClassVar

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
from deepep.backends.ipc.memory import SymmetricMemory
from deepep.cuda.driver import REMEDY
from deepep.errors import DeepEPError, InvalidArgument
from deepep.group import Group
from deepep.topology import Topology

if TYPE_CHECKING:
    from deepep.backends.ipc.low_latency import LowLatency
    from deepep.layout import DispatchLayout


class IpcBackend(Backend):
    """Load/store between the GPUs of one host, through memory that every rank maps (CUDA IPC or VMM)."""

    name: ClassVar[str] = "ipc"

    def __init__(self, group: Group, topology: Topology, options: BackendOptions) -> None:
        super().__init__(group, topology, options)
        # Not before, since a probe must not fail where numpy is missing; and not at each call, which would take 1 us.
        from deepep.cuda import combine, dispatch
        from deepep.cuda.engine import make_engine
        from deepep.cuda.layout import LayoutCounter

        self._dispatch, self._combine, self._sent = dispatch.dispatch, combine.combine, dispatch.Sent
        self._device = torch.cuda.current_device()
        per_gpu = topology.ranks_per_gpu(group.rank)

        def memory_of(num_bytes: int) -> SymmetricMemory:
            self._memory = SymmetricMemory(group, num_bytes, self._device, options.timeout)
            return self._memory

        self._engine = make_engine(memory_of, group.rank, group.num_ranks, self._device, per_gpu, options)
        self._layout = LayoutCounter(self._engine, topology.num_scaleup_ranks)
        self._low_latency: LowLatency | None = None
        if options.low_latency_mode:
            from deepep.backends.ipc.low_latency import LowLatency

            self._low_latency = LowLatency(group, options, self._device, per_gpu, self._engine.order)

    @classmethod
    def probe(cls) -> Availability:
        """Say whether this process has a GPU and the packages to compile for it."""
        if not torch.cuda.is_available():
            return Availability(False, "torch sees no CUDA device", "run on a machine with a GPU and a CUDA torch")
        if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
            return Availability(False, "the Python package cuda-bindings is missing", REMEDY)
        if torch.cuda.get_device_capability()[0] < 8:
            return Availability(False, "the GPU is older than sm_80", "use backend='reference'")
        return Availability(True)

    @classmethod
    def capabilities(cls) -> Capabilities:
        """CUDA tensors on one host."""
        return Capabilities(devices=frozenset({"cuda"}), layouts=frozenset(Layout), graph_capture=True, zero_copy=True)

    @property
    def window_bytes(self) -> int:
        """Bytes of GPU memory that this rank's windows take."""
        extra = 0 if self._low_latency is None else self._low_latency.num_bytes
        return self._engine.window_map.num_bytes + extra

    def dispatch(self, request: DispatchRequest) -> DispatchResult:
        """Send tokens to the ranks of their experts."""
        if request.layout is Layout.PADDED:
            return self._ll("low_latency_dispatch").dispatch(request)
        result = self._dispatch(self._engine, request)
        sent = result.routing.private
        if isinstance(sent, self._sent) and sent.num_rows:  # else the host does not know how many there were
            self.traffic.add(sent.num_rows, self.group.rank, sent.row_bytes)
        return result

    def combine(self, request: CombineRequest) -> CombineResult:
        """Bring rows home and reduce them."""
        if request.routing.layout is Layout.PADDED:
            return self._ll("low_latency_combine").combine(request)
        return self._combine(self._engine, request)

    def dispatch_layout(self, topk_idx: torch.Tensor, num_experts: int) -> DispatchLayout:
        """Count this rank's tokens per rank, host and expert: one kernel that nothing waits for."""
        if self._layout.can(topk_idx, num_experts):
            return self._layout.count(topk_idx, num_experts)
        return super().dispatch_layout(topk_idx, num_experts)

    def barrier(self) -> None:
        """Let the current stream go on once every rank has called this."""
        self._engine.status.begin("barrier")
        self._engine.barrier_launch()

    def destroy(self) -> None:
        """Unmap the windows; never waits for another rank."""
        memory, engine, low_latency = self._memory, self._engine, self._low_latency
        self._low_latency = None
        if low_latency is not None:
            low_latency.close()
        if memory.is_alive:
            with contextlib.suppress(DeepEPError, RuntimeError):
                torch.cuda.synchronize(self._device)
            memory.close()
            engine.close()

    def refuse(self, op: str, error: DeepEPError) -> None:
        """Take part in the peers' operation, only to say no."""
        if "low_latency" not in op:
            self._engine.barrier_launch(is_refusal=True)

    def local_buffer(self, use_rdma_buffer: bool) -> torch.Tensor:
        """Give the payload region of the normal window, or the window of low latency."""
        if use_rdma_buffer:
            if self._low_latency is not None:
                return self._low_latency.local_buffer()
            return torch.empty(0, dtype=torch.uint8, device=f"cuda:{self._device}")
        window = self._engine.window_map
        return self._memory.as_tensor(window.payload, (window.payload_bytes,), torch.uint8)

    def dispatch_input_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Give a tensor that dispatch reads in place; calling this again gives the same memory."""
        return self._engine.input_buffer("dispatch", shape, dtype)

    def combine_input_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Give a tensor that combine of compact rows reads in place; calling this again gives the same memory."""
        return self._engine.input_buffer("combine", shape, dtype)

    def update_mask(self, rank: int, masked: bool) -> None:
        """Leave `rank` out of low-latency operations, or take it back in."""
        self._ll("update_mask").update_mask(rank, masked)

    def query_mask(self, mask_status: torch.Tensor) -> None:
        """Write 1 for each masked rank, 0 for the others."""
        self._ll("query_mask").query_mask(mask_status)

    def clean_mask(self) -> None:
        """Take every masked rank back in."""
        self._ll("clean_mask").clean_mask()

    def clean_low_latency_buffer(self, num_max_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Make the low-latency window ready for a shape; collective."""
        self._ll("clean_low_latency_buffer").clean(num_max_tokens_per_rank, hidden, num_experts)

    def next_combine_buffer(self, routing: Routing, hidden: int) -> torch.Tensor:
        """Give the tensor that the next zero-copy low-latency combine reads."""
        return self._ll("next_combine_buffer").next_combine_buffer(routing, hidden)

    def _ll(self, op: str) -> LowLatency:
        if self._low_latency is None:
            raise InvalidArgument(f"{op}: this buffer was built without low_latency_mode=True")
        return self._low_latency
