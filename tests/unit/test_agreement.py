"""Construction: ranks agree about what they build, or all raise the same error (CONTRACT, 'Errors')."""

from __future__ import annotations

from typing import Any

import pytest
from scenes import Outcome, Scene, assert_says, attempt

import deepep
from deepep.backends import registry
from deepep.backends.base import Availability, Backend, Capabilities, Layout
from deepep.backends.reference.backend import ReferenceBackend
from deepep.testing.launch import Workers
from deepep.topology import Topology

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
    "timeout without end": ({"timeout": float("inf")}, "InvalidArgument", "timeout is inf.*finite"),
    "timeout in words": ({"timeout": "long"}, "InvalidArgument", "timeout is 'long'"),
    "no topology": ({"topology": 2}, "InvalidArgument", "topology is a int; pass a deepep.Topology"),
    "negative size": ({"num_rdma_bytes": -1}, "InvalidArgument", "num_rdma_bytes"),
}


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_ranks_agree_at_construction(pair: Workers, name: str) -> None:
    _, kind, pattern = CONSTRUCTIONS[name]
    outcomes = pair.run(construct, name)
    for outcome in outcomes:
        assert outcome is not None
        assert outcome[0] == kind
        assert_says(outcome[1], pattern)
    assert outcomes[0] == outcomes[1]


# likewise for `ElasticBuffer`, beside one by MoE shape on rank 0
ELASTIC: dict[str, tuple[dict[str, Any], str, str]] = {
    "no size": ({"num_max_tokens_per_rank": 0}, "InvalidArgument", r"\[1\] cannot build.*num_max_tokens_per_rank=0"),
    "no bytes": ({"num_bytes": 0}, "InvalidArgument", r"\[1\] cannot build.*num_bytes is 0"),
    "cpu bytes": ({"num_cpu_bytes": 1}, "UnsupportedOperation", r"\[1\] cannot build.*Engram"),
    "no time": ({"num_gpu_timeout_secs": 0, "timeout": None}, "InvalidArgument", "timeout is 0"),
    "bytes": ({"num_bytes": 64}, "InvalidArgument", "num_bytes: rank 0 has .* and rank 1 has 64"),
}


@pytest.mark.parametrize("name", ELASTIC)
def test_ranks_agree_at_construction_of_elastic_buffers(pair: Workers, name: str) -> None:
    _, kind, pattern = ELASTIC[name]
    outcomes = pair.run(construct_elastic, name)
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][0] == kind
    assert_says(outcomes[0][1], pattern)


def construct_elastic(group: Any, name: str) -> Outcome:
    options = {"num_max_tokens_per_rank": 4, "hidden": 128, "backend": "reference", "timeout": 20}
    if group.rank() == 1:
        options.update(ELASTIC[name][0])
    return attempt(deepep.ElasticBuffer, group, **options)


@pytest.mark.parametrize("name", ["DEEPEP_NUM_HOSTS", "DEEPEP_TIMEOUT"])
def test_a_wrong_environment_on_one_rank_is_told_to_all(pair: Workers, name: str) -> None:
    outcomes = pair.run(construct_with, name)
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][0] == "InvalidArgument"
    assert_says(outcomes[0][1], f"rank 1: {name}='many'")


def construct_with(group: Any, name: str) -> Outcome:
    with pytest.MonkeyPatch.context() as patch:
        if group.rank() == 1:
            patch.setenv(name, "many")
        return attempt(deepep.Buffer, group, backend="reference")


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


def test_what_a_backend_cannot_do_is_named(pair: Workers) -> None:
    for dispatch, low_latency, mask in pair.run(unsupported):
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
        patch.setattr(CudaOnlyBackend, "update_mask", Backend.update_mask, raising=False)
        return [*outcomes, attempt(scene.buffer.low_latency_update_mask_buffer, 1 - group.rank(), True)]
