"""Contract checks of low-latency dispatch and combine. Each runs inside every rank and raises at its end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from deepep.testing.checks_buffer import Scene
from deepep.testing.oracle import make_route
from deepep.testing.oracle_low_latency import expected_low_latency_combine, expected_padded, mask_ranks
from deepep.testing.routing import Case, make_outputs
from deepep.testing.target import Findings, Target, pick, scattered

_FP8_FLAGS: dict[str, dict[str, bool]] = {
    "float32": {},
    "pow2": {"round_scale": True},
    "ue8m0": {"round_scale": True, "use_ue8m0": True},
}


def check_low_latency_dispatch(group: Any, target: Target, case: Case) -> None:
    """Padded rows, counts, sources and ranges, in bf16 and in every FP8 format the hidden size allows."""
    scene, buffer = Scene.of(case, group.rank()), target.buffer(group, case, low_latency_mode=True)
    found = Findings(scene.rank)
    compare(found, scene, call_dispatch(buffer, target, scene, use_fp8=False))
    for sf_format, flags in _FP8_FLAGS.items():
        if case.hidden % (512 if sf_format == "ue8m0" else 128) == 0:
            compare(found, scene, call_dispatch(buffer, target, scene, **flags), sf_format)
    buffer.destroy()
    found.finish()


def check_low_latency_combine(group: Any, target: Target, case: Case) -> None:
    """Weighted sums with both reductions, twice for one dispatch, into `out`, and never from rows past the count."""
    scene, buffer = Scene.of(case, group.rank()), target.buffer(group, case, low_latency_mode=True)
    found = Findings(scene.rank)
    handle = call_dispatch(buffer, target, scene, use_fp8=False)[2]
    outputs = padded_outputs(scene)
    x = target.put(poisoned_outputs(scene, outputs))
    choice = (target.put(scene.mine.topk_idx), target.put(scene.mine.topk_weights))
    for reduction in ("per_rank", "per_copy"):
        want = expected_low_latency_combine(scene.route, scene.inputs, outputs, scene.rank, reduction=reduction)
        y, event, hook = buffer.low_latency_combine(x, *choice, handle, reduction=reduction)
        found.equal(f"y {reduction}", y, want)
        found.equal("event.event and hook", (event.event, hook), (None, None))
        out = target.put(torch.full_like(want, float("nan")))
        y, _, _ = buffer.low_latency_combine(x, *choice, handle, out=out, reduction=reduction)
        found.equal(f"out {reduction}", out, want)
        found.true("y is out", y.data_ptr() == out.data_ptr())
    y, _, _ = buffer.low_latency_combine(x, *choice, handle)
    found.equal("y by default", y, expected_low_latency_combine(scene.route, scene.inputs, outputs, scene.rank))
    buffer.destroy()
    found.finish()


def check_low_latency_logfmt(group: Any, target: Target, case: Case) -> None:
    """`use_logfmt`: whatever travels from owner to home goes through the cast of `deepep.quant`."""
    scene, buffer = Scene.of(case, group.rank()), target.buffer(group, case, low_latency_mode=True)
    found = Findings(scene.rank)
    handle = call_dispatch(buffer, target, scene, use_fp8=False)[2]
    outputs = padded_outputs(scene, cancelling=False)
    x = target.put(poisoned_outputs(scene, outputs))
    choice = (target.put(scene.mine.topk_idx), target.put(scene.mine.topk_weights))
    for reduction in ("per_rank", "per_copy"):
        want = expected_low_latency_combine(
            scene.route, scene.inputs, outputs, scene.rank, reduction=reduction, use_logfmt=True
        )
        y, _, _ = buffer.low_latency_combine(x, *choice, handle, use_logfmt=True, reduction=reduction)
        found.equal(f"y {reduction}", y, want)
    buffer.destroy()
    found.finish()


def check_low_latency_zero_copy(group: Any, target: Target, case: Case) -> None:
    """`zero_copy`: rows written to `get_next_low_latency_combine_buffer` count, `x` is not read."""
    scene, buffer = Scene.of(case, group.rank()), target.buffer(group, case, low_latency_mode=True)
    found = Findings(scene.rank)
    outputs = padded_outputs(scene)
    want = expected_low_latency_combine(scene.route, scene.inputs, outputs, scene.rank)
    choice = (target.put(scene.mine.topk_idx), target.put(scene.mine.topk_weights))
    for _ in range(3):  # more often than there are windows to take turns
        handle = call_dispatch(buffer, target, scene, use_fp8=False)[2]
        view = buffer.get_next_low_latency_combine_buffer(handle)
        found.equal("shape and type of the buffer", (view.shape, view.dtype), (outputs[0].shape, outputs[0].dtype))
        view[:] = target.put(poisoned_outputs(scene, outputs))
        y, _, _ = buffer.low_latency_combine(view, *choice, handle, zero_copy=True)
        found.equal("y", y, want)
    buffer.destroy()
    found.finish()


def check_low_latency_phases(group: Any, target: Target, case: Case) -> None:
    """Receive hooks and asynchronous calls give the same; two results may be under way at once."""
    scene, buffer = Scene.of(case, group.rank()), target.buffer(group, case, low_latency_mode=True)
    found = Findings(scene.rank)
    outputs = padded_outputs(scene)
    x = target.put(poisoned_outputs(scene, outputs))
    choice = (target.put(scene.mine.topk_idx), target.put(scene.mine.topk_weights))
    want = expected_low_latency_combine(scene.route, scene.inputs, outputs, scene.rank)
    first = call_dispatch(buffer, target, scene, use_fp8=False, return_recv_hook=True)
    second = call_dispatch(buffer, target, scene, use_fp8=False, return_recv_hook=True)
    for got in (first, second):
        got[4]()
        compare(found, scene, got)
    y, _, hook = buffer.low_latency_combine(x, *choice, first[2], return_recv_hook=True)
    hook()
    found.equal("y with a hook", y, want)
    got = call_dispatch(buffer, target, scene, use_fp8=False, async_finish=True)
    found.true("an asynchronous dispatch returns an event and no hook", got[3].event is not None and got[4] is None)
    got[3].current_stream_wait()
    compare(found, scene, got)
    y, event, _ = buffer.low_latency_combine(x, *choice, got[2], async_finish=True)
    event.current_stream_wait()
    found.equal("y asynchronous", y, want)
    buffer.destroy()
    found.finish()


def check_low_latency_stats(group: Any, target: Target, case: Case) -> None:
    """Statistics are added to in place: rows per local expert exactly, waiting times at least 0."""
    scene, buffer = Scene.of(case, group.rank()), target.buffer(group, case, low_latency_mode=True)
    found = Findings(scene.rank)
    start = torch.arange(case.num_local_experts, dtype=torch.int32)
    received, waited = target.put(start.clone()), target.put(torch.zeros(case.num_ranks, dtype=torch.int64))
    stats = {"cumulative_local_expert_recv_stats": received, "dispatch_wait_recv_cost_stats": waited}
    for _ in range(2):
        handle = call_dispatch(buffer, target, scene, use_fp8=False, **stats)[2]
    counts = expected_padded(scene.route, scene.inputs, scene.rank, case.num_max_tokens_per_rank).recv_count
    found.equal("cumulative_local_expert_recv_stats", received, start + 2 * counts)
    x = target.put(poisoned_outputs(scene, padded_outputs(scene)))
    choice = (target.put(scene.mine.topk_idx), target.put(scene.mine.topk_weights))
    buffer.low_latency_combine(x, *choice, handle, combine_wait_recv_cost_stats=waited)
    found.true("waiting times are not negative", bool((waited.cpu() >= 0).all()))
    buffer.destroy()
    found.finish()


def check_low_latency_unaligned(group: Any, target: Target, case: Case) -> None:
    """Rows may begin anywhere: slices of larger tensors are as good as others."""
    scene, buffer = Scene.of(case, group.rank()), target.buffer(group, case, low_latency_mode=True)
    found = Findings(scene.rank)
    topk_idx, weights = target.put(scene.mine.topk_idx), target.put(scene.mine.topk_weights)
    x = target.put_unaligned(scene.mine.x)
    got = buffer.low_latency_dispatch(x, topk_idx, case.num_max_tokens_per_rank, case.num_experts, use_fp8=False)
    compare(found, scene, got)
    outputs = padded_outputs(scene)
    y = buffer.low_latency_combine(target.put_unaligned(poisoned_outputs(scene, outputs)), topk_idx, weights, got[2])[0]
    found.equal("y", y, expected_low_latency_combine(scene.route, scene.inputs, outputs, scene.rank))
    buffer.destroy()
    found.finish()


def check_low_latency_after_normal(group: Any, target: Target, case: Case) -> None:
    """`clean_low_latency_buffer` makes a buffer that served normal calls ready for low latency."""
    from deepep.testing.checks_buffer import dispatch

    scene, buffer = Scene.of(case, group.rank()), target.buffer(group, case, low_latency_mode=True)
    found = Findings(scene.rank)
    for _ in range(2):
        found.payload("recv", dispatch(buffer, target, scene)[0], scene.rows.x, scene.rows.sf, slice(None))
        buffer.clean_low_latency_buffer(case.num_max_tokens_per_rank, case.hidden, case.num_experts)
        compare(found, scene, call_dispatch(buffer, target, scene, use_fp8=False))
    buffer.destroy()
    found.finish()


def check_low_latency_mask(group: Any, target: Target, case: Case) -> None:
    """A masked rank stays away: the others neither send to it nor wait for it, its experts contribute nothing."""
    scene = Scene.of(case, group.rank())
    buffer = target.buffer(group, case, low_latency_mode=True, enable_shrink=True)
    found = Findings(scene.rank)
    gone = case.num_ranks - 1
    status = target.put(torch.full((case.num_ranks,), -1, dtype=torch.int32))
    compare(found, scene, call_dispatch(buffer, target, scene, use_fp8=False))
    if scene.rank != gone:
        buffer.low_latency_update_mask_buffer(gone, mask=True)
        buffer.low_latency_query_mask_buffer(status)
        found.equal("mask status", status, (torch.arange(case.num_ranks) == gone).int())
        inputs = mask_ranks(scene.inputs, case.num_experts, [gone])
        shrunk = replace(scene, route=make_route(inputs, case.num_experts))
        got = call_dispatch(buffer, target, scene, use_fp8=False)
        compare(found, shrunk, got)
        outputs = padded_outputs(shrunk)
        choice = (target.put(scene.mine.topk_idx), target.put(scene.mine.topk_weights))
        y, _, _ = buffer.low_latency_combine(target.put(poisoned_outputs(shrunk, outputs)), *choice, got[2])
        found.equal("y", y, expected_low_latency_combine(shrunk.route, inputs, outputs, scene.rank))
    buffer.low_latency_clean_mask_buffer()
    buffer.low_latency_query_mask_buffer(status)
    found.equal("mask status once cleaned", status, torch.zeros(case.num_ranks, dtype=torch.int32))
    buffer.destroy()
    found.finish()


def call_dispatch(buffer: Any, target: Target, scene: Scene, **options: Any) -> tuple[Any, ...]:
    """Call `low_latency_dispatch` for the case; returns its tuple of five."""
    return buffer.low_latency_dispatch(
        target.put(scene.mine.x),
        target.put(scene.mine.topk_idx),
        scene.case.num_max_tokens_per_rank,
        scene.case.num_experts,
        **options,
    )


def compare(found: Findings, scene: Scene, got: tuple[Any, ...], sf_format: str | None = None) -> None:
    """Compare a completed low-latency dispatch with the oracle, valid rows only."""
    case, name = scene.case, sf_format or "unquantised"
    want = expected_padded(scene.route, scene.inputs, scene.rank, case.num_max_tokens_per_rank, sf_format=sf_format)
    valid = valid_rows(scene, scene.rank)
    found.payload(name, got[0], pick(want.x, valid), None if want.sf is None else pick(want.sf, valid), valid)
    found.equal(f"{name} recv_count", got[1], want.recv_count)
    handle = got[2]
    found.true("the handle is a tuple of 5", isinstance(handle, tuple) and len(handle) == 5)
    src_info, layout_range = handle[:2]
    found.equal(f"{name} src_info", pick(src_info, valid), pick(want.src_info, valid))
    found.equal(f"{name} layout_range", layout_range, want.layout_range)
    found.equal(f"{name} handle[2:]", handle[2:], (case.num_max_tokens_per_rank, case.hidden, case.num_experts))
    x = got[0][0] if sf_format else got[0]
    found.equal(f"{name} shape", x.shape, want.x.shape)
    if want.sf is not None:
        sf = got[0][1]
        found.equal(f"{name} sf shape", sf.shape, want.sf.shape)
        column_major = sf.stride(1) == 1 or sf.shape[1] == 1
        found.true(f"{name} sf has its last two dimensions column-major", column_major)


def valid_rows(scene: Scene, rank: int) -> torch.Tensor:
    """Tell which rows [L, R*M] of a rank's padded layout hold a token."""
    places = torch.arange(scene.case.num_ranks * scene.case.num_max_tokens_per_rank)
    counts = [len(scene.route.copies[expert]) for expert in scene.route.local_experts(rank)]
    return places < torch.tensor(counts).unsqueeze(1)


def padded_outputs(scene: Scene, *, cancelling: bool = True) -> list[torch.Tensor]:
    """Make the rows [L, R*M, H] that every rank's experts hand back."""
    case = scene.case
    shape = (case.num_local_experts, case.num_ranks * case.num_max_tokens_per_rank, case.hidden)
    num_rows = shape[0] * shape[1]
    return [make_outputs(case, dst, num_rows, cancelling=cancelling).view(shape) for dst in range(case.num_ranks)]


def poisoned_outputs(scene: Scene, outputs: list[torch.Tensor]) -> torch.Tensor:
    """Take this rank's rows, with NaN where no token is."""
    mine, valid = outputs[scene.rank], valid_rows(scene, scene.rank)
    flat = scattered(mine.flatten(0, 1), valid.flatten(), valid.numel())
    return flat.view(mine.shape)
