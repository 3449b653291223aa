"""A backend of compact rows: each rank hears all tokens, one batch in CONTRACT's order by itself, and picks its own."""

import torch

from deepep.backends import base
from deepep.errors import UnsupportedOperation
from deepep.layout import align, count_experts, last_slots, localise, slot_positions, token_in_rank, topk_ranks


class ToyBackend(base.Backend):
    name = "toy"
    probe = classmethod(lambda _: base.Availability(True))
    capabilities = classmethod(lambda _: base.Capabilities(frozenset({"cpu"}), frozenset({base.Layout.COMPACT})))

    def dispatch(self, request: base.DispatchRequest) -> base.DispatchResult:
        if request.num_worst_rows is not None or (request.topk_idx is None and request.routing is None):
            raise UnsupportedOperation("dispatch: 'toy' needs topk_idx and gives exact shapes; use backend='reference'")
        me, num_ranks, num_local = self.group.rank, self.group.num_ranks, request.num_experts // self.group.num_ranks
        ranks = topk_ranks(request.topk_idx, num_local) if request.routing is None else request.routing.dst_rank.long()
        mine = [last_slots(ranks), request.x, request.sf, request.topk_idx, request.topk_weights]
        said = [None if t is None else t.contiguous().view(torch.uint8) for t in mine]  # rows are opaque bytes
        everyone = self.group.all_gather_object(said, op="dispatch", timeout=self.options.timeout)
        joined = [None if parts[0] is None else torch.cat(parts) for parts in zip(*everyone, strict=True)]
        dst_rank = joined[0].view(torch.int64)
        is_mine = (dst_rank == me).any(dim=1)
        picked = [None if t is None else t[is_mine].view(m.dtype) for t, m in zip(joined, mine, strict=True)]
        if request.routing is not None:
            return base.DispatchResult(picked[1], picked[2], None, None, None, [], request.routing)
        topk_idx, weights = localise(*picked[3:], me, num_local)
        ends, num_rows = torch.tensor([len(part[0]) for part in everyone]).cumsum(0).tolist(), len(topk_idx)
        psum = torch.stack([token_in_rank(dst_rank[:end], num_ranks).sum(0) for end in ends]).int()
        home = slice(ends[me] - len(ranks), ends[me])
        src_token = torch.cat([torch.arange(len(part[0])) for part in everyone])[is_mine].int()
        routing = base.Routing(
            base.Layout.COMPACT, request.num_experts, 0, request.expert_alignment, num_rows, num_rows, request.topk_idx,
            dst_rank[home].int(), slot_positions(dst_rank, num_ranks)[home].int(), psum[:, me], src_token,
        )  # fmt: skip
        counts = count_experts(topk_idx, num_local)
        aligned = [align(count, request.expert_alignment) for count in counts.tolist()]
        return base.DispatchResult(picked[1], picked[2], topk_idx, weights, counts, aligned, routing, psum)

    def combine(self, request: base.CombineRequest) -> base.CombineResult:
        everyone = self.group.all_gather_object(request, op="combine", timeout=self.options.timeout)
        routing, hidden, has_weights = request.routing, request.x.shape[1], request.topk_weights is not None
        rows = [torch.cat([r.x.float(), r.topk_weights] if has_weights else [r.x.float()], dim=1) for r in everyone]
        first, rows = torch.tensor([0, *map(len, rows)]).cumsum(0), torch.cat(rows)
        total = torch.zeros(len(routing.dst_rank), rows.shape[1])
        total[:, :hidden] += sum(bias.float() for bias in request.bias)
        for to, row in zip(routing.dst_rank.T, routing.dst_row.T, strict=True):  # ascending slots, as CONTRACT adds
            token = (to >= 0).nonzero().flatten()
            total[token] += rows[(first[to] + row)[token]]
        weights = total[:, hidden:].contiguous() if has_weights else None
        return base.CombineResult(total[:, :hidden].to(request.x.dtype).contiguous(), weights)

    def barrier(self) -> None:
        self.group.barrier(op="barrier", timeout=self.options.timeout)

    def destroy(self) -> None:
        pass
