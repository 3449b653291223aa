"""What a low-latency dispatch leaves behind on the device: one block, and where its parts are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from deepep.backends.base import DispatchRequest
from deepep.cuda import ll_structs
from deepep.cuda.ll_structs import Shape
from deepep.layout import align
from deepep.records import quickly_made

_STATE_ALIGNMENT = 32  # int32 elements
_DEFAULT_STREAM = 0

Sent = tuple[tuple[int, int], tuple[int, int]]
"""Identity of (topk_idx, topk_weights)."""


class StateParts(NamedTuple):
    """Where the parts of a dispatch's block begin, in bytes; the epoch comes first."""

    sources: int
    home_topk: int
    routes: int
    route_weights: int
    layout_range: int
    src_info: int
    recv_count: int
    recv_sf: int
    end: int

    @classmethod
    def divide(cls, shape: Shape, num_tokens: int, num_sf: int) -> StateParts:
        """Divide the block of a dispatch of T tokens with n scale factors a row, parts at multiples of 128 bytes."""
        room = shape.num_ranks * shape.num_max_tokens
        choices, num_local = room * shape.num_topk, shape.num_local_experts
        places = [_STATE_ALIGNMENT]
        for size in (
            ll_structs.MAX_RANKS, num_tokens * shape.num_topk, choices, choices, 2 * num_local * shape.num_ranks,
            num_local * room, num_local, num_local * room * num_sf,
        ):  # fmt: skip
            places.append(places[-1] + align(size, _STATE_ALIGNMENT))
        return cls(*(4 * place for place in places))


class NextBlock:
    """Blocks for dispatches, each allocated behind the launch before its own, where the GPU need not wait for it.

    So on the default stream only: memory belongs to the stream that it was allocated on, and what a graph uses must
    come from the graph's own pool. No graph is captured on that stream. Only a call of the same size as the one before
    gains, which is what the layers of a model make. One block more is held meanwhile; if the call before was made
    within a memory pool of the user's, it is of that pool.
    """

    def __init__(self) -> None:
        self._like: torch.Tensor | None = None
        self._block: torch.Tensor | None = None
        self._is_tight = False

    def take(self, like: torch.Tensor, stream: int) -> torch.Tensor:
        """Give a block of the size of another for a dispatch on a stream."""
        block = self._block
        if block is None or like is not self._like or stream != _DEFAULT_STREAM:
            return torch.empty_like(like)
        self._block = None
        return block

    def allocate(self, like: torch.Tensor, stream: int) -> None:
        """Have one ready that a dispatch on the same stream is likely to ask for."""
        if stream != _DEFAULT_STREAM or self._is_tight:
            return
        self._block = None  # before there are two
        try:
            self._like, self._block = like, torch.empty_like(like)
        except torch.OutOfMemoryError:
            self._is_tight = True  # the next dispatch will say so, if it is still true


@quickly_made
@dataclass(frozen=True)
class LlRouting:
    """What a dispatch leaves for its second phase and its combines; all of it on the device.

    Attributes:
        state: int32 words: epoch of the call, headers of the sources, `topk_idx` as sent, rows and weights of choices.
            One allocation serves these and all outputs but the rows, which are views of it: they are small beside the
            rows, so nobody minds that they live together, and kernels start before the views are made.
        addresses: of what combine needs, in the order of `LlCommon`.
        shape: the sizes it was made with.
        num_tokens: T.
        sent: whose weights travelled with dispatch, or None.
    """

    state: torch.Tensor
    addresses: tuple[int, int, int, int, int]
    shape: Shape
    num_tokens: int
    sent: Sent | None

    @classmethod
    def of(
        cls,
        request: DispatchRequest,
        state: torch.Tensor,
        addresses: tuple[int, int, int, int, int],
        shape: Shape,
        num_tokens: int,
    ) -> LlRouting:
        """Put together what one dispatch leaves."""
        sent = None
        if request.topk_weights is not None and request.topk_idx is not None:
            sent = (identity(request.topk_idx), identity(request.topk_weights))
        return cls(state, addresses, shape, num_tokens, sent)


def identity(tensor: torch.Tensor) -> tuple[int, int]:
    """Where a tensor's values are and how often they were changed; not looked at on the device, which would wait."""
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version
