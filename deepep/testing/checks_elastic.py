"""Contract checks of `ElasticBuffer`, compact rows. Each runs inside every rank and raises at its end."""

from __future__ import annotations

from typing import Any

import torch

from deepep.testing.checks_buffer import Scene
from deepep.testing.oracle import align, expected_combine, expected_combined_weights
from deepep.testing.oracle_elastic import expected_expanded, expected_handle, worst_case_rows
from deepep.testing.routing import Case, make_bias, make_outputs
from deepep.testing.target import Findings, Target, poisoned

#: Tensor fields that clients save for a recomputation, clear, and put back.
SAVED_FIELDS = (
    "topk_idx",
    "psum_num_recv_tokens_per_scaleup_rank",
    "psum_num_recv_tokens_per_expert",
    "recv_src_metadata",
    "dst_buffer_slot_idx",
    "token_metadata_at_forward",
    "channel_linked_list",
    "num_unaligned_recv_tokens_per_expert",
)


def check_elastic_compact(group: Any, target: Target, case: Case) -> None:
    """Compact rows, with and without CPU sync, cached with and without weights, and all fields of the handle."""
    scene, buffer = Scene.of(case, group.rank()), target.elastic_buffer(group, case)
    found = Findings(scene.rank)
    x, weights = target.payload(scene.mine.x, scene.mine.sf), target.put(scene.mine.topk_weights)
    for do_cpu_sync in (True, False):
        name = f"do_cpu_sync={do_cpu_sync}"
        num_rows = num_compact_rows(scene, do_cpu_sync)
        recv, idx, recv_weights, handle, event = elastic_dispatch(buffer, target, scene, do_cpu_sync=do_cpu_sync)
        _compare_compact(found, scene, name, (recv, idx, recv_weights), num_rows)
        compare_handle(found, scene, name, handle, do_expand=False, exact=do_cpu_sync)
        found.equal("event.event", event.event, None)
        cached = buffer.dispatch(x, topk_weights=weights, handle=handle)
        _compare_compact(found, scene, f"cached {name}", cached[:3], num_rows)
        found.true("a cached dispatch returns the same handle", cached[3] is handle)
        cached = buffer.dispatch(x, handle=handle)
        found.equal("weights of a cached dispatch without them", cached[2], None)
        _compare_compact(found, scene, f"cached x {name}", (*cached[:2], recv_weights), num_rows)
    recv, idx, recv_weights, _, _ = elastic_dispatch(buffer, target, scene, topk_weights=None)
    found.equal("recv_topk_idx without weights", idx, scene.rows.topk_idx)
    found.equal("recv_topk_weights without weights", recv_weights, None)
    buffer.destroy()
    found.finish()


def check_elastic_combine(group: Any, target: Target, case: Case) -> None:
    """`combine` of compact rows: order, biases, weights from the owner of each slot; tails are never read."""
    scene, buffer = Scene.of(case, group.rank()), target.elastic_buffer(group, case)
    found = Findings(scene.rank)
    outputs, sent = scene.outputs(), [rows.topk_weights for rows in scene.everyones_rows()]
    biases = (make_bias(case, scene.rank, 0), make_bias(case, scene.rank, 1))
    for do_cpu_sync in (True, False):
        handle = elastic_dispatch(buffer, target, scene, do_cpu_sync=do_cpu_sync)[3]
        num_rows = num_compact_rows(scene, do_cpu_sync)
        mine = target.put(poisoned(outputs[scene.rank], num_rows))
        my_weights = target.put(poisoned(_spoil_foreign(scene, sent[scene.rank]), num_rows))
        y, weights, event = buffer.combine(mine, handle, topk_weights=my_weights)
        found.equal("y", y, scene.combined(outputs))
        found.equal("weights", weights, expected_combined_weights(scene.route, sent, scene.rank))
        found.equal("event.event", event.event, None)
        y, weights, _ = buffer.combine(mine, handle, bias=target.put(biases[0]))
        found.equal("y with a bias", y, scene.combined(outputs, bias=biases[:1]))
        found.equal("weights of a combine without them", weights, None)
        y, _, _ = buffer.combine(mine, handle, bias=tuple(map(target.put, biases)))
        found.equal("y with two biases", y, scene.combined(outputs, bias=biases))
    buffer.destroy()
    found.finish()


def check_elastic_one_level(group: Any, target: Target, case: Case) -> None:
    """Without hybrid mode, or without multiple reduction, compact rows of all hosts are added up at once."""
    scene = Scene.of(case, group.rank())
    found = Findings(scene.rank)
    outputs = scene.outputs()
    want = expected_combine(scene.route, outputs, scene.rank)
    for option in ("allow_hybrid_mode", "allow_multiple_reduction"):
        buffer = target.elastic_buffer(group, case, **{option: False})
        handle = elastic_dispatch(buffer, target, scene)[3]
        y, _, _ = buffer.combine(target.put(outputs[scene.rank]), handle)
        found.equal(f"y with {option}=False", y, want)
        buffer.destroy()
    found.finish()


def check_elastic_restored_handle(group: Any, target: Target, case: Case) -> None:
    """Handle fields saved, cleared and put back by a client give the same bits again."""
    scene, buffer = Scene.of(case, group.rank()), target.elastic_buffer(group, case)
    found = Findings(scene.rank)
    x = target.payload(scene.mine.x, scene.mine.sf)
    for do_expand in (False, True):
        first = elastic_dispatch(buffer, target, scene, do_expand=do_expand, do_zero_padding=do_expand)
        handle = first[3]
        mine = target.put(make_outputs(case, scene.rank, len(_x_of(first[0]))))
        before = buffer.combine(mine, handle)[0]
        saved = {name: getattr(handle, name) for name in SAVED_FIELDS}
        for name in saved:
            setattr(handle, name, None)
        for name, value in saved.items():
            setattr(handle, name, value.clone() if isinstance(value, torch.Tensor) else value)
        again = buffer.dispatch(x, handle=handle, do_zero_padding=do_expand)
        found.equal(f"recv again, do_expand={do_expand}", _x_of(again[0]), _x_of(first[0]).cpu())
        found.equal(f"y again, do_expand={do_expand}", buffer.combine(mine, handle)[0], before.cpu())
    buffer.destroy()
    found.finish()


def check_elastic_options(group: Any, target: Target, case: Case) -> None:
    """`do_handle_copy`, statistics, column-major scale factors, asynchronous calls, `barrier`, `destroy` twice."""
    import deepep

    scene, buffer = Scene.of(case, group.rank()), target.elastic_buffer(group, case)
    found = Findings(scene.rank)
    topk_idx = target.put(scene.mine.topk_idx)
    for do_handle_copy in (True, False):
        handle = elastic_dispatch(buffer, target, scene, topk_idx=topk_idx, do_handle_copy=do_handle_copy)[3]
        found.equal("handle.topk_idx", handle.topk_idx, scene.mine.topk_idx)
        if topk_idx.numel():
            is_alias = handle.topk_idx.data_ptr() == topk_idx.data_ptr()
            found.equal(f"aliasing of topk_idx with do_handle_copy={do_handle_copy}", is_alias, not do_handle_copy)
    start = torch.arange(case.num_local_experts, dtype=torch.int32)
    stats = target.put(start.clone())
    handle = elastic_dispatch(buffer, target, scene, cumulative_local_expert_recv_stats=stats)[3]
    buffer.dispatch(target.payload(scene.mine.x, scene.mine.sf), handle=handle)
    real = [len(scene.route.copies[expert]) for expert in scene.route.local_experts(scene.rank)]
    found.equal("statistics, cached dispatches uncounted", stats, start + torch.tensor(real, dtype=torch.int32))
    if scene.mine.sf is not None:
        recv = elastic_dispatch(buffer, target, scene, use_tma_aligned_col_major_sf=True)[0]
        found.payload("column-major recv", recv, scene.rows.x, scene.rows.sf, slice(None))
        strides = (1, align(len(scene.rows.x), 4))
        found.true(f"column-major sf has strides {strides}", recv[1].numel() == 0 or _strides_fit(recv[1], strides))
    flags = {"async_with_compute_stream": True, "allocate_on_comm_stream": True}
    got = elastic_dispatch(buffer, target, scene, previous_event=buffer.capture(), **flags)
    found.true("an asynchronous dispatch returns an event", got[4].event is not None)
    got[4].current_stream_wait()
    _compare_compact(found, scene, "asynchronous", got[:3], len(scene.rows.x))
    outputs = scene.outputs()
    y, _, event = buffer.combine(target.put(outputs[scene.rank]), got[3], previous_event=deepep.EventHandle(), **flags)
    event.current_stream_wait()
    found.equal("asynchronous y", y, scene.combined(outputs))
    buffer.barrier()
    buffer.barrier(use_comm_stream=False, with_cpu_sync=True)
    buffer.destroy()
    buffer.destroy()
    found.finish()


def elastic_dispatch(buffer: Any, target: Target, scene: Scene, **options: Any) -> tuple[Any, ...]:
    """Call `ElasticBuffer.dispatch` for the case; returns its tuple of five."""
    arguments: dict[str, Any] = {
        "topk_idx": target.put(scene.mine.topk_idx),
        "topk_weights": target.put(scene.mine.topk_weights),
        "num_experts": scene.case.num_experts,
        "expert_alignment": scene.case.expert_alignment,
    }
    return buffer.dispatch(target.payload(scene.mine.x, scene.mine.sf), **{**arguments, **options})


def num_compact_rows(scene: Scene, exact: bool) -> int:
    """Count rows of the compact layout, received or allocated."""
    return len(scene.rows.x) if exact else scene.case.num_ranks * scene.case.num_max_tokens_per_rank


def compare_handle(found: Findings, scene: Scene, name: str, handle: Any, *, do_expand: bool, exact: bool) -> None:
    """Compare every field of an `EPHandle` that CONTRACT defines."""
    case = scene.case
    want = expected_handle(
        scene.route,
        scene.rank,
        case.num_max_tokens_per_rank,
        expert_alignment=case.expert_alignment,
        do_expand=do_expand,
        num_scaleup_ranks=case.ranks_per_host,
    )
    for field in ("num_experts", "expert_alignment", "num_max_tokens_per_rank"):
        found.equal(f"{name} handle.{field}", getattr(handle, field), getattr(case, field))
    found.equal(f"{name} handle.do_expand", handle.do_expand, do_expand)
    found.equal(f"{name} handle.num_recv_tokens", handle.num_recv_tokens, num_compact_rows(scene, exact))
    if do_expand:
        worst = worst_case_rows(scene.route, case.num_max_tokens_per_rank, case.expert_alignment)
        num_expanded = sum(want.num_recv_tokens_per_expert_list) if exact else worst
        found.equal(f"{name} handle.num_expanded_tokens", handle.num_expanded_tokens, num_expanded)
    counts = want.num_recv_tokens_per_expert_list if exact else []
    found.equal(f"{name} num_recv_tokens_per_expert_list", handle.num_recv_tokens_per_expert_list, counts)
    for field in (
        "psum_num_recv_tokens_per_scaleup_rank",
        "psum_num_recv_tokens_per_expert",
        "num_unaligned_recv_tokens_per_expert",
        "dst_buffer_slot_idx",
    ):
        found.equal(f"{name} handle.{field}", getattr(handle, field), getattr(want, field))
    metadata = handle.recv_src_metadata
    shape = (num_compact_rows(scene, exact), case.num_topk + 2)
    found.equal(f"{name} handle.recv_src_metadata shape", tuple(metadata.shape), shape)
    num_real = len(scene.rows.x)
    found.equal(f"{name} handle.recv_src_metadata[:, 0]", metadata[:num_real, 0], want.src_token_global_idx)
    if do_expand:
        expanded_row = expected_expanded(scene.route, scene.inputs, scene.rank, case.expert_alignment).expanded_row
        found.equal(f"{name} handle.recv_src_metadata[:, 2:]", metadata[:num_real, 2:], expanded_row)


def _compare_compact(found: Findings, scene: Scene, name: str, got: tuple[Any, Any, Any], num_rows: int) -> None:
    recv, idx, weights = got
    num_real = len(scene.rows.x)
    tail = (num_rows - num_real, scene.case.num_topk)
    found.payload(f"{name} recv", recv, scene.rows.x, scene.rows.sf, slice(0, num_real))
    found.equal(f"{name} rows", len(_x_of(recv)), num_rows)
    found.equal(f"{name} recv_topk_idx", idx, torch.cat([scene.rows.topk_idx, torch.full(tail, -1)]))
    found.equal(f"{name} recv_topk_weights", weights, torch.cat([scene.rows.topk_weights, torch.zeros(tail)]))


def _spoil_foreign(scene: Scene, weights: torch.Tensor) -> torch.Tensor:
    """Write NaN into the slots of experts that live elsewhere: only the owner's word counts."""
    return weights.masked_fill(scene.rows.topk_idx < 0, float("nan"))


def _x_of(recv: Any) -> torch.Tensor:
    return recv[0] if isinstance(recv, tuple) else recv


def _strides_fit(sf: torch.Tensor, strides: tuple[int, int]) -> bool:
    """Compare strides of the dimensions that have more than one element; the others mean nothing."""
    return all(size == 1 or got == want for size, got, want in zip(sf.shape, sf.stride(), strides, strict=True))
