"""The seam between the front end and whatever moves rows. Read this file first.

A backend is one class. The front end has validated every argument, owns streams, events and handles, and has made the
right stream current; the backend moves rows between ranks as CONTRACT says and returns plain tensors. `Buffer`, low
latency and `ElasticBuffer` are three spellings of the same two requests.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from deepep.errors import DeepEPError, UnsupportedOperation
from deepep.records import quickly_made

if TYPE_CHECKING:
    import torch

    from deepep.group import Group
    from deepep.layout import DispatchLayout
    from deepep.quant import SfFormat
    from deepep.topology import Topology


class Layout(enum.Enum):
    """How received rows lie (CONTRACT, 'Three row layouts')."""

    COMPACT = "compact"  # [N, H]: one row per (source token, this rank)
    EXPANDED = "expanded"  # [rows, H]: one row per (source token, local expert), grouped and aligned by expert
    PADDED = "padded"  # [L, R*M, H]: per local expert, rows [0, count) valid

    __hash__ = object.__hash__  # of enum, it would be a Python function, and plans are looked up by layout at each call


class Reduction(enum.Enum):
    """Where the expert outputs of one token are added up (CONTRACT, 'Low latency' and 'Arithmetic of combine')."""

    PER_RANK = "per_rank"  # summed by their owner and rounded once, then summed over ranks
    PER_COPY = "per_copy"  # every copy travels; the token's home sums them in ascending top-k position


class WeightSource(enum.Enum):
    """Which ranks contribute to the weights that combine gives back."""

    ALL_RANKS = "all_ranks"  # first generation: summed over destination ranks, slot by slot
    OWNER = "owner"  # second generation: only the rank that owns the slot's expert, 0 for empty slots


@dataclass(frozen=True)
class Availability:
    """What a probe found out: can this backend run here, and if not, why not and what would mend it."""

    ok: bool
    reason: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do once it runs. The front end refuses the rest with `UnsupportedOperation`."""

    devices: frozenset[str]
    layouts: frozenset[Layout]
    max_topk: int = 64
    spans_hosts: bool = False
    graph_capture: bool = False
    zero_copy: bool = False


@dataclass(frozen=True)
class BackendOptions:
    """Construction arguments a backend may care about; sizes in bytes, times in seconds."""

    num_bytes: int = 0
    num_rdma_bytes: int = 0
    num_max_tokens_per_rank: int = 0
    hidden: int = 0
    num_topk: int = 0
    allow_hybrid_mode: bool = True  # False: a combine across hosts adds up ranks at once, not hosts first
    low_latency_mode: bool = False
    enable_shrink: bool = False
    timeout: float = 100.0


@quickly_made
@dataclass(frozen=True)
class Routing:
    """Where the rows of one dispatch went: all a cached dispatch or a combine needs, held by the user's handle.

    S slots per token: the K top-k positions, or the R ranks when a dispatch had no top-k. A token has one row per
    destination rank; it is recorded at the *highest* slot that chose the rank and -1 stands in the other slots, so
    reading slots in ascending order gives the order in which combine adds its terms.

    Attributes:
        layout: of the received rows.
        num_experts: E.
        num_max_tokens_per_rank: M where the caller gave one, else 0.
        expert_alignment: rows each expert's group is aligned to.
        num_recv_tokens: N, rows of the compact view: received, or allocated where shapes are worst-case.
        num_rows: rows of the received `x` (compact N; expanded rows with padding; padded L*R*M).
        topk_idx: [T, K] int64 at the source, or None.
        dst_rank: [T, S] int32, destination rank of the slot, -1 where the slot records none.
        dst_row: [T, S] int32, compact row at that rank, -1 likewise.
        psum_num_recv_tokens_per_rank: [R] int32, inclusive over source ranks.
        recv_src_token: [N] int32, token number at the source of each compact row; -1 in the tail.
        expanded_row: [N, K] int32, row of `x` for each top-k position of a compact row, -1 elsewhere; None if compact.
        private: what else the backend wants to see again; never read by the front end.
    """

    layout: Layout
    num_experts: int
    num_max_tokens_per_rank: int
    expert_alignment: int
    num_recv_tokens: int
    num_rows: int
    topk_idx: torch.Tensor | None
    dst_rank: torch.Tensor
    dst_row: torch.Tensor
    psum_num_recv_tokens_per_rank: torch.Tensor
    recv_src_token: torch.Tensor
    expanded_row: torch.Tensor | None = None
    private: Any = None


@quickly_made
@dataclass(frozen=True)
class DispatchRequest:
    """Send every token to the ranks of its experts.

    Low latency, where names take time, gives the first eleven by position.

    Attributes:
        x: [T, H] contiguous payload; bf16 if padded.
        sf: [T, n] of 4-byte elements, any strides, or None.
        topk_idx: [T, K] int64, or None (then `is_token_in_rank` routes).
        topk_weights: [T, K] float32 or None.
        num_experts: E.
        num_max_tokens_per_rank: M (padded always; others where the caller gave one), else 0.
        layout: of the received rows.
        sf_format: cast `x` to FP8 on the way, with scale factors in this format; None to move `x` as it is.
        split_phases: return before data has arrived; `DispatchResult.finish` completes it (receive hook).
        cumulative_local_expert_recv_stats: [L] int32, added to in place.
        wait_recv_cost_stats: [R] int64, time waited for each source rank is added in place (microseconds).
        is_token_in_rank: [T, R] bool; given exactly when there is no top-k.
        num_tokens_per_expert: [E] int32, likewise; only the receiver's counts are made from it.
        expert_alignment: rows each expert's group is aligned to (counts only, where rows are compact).
        num_worst_rows: rows to allocate without asking how many arrive (no CPU sync), or None for exact shapes.
        do_zero_padding: zero the rows between experts.
        routing: of an earlier dispatch, to repeat it (cached: no counts travel, no CPU sync).
        num_sms: multiprocessors to use at most; 0 for the backend's own choice.
    """

    x: torch.Tensor
    sf: torch.Tensor | None
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    num_experts: int
    num_max_tokens_per_rank: int = 0
    layout: Layout = Layout.COMPACT
    sf_format: SfFormat | None = None
    split_phases: bool = False
    cumulative_local_expert_recv_stats: torch.Tensor | None = None
    wait_recv_cost_stats: torch.Tensor | None = None
    is_token_in_rank: torch.Tensor | None = None
    num_tokens_per_expert: torch.Tensor | None = None
    expert_alignment: int = 1
    num_worst_rows: int | None = None
    do_zero_padding: bool = False
    routing: Routing | None = None
    num_sms: int = 0


@quickly_made
@dataclass(frozen=True)
class DispatchResult:
    """What arrived.

    Attributes:
        x: received rows in the layout asked for ([L, R*M, H] if padded).
        sf: scale factors of these rows or None: row-major [rows, n]; padded [L, R*M, n], last two dims column-major.
        topk_idx: [N, K] int64 local experts, -1 elsewhere; None unless compact with top-k.
        topk_weights: compact [N, K], 0 where the expert lives elsewhere; expanded [rows]; or None.
        num_recv_tokens_per_expert: [L] int32 on the device, real counts; None in a cached dispatch.
        num_recv_tokens_per_expert_list: aligned counts as Python ints; [] where shapes are worst-case.
        rank_prefix_matrix: [R, R] int32, rows from source i at receiver j are [m[i-1][j], m[i][j]); compact only.
        routing: for the handle; in a cached dispatch the one that came in.
        src_info: [L, R*M] int32 token number at its source; padded only.
        layout_range: [L, R] int64 `begin << 32 | count`; padded only.
        psum_num_recv_tokens_per_expert: [L] int32, as the handle of `ElasticBuffer` holds it, where the backend's
            kernels work it out anyway; None otherwise.
        finish: completes a dispatch with `split_phases`; None otherwise.
    """

    x: torch.Tensor
    sf: torch.Tensor | None
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    num_recv_tokens_per_expert: torch.Tensor | None
    num_recv_tokens_per_expert_list: list[int]
    routing: Routing
    rank_prefix_matrix: torch.Tensor | None = None
    src_info: torch.Tensor | None = None
    layout_range: torch.Tensor | None = None
    psum_num_recv_tokens_per_expert: torch.Tensor | None = None
    finish: Callable[[], None] | None = None


@quickly_made
@dataclass(frozen=True)
class CombineRequest:
    """Bring expert outputs home and add them up (CONTRACT, 'Arithmetic of combine').

    Low latency, where names take time, gives the first ten by position.

    Attributes:
        x: rows as dispatch laid them out, [num_rows, H] or padded [L, R*M, H].
        routing: of the dispatch.
        scale_topk_idx: [T, K] int64 and
        scale_topk_weights: [T, K] float32, both at the token's home: scale each expert's row (low latency), or None.
            Product and sum are rounded to fp32 one after the other (no fused multiply-add), so every backend agrees.
        reduction: where expert outputs of one token are added; matters for expanded and padded rows, and across hosts
            for compact ones, which PER_COPY adds up at home alone.
        use_logfmt: rows travel through the LogFMT-10 cast.
        zero_copy: x lies in the buffer of `next_combine_buffer`; its content is already where peers can read it.
        out: [T, H] to write to, or None.
        split_phases: return before data has arrived; `CombineResult.finish` completes it.
        wait_recv_cost_stats: [R] int64, time waited for each rank is added in place (microseconds).
        topk_weights: weights to bring back beside x: compact [N, K], expanded [rows] float32, or None.
        weight_source: which ranks contribute to the weights brought back.
        bias: none, one or two [T, H] tensors that the sum starts from.
        num_sms: multiprocessors to use at most; 0 for the backend's own choice.
    """

    x: torch.Tensor
    routing: Routing
    scale_topk_idx: torch.Tensor | None = None
    scale_topk_weights: torch.Tensor | None = None
    reduction: Reduction = Reduction.PER_RANK
    use_logfmt: bool = False
    zero_copy: bool = False
    out: torch.Tensor | None = None
    split_phases: bool = False
    wait_recv_cost_stats: torch.Tensor | None = None
    topk_weights: torch.Tensor | None = None
    weight_source: WeightSource = WeightSource.ALL_RANKS
    bias: tuple[torch.Tensor, ...] = ()
    num_sms: int = 0


@quickly_made
@dataclass(frozen=True)
class CombineResult:
    """What came home: `x` [T, H], `topk_weights` [T, K] float32 or None, `finish` as in `DispatchResult`."""

    x: torch.Tensor
    topk_weights: torch.Tensor | None = None
    finish: Callable[[], None] | None = None


@dataclass
class Traffic:
    """Rows and bytes a backend has sent to *other* ranks since construction, for people and for the bench."""

    num_rows: int = 0
    num_bytes: int = 0

    def add(self, num_rows: Sequence[int], rank: int, row_bytes: int) -> None:
        """Count `num_rows[r]` rows sent to each rank r, but for those that stayed on `rank`."""
        remote = sum(num_rows) - num_rows[rank]
        self.num_rows += remote
        self.num_bytes += remote * row_bytes


class Backend(abc.ABC):
    """Moves rows between the ranks of one group. One instance per buffer.

    Construction is collective: every rank of the group builds it at the same point of its program. Methods without
    `abstractmethod` are optional and raise `UnsupportedOperation` unless a backend has them.
    """

    name: ClassVar[str]

    def __init__(self, group: Group, topology: Topology, options: BackendOptions) -> None:
        self.group = group
        self.topology = topology
        self.options = options
        self.traffic = Traffic()

    @classmethod
    @abc.abstractmethod
    def probe(cls) -> Availability:
        """Say whether this backend can run in this process. Never raises, has no side effects, touches no GPU state."""

    @classmethod
    @abc.abstractmethod
    def capabilities(cls) -> Capabilities:
        """Say what this backend can do."""

    @classmethod
    def probe_topology(cls, topology: Topology) -> Availability:
        """Say whether this backend can serve these ranks; called after `probe`, same answer on every rank."""
        if topology.spans_hosts and not cls.capabilities().spans_hosts:
            return Availability(False, "the group spans several hosts", "choose a backend that spans hosts")
        return Availability(True)

    @abc.abstractmethod
    def dispatch(self, request: DispatchRequest) -> DispatchResult:
        """Send tokens to the ranks of their experts."""

    @abc.abstractmethod
    def combine(self, request: CombineRequest) -> CombineResult:
        """Bring rows home and reduce them."""

    @abc.abstractmethod
    def barrier(self) -> None:
        """Return, or let the current stream go on, once every rank has called this."""

    @abc.abstractmethod
    def destroy(self) -> None:
        """Release everything; may be called twice; never waits for another rank and never raises."""

    def refuse(self, op: str, error: DeepEPError) -> None:  # noqa: B027 - doing nothing is a valid answer
        """Tell the peers that this rank will not take part in `op`, so that they raise the same error.

        A backend that cannot do so leaves its peers to their timeout, which then names this rank.
        """

    def dispatch_layout(self, topk_idx: torch.Tensor, num_experts: int) -> DispatchLayout:
        """Count this rank's tokens per rank, host and expert (`deepep.layout.dispatch_layout`), on the current stream.

        Plain torch unless a backend has something quicker.
        """
        from deepep.layout import dispatch_layout

        return dispatch_layout(topk_idx, num_experts, self.topology.num_ranks, self.topology.num_scaleup_ranks)

    def update_mask(self, rank: int, masked: bool) -> None:
        """Leave `rank` out of low-latency operations, or take it back in, after which all ranks clean their windows."""
        raise self._unsupported("update_mask")

    def query_mask(self, mask_status: torch.Tensor) -> None:
        """Write 1 for each masked rank into the int32 [R] tensor, 0 for the others."""
        raise self._unsupported("query_mask")

    def clean_mask(self) -> None:
        """Take every masked rank back in."""
        raise self._unsupported("clean_mask")

    def clean_low_latency_buffer(self, num_max_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Make the windows ready for low latency after other use; collective."""
        raise self._unsupported("clean_low_latency_buffer")

    def next_combine_buffer(self, routing: Routing, hidden: int) -> torch.Tensor:
        """Give the padded [L, R*M, H] bf16 tensor that the next low-latency combine can read in place."""
        raise self._unsupported("next_combine_buffer")

    def local_buffer(self, use_rdma_buffer: bool) -> torch.Tensor:
        """Give this rank's communication memory as a flat uint8 tensor."""
        raise self._unsupported("local_buffer")

    def dispatch_input_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Give a tensor inside the window from which dispatch reads without staging."""
        raise self._unsupported("dispatch_input_buffer")

    def combine_input_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Give a tensor inside the window from which combine reads without staging."""
        raise self._unsupported("combine_input_buffer")

    def _unsupported(self, op: str) -> UnsupportedOperation:
        from deepep.backends.registry import backends_with

        who = ", ".join(backends_with(op)) or "no installed backend"
        return UnsupportedOperation(f"{op}: backend '{self.name}' does not offer this operation; {who} does")
