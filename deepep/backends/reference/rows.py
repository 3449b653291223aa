"""Moving and adding rows: the two things the reference backend does to payload."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from deepep.layout import token_in_rank

if TYPE_CHECKING:
    from deepep.group import Group

# Tokens summed at a time: the fp32 accumulator of so many rows stays in the cache.
_BLOCK_TOKENS = 256


def tokens_of_ranks(dst_rank: torch.Tensor, num_ranks: int) -> list[torch.Tensor]:
    """List, for each rank, the tokens that go there, ascending: R int64 tensors."""
    in_rank = token_in_rank(dst_rank.to(torch.int64), num_ranks)
    return [in_rank[:, rank].nonzero().flatten() for rank in range(num_ranks)]


def send_rows(
    group: Group, source: torch.Tensor, picks: Sequence[torch.Tensor], recv_counts: Sequence[int], out: torch.Tensor,
    op: str, timeout: float,
) -> None:  # fmt: skip
    """Send `source[picks[r]]` to each rank r and receive `recv_counts[r]` rows from each, back to back, into `out`."""
    parts = list(out[: sum(recv_counts)].split(list(recv_counts)))
    rank = group.rank
    # float8 has no index_select on every torch this runs on, and rows are opaque anyway: move bytes.
    raw = as_bytes(source)
    send = [raw.index_select(0, pick) if peer != rank else raw[:0] for peer, pick in enumerate(picks)]
    torch.index_select(raw, 0, picks[rank], out=as_bytes(parts[rank]))
    recv = [part if peer != rank else part[:0] for peer, part in enumerate(parts)]
    group.exchange(send, recv, op=op, timeout=timeout)


def return_rows(
    group: Group, rows: torch.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], op: str, timeout: float
) -> torch.Tensor:
    """Send back to back pieces of `rows` to their ranks; give what arrives, back to back: [sum(recv_counts), ..]."""
    out = rows.new_empty((sum(recv_counts), *rows.shape[1:]))
    send = list(rows[: sum(send_counts)].split(list(send_counts)))
    group.exchange(send, list(out.split(list(recv_counts))), op=op, timeout=timeout)
    return out


def as_bytes(rows: torch.Tensor) -> torch.Tensor:
    """See rows of one-byte floats as bytes; other rows stay as they are."""
    return rows.view(torch.uint8) if rows.element_size() == 1 else rows


def ordered_sum(
    rows: torch.Tensor,
    index: torch.Tensor,
    start: Sequence[torch.Tensor] = (),
    scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Add up, for each token, the rows its slots name, in slot order (CONTRACT, 'Arithmetic of combine').

    Args:
        rows: [P, H] payload.
        index: [T, S] rows to add, -1 for none.
        start: none, one or two [T, H] the fp32 accumulator starts from.
        scale: [T, S] float32; each row is multiplied by its slot's factor, rounded, then added. None adds rows as are.
        dtype: of the result; that of `rows` where not given.

    Returns:
        [T, H], rounded once.
    """
    num_tokens, hidden = index.shape[0], rows.shape[1]
    out = torch.empty(num_tokens, hidden, dtype=dtype or rows.dtype, device=rows.device)
    for begin in range(0, num_tokens, _BLOCK_TOKENS):
        block = slice(begin, begin + _BLOCK_TOKENS)
        total = _start(start, block, min(_BLOCK_TOKENS, num_tokens - begin), hidden, rows.device)
        for slot in range(index.shape[1]):
            chosen = index[block, slot]
            tokens = (chosen >= 0).nonzero().flatten()
            if tokens.numel() == 0:
                continue
            term = rows.index_select(0, chosen[tokens]).float()
            if scale is not None:
                term *= scale[block, slot][tokens].unsqueeze(1)
            # Each token occurs once, so index_add_ adds exactly one term to it: order is the slots' order.
            total.index_add_(0, tokens, term)
        out[block] = total
    return out


def _start(
    start: Sequence[torch.Tensor], block: slice, num_tokens: int, hidden: int, device: torch.device
) -> torch.Tensor:
    if not start:
        return torch.zeros(num_tokens, hidden, dtype=torch.float32, device=device)
    total = start[0][block].float()
    return total + start[1][block].float() if len(start) == 2 else total.clone()
