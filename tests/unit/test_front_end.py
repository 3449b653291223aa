"""A buffer's life and small methods: what the front end promises on any backend."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from scenes import BF16, E, H, M, Outcome, Scene, assert_says, attempt

import deepep
from deepep.backends.base import Layout, Reduction
from deepep.testing.launch import Workers
from deepep.topology import Topology


def test_a_destroyed_buffer_says_so(pair: Workers) -> None:
    for outcomes in pair.run(use_after_destroy):
        for kind, text in outcomes:
            assert kind == "BufferDestroyed"
            assert "this buffer was destroyed; build a new one" in text


def use_after_destroy(group: Any) -> list[Outcome]:
    scene, other = (Scene(deepep.Buffer(group, backend="reference", explicitly_destroy=True)) for _ in range(2))
    buffer = scene.buffer
    handle, ll_handle = scene.dispatch()[4], scene.ll_dispatch()[2]
    layout = buffer.get_dispatch_layout(scene.topk_idx, E)
    buffer.destroy()
    buffer.destroy()
    outcomes = [
        attempt(buffer.get_dispatch_layout, scene.topk_idx, E),
        attempt(
            buffer.dispatch, scene.x, num_tokens_per_expert=layout[2], is_token_in_rank=layout[3],
            topk_idx=scene.topk_idx, topk_weights=scene.topk_weights,
        ),
        attempt(buffer.dispatch, scene.x, handle),
        attempt(buffer.combine, scene.x, handle),
        attempt(scene.ll_dispatch),
        attempt(buffer.low_latency_combine, scene.x, scene.topk_idx, scene.topk_weights, ll_handle),
        attempt(buffer.get_next_low_latency_combine_buffer, ll_handle),
        attempt(buffer.clean_low_latency_buffer, M, H, E),
        attempt(buffer.get_local_buffer_tensor, torch.uint8),
        attempt(lambda: buffer.backend),
        attempt(lambda: buffer.traffic),
    ]  # fmt: skip
    other.combine()  # one buffer's end is not another's
    return outcomes


def test_buffers_can_be_watched_and_go_away(pair: Workers) -> None:
    assert pair.run(watch) == [(True, True, True)] * 2


def watch(group: Any) -> tuple[bool, bool, bool]:
    scene = Scene(deepep.Buffer(group, backend="reference"))
    handle = scene.dispatch()[4]
    seen = weakref.ref(scene.buffer)
    known = weakref.WeakValueDictionary({"buffer": scene.buffer})
    was_alive = seen() is not None and "buffer" in known
    del scene
    gc.collect()
    # A handle outlives its buffer without keeping it.
    return was_alive, seen() is None and "buffer" not in known, len(handle) == 6


def test_attributes_that_clients_read(pair: Workers) -> None:
    pair.run(read_attributes)


def read_attributes(group: Any) -> None:
    buffer = deepep.Buffer(group, 256, 128, enable_shrink=True, explicitly_destroy=True, backend="reference")
    assert buffer.group is group
    assert (buffer.rank, buffer.group_size) == (group.rank(), 2)
    assert (buffer.num_nvl_bytes, buffer.num_rdma_bytes) == (256, 128)
    assert (buffer.low_latency_mode, buffer.enable_shrink, buffer.explicitly_destroy) == (False, True, True)
    assert buffer.backend == "reference"
    assert buffer.traffic == {"num_rows": 0, "num_bytes": 0}
    scene = Scene(buffer)
    scene.dispatch()
    num_sent = 3 if group.rank() == 1 else 2
    assert buffer.traffic == {"num_rows": num_sent, "num_bytes": num_sent * H * 2}


def test_local_buffer_keeps_its_bounds(pair: Workers) -> None:
    for outcomes in pair.run(local_buffers):
        for kind, text in outcomes:
            assert kind == "InvalidArgument"
            assert_says(text, "get_local_buffer_tensor: ")


def local_buffers(group: Any) -> list[Outcome]:
    view = deepep.Buffer(group, 256, 128, backend="reference").get_local_buffer_tensor
    assert view(torch.uint8).shape == (256,)
    assert view(torch.float32, use_rdma_buffer=True).shape == (32,)
    assert view(BF16, (4, 8), offset=192).shape == (4, 8)
    assert view(torch.int64, offset=256).numel() == 0
    view(torch.int32, [2], offset=8).fill_(7)
    assert view(torch.int32)[:5].tolist() == [0, 0, 7, 7, 0]  # a view: no copy, and bytes, not elements
    return [
        attempt(view, torch.uint8, (257,)),
        attempt(view, BF16, (4, 8), 193),
        attempt(view, torch.uint8, None, -1),
        attempt(view, torch.uint8, (0,), 257),
        attempt(view, torch.int64, (1,), 4),
        attempt(view, torch.uint8, (129,), 0, True),
        attempt(view, torch.uint8, (-1,)),
    ]


def test_handles_keep_upstreams_positions(pair: Workers) -> None:
    pair.run(read_handles)


def read_handles(group: Any) -> None:
    rank = group.rank()
    scene = Scene(deepep.Buffer(group, backend="reference"))
    handle = scene.dispatch()[4]
    assert len(handle) == 6
    assert handle[0].tolist() == [[3, 2], [6, 4]]
    assert handle[3].tolist() == ([0, 1, 2] * 2 if rank == 0 else [0, 2] * 2)
    src_info, layout_range, *rest = scene.ll_dispatch()[2]
    assert (src_info.shape, layout_range.shape, rest) == ((4, 2 * M), (4, 2), [M, H, E])
    hosts = Scene(deepep.Buffer(group, backend="reference", topology=Topology.split(2, 2)))
    handle = hosts.dispatch()[4]
    assert len(handle) == 10
    assert handle[-4].tolist() == ([3, 6] if rank == 0 else [2, 4])


def test_either_kind_of_event_is_taken(pair: Workers) -> None:
    pair.run(pass_events)


def pass_events(group: Any) -> None:
    scene = Scene(deepep.Buffer(group, backend="reference"))
    events = (deepep.EventHandle(), deepep.EventOverlap(deepep.EventHandle()), deepep.Buffer.capture())
    for previous in events:
        *_, event = scene.dispatch(previous_event=previous, async_finish=True, allocate_on_comm_stream=True)
        assert event.event is not None
        with event(release_handle=True):
            pass
        assert event.event is None
        *_, event = scene.dispatch(previous_event=previous)
        assert event.event is None
        event.current_stream_wait()


def test_a_buffer_without_a_group_or_with_two() -> None:
    with pytest.raises(deepep.InvalidArgument, match="neither given"):
        deepep.Buffer()
    with pytest.raises(deepep.InvalidArgument, match="both given"):
        deepep.Buffer(object(), comm=object())
    with pytest.raises(deepep.InvalidArgument, match="ProcessGroup"):
        deepep.Buffer("gloo")


def test_num_sms_belongs_to_the_class() -> None:
    before = deepep.Buffer.num_sms
    try:
        deepep.Buffer.set_num_sms(8)
        assert deepep.Buffer.num_sms == deepep.Buffer.get_dispatch_config(4).num_sms == 8
        assert deepep.Buffer.get_combine_config(4).num_sms == 8
        with pytest.raises(deepep.InvalidArgument, match="-2"):
            deepep.Buffer.set_num_sms(-2)
    finally:
        deepep.Buffer.set_num_sms(before)


def test_config() -> None:
    config = deepep.Config(24, 8, 512, 16, 128)
    assert config == deepep.Config(
        num_sms=24, num_max_nvl_chunked_send_tokens=8, num_max_nvl_chunked_recv_tokens=512,
        num_max_rdma_chunked_send_tokens=16, num_max_rdma_chunked_recv_tokens=128,
    )  # fmt: skip
    assert config.get_nvl_buffer_size_hint(14336, 8) % 128 == 0
    assert config.get_nvl_buffer_size_hint(14336, 8) > config.get_nvl_buffer_size_hint(14336, 2) > 0
    assert config.get_rdma_buffer_size_hint(14336, 8) == 0 < config.get_rdma_buffer_size_hint(14336, 16)
    for num_ranks in (1, 2, 3, 7, 160):
        assert deepep.Buffer.get_dispatch_config(num_ranks) == deepep.Buffer.get_combine_config(num_ranks)
    for wrong in ({"num_sms": -1}, {"num_max_nvl_chunked_send_tokens": 0}, {"num_max_rdma_chunked_recv_tokens": 6}):
        with pytest.raises(deepep.InvalidArgument, match=next(iter(wrong))):
            deepep.Config(**wrong)
    with pytest.raises(deepep.InvalidArgument, match="num_ranks is 0"):
        deepep.Buffer.get_dispatch_config(0)


def test_size_hint_of_low_latency() -> None:
    hint = deepep.Buffer.get_low_latency_rdma_size_hint
    assert hint(num_max_dispatch_tokens_per_rank=128, hidden=7168, num_ranks=8, num_experts=256) % 128 == 0
    more_experts = hint(128, 7168, 8, 256) - hint(128, 7168, 8, 8)
    assert 2 * 8 * 248 <= more_experts <= 2 * 8 * 248 + 256, "a word each, in two banks"
    assert hint(128, 7168, 8, 256) < hint(256, 7168, 8, 8)
    with pytest.raises(deepep.InvalidArgument, match="num_experts is 9"):
        hint(128, 7168, 8, 9)


def test_events() -> None:
    calls: list[str] = []
    event = deepep.EventOverlap()
    event.current_stream_wait()  # nothing to wait for
    event.register_hook_after_wait(lambda: calls.append("hook"))
    with pytest.raises(RuntimeError, match="already"):
        event.register_hook_after_wait(lambda: calls.append("second"))
    with event:
        assert calls == []
    event.current_stream_wait()
    assert calls == ["hook"]
    event = deepep.EventOverlap(deepep.EventHandle(), (torch.ones(1),))
    event.current_stream_wait(release_handle=True)
    assert (event.event, event.extra_tensors) == (None, None)


def test_comm_stream_needs_a_gpu(pair: Workers) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert [kind for kind, _ in pair.run(ask_for_stream)] == ["UnsupportedOperation"] * 2


def ask_for_stream(group: Any) -> Outcome:
    return attempt(deepep.Buffer(group, backend="reference").get_comm_stream)


def test_a_backend_without_windows_reads_nothing_in_place(pair: Workers) -> None:
    for outcomes in pair.run(ask_for_input_buffers):
        for kind, text in outcomes:
            assert kind == "UnsupportedOperation"
            assert_says(text, "input_buffer: backend 'reference' does not offer this operation; ipc does")


def ask_for_input_buffers(group: Any) -> list[Outcome]:
    buffer = deepep.Buffer(group, backend="reference")
    return [
        attempt(buffer.get_dispatch_input_buffer, (4, H), BF16),
        attempt(buffer.get_combine_input_buffer, (4, H), BF16),
    ]


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="HybridEPBuffer"):
        _ = deepep.HybridEPBuffer


def test_low_latency_requests_hold_what_was_passed(pair: Workers) -> None:
    assert pair.run(look_at_requests) == [[], []]


def look_at_requests(group: Any) -> list[str]:
    """Low latency makes requests by position: fields that hold something else than their name says."""
    scene = Scene(deepep.Buffer(group, backend="reference"))
    buffer, num_local = scene.buffer, E // group.size()
    rows, _, handle, _, _ = scene.ll_dispatch(use_fp8=False)
    received, waited = torch.zeros(num_local, dtype=torch.int32), torch.zeros(group.size(), dtype=torch.int64)
    out = torch.zeros_like(scene.x)
    seen: list[Any] = []

    class Seen(Exception):
        pass

    def note(_op: str, _backend: Any, request: Any, *_: Any) -> None:
        seen.append(request)
        raise Seen

    buffer._dispatch = buffer._combine = note
    with pytest.raises(Seen):
        buffer.low_latency_dispatch(
            scene.x, scene.topk_idx, M, E, received, waited, use_fp8=False, return_recv_hook=True,
            topk_weights=scene.topk_weights,
        )  # fmt: skip
    with pytest.raises(Seen):
        buffer.low_latency_combine(
            rows, scene.topk_idx, scene.topk_weights, handle, False, True, False, True, out, waited,
            reduction="per_copy",
        )  # fmt: skip
    given: list[dict[str, Any]] = [
        {
            "x": scene.x, "sf": None, "topk_idx": scene.topk_idx, "topk_weights": scene.topk_weights, "num_experts": E,
            "num_max_tokens_per_rank": M, "layout": Layout.PADDED, "sf_format": None, "split_phases": True,
            "cumulative_local_expert_recv_stats": received, "wait_recv_cost_stats": waited,
        },
        {
            "x": rows, "routing": handle.routing, "scale_topk_idx": scene.topk_idx,
            "scale_topk_weights": scene.topk_weights, "reduction": Reduction.PER_COPY, "use_logfmt": False,
            "zero_copy": True, "out": out, "split_phases": True, "wait_recv_cost_stats": waited,
        },
    ]  # fmt: skip
    return [
        name
        for fields, request in zip(given, seen, strict=True)
        for name, value in fields.items()
        if getattr(request, name) is not value
    ]
