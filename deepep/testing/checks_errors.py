"""Contract checks of errors: named, on every rank, before anything is sent; and nobody hangs (CONTRACT, 'Errors')."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from deepep.errors import BufferDestroyed, CommTimeout, DeepEPError, InvalidArgument
from deepep.testing.checks_buffer import Scene, dispatch
from deepep.testing.checks_elastic import elastic_dispatch
from deepep.testing.routing import Case
from deepep.testing.target import Findings, Target

_SHORT_TIMEOUT = 2.0


def check_bad_arguments(group: Any, target: Target, case: Case) -> None:
    """One rank's wrong argument is an `InvalidArgument` on every rank, and the buffer goes on working."""
    scene, buffer = Scene.of(case, group.rank()), target.buffer(group, case)
    found = Findings(scene.rank)
    layout = buffer.get_dispatch_layout(target.put(scene.mine.topk_idx), case.num_experts)[:4]
    for name, spoil in _bad_scenes(target.device).items():
        mine = spoil(scene) if scene.rank == case.num_ranks - 1 else scene
        _expect(found, name, target, InvalidArgument, dispatch, buffer, target, mine, layout=layout)
        found.payload(f"recv after {name}", dispatch(buffer, target, scene)[0], scene.rows.x, None, slice(None))
    buffer.destroy()
    found.finish()


def check_disagreement(group: Any, target: Target, case: Case) -> None:
    """Ranks that differ in H, dtype, E or M get the same error everywhere, and it names both values."""
    scene, buffer = Scene.of(case, group.rank()), target.elastic_buffer(group, case)
    found = Findings(scene.rank)
    is_odd = scene.rank == case.num_ranks - 1
    wide = torch.cat([scene.mine.x, scene.mine.x], dim=1)
    other_x = {"H": wide[:, : case.hidden // 2].contiguous(), "dtype": scene.mine.x.half()}
    for name, x in other_x.items():
        odd = replace(scene, inputs=[replace(one, x=x) if is_odd else one for one in scene.inputs])
        _expect(found, name, target, InvalidArgument, elastic_dispatch, buffer, target, odd)
    options = {
        "E": ("num_experts", case.num_experts, 2 * case.num_experts),
        "M": ("num_max_tokens_per_rank", case.num_max_tokens_per_rank, case.num_max_tokens_per_rank - 1),
    }
    for name, (option, usual, odd_value) in options.items():
        few = _shortened(scene)  # fits either M
        value = {option: odd_value if is_odd else usual}
        error = _expect(found, name, target, InvalidArgument, elastic_dispatch, buffer, target, few, **value)
        found.true(f"'{error}' names {usual} and {odd_value}", str(usual) in error and str(odd_value) in error)
    found.payload("recv afterwards", elastic_dispatch(buffer, target, scene)[0], scene.rows.x, None, slice(None))
    buffer.destroy()
    odd_case = replace(case, num_max_tokens_per_rank=case.num_max_tokens_per_rank + 5) if is_odd else case
    _expect(found, "construction", target, InvalidArgument, target.elastic_buffer, group, odd_case)
    found.finish()


def check_too_few_rows(group: Any, target: Target, case: Case) -> None:
    """More rows than `num_worst_tokens` are an error that names the number needed, on the rank that lacks them."""
    scene, buffer = Scene.of(case, group.rank()), target.buffer(group, case)
    found = Findings(scene.rank)
    needed = max(len(rows) for rows in scene.route.rows)
    error = _expect(
        found, "dispatch", target, InvalidArgument, dispatch, buffer, target, scene, num_worst_tokens=needed - 1
    )
    found.true(f"'{error}' names {needed}", str(needed) in error)
    buffer.destroy()
    found.finish()


def check_misuse(group: Any, target: Target, case: Case) -> None:
    """Rows that do not fit the handle and a destroyed buffer are refused by name; a handle outlives its buffer."""
    scene = Scene.of(case, group.rank())
    buffer, other = target.buffer(group, case), target.buffer(group, case)
    found = Findings(scene.rank)
    handle = dispatch(other, target, scene)[4]
    x = target.put(scene.outputs()[scene.rank])
    found.equal("y of another buffer's handle", buffer.combine(x, handle)[0], scene.combined(scene.outputs()))
    handle = dispatch(buffer, target, scene)[4]
    too_long = torch.cat([x, x[:1]]) if len(x) else x.new_zeros(1, case.hidden)
    _expect(found, "rows", target, InvalidArgument, buffer.combine, too_long, handle)
    buffer.destroy()
    _expect(found, "combine after destroy", target, BufferDestroyed, buffer.combine, x, handle)
    other.destroy()
    found.finish()


def check_timeout(group: Any, target: Target, case: Case) -> None:
    """A rank that stays away is named by a `CommTimeout` on the others; a new buffer on all ranks works again."""
    scene, brief = Scene.of(case, group.rank()), replace(target, timeout=_SHORT_TIMEOUT)
    buffer = brief.buffer(group, case)
    found = Findings(scene.rank)
    gone = case.num_ranks - 1
    layout = buffer.get_dispatch_layout(target.put(scene.mine.topk_idx), case.num_experts)[:4]
    if scene.rank != gone:
        try:
            dispatch(buffer, target, scene, layout=layout)
            found.true("dispatch without a rank raises", False)
        except CommTimeout as error:
            found.equal("missing_ranks", error.missing_ranks, (gone,))
            found.true(f"'{error}' names the operation", "dispatch" in str(error))
        _expect(found, "use of a broken buffer", target, DeepEPError, dispatch, buffer, target, scene, layout=layout)
    buffer.destroy()
    again = target.buffer(group, case)
    found.payload("recv of a new buffer", dispatch(again, target, scene)[0], scene.rows.x, None, slice(None))
    again.destroy()
    found.finish()


def _expect(
    found: Findings,
    what: str,
    target: Target,
    kind: type[DeepEPError],
    call: Callable[..., Any],
    *args: Any,
    **options: Any,
) -> str:
    """Note it unless `call(*args, **options)` raises `kind`; give the error's text.

    An operation that never waits on the CPU may raise at the next call instead, once the device has got there.
    """
    for _ in range(2 if target.device == "cuda" else 1):
        try:
            call(*args, **options)
            if target.device == "cuda":
                torch.cuda.synchronize()
        except kind as error:
            return str(error)
    found.true(f"{what}: raises {kind.__name__}", False)
    return ""


def _bad_scenes(device: str) -> dict[str, Callable[[Scene], Scene]]:
    """Ways to spoil what a rank sends. Values are looked at on the CPU only: on a GPU that would wait for it."""
    shapes: dict[str, Callable[[Scene], Scene]] = {
        "topk_idx of int32": lambda scene: _with(scene, topk_idx=scene.mine.topk_idx.int()),
        "topk_weights of float64": lambda scene: _with(scene, topk_weights=scene.mine.topk_weights.double()),
        "topk_weights of another shape": lambda scene: _with(scene, topk_weights=scene.mine.topk_weights[:, :1]),
        "x not contiguous": lambda scene: _with(scene, x=scene.mine.x.repeat(1, 2)[:, ::2]),
        "x of three dimensions": lambda scene: _with(scene, x=scene.mine.x.unsqueeze(0)),
        "x of another length": lambda scene: _with(scene, x=scene.mine.x[1:]),
        "rows of 2 bytes": lambda scene: _with(scene, x=scene.mine.x[:, :1].contiguous()),
    }
    values: dict[str, Callable[[Scene], Scene]] = {
        "expert out of range": lambda scene: _with(scene, topk_idx=_first_choice(scene, scene.case.num_experts)),
        "the same expert twice": lambda scene: _with(scene, topk_idx=torch.zeros_like(scene.mine.topk_idx)),
    }
    return shapes if device == "cuda" else {**shapes, **values}


def _first_choice(scene: Scene, expert: int) -> torch.Tensor:
    topk_idx = scene.mine.topk_idx.clone()
    topk_idx[0, 0] = expert
    return topk_idx


def _with(scene: Scene, **fields: torch.Tensor) -> Scene:
    """Change what this rank sends."""
    inputs = list(scene.inputs)
    inputs[scene.rank] = replace(scene.mine, **fields)
    return replace(scene, inputs=inputs)


def _shortened(scene: Scene) -> Scene:
    """Leave out this rank's last token."""
    mine = scene.mine
    return _with(scene, x=mine.x[:-1], topk_idx=mine.topk_idx[:-1], topk_weights=mine.topk_weights[:-1])
