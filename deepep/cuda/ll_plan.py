"""What low-latency calls of the same sizes have in common, so that those after the first need not work it out."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch

from deepep.cuda.like import like
from deepep.cuda.ll_grid import Grids
from deepep.cuda.ll_state import StateParts
from deepep.cuda.ll_structs import RECV, SEND, LlCombineArgs, LlCommon, LlDispatchArgs, Shape, magic
from deepep.quant import FP8_DTYPE, SfFormat

_SF_CODES = {None: 0, SfFormat.FLOAT32: 1, SfFormat.POW2: 2, SfFormat.UE8M0: 3}


class SfView(NamedTuple):
    """Scale factors [L, R*M, n] as a view of the state, the last two dimensions column-major.

    Attributes:
        dtype: of each, 4 bytes.
        size: L, R*M, n.
        stride: in elements.
        offset: likewise.
    """

    dtype: torch.dtype
    size: tuple[int, int, int]
    stride: tuple[int, int, int]
    offset: int

    def of(self, state: torch.Tensor) -> torch.Tensor:
        """Make the view."""
        return state.view(self.dtype).as_strided(self.size, self.stride, self.offset)


class Launch(NamedTuple):
    """A launch; the stream is what it lacks.

    Attributes:
        kernel: handle of the function.
        num_blocks: of the grid.
        smem: bytes of dynamic shared memory.
        args: address of the struct it takes.
    """

    kernel: int
    num_blocks: int
    smem: int
    args: int


class DispatchPlan(NamedTuple):
    """How a dispatch is launched, and where its results go.

    Attributes:
        launch: of the whole call, or of its first phase.
        args: what it takes, lacking only pointers. Launches copy them, so one struct serves all calls.
        parts: where the parts of the state are.
        state: what to allocate for it, see `like`.
        recv_x: the same for the rows, [L, R*M, H].
        sf: the scale factors, if there are any.
    """

    launch: Launch
    args: LlDispatchArgs
    parts: StateParts
    state: torch.Tensor
    recv_x: torch.Tensor
    sf: SfView | None

    @classmethod
    def make(
        cls,
        shape: Shape,
        grids: Grids,
        common: LlCommon,
        kernel: int,
        num_tokens: int,
        num_sms: int,
        sf_format: SfFormat | None,
        split_phases: bool,
        device: torch.device,
    ) -> DispatchPlan:
        """Plan dispatches of T tokens; `common` are the arguments that all launches of an engine share."""
        num_local, room, hidden = shape.num_local_experts, shape.num_ranks * shape.num_max_tokens, shape.hidden
        num_sf = 0 if sf_format is None else hidden // sf_format.hidden_multiple
        grid = grids.dispatch(num_tokens, num_sms, hidden // (8 if sf_format is None else 16), split_phases)
        args = LlDispatchArgs(
            common=common,
            sf_format=_SF_CODES[sf_format],
            tokens_per_block=grid.tokens_per_block,
            keeps_own=grid.keeps_own,
            send_parts=grid.send_parts,
            recv_parts=grid.recv_parts,
        )
        _set_first_launch(args.common, grid.team, num_tokens, split_phases)
        parts = StateParts.divide(shape, num_tokens, num_sf)
        dtype, sf = torch.bfloat16, None
        if sf_format is not None:
            dtype = FP8_DTYPE
            sf = SfView(sf_format.dtype, (num_local, room, num_sf), (num_sf * room, 1, room), parts.recv_sf // 4)
        state, recv_x = like((parts.end // 4,), torch.int32, device), like((num_local, room, hidden), dtype, device)
        launch = Launch(kernel, grid.num_blocks, grids.table_bytes, ctypes.addressof(args))
        return cls(launch, args, parts, state, recv_x, sf)


class CombinePlan(NamedTuple):
    """How a combine is launched.

    Attributes:
        launch: as a dispatch's.
        args: likewise.
        out: what to allocate for the result, [T, H]; see `like`.
    """

    launch: Launch
    args: LlCombineArgs
    out: torch.Tensor

    @classmethod
    def make(
        cls,
        grids: Grids,
        common: LlCommon,
        kernel: int,
        num_tokens: int,
        num_sms: int,
        is_per_copy: bool,
        use_logfmt: bool,
        has_sent_weights: bool,
        split_phases: bool,
        device: torch.device,
    ) -> CombinePlan:
        """Plan combines that bring T tokens home; `common` are the arguments that all launches of an engine share."""
        grid = grids.combine(num_tokens, num_sms, is_per_copy, split_phases)
        args = LlCombineArgs(
            common=common,
            is_per_copy=is_per_copy,
            use_logfmt=use_logfmt,
            has_sent_weights=has_sent_weights,
            keeps_own=grid.keeps_own,
            has_workers=grid.has_workers,
            debt_parts=grid.debt_parts,
            home_parts=grid.home_parts,
            debt_parts_magic=magic(grid.debt_parts),
            home_parts_magic=magic(grid.home_parts),
        )
        _set_first_launch(args.common, grid.team, num_tokens, split_phases)
        out = like((num_tokens, common.shape.hidden), torch.bfloat16, device)
        return cls(Launch(kernel, grid.num_blocks, 0, ctypes.addressof(args)), args, out)


def _set_first_launch(common: LlCommon, team: int, num_tokens: int, split_phases: bool) -> None:
    """Fill in what a plan knows beyond what all launches of an engine share."""
    common.team_threads, common.num_tokens = team, num_tokens
    common.phases = SEND if split_phases else SEND | RECV
