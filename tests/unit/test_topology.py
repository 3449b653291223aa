"""Which ranks share a host or a GPU."""

from __future__ import annotations

import os
from typing import Any

import pytest

from deepep.errors import InvalidArgument
from deepep.group import make_group
from deepep.testing.launch import Workers
from deepep.topology import Topology


def test_split_makes_equal_contiguous_hosts() -> None:
    topology = Topology.split(6, 2)
    assert (topology.num_ranks, topology.num_scaleout_ranks, topology.num_scaleup_ranks) == (6, 2, 3)
    assert topology.spans_hosts
    assert topology.scaleup_ranks(4) == (3, 4, 5)
    assert topology.ranks_per_gpu(0) == 1
    flat = Topology.split(4, 1)
    assert (flat.num_scaleout_ranks, flat.num_scaleup_ranks, flat.spans_hosts) == (1, 4, False)


@pytest.mark.parametrize("hosts", ["aab", "abab", "abba", "aaabbc"])
def test_unequal_or_scattered_hosts_are_one_flat_domain(hosts: str) -> None:
    topology = Topology(tuple(hosts), (None,) * len(hosts))
    assert (topology.num_scaleout_ranks, topology.num_scaleup_ranks) == (1, len(hosts))
    assert topology.scaleup_ranks(1) == tuple(range(len(hosts)))
    assert topology.spans_hosts


def test_ranks_of_one_gpu_are_counted() -> None:
    topology = Topology(("a",) * 4, ("x", "y", "x", None))
    assert [topology.ranks_per_gpu(rank) for rank in range(4)] == [2, 1, 2, 1]


def test_bad_arguments() -> None:
    with pytest.raises(InvalidArgument):
        Topology.split(4, 3)
    with pytest.raises(InvalidArgument):
        Topology.split(0, 1)
    with pytest.raises(InvalidArgument):
        Topology(("a",), ())
    with pytest.raises(InvalidArgument):
        Topology.split(4, 2).scaleup_ranks(4)


def discover(group: Any, num_hosts: list[str]) -> Topology:
    os.environ["DEEPEP_NUM_HOSTS"] = num_hosts[group.rank()]
    return Topology.discover(make_group(group), False, 30.0)


def test_discover_agrees_on_all_ranks_and_obeys_the_environment() -> None:
    with Workers(2) as workers:
        first, second = workers.run(discover, ["", ""])
        assert first == second
        assert first.hosts[0] == first.hosts[1]
        assert first.gpus == (None, None)
        assert workers.run(discover, ["2", "2"])[0].num_scaleout_ranks == 2
        errors = workers.run(discover, ["1", "2"], return_exceptions=True)
        assert all(isinstance(error, InvalidArgument) and "rank 1: 2" in str(error) for error in errors)
        bad = workers.run(discover, ["two", "two"], return_exceptions=True)
        assert all(isinstance(error, InvalidArgument) for error in bad)
