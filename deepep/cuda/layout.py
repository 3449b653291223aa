"""`Buffer.get_dispatch_layout` as one launch: `deepep.layout.dispatch_layout` says what it computes."""

from __future__ import annotations

import ctypes

import torch

from deepep.cuda.arguments import MAX_RANKS
from deepep.cuda.engine import Engine
from deepep.cuda.kernels import LAYOUT
from deepep.cuda.launch import current_stream
from deepep.layout import DispatchLayout

_NUM_THREADS = 256
_TILE_TOKENS = 128
_MOST_BLOCKS = 128


class LayoutArgs(ctypes.Structure):
    """Of `deepep_layout`; twin of the struct in `csrc/kernels/layout.cu`, compared by a unit test."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("topk_idx", "per_expert", "per_rank", "per_host", "is_token_in_rank")),
        ("sums", ctypes.c_uint64),
        *((name, ctypes.c_uint32) for name in ("num_tokens", "num_topk", "num_experts", "num_ranks")),
        *((name, ctypes.c_uint32) for name in ("ranks_per_host", "num_hosts")),
    ]


class LayoutCounter:
    """Counts tokens for one backend.

    The kernel adds up in memory that it finds zeroed and leaves zeroed. That memory belongs to a stream, since calls on
    two streams may run at the same time.
    """

    def __init__(self, engine: Engine, num_ranks_per_host: int) -> None:
        self._engine = engine
        self._ranks_per_host = num_ranks_per_host
        self._num_hosts = engine.num_ranks // num_ranks_per_host if num_ranks_per_host < engine.num_ranks else 0
        self._sums: dict[int, torch.Tensor] = {}

    def can(self, topk_idx: torch.Tensor, num_experts: int) -> bool:
        """Say whether the kernel takes these: on this engine's GPU, and histograms that fit shared memory."""
        num_columns = num_experts + 2 * MAX_RANKS
        return topk_idx.get_device() == self._engine.device and 4 * num_columns <= self._engine.smem_bytes

    def count(self, topk_idx: torch.Tensor, num_experts: int) -> DispatchLayout:
        """Count on the current stream, without a wait; arguments and results as `deepep.layout.dispatch_layout`."""
        engine, device = self._engine, topk_idx.device
        num_tokens, num_topk = topk_idx.shape
        num_ranks, num_hosts = engine.num_ranks, self._num_hosts
        num_columns = num_experts + num_ranks + num_hosts
        per_rank = torch.empty(num_ranks, dtype=torch.int32, device=device)
        per_expert = torch.empty(num_experts, dtype=torch.int32, device=device)
        per_host = torch.empty(num_hosts, dtype=torch.int32, device=device) if num_hosts else None
        in_rank = torch.empty((num_tokens, num_ranks), dtype=torch.bool, device=device)
        sums = self._zeroed(1 + num_columns, device)
        args = LayoutArgs(
            topk_idx.data_ptr(), per_expert.data_ptr(), per_rank.data_ptr(),
            0 if per_host is None else per_host.data_ptr(), in_rank.data_ptr(), sums.data_ptr(),
            num_tokens, num_topk, num_experts, num_ranks, self._ranks_per_host, num_hosts,
        )  # fmt: skip
        num_blocks = max(1, min(-(-num_tokens // _TILE_TOKENS), _MOST_BLOCKS))
        engine.launch(LAYOUT, num_blocks, _NUM_THREADS, 4 * num_columns, args, engine.stream())
        return DispatchLayout(per_rank, per_host, per_expert, in_rank)

    def _zeroed(self, num_words: int, device: torch.device) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            # A graph may run beside whatever its stream does by then: it has memory of its own, and zeroes it.
            return torch.zeros(num_words, dtype=torch.int32, device=device)
        stream = current_stream(self._engine.device)
        sums = self._sums.get(stream)
        if sums is None or sums.numel() < num_words:
            sums = self._sums[stream] = torch.zeros(num_words, dtype=torch.int32, device=device)
        return sums
