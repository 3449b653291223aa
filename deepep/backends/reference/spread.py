"""From compact rows to expanded and padded ones: every row goes to each of its experts on this rank."""

from __future__ import annotations

import torch

from deepep.backends.reference.pool import row_pool
from deepep.backends.reference.rows import as_bytes


class Spread:
    """Puts compact rows where (row, top-k position) pairs say.

    Args:
        expanded_row: [N, K] int32, as in `Routing`.
        num_rows: of the result, with padding.
        do_zero: zero what `rows` leaves unused.
    """

    def __init__(self, expanded_row: torch.Tensor, num_rows: int, do_zero: bool) -> None:
        self.pairs = (expanded_row >= 0).nonzero()
        self.target = expanded_row[self.pairs[:, 0], self.pairs[:, 1]].to(torch.int64)
        self.num_rows = num_rows
        self.do_zero = do_zero

    def rows(self, compact: torch.Tensor) -> torch.Tensor:
        """Give expanded rows [num_rows, ..] of compact ones [N, ..]; rows between experts zero if asked for."""
        out = row_pool.empty(self.num_rows, compact.shape[1], compact.dtype, compact.device)
        if self.do_zero:
            as_bytes(out).zero_()
        self.into(out, compact)
        return out

    def choices(self, values: torch.Tensor) -> torch.Tensor:
        """Give one value per expanded row, [num_rows], of one per (compact row, position); 0 elsewhere."""
        out = torch.zeros(self.num_rows, dtype=values.dtype, device=values.device)
        out[self.target] = values[self.pairs[:, 0], self.pairs[:, 1]]
        return out

    def into(self, out: torch.Tensor, compact: torch.Tensor) -> None:
        """Write expanded rows into `out` [num_rows, ..]."""
        as_bytes(out)[self.target] = as_bytes(compact)[self.pairs[:, 0]]

    def into_3d(self, out: torch.Tensor, compact: torch.Tensor) -> None:
        """Write padded rows into `out` [L, room, ..] of any strides."""
        room = out.shape[1]
        out[self.target // room, self.target % room] = compact[self.pairs[:, 0]]
