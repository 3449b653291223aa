"""`deep_ep.utils.refs`: dispatch and combine in a few plain torch lines, to compare results with.

`dispatch` communicates (one all-gather per tensor); the rest is local. They share nothing with the backends but
`layout.py`, and spare no memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from deepep.errors import InvalidArgument
from deepep.layout import last_slots, localise, topk_ranks

__all__ = ["DispatchedRows", "combine", "dispatch", "generate_pre_combine_data", "ordered_accumulate"]

Payload = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
Bias = torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None


class DispatchedRows(NamedTuple):
    """What one rank receives, compact, ascending by (source rank, source token).

    Attributes:
        x: `[N, H]`, or the pair with its scale factors `[N, S]`.
        topk_idx: `[N, K]` local expert or -1.
        topk_weights: `[N, K]`, 0 where `topk_idx` is -1; None if none were given.
        src_token_global_idx: `[N]` int64, `source rank * num_max_tokens_per_rank + source token`.
    """

    x: Payload
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor | None
    src_token_global_idx: torch.Tensor


def dispatch(
    x: Payload,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor | None,
    num_max_tokens_per_rank: int,
    num_experts: int,
    group: dist.ProcessGroup | None = None,
) -> DispatchedRows:
    """Find out what this rank must receive, by gathering all inputs of all ranks (CONTRACT, 'Three row layouts').

    Args:
        x: `[T, H]`, or a pair with scale factors `[T, S]`.
        topk_idx: `[T, K]` int64, -1 = no expert.
        topk_weights: `[T, K]` float32 or None.
        num_max_tokens_per_rank: M, equal on all ranks, at least every T.
        num_experts: E, a multiple of the group's size.
        group: torch process group, by default the world.

    Raises:
        InvalidArgument: more than M tokens.
    """
    num_ranks, rank = dist.get_world_size(group), dist.get_rank(group)

    def gather(t: torch.Tensor, fill: int = 0) -> torch.Tensor:
        return _gather_rows(t, num_max_tokens_per_rank, fill, num_ranks, group)

    everyone_idx = gather(topk_idx, fill=-1)
    everyone_weights = None if topk_weights is None else gather(topk_weights)
    local_idx, local_weights = localise(everyone_idx, everyone_weights, rank, num_experts // num_ranks)
    # Ranks were padded to M tokens each with empty choices, so a row number is the global token number.
    rows = (local_idx >= 0).any(dim=1).nonzero().flatten()
    parts = [_take(gather(part), rows) for part in (x if isinstance(x, tuple) else (x,))]
    return DispatchedRows(
        (parts[0], parts[1]) if isinstance(x, tuple) else parts[0],
        local_idx[rows],
        None if local_weights is None else local_weights[rows],
        rows,
    )


def generate_pre_combine_data(
    src_token_global_idx: torch.Tensor, num_max_tokens_per_rank: int, num_topk: int, hidden: int
) -> torch.Tensor:
    """Make up expert outputs that any rank can work out for any token: `[N, K, hidden]` bfloat16 in [-1, 1).

    Args:
        src_token_global_idx: `[N]` integers, `source rank * num_max_tokens_per_rank + source token`.
        num_max_tokens_per_rank: M.
        num_topk: K; every top-k position gets values of its own.
        hidden: channels.
    """
    src_rank, token = src_token_global_idx.long() // num_max_tokens_per_rank, src_token_global_idx.long()
    token = token % num_max_tokens_per_rank
    position = torch.arange(num_topk, device=token.device)
    channel = torch.arange(hidden, device=token.device)
    # Odd multipliers keep different (rank, token, position) apart modulo 2**16 until there are 65536 of them.
    row = (src_rank * 40503 + token * 9973)[:, None] + position * 30011
    bits = (row[..., None].int() ^ (channel * 25173 + 13849).int()) & 0xFFFF
    return ((bits - 0x8000).float() / 0x8000).to(torch.bfloat16)


def ordered_accumulate(data: torch.Tensor, initial_value: torch.Tensor | None = None) -> torch.Tensor:
    """Add `data[0]`, `data[1]`, ... one after the other to `initial_value` (or 0), in float32.

    Args:
        data: `[n, ...]`.
        initial_value: `[...]`.

    Returns:
        `[...]` float32.
    """
    start = data.new_zeros(data.shape[1:]) if initial_value is None else initial_value
    total = start.float()
    for term in data:
        total = total + term.float()
    return total


def combine(
    y: torch.Tensor,
    topk_idx: torch.Tensor,
    num_scaleout_ranks: int,
    num_scaleup_ranks: int,
    num_experts: int,
    bias: Bias = None,
    reduce_in_local: bool = True,
    reduce_in_scaleup: bool = True,
) -> torch.Tensor:
    """Sum what experts return for the tokens of one rank, in the stated order, bit for bit (CONTRACT, 'Arithmetic').

    Args:
        y: `[T, K, H]`, the row that the expert at each top-k position returns. For compact rows, keep only the highest
            position of each rank in `topk_idx`.
        topk_idx: `[T, K]` global expert numbers, -1 = no expert; `y` is not read there.
        num_scaleout_ranks: domains.
        num_scaleup_ranks: ranks per domain.
        num_experts: E.
        bias: none, one, or a pair of `[T, H]`; the accumulator starts there.
        reduce_in_local: the rows of one token on one rank are first summed and rounded.
        reduce_in_scaleup: likewise the rows of one domain, if there are several domains.

    Returns:
        `[T, H]` in the dtype of `y`.
    """
    num_ranks = num_scaleout_ranks * num_scaleup_ranks
    owner = topk_ranks(topk_idx, num_experts // num_ranks)
    slots = list(y.unbind(dim=1))
    if reduce_in_local:
        slots, owner = _reduce_level(slots, owner)
    if reduce_in_scaleup and num_scaleout_ranks > 1:
        slots, owner = _reduce_level(slots, topk_ranks(owner, num_scaleup_ranks))
    terms = [
        torch.where(present[:, None], slot.float(), 0) for slot, present in zip(slots, (owner >= 0).t(), strict=True)
    ]
    return ordered_accumulate(torch.stack(terms), _initial_value(bias)).to(y.dtype)


def _reduce_level(slots: list[torch.Tensor], keys: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Sum the slots of a token that share a key, ascending, and leave the rounded sum at the highest of them.

    As sums stand at the highest position of their group, going through the slots in order is the next level's order.

    Args:
        slots: K tensors `[T, H]`.
        keys: `[T, K]`, negative = empty.

    Returns:
        The new slots, and their keys, -1 where nothing is left.
    """
    last = last_slots(keys)
    reduced = []
    for k in range(len(slots)):
        total = torch.zeros_like(slots[k], dtype=torch.float32)
        for j in range(k + 1):
            belongs = (keys[:, j] == last[:, k]) & (last[:, k] >= 0)
            total = torch.where(belongs[:, None], total + slots[j].float(), total)
        reduced.append(total.to(slots[k].dtype))
    return reduced, last


def _initial_value(bias: Bias) -> torch.Tensor | None:
    if bias is None:
        return None
    return bias[0].float() + bias[1].float() if isinstance(bias, tuple) else bias.float()


def _gather_rows(
    t: torch.Tensor, num_rows: int, fill: int, num_ranks: int, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Gather `[T, ..]` of all ranks, each filled up to `num_rows`: `[num_ranks * num_rows, ..]`."""
    if t.shape[0] > num_rows:
        raise InvalidArgument(
            f"dispatch: {t.shape[0]} tokens, num_max_tokens_per_rank={num_rows} allows no more than that"
        )
    padded = torch.empty(num_rows, *t.shape[1:], dtype=t.dtype, device=t.device)
    padded.view(torch.uint8)[t.shape[0] :] = fill & 0xFF
    padded.view(torch.uint8)[: t.shape[0]] = t.contiguous().view(torch.uint8)
    # gloo works on host memory; bytes, because no transport knows FP8.
    mine = padded.view(torch.uint8) if dist.get_backend(group) == "nccl" else padded.view(torch.uint8).cpu()
    everyone = [torch.empty_like(mine) for _ in range(num_ranks)]
    dist.all_gather(everyone, mine, group=group)
    return torch.cat(everyone).to(t.device).view(t.dtype)


def _take(t: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows of a tensor of any dtype."""
    return t.view(torch.uint8)[rows].view(t.dtype)
