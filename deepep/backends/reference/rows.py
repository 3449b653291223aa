"""Moving and adding rows: the two things the reference backend does to payload."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from deepep.backends.reference.pool import row_pool
from deepep.layout import token_in_rank

if TYPE_CHECKING:
    from deepep.group import Group

# Tokens summed at a time: on the CPU the fp32 accumulator of so many rows stays in a core's own cache.
_BLOCK_TOKENS = {"cpu": 16}
_BLOCK_TOKENS_ELSEWHERE = 4096


def tokens_of_ranks(dst_rank: torch.Tensor, num_ranks: int) -> list[torch.Tensor]:
    """List, for each rank, the tokens that go there, ascending: R int64 tensors."""
    in_rank = token_in_rank(dst_rank.to(torch.int64), num_ranks)
    return [in_rank[:, rank].nonzero().flatten() for rank in range(num_ranks)]


def without(ranks: torch.Tensor, masked: Sequence[int]) -> torch.Tensor:
    """Put -1 where `ranks` names a masked rank."""
    for rank in masked:
        ranks = torch.where(ranks == rank, -1, ranks)
    return ranks


def send_rows(
    group: Group, source: torch.Tensor, picks: Sequence[torch.Tensor], recv_counts: Sequence[int], out: torch.Tensor,
    op: str, timeout: float,
) -> None:  # fmt: skip
    """Send `source[picks[r]]` to each rank r and receive `recv_counts[r]` rows from each, back to back, into `out`."""
    parts = list(out[: sum(recv_counts)].split(list(recv_counts)))
    rank = group.rank
    # float8 has no index_select on every torch this runs on, and rows are opaque anyway: move bytes.
    raw = as_bytes(source)
    send = [_picked(raw, pick) if peer != rank else raw[:0] for peer, pick in enumerate(picks)]
    torch.index_select(raw, 0, picks[rank], out=as_bytes(parts[rank]))
    recv = [part if peer != rank else part[:0] for peer, part in enumerate(parts)]
    group.exchange(send, recv, op=op, timeout=timeout)


def return_rows(
    group: Group, rows: torch.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], op: str, timeout: float
) -> torch.Tensor:
    """Send back to back pieces of `rows` to their ranks; give what arrives, back to back: [sum(recv_counts), ..]."""
    out = row_pool.empty(sum(recv_counts), rows.shape[1], rows.dtype, rows.device)
    send = list(rows[: sum(send_counts)].split(list(send_counts)))
    group.exchange(send, list(out.split(list(recv_counts))), op=op, timeout=timeout)
    return out


def _picked(rows: torch.Tensor, pick: torch.Tensor) -> torch.Tensor:
    return torch.index_select(rows, 0, pick, out=row_pool.empty(pick.numel(), rows.shape[1], rows.dtype, rows.device))


def as_bytes(rows: torch.Tensor) -> torch.Tensor:
    """See rows of one-byte floats as bytes; other rows stay as they are."""
    return rows.view(torch.uint8) if rows.element_size() == 1 else rows


def ordered_sum(
    rows: torch.Tensor,
    index: torch.Tensor,
    start: Sequence[torch.Tensor] = (),
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add up, for each token, the rows its slots name, in slot order (CONTRACT, 'Arithmetic of combine').

    Args:
        rows: [P, H] payload.
        index: [T, S] rows to add, -1 for none.
        start: none, one or two [T, H] the fp32 accumulator starts from.
        scale: [T, S] float32; each row is multiplied by its slot's factor, rounded, then added. None adds rows as are.

    Returns:
        [T, H] of the dtype of `rows`, rounded once.
    """
    num_tokens, hidden = index.shape[0], rows.shape[1]
    out = row_pool.empty(num_tokens, hidden, rows.dtype, rows.device)
    index, scale = _without_gaps(index, scale)
    size = _BLOCK_TOKENS.get(rows.device.type, _BLOCK_TOKENS_ELSEWHERE)
    for begin in range(0, num_tokens, size):
        block = slice(begin, begin + size)
        total = _start(start, block, min(size, num_tokens - begin), hidden, rows.device)
        for slot in range(index.shape[1]):
            chosen = index[block, slot]
            tokens = (chosen >= 0).nonzero().flatten()
            if tokens.numel() == 0:
                break
            term = rows.index_select(0, chosen[tokens]).float()
            if scale is not None:
                term *= scale[block, slot][tokens].unsqueeze(1)
            if tokens.numel() == total.shape[0]:
                total += term
            else:
                # Each token occurs once, so index_add_ adds exactly one term to it: order is the slots' order.
                total.index_add_(0, tokens, term)
        out[block] = total
    return out


def _without_gaps(index: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Move each token's used slots to the front, in their order, and drop the columns that no token uses."""
    is_used = index >= 0
    num_columns = int(is_used.sum(dim=1).max()) if index.numel() else 0
    order = is_used.logical_not().to(torch.int8).argsort(dim=1, stable=True)[:, :num_columns]
    return index.gather(1, order), None if scale is None else scale.gather(1, order)


def _start(
    start: Sequence[torch.Tensor], block: slice, num_tokens: int, hidden: int, device: torch.device
) -> torch.Tensor:
    if not start:
        return torch.zeros(num_tokens, hidden, dtype=torch.float32, device=device)
    total = start[0][block].float()
    return total + start[1][block].float() if len(start) == 2 else total.clone()
