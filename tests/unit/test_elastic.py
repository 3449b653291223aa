"""`ElasticBuffer`: what the contract checks leave out."""

from __future__ import annotations

import resource
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from elastic_scenes import HIDDEN, MAX_TOKENS, NUM_EXPERTS, NUM_TOPK, batch, build, same_bits

import deepep
from deepep.compat import refs
from deepep.elastic_sizes import SIZE_ALIGNMENT
from deepep.layout import last_slots, topk_ranks
from deepep.testing.launch import Workers
from deepep.topology import Topology


def add_up(group: Any, do_expand: bool, allow_hybrid_mode: bool, allow_multiple_reduction: bool) -> None:
    """Every way of adding up across hosts, against the written-down reference."""
    modes = {"allow_hybrid_mode": allow_hybrid_mode, "allow_multiple_reduction": allow_multiple_reduction}
    buffer = build(group, topology=Topology.split(4, 2), **modes)
    assert buffer.get_physical_domain_size() == (2, 2)
    domain = (2, 2) if allow_hybrid_mode else (1, 4)
    assert buffer.get_logical_domain_size() == (buffer.num_scaleout_ranks, buffer.num_scaleup_ranks) == domain
    assert (buffer.scaleout_rank_idx, buffer.scaleup_rank_idx) == divmod(group.rank(), domain[1])
    x, topk_idx, _ = batch(group)
    handle = buffer.dispatch(x, topk_idx, num_experts=NUM_EXPERTS, do_expand=do_expand)[3]
    source = handle.recv_src_metadata[:, 0]
    data = refs.generate_pre_combine_data(source, MAX_TOKENS, NUM_TOPK, HIDDEN)
    lane = last_lane(group, topk_idx)
    if do_expand:
        rows = torch.zeros(handle.num_expanded_tokens, HIDDEN, dtype=torch.bfloat16)
        place = handle.recv_src_metadata[:, 2:]
        rows[place[place >= 0].long()] = data[place >= 0]
    else:
        # The row of a rank counts as that of its highest position.
        idx = buffer.dispatch(x, handle=handle)[1]
        assert idx is not None
        highest = (torch.arange(NUM_TOPK) * (idx >= 0)).amax(dim=1)
        rows = data[torch.arange(len(data)), highest]
    mine = torch.arange(len(x)) + group.rank() * MAX_TOKENS
    sent = refs.generate_pre_combine_data(mine, MAX_TOKENS, NUM_TOPK, HIDDEN)
    want = refs.combine(
        sent, topk_idx if do_expand else lane, *domain, NUM_EXPERTS,
        reduce_in_local=do_expand and allow_multiple_reduction, reduce_in_scaleup=allow_multiple_reduction,
    )  # fmt: skip
    assert same_bits(buffer.combine(rows, handle)[0], want)


def last_lane(group: Any, topk_idx: torch.Tensor) -> torch.Tensor:
    """Keep of each rank the choice at its highest position."""
    ranks = last_slots(topk_ranks(topk_idx, NUM_EXPERTS // group.size()))
    return torch.where(ranks >= 0, topk_idx, -1)


@pytest.mark.parametrize("do_expand", [False, True])
@pytest.mark.parametrize("allow_hybrid_mode", [False, True])
@pytest.mark.parametrize("allow_multiple_reduction", [False, True])
def test_sums_across_hosts(
    four: Workers, do_expand: bool, allow_hybrid_mode: bool, allow_multiple_reduction: bool
) -> None:
    four.run(add_up, do_expand, allow_hybrid_mode, allow_multiple_reduction)


def disagree(group: Any, **options: Any) -> None:
    x, idx, weights = batch(group)
    build(group).dispatch(x, idx, weights, num_experts=NUM_EXPERTS, **{k: v[group.rank()] for k, v in options.items()})


def messages(pair: Workers, options: dict[str, Any]) -> list[str]:
    outcomes = pair.run(disagree_with, options, return_exceptions=True)
    assert all(isinstance(outcome, deepep.InvalidArgument) for outcome in outcomes), outcomes
    return [str(outcome) for outcome in outcomes]


def disagree_with(group: Any, options: dict[str, Any]) -> None:
    disagree(group, **options)


def test_ranks_that_disagree_raise_the_same_error(pair: Workers) -> None:
    one, other = messages(pair, {"num_max_tokens_per_rank": [9, 16]})
    assert one == other
    assert "num_max_tokens_per_rank: rank 0 has 9 and rank 1 has 16" in one
    one, other = messages(pair, {"do_expand": [False, True]})
    assert one == other
    assert "layout" in one


def test_a_refused_argument_is_told_to_the_other_ranks(pair: Workers) -> None:
    one, other = messages(pair, {"num_max_tokens_per_rank": [4, 9]})
    assert "num_max_tokens_per_rank is 4 and x has 9 tokens" in one
    assert other.startswith("dispatch: rank 0 refused: ")


def refuse_arguments(group: Any) -> None:
    buffer = build(group)
    x, topk_idx, weights = batch(group)
    handle = buffer.dispatch(x, topk_idx, num_experts=NUM_EXPERTS, expert_alignment=2)[3]
    for wrong in (
        {"num_experts": 2 * NUM_EXPERTS},
        {"expert_alignment": 4},
        {"num_max_tokens_per_rank": 2 * MAX_TOKENS},
        {"do_expand": True},
        {"do_cpu_sync": True},
        {"topk_idx": topk_idx},
        {"topk_weights": weights[:, :1]},
        {"num_sms": -1},
        {"x": x[:1]},
    ):
        with pytest.raises(deepep.InvalidArgument, match=next(iter(wrong))):
            buffer.dispatch(**{"x": x, "handle": handle, **wrong})
    same = {"num_experts": NUM_EXPERTS, "expert_alignment": 2, "num_max_tokens_per_rank": MAX_TOKENS}
    assert buffer.dispatch(x, handle=handle, do_expand=False, do_cpu_sync=False, **same)[3] is handle
    for call in (lambda: buffer.dispatch(x, topk_idx), lambda: buffer.dispatch(x, num_experts=NUM_EXPERTS)):
        with pytest.raises(deepep.InvalidArgument, match="are needed without a handle"):
            call()
    with pytest.raises(deepep.InvalidArgument, match="EPHandle"):
        buffer.combine(x, (1, 2))  # type: ignore[arg-type]
    with pytest.raises(deepep.InvalidArgument, match="x has 1 rows"):
        buffer.combine(x[:1], handle)


def test_wrong_arguments_are_named(pair: Workers) -> None:
    pair.run(refuse_arguments)


def chain_events(group: Any) -> None:
    """Both kinds of events are taken in every place; synchronous calls return none."""
    buffer = build(group)
    x, idx, weights = batch(group)
    captured = buffer.capture()
    assert isinstance(captured, deepep.EventHandle)
    flags: dict[str, Any] = {"async_with_compute_stream": True, "allocate_on_comm_stream": True}
    for event in (captured, deepep.EventOverlap(captured)):
        recv, _, _, handle, after = buffer.dispatch(
            x,
            idx,
            weights,
            num_experts=NUM_EXPERTS,
            previous_event=event,
            previous_event_before_epilogue=event,
            **flags,
        )
        y, _, last = buffer.combine(recv, handle, previous_event=after, previous_event_before_epilogue=event, **flags)
        last.current_stream_wait()
        assert same_bits(y, buffer.combine(recv, handle)[0])


def test_events_of_both_kinds_are_taken_everywhere(pair: Workers) -> None:
    pair.run(chain_events)


def create_and_drop(group: Any, num_alive: int, num_rounds: int) -> list[int]:
    """Keep `num_alive` buffers, replace a tenth of them in each round; resident bytes after each round."""
    resident = []
    topology = Topology.split(group.size(), 1)
    buffers = [build(group, topology=topology) for _ in range(num_alive)]
    for _ in range(num_rounds):
        dropped = [weakref.ref(buffers.pop(0)) for _ in range(num_alive // 10)]
        assert not any(reference() for reference in dropped)  # without the garbage collector
        buffers += [build(group, topology=topology) for _ in range(num_alive // 10)]
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident.append(pages * resource.getpagesize())
    x, idx, weights = batch(group)
    for buffer in buffers:
        recv, _, _, handle, _ = buffer.dispatch(x, idx, weights, num_experts=NUM_EXPERTS)
        buffer.combine(recv, handle)
    return resident


def test_many_buffers_alive_at_once_and_no_memory_kept(pair: Workers) -> None:
    for resident in pair.run(create_and_drop, 30, 100):
        # The first rounds fill caches and free lists.
        assert resident[-1] - resident[20] < 4 << 20


def use_after_destroy(group: Any) -> None:
    buffer = build(group)
    buffer.destroy()
    buffer.destroy()
    with pytest.raises(deepep.BufferDestroyed):
        buffer.barrier()
    assert buffer.get_logical_domain_size() == (1, 2)
    assert deepep.get_physical_domain_size(group) == deepep.get_logical_domain_size(group) == (1, 2)


def test_destroy_may_be_called_twice(pair: Workers) -> None:
    pair.run(use_after_destroy)


def check_sizes(group: Any) -> None:
    by_shape = build(group)
    hint = deepep.ElasticBuffer.get_buffer_size_hint(group, MAX_TOKENS, HIDDEN, num_topk=NUM_TOPK)
    assert by_shape.num_bytes == hint
    assert hint % SIZE_ALIGNMENT == 0 < hint
    assert build(group, num_bytes=1 << 21).num_bytes == 1 << 21
    with pytest.raises(deepep.InvalidArgument, match="num_max_tokens_per_rank=0"):
        deepep.ElasticBuffer(group)
    num_sms = by_shape.get_theoretical_num_sms(NUM_EXPERTS, NUM_TOPK)
    assert 0 < by_shape.get_theoretical_num_qps(num_sms) <= by_shape.num_allocated_qps
    x, idx, weights = batch(group)
    assert by_shape.dispatch(x, idx, weights, num_experts=NUM_EXPERTS)[3].num_sms == num_sms
    assert by_shape.dispatch(x, idx, weights, num_experts=NUM_EXPERTS, num_sms=6)[3].num_sms == 6


def test_sizes_of_a_buffer(pair: Workers) -> None:
    pair.run(check_sizes)


@pytest.mark.parametrize(
    "name",
    ["all_gather", "agrs_new_session", "pp_send", "engram_fetch", "get_pp_buffer_size_hint"],
)
def test_what_is_not_here_says_so(name: str) -> None:
    with pytest.raises(deepep.UnsupportedOperation, match=f"ElasticBuffer.{name}: .* not part of this library"):
        getattr(deepep.ElasticBuffer, name)(1, extra=2)
