"""What every rank must get, from the inputs of all ranks alone: routing, layouts, compact rows, sums.

Written to be obviously right, not fast: places come from plain loops over (rank, token, position), only payload moves
through torch. Nothing here communicates or looks at a backend. `oracle_low_latency` and `oracle_elastic` build on this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from deepep.testing.routing import Inputs

Choices = list[list[list[int]]]


@dataclass(frozen=True)
class Route:
    """Where everything goes, on all ranks.

    Attributes:
        num_ranks: R.
        num_experts: E.
        num_topk: K.
        choices: `choices[src][token][k]`, expert or -1.
        rows: `rows[dst]`, the (src, token) of each compact row, ascending.
        row_of: (dst, src, token) -> compact row at dst.
        copies: `copies[expert]`, the (src, token, k) of each choice of that expert, ascending.
        place_of: (src, token, k) -> place among the copies of the chosen expert.
    """

    num_ranks: int
    num_experts: int
    num_topk: int
    choices: Choices
    rows: list[list[tuple[int, int]]]
    row_of: dict[tuple[int, int, int], int]
    copies: list[list[tuple[int, int, int]]]
    place_of: dict[tuple[int, int, int], int]

    @property
    def num_local_experts(self) -> int:
        """L, experts of one rank."""
        return self.num_experts // self.num_ranks

    def owner(self, expert: int) -> int:
        """Rank that an expert lives on."""
        return expert // self.num_local_experts

    def local_experts(self, rank: int) -> range:
        """Global numbers of a rank's experts."""
        return range(rank * self.num_local_experts, (rank + 1) * self.num_local_experts)

    def last_position(self, src: int, token: int) -> dict[int, int]:
        """Map each destination rank of a token to the highest top-k position that chose it."""
        last: dict[int, int] = {}
        for k, expert in enumerate(self.choices[src][token]):
            if expert >= 0:
                last[self.owner(expert)] = k
        return last


def make_route(inputs: Sequence[Inputs], num_experts: int) -> Route:
    """Find all places from every rank's `topk_idx`."""
    choices: Choices = [one.topk_idx.tolist() for one in inputs]
    route = Route(len(inputs), num_experts, inputs[0].topk_idx.shape[1], choices, [[] for _ in inputs], {}, [], {})
    route.copies.extend([] for _ in range(num_experts))
    for src, tokens in enumerate(choices):
        for token, choice in enumerate(tokens):
            for dst in route.last_position(src, token):
                route.row_of[dst, src, token] = len(route.rows[dst])
                route.rows[dst].append((src, token))
            for k, expert in enumerate(choice):
                if expert >= 0:
                    route.place_of[src, token, k] = len(route.copies[expert])
                    route.copies[expert].append((src, token, k))
    return route


@dataclass(frozen=True)
class Layout:
    """Outcome of `get_dispatch_layout` on one rank; shapes as CONTRACT, '`Buffer`', has them."""

    num_tokens_per_rank: torch.Tensor
    num_tokens_per_rdma_rank: torch.Tensor
    num_tokens_per_expert: torch.Tensor
    is_token_in_rank: torch.Tensor


def expected_layout(route: Route, rank: int, ranks_per_host: int = 0) -> Layout:
    """Count a rank's own tokens per destination. `ranks_per_host` 0 puts all ranks on one host."""
    ranks_per_host = ranks_per_host or route.num_ranks
    num_tokens = len(route.choices[rank])
    per_rank, per_expert = [0] * route.num_ranks, [0] * route.num_experts
    per_host = [0] * (route.num_ranks // ranks_per_host)
    in_rank = torch.zeros(num_tokens, route.num_ranks, dtype=torch.bool)
    for token in range(num_tokens):
        destinations = set(route.last_position(rank, token))
        for dst in destinations:
            per_rank[dst] += 1
            in_rank[token, dst] = True
        for host in {dst // ranks_per_host for dst in destinations}:
            per_host[host] += 1
        for expert in route.choices[rank][token]:
            if expert >= 0:
                per_expert[expert] += 1
    return Layout(int32(per_rank), int32(per_host), int32(per_expert), in_rank)


@dataclass(frozen=True)
class CompactRows:
    """What one rank receives in the compact layout.

    Attributes:
        x: [N, H]; sf: [N, S] or None.
        topk_idx: [N, K] local expert or -1; topk_weights: [N, K], 0 where -1.
        counts: aligned rows of each local expert, Python ints.
        rank_prefix_matrix: [R, R], rows from source i at receiver j are [m[i-1][j], m[i][j]).
        src_token: [N], token number at the source.
    """

    x: torch.Tensor
    sf: torch.Tensor | None
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    counts: list[int]
    rank_prefix_matrix: torch.Tensor
    src_token: torch.Tensor


def expected_compact(route: Route, inputs: Sequence[Inputs], rank: int, expert_alignment: int = 1) -> CompactRows:
    """Work out the compact rows of `rank`, in order of (source rank, source token)."""
    rows = route.rows[rank]
    idx = torch.full((len(rows), route.num_topk), -1, dtype=torch.int64)
    weights = torch.zeros(len(rows), route.num_topk)
    first = route.local_experts(rank).start
    for row, (src, token) in enumerate(rows):
        for k, expert in enumerate(route.choices[src][token]):
            if expert in route.local_experts(rank):
                idx[row, k] = expert - first
                weights[row, k] = inputs[src].topk_weights[token, k]
    x, sf = gather_tokens(inputs, rows)
    counts = [align(len(route.copies[expert]), expert_alignment) for expert in route.local_experts(rank)]
    return CompactRows(x, sf, idx, weights, counts, _rank_prefix_matrix(route), int32([token for _, token in rows]))


def _rank_prefix_matrix(route: Route) -> torch.Tensor:
    matrix = torch.zeros(route.num_ranks, route.num_ranks, dtype=torch.int32)
    for dst, rows in enumerate(route.rows):
        for src in range(route.num_ranks):
            matrix[src, dst] = sum(1 for sender, _ in rows if sender <= src)
    return matrix


def rank_terms(route: Route, src: int, *, by_rank: bool = False) -> list[list[int]]:
    """For each token of `src`: its destination ranks in the order in which combine adds their terms.

    That is by highest top-k position that chose the rank or, `by_rank` (a dispatch without top-k), by rank.
    """
    terms = []
    for token in range(len(route.choices[src])):
        last = route.last_position(src, token)
        terms.append(sorted(last) if by_rank else sorted(last, key=lambda dst: last[dst]))
    return terms


def expected_combine(
    route: Route,
    outputs: Sequence[torch.Tensor],
    rank: int,
    *,
    bias: Sequence[torch.Tensor] = (),
    ranks_per_host: int = 0,
    by_rank: bool = False,
) -> torch.Tensor:
    """Sum the compact rows `outputs[dst]` [N, H] that every rank sends back for the tokens of `rank`: [T, H].

    Where `ranks_per_host` leaves several hosts, the rows of each are first summed and rounded, then the hosts, likewise
    ordered by the highest position that chose them.
    """
    terms = []
    is_two_level = 0 < ranks_per_host < route.num_ranks
    for token, ranks in enumerate(rank_terms(route, rank, by_rank=by_rank)):
        rows = [(dst, outputs[dst][route.row_of[dst, rank, token]]) for dst in ranks]
        whole = [row for _, row in rows]
        terms.append(reduce_hosts(rows, ranks_per_host, by_rank=by_rank) if is_two_level else whole)
    return add_terms(terms, outputs[0], bias)


def expected_combined_weights(route: Route, weights: Sequence[torch.Tensor], rank: int) -> torch.Tensor:
    """Sum the weights `weights[dst]` [N, K] of all destination ranks, slot by slot: [T, K]. Nothing is masked."""
    combined = torch.zeros(len(route.choices[rank]), route.num_topk)
    for token, ranks in enumerate(rank_terms(route, rank)):
        for dst in ranks:
            combined[token] += weights[dst][route.row_of[dst, rank, token]]
    return combined


def reduce_hosts(
    rows: Sequence[tuple[int, torch.Tensor]], ranks_per_host: int, *, by_rank: bool = False
) -> list[torch.Tensor]:
    """Turn ordered (rank, row) terms into one rounded sum per host, ordered by each host's last term.

    Without top-k (`by_rank`) ranks and hosts ascend, which is the same order.
    """
    last = {dst // ranks_per_host: place for place, (dst, _) in enumerate(rows)}
    hosts = sorted(last) if by_rank else sorted(last, key=lambda host: last[host])
    return [round_sum([row for dst, row in rows if dst // ranks_per_host == host]) for host in hosts]


def round_sum(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Add rows in the given order in float32, from 0, and round once to their type."""
    total = torch.zeros(rows[0].shape)
    for row in rows:
        total = total + row.float()
    return total.to(rows[0].dtype)


def add_terms(
    terms: Sequence[Sequence[torch.Tensor]], like: torch.Tensor, bias: Sequence[torch.Tensor] = ()
) -> torch.Tensor:
    """Start from the biases, add each token's terms in order in float32, round once: [T, H] of `like.dtype`."""
    total = torch.zeros(len(terms), like.shape[-1])
    for number, one in enumerate(bias):
        total = one.float().clone() if number == 0 else total + one.float()
    for token, rows in enumerate(terms):
        for row in rows:
            total[token] = total[token] + row.float()
    return total.to(like.dtype)


def gather_tokens(
    inputs: Sequence[Inputs], tokens: Sequence[tuple[int, int]]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Collect the payload, and the scale factors if there are any, of the named (source rank, token)s."""
    x = gather(lambda one: one.x, inputs, tokens)
    return x, None if inputs[0].sf is None else gather(_sf_of, inputs, tokens)


def gather(
    field: Callable[[Inputs], torch.Tensor], inputs: Sequence[Inputs], tokens: Sequence[tuple[int, int]]
) -> torch.Tensor:
    """Collect one row of `field` for each of the named (source rank, token)s."""
    parts = [field(one).contiguous() for one in inputs]
    starts = [sum(len(part) for part in parts[:rank]) for rank in range(len(parts))]
    index = torch.tensor([starts[src] + token for src, token in tokens], dtype=torch.int64)
    return torch.cat([bits(part) for part in parts])[index].view(parts[0].dtype)


def _sf_of(one: Inputs) -> torch.Tensor:
    if one.sf is None:
        raise ValueError("one rank has scale factors and another has none")
    return one.sf


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """View a tensor as integers of the same width: torch indexes and compares not every float8, and bits count."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def align(count: int, alignment: int) -> int:
    """Round up to a multiple of `alignment`."""
    return (count + alignment - 1) // alignment * alignment


def int32(values: Sequence[int]) -> torch.Tensor:
    """Make a 1-D int32 tensor."""
    return torch.tensor(values, dtype=torch.int32)
