"""Before rows move: every rank tells every other what it is about to do, and all agree or all raise the same error."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from deepep.backends.base import Layout
from deepep.errors import InvalidArgument

if TYPE_CHECKING:
    from deepep.group import Group


@dataclass(frozen=True)
class Notice:
    """What one rank says at the start of an operation.

    Attributes:
        op: the operation, e.g. "dispatch".
        terms: what must be equal on all ranks, by name.
        num_tokens_per_rank: rows this rank will send to each rank.
        num_tokens_from_rank: rows its handle says that each rank will send; empty without one.
        num_tokens_per_expert: counts for a dispatch without top-k, else empty.
        num_worst_rows: rows this rank has room for; None if it takes what comes.
        refusal: why this rank will not take part, or None.
    """

    op: str
    terms: dict[str, object]
    num_tokens_per_rank: tuple[int, ...] = ()
    num_tokens_from_rank: tuple[int, ...] = ()
    num_tokens_per_expert: tuple[int, ...] = ()
    num_worst_rows: int | None = None
    refusal: str | None = None


def op_name(direction: str, layout: Layout) -> str:
    """Give "dispatch" or "combine" the name of the method that the user called, for errors."""
    return f"low_latency_{direction}" if layout is Layout.PADDED else direction


def notify(group: Group, mine: Notice, timeout: float, masked: Collection[int] = ()) -> list[Notice | None]:
    """Exchange notices and compare them.

    Returns:
        One notice per rank, None for masked ranks.

    Raises:
        InvalidArgument: a rank refuses, or two disagree; the same on all ranks but the one that refuses, which raises
            its own error itself.
        CommTimeout: a rank did not arrive.
    """
    notices: list[Notice | None] = group.all_gather_object(mine, op=mine.op, timeout=timeout, skip=masked)
    for rank, notice in enumerate(notices):
        if notice is not None and notice.refusal is not None and mine.refusal is None:
            raise InvalidArgument(f"{mine.op}: rank {rank} refused: {notice.refusal}")
    if mine.refusal is None:
        _agree(notices)
    return notices


def count_matrix(notices: list[Notice | None]) -> torch.Tensor:
    """Stack what the ranks send: [R, R] int64, row = source, column = receiver; 0 for masked ranks."""
    num_ranks = len(notices)
    counts = [list(n.num_tokens_per_rank) if n else [0] * num_ranks for n in notices]
    return torch.tensor(counts, dtype=torch.int64, device="cpu")


def check_room(op: str, notices: list[Notice | None], counts: torch.Tensor) -> None:
    """Refuse, on every rank alike, when more rows would arrive anywhere than that rank has room for."""
    arriving = counts.sum(dim=0).tolist()
    for rank, notice in enumerate(notices):
        if notice is not None and notice.num_worst_rows is not None and arriving[rank] > notice.num_worst_rows:
            raise InvalidArgument(
                f"{op}: {arriving[rank]} rows arrive at rank {rank}, whose num_worst_tokens is "
                f"{notice.num_worst_rows}; it must be at least {arriving[rank]}"
            )


def check_handles(op: str, notices: list[Notice | None]) -> None:
    """Refuse, on every rank alike, when handles are not of the same dispatch, as far as numbers of rows show it."""
    present = [(rank, notice) for rank, notice in enumerate(notices) if notice is not None]
    for receiver, theirs in present:
        for sender, said in present:
            expected = theirs.num_tokens_from_rank[sender] if theirs.num_tokens_from_rank else None
            if expected is not None and expected != said.num_tokens_per_rank[receiver]:
                raise InvalidArgument(
                    f"{op}: rank {sender} has {said.num_tokens_per_rank[receiver]} rows for rank {receiver}, whose "
                    f"handle says {expected}; all ranks must pass the handle of the same dispatch"
                )


def _agree(notices: list[Notice | None]) -> None:
    present = [(rank, notice) for rank, notice in enumerate(notices) if notice is not None]
    first_rank, first = present[0]
    for rank, notice in present[1:]:
        said, expected = {"op": notice.op, **notice.terms}, {"op": first.op, **first.terms}
        for name in expected:
            if said.get(name) != expected[name]:
                raise InvalidArgument(
                    f"{first.op}: ranks disagree about {name}: rank {first_rank} has {expected[name]} and rank {rank} "
                    f"has {said.get(name)}; it must be equal on all ranks"
                )
