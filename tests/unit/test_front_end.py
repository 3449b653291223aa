"""Bad input, agreement between ranks, lifetime: what the front end promises on any backend (CONTRACT, 'Errors')."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import deepep
from deepep.backends import registry
from deepep.backends.base import Availability, Capabilities, Layout
from deepep.backends.reference.backend import ReferenceBackend
from deepep.testing.launch import Workers
from deepep.topology import Topology

E, H, K, M, T = 8, 128, 2, 6, 4
Outcome = tuple[str, str] | None  # name of the error, its text

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers(2) as running:
        yield running


@dataclass
class Scene:
    """A buffer of one of two ranks, and arguments that are right; tests spoil one of them."""

    buffer: Any
    x: torch.Tensor = field(default_factory=lambda: torch.ones(T, H, dtype=BF16))
    topk_idx: torch.Tensor = field(default_factory=lambda: torch.tensor([[0, 5], [1, -1], [7, 2], [-1, -1]]))
    topk_weights: torch.Tensor = field(default_factory=lambda: torch.ones(T, K))

    def dispatch(self, **changed: Any) -> Any:
        counts = self.buffer.get_dispatch_layout(self.topk_idx, E)
        arguments = {
            "x": self.x,
            "num_tokens_per_rank": counts[0],
            "num_tokens_per_expert": counts[2],
            "is_token_in_rank": counts[3],
            "topk_idx": self.topk_idx,
            "topk_weights": self.topk_weights,
        }
        return self.buffer.dispatch(**{**arguments, **changed})

    def cached(self, **changed: Any) -> Any:
        return self.buffer.dispatch(**{"x": self.x, "handle": self.dispatch()[4], **changed})

    def combine(self, **changed: Any) -> Any:
        recv_x, _, recv_weights, _, handle, _ = self.dispatch()
        return self.buffer.combine(**{"x": recv_x, "handle": handle, "topk_weights": recv_weights, **changed})

    def ll_dispatch(self, **changed: Any) -> Any:
        arguments = {"x": self.x, "topk_idx": self.topk_idx, "num_max_dispatch_tokens_per_rank": M, "num_experts": E}
        return self.buffer.low_latency_dispatch(**{**arguments, **changed})

    def ll_combine(self, **changed: Any) -> Any:
        x, _, handle, _, _ = self.ll_dispatch(use_fp8=False)
        arguments = {"x": x, "topk_idx": self.topk_idx, "topk_weights": self.topk_weights, "handle": handle}
        return self.buffer.low_latency_combine(**{**arguments, **changed})


def _spoilt(**changed: Any) -> dict[str, Any]:
    return changed


def _idx(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


# name -> (method of Scene, what to change, what the message must say)
BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "x is no tensor": ("dispatch", _spoilt(x=[1.0]), "x is a list"),
    "x has one dimension": ("dispatch", _spoilt(x=torch.ones(H)), r"x is float32 \[128\].*contiguous \[rows, H\]"),
    "x is not contiguous": ("dispatch", _spoilt(x=torch.ones(H, T).T), "not contiguous"),
    "odd row size": ("dispatch", _spoilt(x=torch.ones(T, 5)), r"5 x 4 = 20 bytes.*multiple of 16"),
    "empty rows": ("dispatch", _spoilt(x=torch.ones(T, 0)), "0 bytes"),
    "sf has two-byte elements": ("dispatch", _spoilt(x=(torch.ones(T, H), torch.ones(T, 1, dtype=BF16))), "sf is"),
    "sf has other rows": ("dispatch", _spoilt(x=(torch.ones(T, H), torch.ones(T + 1, 1))), r"\[T=4, n\]"),
    "topk_idx is int32": ("dispatch", _spoilt(topk_idx=_idx([0, 1]).int().repeat(T, 1)), "int32.*topk_idx_t"),
    "topk_idx is a list": ("dispatch", _spoilt(topk_idx=[[0, 1]] * T), "topk_idx is a list"),
    "topk_idx has other rows": ("dispatch", _spoilt(topk_idx=_idx([0, 1])), "1 rows and x has 4"),
    "topk_idx is elsewhere": ("dispatch", _spoilt(topk_idx=torch.ones(T, K, dtype=torch.int64, device="meta")), "meta"),
    "no column": ("dispatch", _spoilt(topk_idx=torch.ones(T, 0, dtype=torch.int64)), "K = 0"),
    "too many columns": ("dispatch", _spoilt(topk_idx=torch.ones(T, 65, dtype=torch.int64)), "K = 65.*1 to 64"),
    "expert above E": ("dispatch", _spoilt(topk_idx=_idx([0, E]).repeat(T, 1)), "from 0 to 8.*0 to 7"),
    "expert below -1": ("dispatch", _spoilt(topk_idx=_idx([0, -2]).repeat(T, 1)), "from -2 to 0"),
    "expert twice": ("dispatch", _spoilt(topk_idx=_idx([0, 1], [3, 3], [0, 1], [0, 1])), "token 1 names the same"),
    "weights of another type": ("dispatch", _spoilt(topk_weights=torch.ones(T, K).double()), "float64.*float32"),
    "weights of another shape": ("dispatch", _spoilt(topk_weights=torch.ones(T, K + 1)), r"\[4, 3\].*\[4, 2\]"),
    "weights without experts": ("dispatch", _spoilt(topk_idx=None), "topk_weights without topk_idx"),
    "no layout": ("dispatch", _spoilt(num_tokens_per_expert=None), "get_dispatch_layout"),
    "nothing that routes": ("dispatch", _spoilt(topk_idx=None, is_token_in_rank=None), "topk_idx and is_token_in_rank"),
    "E is no multiple of R": (
        "dispatch", _spoilt(num_tokens_per_expert=torch.zeros(7, dtype=torch.int32)), "num_experts is 7.*the 2 ranks",
    ),
    "counts are a list": ("dispatch", _spoilt(num_tokens_per_expert=[0] * E), "num_tokens_per_expert is a list"),
    "counts are int64": ("dispatch", _spoilt(num_tokens_per_expert=torch.zeros(E).long()), r"int64 \[8\].*int32 \[8\]"),
    "foreign layout": (
        "dispatch", _spoilt(is_token_in_rank=torch.ones(T, 2, dtype=torch.bool)), "does not follow from topk_idx",
    ),
    "layout of another size": ("dispatch", _spoilt(is_token_in_rank=torch.ones(T, 3, dtype=torch.bool)), r"\[4, 2\]"),
    "alignment 0": ("dispatch", _spoilt(expert_alignment=0), "expert_alignment=0"),
    "negative worst case": ("dispatch", _spoilt(num_worst_tokens=-1), "num_worst_tokens=-1"),
    "allocation without event": (
        "dispatch", _spoilt(allocate_on_comm_stream=True, async_finish=True), "needs previous_event",
    ),
    "no handle": ("cached", _spoilt(handle=(1, 2)), "handle is a tuple"),
    "handle and experts": ("cached", _spoilt(topk_idx=_idx([0, 1]).repeat(T, 1)), "handle repeats a routing"),
    "cached with other rows": ("cached", _spoilt(x=torch.ones(T + 1, H)), "5 rows; the handle's dispatch has 4"),
    "combine other rows": ("combine", _spoilt(x=torch.ones(99, H, dtype=BF16)), "x has 99 rows"),
    "combine no tensor": ("combine", _spoilt(x=None), "x is a NoneType"),
    "combine integers": ("combine", _spoilt(x="int32"), "int32; sums are over"),
    "combine with other weights": ("combine", _spoilt(topk_weights=torch.ones(1)), "topk_weights is"),
    "combine with three biases": ("combine", _spoilt(bias=[torch.ones(T, H, dtype=BF16)] * 3), "3 tensors"),
    "combine with another bias": ("combine", _spoilt(bias=torch.ones(T, H)), r"bias is float32.*bfloat16 \[4, 128\]"),
    "low latency: T > M": ("ll_dispatch", _spoilt(num_max_dispatch_tokens_per_rank=3), "T = 4 tokens.*allows 3"),
    "low latency: fp16": ("ll_dispatch", _spoilt(x=torch.ones(T, H).half()), "float16; it must be bfloat16"),
    "low latency: E % R": ("ll_dispatch", _spoilt(num_experts=7), "num_experts is 7"),
    "low latency: expert twice": ("ll_dispatch", _spoilt(topk_idx=_idx([1, 1]).repeat(T, 1)), "same expert twice"),
    "low latency: odd hidden": ("ll_dispatch", _spoilt(x=torch.ones(T, 72, dtype=BF16)), "hidden is 72.*128"),
    "low latency: UE8M0": ("ll_dispatch", _spoilt(use_ue8m0=True), "round_scale"),
    "low latency: scale without cast": ("ll_dispatch", _spoilt(use_fp8=False, round_scale=True), "need use_fp8=True"),
    "low latency: hook and event": ("ll_dispatch", _spoilt(async_finish=True, return_recv_hook=True), "exclude each"),
    "low latency: statistics": (
        "ll_dispatch", _spoilt(cumulative_local_expert_recv_stats=torch.zeros(3, dtype=torch.int32)), r"int32 \[4\]",
    ),
    "low latency: costs": ("ll_dispatch", _spoilt(dispatch_wait_recv_cost_stats=torch.zeros(2)), r"int64 \[2\]"),
    "low latency: no handle": ("ll_combine", _spoilt(handle=None), "handle is a NoneType.*LowLatencyHandle"),
    "low latency: x": ("ll_combine", _spoilt(x=torch.ones(2, 3, dtype=BF16)), r"bfloat16 \[4, 12, 128\]"),
    "low latency: no weights": ("ll_combine", _spoilt(topk_weights=None), "topk_weights is needed"),
    "low latency: out": ("ll_combine", _spoilt(out=torch.ones(T, H)), r"out is float32.*bfloat16 \[4, 128\]"),
    "low latency: two casts": ("ll_combine", _spoilt(zero_copy=True, use_logfmt=True), "exclude each other"),
    "low latency: reduction": ("ll_combine", _spoilt(reduction="mean"), "'mean'.*'per_rank' or 'per_copy'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_on_every_rank(workers: Workers, name: str) -> None:
    _, _, pattern = BAD[name]
    everywhere, only_at_one = zip(*workers.run(refuse, name), strict=True)
    for kind, text in everywhere:
        assert kind == "InvalidArgument"
        assert_says(text, pattern)
        assert text.startswith(("dispatch:", "combine:", "low_latency_"))
    (kind, text), (own_kind, own_text) = only_at_one
    assert (kind, own_kind) == ("InvalidArgument", "InvalidArgument")
    assert text.endswith(f"rank 1 refused: {own_text}")


def refuse(group: Any, name: str) -> list[Outcome]:
    """Spoil the call on both ranks, then on rank 1 alone; a good call in between and at the end must go through."""
    method, changed, _ = BAD[name]
    if changed.get("x") == "int32":
        changed = {"x": torch.ones(6 - 2 * group.rank(), H, dtype=torch.int32)}
    scene = Scene(deepep.Buffer(group, backend="reference", timeout=20))
    call = getattr(scene, method)
    outcomes = [attempt(call, **changed)]
    call()
    outcomes.append(attempt(call, **(changed if group.rank() == 1 else {})))
    call()
    scene.buffer.destroy()
    return outcomes


def attempt(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Outcome:
    try:
        call(*args, **kwargs)
    except Exception as error:  # noqa: BLE001  the test says which it must be
        return type(error).__name__, str(error)
    return None


def assert_says(text: str, pattern: str) -> None:
    assert re.search(pattern, text, re.DOTALL), f"{text!r} does not match {pattern!r}"


# name -> (what rank 1 does, what both are told)
DISAGREEMENTS: dict[str, tuple[Callable[[Scene], Any], str]] = {
    "hidden": (lambda s: s.dispatch(x=torch.ones(T, 2 * H, dtype=BF16)), "hidden.*128.*256"),
    "dtype": (lambda s: s.dispatch(x=torch.ones(T, H).half()), "dtype.*bfloat16.*float16"),
    "E": (
        lambda s: s.dispatch(num_tokens_per_expert=torch.zeros(2 * E).int(), is_token_in_rank=None),
        "num_experts.*8.*16",
    ),
    "K": (lambda s: s.dispatch(topk_idx=_idx([0]).repeat(T, 1), topk_weights=None, is_token_in_rank=None), "num_topk"),
    "weights": (lambda s: s.dispatch(topk_weights=None), "topk_weights.*True.*False"),
    "scale factors": (lambda s: s.dispatch(x=(s.x, torch.ones(T, 2))), "scale factors.*None.*2"),
}


@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_ranks_that_disagree_get_the_same_error(workers: Workers, name: str) -> None:
    first, second = workers.run(disagree, name)
    assert first == second
    assert first[0] == "InvalidArgument"
    assert_says(first[1], f"ranks disagree about.*{DISAGREEMENTS[name][1]}")
    assert_says(first[1], "rank 0 has.*rank 1 has")


def disagree(group: Any, name: str) -> Outcome:
    scene = Scene(deepep.Buffer(group, backend="reference", timeout=20))
    outcome = attempt(DISAGREEMENTS[name][0], scene) if group.rank() == 1 else attempt(scene.dispatch)
    scene.dispatch()
    return outcome


def test_ranks_that_disagree_about_m(workers: Workers) -> None:
    first, second = workers.run(disagree_about_m)
    assert first == second
    assert_says(first[1], "num_max_tokens_per_rank: rank 0 has 6 and rank 1 has 7")


def disagree_about_m(group: Any) -> Outcome:
    scene = Scene(deepep.Buffer(group, backend="reference", timeout=20))
    return attempt(scene.ll_dispatch, num_max_dispatch_tokens_per_rank=M + group.rank())


def test_too_few_worst_tokens_names_the_number(workers: Workers) -> None:
    outcomes = workers.run(too_few)
    assert outcomes[0] == outcomes[1]
    kind, text = outcomes[0]
    assert kind == "InvalidArgument"
    # Tokens 0, 1 and 2 of both ranks go to rank 0, tokens 0 and 2 to rank 1.
    assert_says(text, "6 rows arrive at rank 0.*num_worst_tokens is 5.*at least 6")


def too_few(group: Any) -> Outcome:
    scene = Scene(deepep.Buffer(group, backend="reference", timeout=20))
    outcome = attempt(scene.dispatch, num_worst_tokens=5)
    scene.dispatch(num_worst_tokens=6)
    return outcome


def test_handle_of_another_buffer(workers: Workers) -> None:
    for outcomes in workers.run(foreign_handles):
        for kind, text in outcomes:
            assert kind == "InvalidArgument"
            assert "handle belongs to another buffer" in text or "pass the LowLatencyHandle" in text


def foreign_handles(group: Any) -> list[Outcome]:
    ours, other = (Scene(deepep.Buffer(group, backend="reference", timeout=20)) for _ in range(2))
    normal, low_latency = other.dispatch()[4], other.ll_dispatch()[2]
    return [
        attempt(ours.cached, handle=normal),
        attempt(ours.combine, handle=normal),
        attempt(ours.ll_combine, handle=low_latency),
        attempt(ours.ll_combine, handle=normal),
        attempt(ours.buffer.get_next_low_latency_combine_buffer, low_latency),
    ]


def test_layout_checks_its_arguments(workers: Workers) -> None:
    for kind, text in workers.run(bad_layouts)[0]:
        assert kind == "InvalidArgument"
        assert_says(text, "^get_dispatch_layout: (topk_idx|num_experts|token 0|allocate_on_comm_stream)")


def bad_layouts(group: Any) -> list[Outcome]:
    layout = deepep.Buffer(group, backend="reference").get_dispatch_layout
    good = _idx([0, 1])
    calls: list[tuple[Any, ...]] = [
        (good.int(), E),
        (_idx([0, 1], [2, 3]).T, E),
        (good, 7),
        (good, 0),
        (good, 1.5),
        (good * 8, E),
    ]
    calls += [(_idx([2, 2]), E), (good, E, None, True, True), (good, E, layout, False, True)]
    return [attempt(layout, *call) for call in calls]


# name -> (what rank 1 passes, what every rank is told); rank 0 builds a plain reference buffer
CONSTRUCTIONS: dict[str, tuple[dict[str, Any], str, str]] = {
    "bytes": ({"num_nvl_bytes": 1 << 20}, "InvalidArgument", "num_bytes: rank 0 has 0 and rank 1 has 1048576"),
    "mode": ({"low_latency_mode": True}, "InvalidArgument", "low_latency_mode: rank 0 has False and rank 1 has True"),
    "shrink": ({"enable_shrink": True}, "InvalidArgument", "enable_shrink"),
    "backend": ({"backend": "other"}, "InvalidArgument", "backend: rank 0 has 'reference' and rank 1 has 'other'"),
    "unknown": ({"backend": "nonsense"}, "InvalidArgument", r"\[1\] cannot build.*'nonsense' is unknown; known are"),
    "absent": ({"backend": "broken"}, "BackendUnavailable", r"\[1\] cannot build.*broken: not available: no luck; try"),
    "version": ({"version": "9.9"}, "InvalidArgument", "version: rank 0 has .* and rank 1 has '9.9'"),
    "topology": ({"topology": Topology.split(2, 2)}, "InvalidArgument", "hosts"),
    "topology of others": ({"topology": Topology.split(3, 1)}, "InvalidArgument", "describes 3 ranks.*group has 2"),
    "timeout": ({"timeout": 0}, "InvalidArgument", "timeout is 0"),
    "negative size": ({"num_rdma_bytes": -1}, "InvalidArgument", "num_rdma_bytes"),
}


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_ranks_agree_at_construction(workers: Workers, name: str) -> None:
    _, kind, pattern = CONSTRUCTIONS[name]
    outcomes = workers.run(construct, name)
    for outcome in outcomes:
        assert outcome is not None
        assert outcome[0] == kind
        assert_says(outcome[1], pattern)
    assert outcomes[0] == outcomes[1]


class OtherBackend(ReferenceBackend):
    """A second backend that works."""

    name = "other"


class BrokenBackend(ReferenceBackend):
    """A backend that never works."""

    name = "broken"

    @classmethod
    def probe(cls) -> Availability:
        return Availability(False, "no luck", "try tomorrow")


class CudaOnlyBackend(ReferenceBackend):
    """A backend that takes compact rows on GPUs and nothing else."""

    name = "cuda_only"

    @classmethod
    def capabilities(cls) -> Capabilities:
        return Capabilities(frozenset({"cuda"}), frozenset({Layout.COMPACT}))


def construct(group: Any, name: str) -> Outcome:
    options = {"backend": "reference", "timeout": 20}
    if group.rank() == 1:
        options.update(CONSTRUCTIONS[name][0])
    with pytest.MonkeyPatch.context() as patch:
        add_backends(patch)
        if "version" in options:
            patch.setattr("deepep.front.__version__", options.pop("version"))
        outcome = attempt(deepep.Buffer, group, **options)
    deepep.Buffer(group, backend="reference", timeout=20).destroy()  # and the group still works
    return outcome


def add_backends(patch: pytest.MonkeyPatch) -> None:
    for backend in (OtherBackend, BrokenBackend, CudaOnlyBackend):
        patch.setitem(registry._BUILT_IN, backend.name, f"{__name__}:{backend.__name__}")


def test_what_a_backend_cannot_do_is_named(workers: Workers) -> None:
    for dispatch, low_latency, mask in workers.run(unsupported):
        assert dispatch[0] == low_latency[0] == mask[0] == "UnsupportedOperation"
        assert_says(dispatch[1], "dispatch: backend 'cuda_only' does not work on cpu tensors.*'reference'")
        assert_says(low_latency[1], "low_latency_dispatch: backend 'cuda_only'.*'reference'")
        assert_says(mask[1], "update_mask: backend 'maskless' does not offer.*reference")


def unsupported(group: Any) -> list[Outcome]:
    with pytest.MonkeyPatch.context() as patch:
        add_backends(patch)
        scene = Scene(deepep.Buffer(group, backend="cuda_only", enable_shrink=True))
        outcomes = [attempt(scene.dispatch), attempt(scene.ll_dispatch)]
        patch.setattr(CudaOnlyBackend, "name", "maskless")
        patch.setattr(CudaOnlyBackend, "update_mask", registry.Backend.update_mask, raising=False)
        return [*outcomes, attempt(scene.buffer.low_latency_update_mask_buffer, 1 - group.rank(), True)]


def test_masks_need_a_buffer_that_shrinks(workers: Workers) -> None:
    for outcomes in workers.run(mask_misuse):
        for kind, text in outcomes:
            assert kind == "InvalidArgument"
            assert_says(text, "enable_shrink=True|another rank of the group|mask_status is")


def mask_misuse(group: Any) -> list[Outcome]:
    plain = deepep.Buffer(group, backend="reference")
    shrinking = deepep.Buffer(group, backend="reference", enable_shrink=True)
    status = torch.zeros(2, dtype=torch.int32)
    return [
        attempt(plain.low_latency_update_mask_buffer, 1 - group.rank(), True),
        attempt(plain.low_latency_query_mask_buffer, status),
        attempt(plain.low_latency_clean_mask_buffer),
        attempt(shrinking.low_latency_update_mask_buffer, group.rank(), True),
        attempt(shrinking.low_latency_update_mask_buffer, 2, True),
        attempt(shrinking.low_latency_query_mask_buffer, status.long()),
    ]


def test_a_destroyed_buffer_says_so(workers: Workers) -> None:
    for outcomes in workers.run(use_after_destroy):
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


def test_buffers_can_be_watched_and_go_away(workers: Workers) -> None:
    assert workers.run(watch) == [(True, True, True)] * 2


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


def test_attributes_that_clients_read(workers: Workers) -> None:
    workers.run(read_attributes)


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


def test_local_buffer_keeps_its_bounds(workers: Workers) -> None:
    for outcomes in workers.run(local_buffers):
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
    ]


def test_handles_keep_upstreams_positions(workers: Workers) -> None:
    workers.run(read_handles)


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


def test_either_kind_of_event_is_taken(workers: Workers) -> None:
    workers.run(pass_events)


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
    assert hint(128, 7168, 8, 256) == hint(128, 7168, 8, 8) < hint(256, 7168, 8, 8)
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


def test_comm_stream_needs_a_gpu(workers: Workers) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert [kind for kind, _ in workers.run(ask_for_stream)] == ["UnsupportedOperation"] * 2


def ask_for_stream(group: Any) -> Outcome:
    return attempt(deepep.Buffer(group, backend="reference").get_comm_stream)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="HybridEPBuffer"):
        _ = deepep.HybridEPBuffer
