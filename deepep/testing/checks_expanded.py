"""Contract checks of `ElasticBuffer`, expanded rows. Each runs inside every rank and raises at its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from deepep.testing.checks_buffer import Scene
from deepep.testing.checks_elastic import compare_handle, elastic_dispatch
from deepep.testing.oracle_elastic import (
    ExpandedRows,
    expected_expanded,
    expected_expanded_combine,
    expected_expanded_weights,
    worst_case_rows,
)
from deepep.testing.routing import Case, make_bias, make_outputs
from deepep.testing.target import Findings, Target, pick, scattered


def check_expanded_dispatch(group: Any, target: Target, case: Case) -> None:
    """Expanded rows: grouped, aligned, zero padding where asked for; exact and worst-case; cached."""
    scene, buffer = Scene.of(case, group.rank()), target.elastic_buffer(group, case)
    found = Findings(scene.rank)
    want = expected_expanded(scene.route, scene.inputs, scene.rank, case.expert_alignment)
    x, weights = target.payload(scene.mine.x, scene.mine.sf), target.put(scene.mine.topk_weights)
    for do_cpu_sync, zero in ((True, False), (True, True), (False, False), (False, True)):
        name = f"do_cpu_sync={do_cpu_sync} do_zero_padding={zero}"
        num_rows = _num_rows(scene, want, do_cpu_sync)
        got = elastic_dispatch(buffer, target, scene, do_expand=True, do_cpu_sync=do_cpu_sync, do_zero_padding=zero)
        _compare_expanded(found, name, want, got[:3], num_rows, zero)
        compare_handle(found, scene, name, got[3], do_expand=True, exact=do_cpu_sync)
        cached = buffer.dispatch(x, topk_weights=weights, handle=got[3], do_zero_padding=zero, do_expand=True)
        _compare_expanded(found, f"cached {name}", want, cached[:3], num_rows, zero)
        found.true("a cached dispatch returns the same handle", cached[3] is got[3])
        cached = buffer.dispatch(x, handle=got[3], do_zero_padding=zero)
        found.equal("weights of a cached dispatch without them", cached[2], None)
        _compare_expanded(found, f"cached x {name}", want, (*cached[:2], got[2]), num_rows, zero)
    buffer.destroy()
    found.finish()


def check_expanded_combine(group: Any, target: Target, case: Case) -> None:
    """Sums with `allow_multiple_reduction`: per rank first; padding and tails are never read; weights come home."""
    scene, buffer = Scene.of(case, group.rank()), target.elastic_buffer(group, case)
    found = Findings(scene.rank)
    everyone = _everyones_rows(scene)
    sent = [1 + 0.5 * torch.arange(len(rows.x)) + 1000 * dst for dst, rows in enumerate(everyone)]
    want = expected_expanded_weights(scene.route, sent, scene.rank, case.expert_alignment)
    _compare_sums(found, target, scene, buffer, everyone, allow_multiple_reduction=True)
    for do_cpu_sync in (True, False):
        handle = elastic_dispatch(buffer, target, scene, do_expand=True, do_cpu_sync=do_cpu_sync)[3]
        num_rows = _num_rows(scene, everyone[scene.rank], do_cpu_sync)
        is_token = ~everyone[scene.rank].is_padding
        x = torch.zeros(num_rows, case.hidden, dtype=case.combine_dtype)
        mine = target.put(scattered(sent[scene.rank], is_token, num_rows))
        _, weights, _ = buffer.combine(target.put(x), handle, topk_weights=mine)
        found.equal(f"weights, do_cpu_sync={do_cpu_sync}", weights, want)
    buffer.destroy()
    found.finish()


def check_expanded_single_reduction(group: Any, target: Target, case: Case) -> None:
    """Sums without `allow_multiple_reduction`: every row on its own, in ascending top-k position."""
    scene = Scene.of(case, group.rank())
    buffer = target.elastic_buffer(group, case, allow_multiple_reduction=False)
    found = Findings(scene.rank)
    _compare_sums(found, target, scene, buffer, _everyones_rows(scene), allow_multiple_reduction=False)
    buffer.destroy()
    found.finish()


def _compare_sums(
    found: Findings,
    target: Target,
    scene: Scene,
    buffer: Any,
    everyone: Sequence[ExpandedRows],
    *,
    allow_multiple_reduction: bool,
) -> None:
    case = scene.case
    outputs = [make_outputs(case, dst, len(rows.x)) for dst, rows in enumerate(everyone)]
    biases = (make_bias(case, scene.rank, 0), make_bias(case, scene.rank, 1))
    for do_cpu_sync in (True, False):
        handle = elastic_dispatch(buffer, target, scene, do_expand=True, do_cpu_sync=do_cpu_sync)[3]
        num_rows = _num_rows(scene, everyone[scene.rank], do_cpu_sync)
        mine = target.put(scattered(outputs[scene.rank], ~everyone[scene.rank].is_padding, num_rows))
        for bias in ((), biases[:1], biases):
            argument = {1: target.put(biases[0]), 2: tuple(map(target.put, biases))}.get(len(bias))
            y, weights, _ = buffer.combine(mine, handle, bias=argument)
            want = expected_expanded_combine(
                scene.route,
                outputs,
                scene.rank,
                expert_alignment=case.expert_alignment,
                allow_multiple_reduction=allow_multiple_reduction,
                bias=bias,
                ranks_per_host=case.ranks_per_host,
            )
            found.equal(f"y with {len(bias)} biases, do_cpu_sync={do_cpu_sync}", y, want)
            found.equal("weights of a combine without them", weights, None)


def _compare_expanded(
    found: Findings, name: str, want: ExpandedRows, got: tuple[Any, Any, Any], num_rows: int, zero_padding: bool
) -> None:
    recv, idx, weights = got
    exact = len(want.x)
    rows = torch.ones(exact, dtype=torch.bool) if zero_padding else ~want.is_padding
    taken = torch.cat([rows, torch.zeros(num_rows - exact, dtype=torch.bool)])
    x = recv[0] if isinstance(recv, tuple) else recv
    found.equal(f"{name} rows", len(x), num_rows)
    found.payload(f"{name} recv", recv, pick(want.x, rows), None if want.sf is None else pick(want.sf, rows), taken)
    found.equal(f"{name} recv_topk_idx", idx, None)
    # Rows that hold no token weigh nothing, whether or not their payload is zeroed.
    found.equal(f"{name} recv_topk_weights", weights, torch.cat([want.topk_weights, torch.zeros(num_rows - exact)]))


def _everyones_rows(scene: Scene) -> list[ExpandedRows]:
    case = scene.case
    return [expected_expanded(scene.route, scene.inputs, dst, case.expert_alignment) for dst in range(case.num_ranks)]


def _num_rows(scene: Scene, rows: ExpandedRows, exact: bool) -> int:
    if exact:
        return len(rows.x)
    return worst_case_rows(scene.route, scene.case.num_max_tokens_per_rank, scene.case.expert_alignment)
