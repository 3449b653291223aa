"""The operations that are timed, each with its check and with what it moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from deepep.bench import checks
from deepep.bench.checks import Scene
from deepep.bench.plan import EXPERT_ALIGNMENT
from deepep.buffer import Buffer
from deepep.config import Config
from deepep.elastic import ElasticBuffer
from deepep.quant import fp8_uncast


@dataclass(frozen=True)
class Operation:
    """One operation on prepared inputs.

    Attributes:
        name: what it is called in the table.
        call: the whole operation; collective.
        check: raises `checks.WrongResult` if what `call` returned is wrong.
        remote_bytes: payload that the operation must bring from or to other ranks, on this rank.
        capture: the same operation without CPU synchronisation, for a CUDA graph; None where there is none.
        transport: per tensor that moves, bytes to each rank and bytes from each rank, for the bare all-to-all.
    """

    name: str
    call: Callable[[], Any]
    check: Callable[[Any], None]
    remote_bytes: int = 0
    capture: Callable[[], Any] | None = None
    transport: list[tuple[list[int], list[int]]] = field(default_factory=list)


def compact(buffer: Buffer, scene: Scene, num_sms: int) -> list[Operation]:
    """`Buffer`: layout, dispatch, cached dispatch and combine of compact rows."""
    plan, mine = scene.plan, scene.mine
    config = Config(num_sms=num_sms)
    x = scene.payload if scene.sf is None else (scene.payload, scene.sf)
    per_rank, per_host, per_expert, in_rank, _ = buffer.get_dispatch_layout(mine.topk_idx, plan.num_experts)

    def dispatch(num_worst_tokens: int = 0) -> Any:
        return buffer.dispatch(
            x, None, per_rank, per_host, in_rank, per_expert, mine.topk_idx, mine.topk_weights,
            num_worst_tokens=num_worst_tokens, config=config,
        )  # fmt: skip

    recv, *_, handle, _ = dispatch()
    if handle is None:
        raise TypeError("a dispatch without handle= returns one")
    rows = scene.expert_outputs(recv)
    sent, received = scene.rows_to_ranks(), scene.rows_from_ranks()
    there = [scene.row_bytes(sent), scene.row_bytes(received)]
    topk = [([n * 12 * plan.num_topk for n in sent], [n * 12 * plan.num_topk for n in received])]
    home = (scene.combine_bytes(received), scene.combine_bytes(sent))
    return [
        Operation("layout", lambda: buffer.get_dispatch_layout(mine.topk_idx, plan.num_experts), _nothing),
        Operation(
            "dispatch",
            dispatch,
            lambda out: checks.compact(scene, out),
            scene.remote(there[0]),
            lambda: dispatch(scene.num_ranks * plan.num_tokens),
            [(there[0], there[1]), *topk],
        ),
        Operation(
            "dispatch, cached",
            lambda: buffer.dispatch(x, handle=handle, config=config),
            lambda out: checks.compact_rows(scene, out[0]),
            scene.remote(there[0]),
            lambda: buffer.dispatch(x, handle=handle, config=config),
            [(there[0], there[1])],
        ),
        Operation(
            "combine",
            lambda: buffer.combine(rows, handle, config=config),
            lambda out: checks.combined(scene, out[0]),
            scene.remote(home[1]),
            lambda: buffer.combine(rows, handle, config=config),
            [home],
        ),
    ]


def expanded(buffer: ElasticBuffer, scene: Scene, num_sms: int) -> list[Operation]:
    """`ElasticBuffer`: dispatch to and combine of expanded rows."""
    plan, mine = scene.plan, scene.mine
    x = scene.payload if scene.sf is None else (scene.payload, scene.sf)

    def dispatch(do_cpu_sync: bool = True) -> Any:
        return buffer.dispatch(
            x, mine.topk_idx, mine.topk_weights, num_experts=plan.num_experts,
            num_max_tokens_per_rank=plan.num_tokens, expert_alignment=EXPERT_ALIGNMENT, num_sms=num_sms,
            do_cpu_sync=do_cpu_sync, do_expand=True,
        )  # fmt: skip

    recv, _, _, handle, _ = dispatch()
    rows = scene.expert_outputs(recv)
    sent, received = scene.rows_to_ranks(), scene.rows_from_ranks()
    there = (scene.row_bytes(sent), scene.row_bytes(received))
    home = (scene.combine_bytes(received), scene.combine_bytes(sent))
    return [
        Operation(
            "dispatch, expanded",
            dispatch,
            lambda out: checks.expanded_rows(scene, out[0]),
            scene.remote(there[0]),
            lambda: dispatch(do_cpu_sync=False),
            [there],
        ),
        Operation(
            "combine, expanded",
            lambda: buffer.combine(rows, handle, num_sms=num_sms),
            lambda out: checks.combined(scene, out[0], is_expanded=True),
            scene.remote(home[1]),
            lambda: buffer.combine(rows, handle, num_sms=num_sms),
            [home],
        ),
    ]


def low_latency(buffer: Buffer, scene: Scene) -> list[Operation]:
    """`Buffer.low_latency_*`: FP8 dispatch to padded rows, bf16 combine; weights sent by combine, then by dispatch."""
    return _low_latency(buffer, scene, None, "") + _low_latency(
        buffer, scene, scene.mine.topk_weights, ", weights ahead"
    )


def _low_latency(buffer: Buffer, scene: Scene, weights_ahead: torch.Tensor | None, name: str) -> list[Operation]:
    plan, mine = scene.plan, scene.mine
    x = scene.payload.bfloat16()

    def dispatch() -> Any:
        return buffer.low_latency_dispatch(
            x, mine.topk_idx, plan.num_tokens, plan.num_experts, topk_weights=weights_ahead
        )

    (recv, sf), _, handle, _, _ = dispatch()
    rows = (fp8_uncast(recv, sf).float() * (scene.rank + 1)).bfloat16()

    def combine() -> Any:
        return buffer.low_latency_combine(rows, mine.topk_idx, mine.topk_weights, handle)

    sent, received = scene.rows_to_ranks(), scene.rows_from_ranks()
    fp8_row = plan.hidden + plan.hidden // 128 * 4
    there = ([n * fp8_row for n in sent], [n * fp8_row for n in received])
    home = ([n * plan.hidden * 2 for n in received], [n * plan.hidden * 2 for n in sent])
    return [
        Operation(
            f"low-latency dispatch{name}", dispatch, lambda out: checks.padded(scene, x, out), scene.remote(there[0]),
            dispatch, [there],
        ),
        Operation(
            f"low-latency combine{name}", combine, lambda out: checks.low_latency_combined(scene, x, out[0]),
            scene.remote(home[1]), combine, [home],
        ),
    ]  # fmt: skip


def _nothing(_out: Any) -> None:
    """Counts are checked by the dispatch that uses them."""
