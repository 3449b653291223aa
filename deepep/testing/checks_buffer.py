"""Contract checks of `Buffer`, compact rows. Each runs inside every rank and raises at its end."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from deepep.testing.oracle import (
    CompactRows,
    Route,
    expected_combine,
    expected_combined_weights,
    expected_compact,
    expected_layout,
    make_route,
)
from deepep.testing.routing import Case, Inputs, make_all_inputs, make_bias, make_outputs
from deepep.testing.target import Findings, Target, poisoned


@dataclass(frozen=True)
class Scene:
    """A case seen from one rank: everyone's inputs, the route, and what this rank must receive."""

    case: Case
    rank: int
    inputs: list[Inputs]
    route: Route
    rows: CompactRows

    @classmethod
    def of(cls, case: Case, rank: int) -> Scene:
        """Work the case out."""
        inputs = make_all_inputs(case)
        route = make_route(inputs, case.num_experts)
        return cls(case, rank, inputs, route, expected_compact(route, inputs, rank, case.expert_alignment))

    @property
    def mine(self) -> Inputs:
        """What this rank sends."""
        return self.inputs[self.rank]

    def everyones_rows(self) -> list[CompactRows]:
        """What every rank receives."""
        alignment = self.case.expert_alignment
        return [expected_compact(self.route, self.inputs, dst, alignment) for dst in range(self.case.num_ranks)]

    def outputs(self) -> list[torch.Tensor]:
        """Compact rows that every rank sends back."""
        return [make_outputs(self.case, dst, len(rows)) for dst, rows in enumerate(self.route.rows)]

    def returned_weights(self) -> list[torch.Tensor]:
        """Weights [N, K] that every rank sends back: small whole numbers, so that no order of adding them matters."""
        generator = torch.Generator().manual_seed(self.case.seed)
        shapes = [(len(rows), self.case.num_topk) for rows in self.route.rows]
        return [torch.randint(-9, 10, shape, generator=generator).float() for shape in shapes]

    def combined(self, outputs: list[torch.Tensor], **options: Any) -> torch.Tensor:
        """Sum of `outputs` for the tokens of this rank."""
        return expected_combine(self.route, outputs, self.rank, ranks_per_host=self.case.ranks_per_host, **options)


def check_layout(group: Any, target: Target, case: Case) -> None:
    """`get_dispatch_layout` counts tokens per rank, per host and per expert."""
    scene, buffer = Scene.of(case, group.rank()), target.buffer(group, case)
    found = Findings(scene.rank)
    want = expected_layout(scene.route, scene.rank, case.ranks_per_host)
    got = buffer.get_dispatch_layout(target.put(scene.mine.topk_idx), case.num_experts)
    found.equal("num_tokens_per_rank", got[0], want.num_tokens_per_rank)
    per_host = want.num_tokens_per_rdma_rank if case.num_hosts > 1 else None
    found.equal("num_tokens_per_rdma_rank", got[1], per_host)
    found.equal("num_tokens_per_expert", got[2], want.num_tokens_per_expert)
    found.equal("is_token_in_rank", got[3], want.is_token_in_rank)
    found.equal("event.event", got[4].event, None)
    buffer.destroy()
    found.finish()


def check_dispatch(group: Any, target: Target, case: Case) -> None:
    """`dispatch` gives compact rows in order; with the handle it gives the same rows again."""
    scene, buffer = Scene.of(case, group.rank()), target.buffer(group, case)
    found = Findings(scene.rank)
    got = dispatch(buffer, target, scene)
    _compare_dispatch(found, scene, got)
    _compare_handle(found, scene, got[4])
    again = buffer.dispatch(target.payload(scene.mine.x, scene.mine.sf), handle=got[4])
    found.payload("cached recv", again[0], scene.rows.x, scene.rows.sf, slice(None))
    found.equal("what else a cached dispatch returns", again[1:5], (None, None, None, None))
    buffer.destroy()
    found.finish()


def check_combine(group: Any, target: Target, case: Case) -> None:
    """`combine` adds in the stated order, with no, one and two biases, and sums weights slot by slot."""
    scene, buffer = Scene.of(case, group.rank()), target.buffer(group, case)
    found = Findings(scene.rank)
    handle = dispatch(buffer, target, scene)[4]
    outputs, weights = scene.outputs(), scene.returned_weights()
    mine, my_weights = target.put(outputs[scene.rank]), target.put(weights[scene.rank])
    y, none, event = buffer.combine(mine, handle)
    found.equal("y", y, scene.combined(outputs))
    found.equal("weights of a combine without them", none, None)
    found.equal("event.event", event.event, None)
    _, combined_weights, _ = buffer.combine(mine, handle, topk_weights=my_weights)
    found.equal("weights", combined_weights, expected_combined_weights(scene.route, weights, scene.rank))
    biases = (make_bias(case, scene.rank, 0), make_bias(case, scene.rank, 1))
    y, _, _ = buffer.combine(mine, handle, bias=target.put(biases[0]))
    found.equal("y with a bias", y, scene.combined(outputs, bias=biases[:1]))
    y, _, _ = buffer.combine(mine, handle, bias=tuple(map(target.put, biases)))
    found.equal("y with two biases", y, scene.combined(outputs, bias=biases))
    buffer.destroy()
    found.finish()


def check_weights_round_trip(group: Any, target: Target, case: Case) -> None:
    """What `dispatch` hands out as weights, `combine` brings home: the originals, 0 for empty slots."""
    scene, buffer = Scene.of(case, group.rank()), target.buffer(group, case)
    found = Findings(scene.rank)
    _, _, recv_topk_weights, _, handle, _ = dispatch(buffer, target, scene)
    x = target.put(scene.outputs()[scene.rank])
    _, weights, _ = buffer.combine(x, handle, topk_weights=recv_topk_weights)
    found.equal("weights", weights, scene.mine.topk_weights * (scene.mine.topk_idx >= 0))
    buffer.destroy()
    found.finish()


def check_without_topk(group: Any, target: Target, case: Case) -> None:
    """Without top-k the layout tensors route; combine then adds in ascending rank order."""
    scene, buffer = Scene.of(case, group.rank()), target.buffer(group, case)
    found = Findings(scene.rank)
    recv, idx, weights, counts, handle, _ = dispatch(buffer, target, scene, topk=False)
    found.payload("recv", recv, scene.rows.x, scene.rows.sf, slice(None))
    found.equal("recv_topk_idx and recv_topk_weights", (idx, weights), (None, None))
    found.equal("num_recv_tokens_per_expert_list", counts, scene.rows.counts)
    outputs = scene.outputs()
    y, _, _ = buffer.combine(target.put(outputs[scene.rank]), handle)
    found.equal("y", y, scene.combined(outputs, by_rank=True))
    buffer.destroy()
    found.finish()


def check_worst_case(group: Any, target: Target, case: Case) -> None:
    """`num_worst_tokens` gives exactly that many rows, marked tails and an empty list; combine never reads tails."""
    scene, buffer = Scene.of(case, group.rank()), target.buffer(group, case)
    found = Findings(scene.rank)
    num_rows, num_real = case.num_ranks * case.num_max_tokens_per_rank + 3, len(scene.rows.src_token)
    recv, idx, weights, counts, handle, _ = dispatch(buffer, target, scene, num_worst_tokens=num_rows)
    found.payload("recv", recv, scene.rows.x, scene.rows.sf, slice(0, num_real))
    found.equal("rows", len(recv[0] if isinstance(recv, tuple) else recv), num_rows)
    tail = (num_rows - num_real, case.num_topk)
    found.equal("recv_topk_idx", idx, torch.cat([scene.rows.topk_idx, torch.full(tail, -1)]))
    found.equal("recv_topk_weights", weights, torch.cat([scene.rows.topk_weights, torch.zeros(tail)]))
    found.equal("num_recv_tokens_per_expert_list", counts, [])
    outputs, sent = scene.outputs(), scene.returned_weights()
    y, combined_weights, _ = buffer.combine(
        target.put(poisoned(outputs[scene.rank], num_rows)),
        handle,
        topk_weights=target.put(poisoned(sent[scene.rank], num_rows)),
    )
    found.equal("y", y, scene.combined(outputs))
    found.equal("weights", combined_weights, expected_combined_weights(scene.route, sent, scene.rank))
    again = buffer.dispatch(target.payload(scene.mine.x, scene.mine.sf), handle=handle)
    found.payload("cached recv", again[0], scene.rows.x, scene.rows.sf, slice(0, num_real))
    found.equal("cached rows", len(again[0][0] if isinstance(again[0], tuple) else again[0]), num_rows)
    buffer.destroy()
    found.finish()


def check_async(group: Any, target: Target, case: Case) -> None:
    """The asynchronous forms give the same once their event has been waited for; either kind of event is taken.

    Calls on the current stream may come before that.
    """
    import deepep

    scene, buffer = Scene.of(case, group.rank()), target.buffer(group, case)
    found = Findings(scene.rank)
    flags = {"async_finish": True, "allocate_on_comm_stream": True}
    layout = buffer.get_dispatch_layout(
        target.put(scene.mine.topk_idx), case.num_experts, previous_event=buffer.capture(), **flags
    )
    got = dispatch(buffer, target, scene, layout=layout[:4], previous_event=layout[4], **flags)
    found.true("an asynchronous dispatch returns an event", got[5].event is not None)
    got[5].current_stream_wait()
    _compare_dispatch(found, scene, got)
    outputs = scene.outputs()
    mine = target.put(outputs[scene.rank])
    y, _, event = buffer.combine(mine, got[4], previous_event=deepep.EventHandle(), **flags)
    event.current_stream_wait()
    found.equal("y", y, scene.combined(outputs))
    y, _, event = buffer.combine(mine, got[4], async_finish=True)
    event.current_stream_wait()
    found.equal("y without previous_event", y, scene.combined(outputs))
    # Calls run one after another, whatever streams they are on: nothing is waited for in between.
    under_way = [dispatch(buffer, target, scene, async_finish=True) for _ in range(2)]
    y, _, _ = buffer.combine(mine, got[4])
    found.equal("y beside asynchronous calls", y, scene.combined(outputs))
    for got in under_way:
        got[5].current_stream_wait()
        _compare_dispatch(found, scene, got)
    buffer.destroy()
    found.finish()


def check_interleaved(group: Any, target: Target, case: Case) -> None:
    """Several dispatches on two living buffers are combined in another order; `destroy` may be called twice."""
    scenes = [Scene.of(case, group.rank()), Scene.of(replace(case, seed=case.seed + 1), group.rank())]
    buffers = [target.buffer(group, case), target.buffer(group, case)]
    found = Findings(group.rank())
    handles = [[dispatch(buffer, target, scene)[4] for scene in scenes] for buffer in buffers]
    for buffer, own in reversed(list(zip(buffers, handles, strict=True))):
        for scene, handle in reversed(list(zip(scenes, own, strict=True))):
            outputs = scene.outputs()
            y, _, _ = buffer.combine(target.put(outputs[scene.rank]), handle)
            found.equal("y", y, scene.combined(outputs))
    for buffer in buffers:
        buffer.destroy()
        buffer.destroy()
    found.finish()


def dispatch(
    buffer: Any, target: Target, scene: Scene, *, topk: bool = True, layout: Any = None, **options: Any
) -> tuple[Any, ...]:
    """Call layout (unless given) and dispatch as programs do; returns dispatch's tuple of six."""
    topk_idx = target.put(scene.mine.topk_idx)
    per_rank, per_host, per_expert, in_rank = layout or buffer.get_dispatch_layout(topk_idx, scene.case.num_experts)[:4]
    chosen = {"topk_idx": topk_idx, "topk_weights": target.put(scene.mine.topk_weights)} if topk else {}
    return buffer.dispatch(
        target.payload(scene.mine.x, scene.mine.sf),
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_host,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        expert_alignment=scene.case.expert_alignment,
        **chosen,
        **options,
    )


def _compare_dispatch(found: Findings, scene: Scene, got: tuple[Any, ...]) -> None:
    found.equal("length of what dispatch returns", len(got), 6)
    found.payload("recv", got[0], scene.rows.x, scene.rows.sf, slice(None))
    found.equal("recv_topk_idx", got[1], scene.rows.topk_idx)
    found.equal("recv_topk_weights", got[2], scene.rows.topk_weights)
    found.equal("num_recv_tokens_per_expert_list", got[3], scene.rows.counts)


def _compare_handle(found: Findings, scene: Scene, handle: Any) -> None:
    """Look at the positions of the handle that clients read."""
    found.true("the handle is a tuple", isinstance(handle, tuple))
    matrix = scene.rows.rank_prefix_matrix
    if scene.case.num_hosts > 1:
        found.equal("handle length", len(handle), 10)
        found.equal("handle[-4] recv_gbl_rank_prefix_sum", handle[-4], matrix[:, scene.rank].contiguous())
    else:
        found.equal("handle length", len(handle), 6)
        found.equal("handle[0] rank_prefix_matrix", handle[0], matrix)
        found.equal("handle[3] recv_src_idx", handle[3], scene.rows.src_token)
